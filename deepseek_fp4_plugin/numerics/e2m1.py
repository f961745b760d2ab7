"""E2M1, the 4-bit float: one sign bit, two exponent bits, one mantissa bit.

Codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign, so code 8 is minus zero. There is no infinity and
no NaN. Rounding is to the nearest value, ties to the even code; larger magnitudes saturate at 6. See docs/format.md.
"""

import functools

import torch
from torch import Tensor

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Midpoints between neighbours. A tie rounds down where the code below is even, up where the code above is.
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)


def encode(x: Tensor) -> Tensor:
    """Round every element of `x` to its nearest E2M1 code.

    x: any shape, any floating dtype.  Returns uint8 codes 0..15, same shape.
    The sign bit is `x < 0`: minus zero becomes code 0, a negative that rounds to zero becomes code 8. Infinities
    saturate; NaN becomes code 7, as in ModelOpt (callers that must refuse NaN check before).
    """
    magnitude = x.abs().float()
    codes = torch.full(x.shape, 7, dtype=torch.uint8, device=x.device)
    for midpoint in _TIES_DOWN:
        codes -= (magnitude <= midpoint).view(torch.uint8)
    for midpoint in _TIES_UP:
        codes -= (magnitude < midpoint).view(torch.uint8)
    return codes + ((x < 0).view(torch.uint8) << 3)


def round_to_values(x: Tensor) -> Tensor:
    """`decode(encode(x))` in six elementwise passes, for searches that round a weight many times.

    x: FP32, any shape, no NaN.  Returns FP32; what rounds to zero is 0.0 of either sign.
    Adding 1.5 * 2^22 leaves no bits below 0.5, the step of magnitudes up to 2, and rounds ties to even; twice and four
    times as much leave none below 1 and 2, the steps up to 4 and 6. The power of two comes from the exponent bits.
    """
    rounded = x.clamp(-MAX, MAX)
    shift = (rounded.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(1.0, 4.0).mul_(1.5 * 2**22)
    return rounded.add_(shift).sub_(shift)


def decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of E2M1 `codes` (uint8, 0..15, any shape), exact in every dtype from BF16 up."""
    return _table(dtype, codes.device)[codes.int()]


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`VALUES`, once for each device: a graph that is being captured cannot wait for a copy from the host."""
    return torch.tensor(VALUES, dtype=dtype, device=device)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte along the last axis, the even element in the low nibble.

    codes: uint8 [..., n], n even.  Returns uint8 [..., n / 2].  Raises ValueError when n is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack an odd number of 4-bit values: last axis is {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: uint8 [..., n / 2] to uint8 codes [..., n]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
