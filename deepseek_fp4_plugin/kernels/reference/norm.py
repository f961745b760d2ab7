"""RMSNorm: statistics in FP32, the normalised value rounded to x's dtype, then the weight, as transformers does."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., n].  weight: [n].  Returns x's shape and dtype."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm(
    x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x, hidden: [T, n].  other: [T, n], added to x before.  Returns hidden + x and its norm, each as by itself."""
    y = hidden + (x if other is None else x + other)
    return y, rms_norm(y, weight, eps)
