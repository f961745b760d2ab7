"""What a step reads from the slots."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.addresses import dense
from deepseek_fp4_plugin.kernels.cpu.extension import native


def step_inputs(
    slots: Tensor, starts: Tensor, tokens: Tensor, tables: Tensor, num_blocks: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels/ops.py. IndexError for a slot that there is not and for a position behind the blocks."""
    requests, (count, width), columns = slots.shape[0], tokens.shape, tables.shape[1]
    if not 0 < num_blocks <= columns or block_size < 1:
        raise ValueError(f"{num_blocks} blocks of {block_size} tokens do not fit tables of {columns}")
    ids, positions, mapping = (torch.empty(requests * width, dtype=torch.int64) for _ in range(3))
    own, contexts = torch.empty(requests, num_blocks, dtype=torch.int64), torch.empty(requests, dtype=torch.int64)
    native.step_inputs(
        (dense("slots", slots, torch.int64, requests), requests, count),
        dense("starts", starts, torch.int64, count),
        (dense("tokens", tokens, torch.int64, count, width), width),
        (dense("tables", tables, torch.int64, count, columns), columns),
        num_blocks,
        block_size,
        tuple(out.data_ptr() for out in (ids, positions, mapping, own, contexts)),
    )
    return ids, positions, mapping, own, contexts
