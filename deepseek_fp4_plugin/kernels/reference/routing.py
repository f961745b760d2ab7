"""Group-limited top-k routing without auxiliary loss (noaux_tc). Source: arXiv 2412.19437, section 2.1.2."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.reference.linear import plain_linear


def prepare_router(weight: Tensor) -> Tensor:
    """As it is: FP32 [experts, hidden]."""
    return weight


def router(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """x: [T, hidden].  weight: FP32 [experts, hidden].  Returns `route` of their product, in FP32."""
    return route(plain_linear(x, weight), bias, k, n_group, topk_group, normalize, scaling)


def placed_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slots: Tensor,
    k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scaling: float,
) -> None:
    """One after the other."""


def local_ids(ids: Tensor, slots: Tensor) -> Tensor:
    """slots[ids], int64 [T, k]: where this rank holds each chosen expert, below 0 where it does not."""
    return slots.index_select(0, ids.flatten()).view(ids.shape)


def route(
    logits: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Choose experts by biased scores, weigh them by unbiased ones.

    logits: FP32 [T, experts].  bias: FP32 [experts], for the choice only.
    A group's score is the sum of its two best biased scores; experts outside the `topk_group` best groups get -inf.
    Returns ids int64 [T, k] and weights FP32 [T, k].
    """
    scores = logits.sigmoid()
    choice = scores + bias
    if n_group > 1:
        grouped = choice.unflatten(-1, (n_group, -1))
        group_score = grouped.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept.scatter_(1, group_score.topk(topk_group, -1, sorted=False).indices, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.topk(k, -1, sorted=False).indices
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scaling
