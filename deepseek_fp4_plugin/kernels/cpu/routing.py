"""Group-limited top-k routing."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.extension import native


def route(
    logits: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/routing.py; experts come best first, of equal ones the lowest."""
    tokens, experts = logits.shape
    if experts % n_group or k > experts:
        raise ValueError(f"cannot pick {k} of {experts} experts in {n_group} groups")
    logits, bias = logits.contiguous(), bias.contiguous()
    ids = torch.empty(tokens, k, dtype=torch.int64)
    weights = torch.empty(tokens, k, dtype=torch.float32)
    native.route(
        logits.data_ptr(),
        bias.data_ptr(),
        tokens,
        experts,
        k,
        n_group,
        topk_group,
        normalize,
        scaling,
        ids.data_ptr(),
        weights.data_ptr(),
    )
    return ids, weights
