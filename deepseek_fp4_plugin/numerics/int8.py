"""Activations as 8-bit integers in blocks of 16, each with an FP32 scale of its own: what `int8` activations mean.

A block as long as NVFP4's has one scale on either side of a product, and between them an exact sum of integers.
"""

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK

MAX = 127
SMALLEST = 2.0**-100  # a block without a larger magnitude is zero, so that no quotient overflows


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest integers, ties to even, under a scale that makes each block's largest magnitude 127.

    x: [..., cols] BF16 or FP32, cols a multiple of 16.  Returns int8 [..., cols] and scales FP32 [..., cols / 16]. A
    block with a value that is not finite has a scale of NaN.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    held = amax >= SMALLEST
    inverse = torch.where(held, torch.tensor(float(MAX)) / amax, 0.0)  # `MAX / amax` is no division in torch
    integers = (blocks * inverse.unsqueeze(-1)).round().nan_to_num(0.0).to(torch.int8)
    scale = torch.where(held, amax / MAX, 0.0)
    return integers.flatten(-2), torch.where(amax.isfinite(), scale, torch.nan)


def values(integers: Tensor, scale: Tensor) -> Tensor:
    """What they stand for: FP32 [..., cols]."""
    return (integers.float().unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2)
