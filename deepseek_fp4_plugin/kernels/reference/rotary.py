"""Rotary position embedding on adjacent pairs (interleaved), DeepSeek's own order: results stay in place."""

import torch
from torch import Tensor


def cos_sin(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """FP32 cosines and sines [T, dim / 2] of the angles of `positions` [T]; `magnitude` is YaRN's mscale ratio."""
    angles = positions.float().unsqueeze(-1) * frequencies
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pair (2i, 2i+1) by its angle, in FP32.

    x: [T, heads, d].  cos, sin: FP32 [T, d / 2].  Returns [T, heads, d] in x's dtype.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
