"""What a step in which all requests decode begins with: a launch."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, together


def step_inputs(
    slots: Tensor, starts: Tensor, tokens: Tensor, tables: Tensor, num_blocks: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels/ops.py; slots hold valid positions, which nobody looks at here."""
    together(slots, starts, tokens, tables)
    slots, starts = slots.contiguous(), starts.contiguous()
    tokens, tables = (t if t.stride(1) == 1 else t.contiguous() for t in (tokens, tables))
    count, width, blocks = slots.shape[0], tokens.shape[1], min(num_blocks, tables.shape[1])
    ids, positions, mapping = torch.empty(3, count * width, dtype=torch.int64, device=slots.device)
    own = torch.empty(count, blocks, dtype=torch.int64, device=slots.device)
    contexts = torch.empty(count, dtype=torch.int64, device=slots.device)
    kernel("small.cu", "step_inputs", "9P5i", (), slots.device.index)(
        (count, 1, 1),
        128,
        0,
        slots.data_ptr(),
        starts.data_ptr(),
        tokens.data_ptr(),
        tables.data_ptr(),
        ids.data_ptr(),
        positions.data_ptr(),
        mapping.data_ptr(),
        own.data_ptr(),
        contexts.data_ptr(),
        width,
        blocks,
        block_size,
        tokens.stride(0),
        tables.stride(0),
    )
    return ids, positions, mapping, own, contexts
