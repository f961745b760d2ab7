"""Group-limited top-k routing."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.addresses import dense
from deepseek_fp4_plugin.kernels.cpu.extension import native
from deepseek_fp4_plugin.kernels.cpu.linear import plain_linear


def router(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/routing.py."""
    return route(plain_linear(x, weight), bias, k, n_group, topk_group, normalize, scaling)


def route(
    logits: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/routing.py; experts come best first, of equal ones the lowest."""
    tokens, experts = logits.shape
    even = n_group > 0 and experts % n_group == 0 and 0 < topk_group <= n_group
    if not even or not 0 <= k <= experts // n_group * topk_group:
        raise ValueError(f"cannot pick {k} of {experts} experts in {topk_group} of {n_group} groups")
    logits, bias = logits.contiguous(), bias.contiguous()
    ids = torch.empty(tokens, k, dtype=torch.int64)
    weights = torch.empty(tokens, k, dtype=torch.float32)
    native.route(
        dense("logits", logits, torch.float32, tokens, experts),
        dense("the router's bias", bias, torch.float32, experts),
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
