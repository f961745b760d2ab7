"""E4M3 activations, a scale a row, times NVFP4 weights rounded to E4M3: what `fp8` activations mean.

A block scale of an NVFP4 weight is for 16 inputs, and Hopper's FP8 product has 32, so that the scale cannot stay
outside: it is multiplied in, and the result, of up to six significant bits, is rounded to four. So the values 1.5, 3
and 6 may change, and in blocks whose scale is below 4, a hundredth of the largest, others too, by at most an eighth of
1.0 on the scale on which the largest weight is 2688. The tensor scale stays outside.
"""

import torch
from torch import Tensor

MAX = 448.0  # E4M3's largest number
SMALLEST = 2.0**-100  # a row without a larger magnitude is zero, so that no quotient overflows
WEIGHT_SCALE = 128.0  # rounded weights stand for so many times themselves: the largest are 21, not 2688


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest E4M3 numbers, ties to even, under a scale that makes each row's largest magnitude 448.

    x: [..., cols] BF16 or FP32.  Returns E4M3 [..., cols] and scales FP32 [...]. A row with a value that is not finite
    has a scale of NaN.
    """
    amax = x.float().abs().amax(-1)
    held = amax >= SMALLEST
    largest = torch.tensor(MAX, device=x.device)  # by a number of the host torch does not divide, but multiplies
    inverse = torch.where(held, largest / amax, 0.0)
    numbers = (x.float() * inverse.unsqueeze(-1)).clamp(-MAX, MAX).to(torch.float8_e4m3fn)
    scale = torch.where(held, amax / largest, 0.0)
    return numbers, torch.where(amax.isfinite(), scale, torch.nan)


def values(numbers: Tensor, scale: Tensor) -> Tensor:
    """What they stand for: FP32 [..., cols]."""
    return numbers.float() * scale.unsqueeze(-1)


def rounded_weights(values: Tensor) -> Tensor:
    """NVFP4 weights without the tensor scale (`nvfp4.block_values`, BF16 or FP32), rounded to E4M3; in their dtype."""
    return (values / WEIGHT_SCALE).to(torch.float8_e4m3fn).to(values.dtype) * WEIGHT_SCALE
