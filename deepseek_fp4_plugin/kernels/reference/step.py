"""From what slots hold to the inputs of a step in which every request decodes alike."""

import torch
from torch import Tensor


def step_inputs(
    slots: Tensor, starts: Tensor, tokens: Tensor, tables: Tensor, num_blocks: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See kernels/ops.py."""
    width, first = tokens.shape[1], starts.index_select(0, slots)
    own = tables[:, :num_blocks].index_select(0, slots)
    positions = first.unsqueeze(1)
    if width > 1:
        positions = positions + torch.arange(width, device=starts.device)
    columns = positions // block_size
    # block * size + position % size, in fewer operations
    mapping = positions.add(own.gather(1, columns).sub_(columns), alpha=block_size)
    return tokens.index_select(0, slots).view(-1), positions.view(-1), mapping.view(-1), own, first + width
