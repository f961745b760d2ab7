"""In which order nibbles and block scales were written, and how values were rounded.

Against the source every question has an exact answer. Without it one has: block scales of trained weights follow rows
and columns of the matrix, and in the tensor cores' 128 x 4 order they do not. Nothing inside a checkpoint tells which
nibble comes first, or how a value was rounded.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.findings import Fault
from deepseek_fp4_plugin.numerics import e2m1, nvfp4, scale_layout
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor

# NVFP4 of the same weight is near 20 dB, of any other weight near -3; of the same weight under its neighbours' scales
# it may be 15.
ALIKE_DB, SURE_DB, _BETTER_DB = 10.0, 18.0, 1.5
_LEAST_TENSORS, _LEAST_GAP, _LEAST_Z = 6, 0.02, 4.0


class Codes(NamedTuple):
    """Codes compared with the nearest ones. differing: of `total`.  ties: of these, halfway between two codes.
    inward: of these, nearer to zero than the nearest code."""

    total: int = 0
    differing: int = 0
    ties: int = 0
    inward: int = 0

    def plus(self, other: "Codes") -> "Codes":
        return Codes(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def wrong(self) -> str | None:
        """How the rounding is wrong. Codes that lie on both sides of the nearest were chosen for another reason, as
        error-compensating recipes do."""
        if self.differing and self.ties == self.differing:
            return "away from the even code where a value lies halfway"
        if self.differing > 0.01 * self.total and self.inward > 0.95 * self.differing:
            return "towards zero"
        return None


def swap_nibbles(packed: Tensor) -> Tensor:
    return (packed >> 4) | ((packed & 0xF) << 4)


def untiled(scale: Tensor, rows: int, blocks: int) -> Tensor:
    """Block scales out of the tensor cores' order: any shape to E4M3 [rows, blocks]."""
    return scale_layout.from_tiled(scale.flatten(), rows, blocks)


def tile_of(start: int, rows: int) -> tuple[int, int]:
    """The rows of the 128-row tile that row `start` is in."""
    first = start // scale_layout.ROWS * scale_layout.ROWS
    return first, min(first + scale_layout.ROWS, rows)


def looks_tiled(scales: Sequence[Tensor]) -> bool:
    """Whether whole matrices of block scales are in the tensor cores' order.

    Compares how much of the variance row and column means explain as stored and out of that order; needs trained
    weights, and several matrices that agree.
    """
    gaps = torch.tensor([_structure(scale) - _structure(untiled(scale, *scale.shape)) for scale in scales])
    if len(gaps) < _LEAST_TENSORS:
        return False
    mean, spread = float(gaps.mean()), float(gaps.std()) / math.sqrt(len(gaps))
    return mean < -_LEAST_GAP and mean < -_LEAST_Z * spread


def _structure(scale: Tensor) -> float:
    """The share of the logarithms' variance that row and column means explain."""
    x = scale.float().clamp_min(nvfp4.E4M3_MIN).log()
    x = x - x.mean()
    rest = x - x.mean(1, keepdim=True) - x.mean(0, keepdim=True)
    total = float(x.square().sum())
    return 1 - float(rest.square().sum()) / total if total > 0 else 0.0


def sqnr(weight: Tensor, stored: NVFP4Tensor) -> float:
    """Decibels of stored NVFP4 rows against the source's BF16 rows."""
    signal = float(weight.float().square().sum())
    noise = float((nvfp4.dequantize(stored) - weight.float()).square().sum())
    if not math.isfinite(noise):
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def explain(weight: Tensor, stored: NVFP4Tensor, tiled: Tensor | None) -> Fault | None:
    """What makes stored rows differ from the source's: an order, a reciprocal, or other values; None: they do not.

    tiled: the same rows' scales if the file is in the tensor cores' order; None where that cannot be.
    """
    guesses = {
        Fault.NIBBLES: stored._replace(packed=swap_nibbles(stored.packed)),
        Fault.RECIPROCAL: stored._replace(scale_2=1 / stored.scale_2),
    }
    if tiled is not None:
        guesses[Fault.TILED_SCALES] = stored._replace(scale=tiled)
    found, best = max((sqnr(weight, guess), fault) for fault, guess in guesses.items())
    as_stored = sqnr(weight, stored)
    if found >= ALIKE_DB and found > as_stored + _BETTER_DB:
        return best
    return None if as_stored >= ALIKE_DB else Fault.OTHER_VALUES


def compare_codes(weight: Tensor, stored: NVFP4Tensor) -> Codes:
    """Stored codes against the nearest ones under the stored scales.  weight: BF16 [rows, in] of the source."""
    blocks = weight.unflatten(-1, (-1, nvfp4.BLOCK))
    nearest = e2m1.unpack(nvfp4.encode_blocks(blocks, stored.scale, stored.scale_2))
    found = e2m1.unpack(stored.packed)
    own, best = e2m1.decode(found), e2m1.decode(nearest)
    differs = own != best  # minus zero is zero
    if not bool(differs.any()):
        return Codes(found.numel())
    step = (stored.scale.float() * stored.scale_2).repeat_interleave(nvfp4.BLOCK, -1)
    value = weight.float() / step
    tie = ((value - own).abs() == (value - best).abs()) & differs
    inward = (own.abs() < best.abs()) & differs
    return Codes(found.numel(), int(differs.sum()), int(tie.sum()), int(inward.sum()))
