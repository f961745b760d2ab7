"""What a recipe is: how scales and codes are found for weights of one input, and what it wants to know of that input.

The loop (quantize.py and what it calls) owns files, memory and the forward; a recipe is a pure function with a few
facts about itself. It never sees a file, a name or another layer, and the same arguments give the same bits on every
call. Names, dtypes and sizes of what it returns are those of numerics/nvfp4.py, whatever the recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK, NVFP4Tensor

HELD_OUT = 5  # every fifth input row is kept out of a Hessian, for a recipe to choose by


class Needs(StrEnum):
    """What `solve` reads of InputStatistics. Every recipe's `input_scale` comes from amax besides."""

    NOTHING = "nothing"
    BLOCK_HESSIAN = "block hessian"  # the 16 x 16 blocks of the diagonal, and rows held out
    HESSIAN = "hessian"  # all of it, and rows held out


@dataclass(frozen=True)
class InputStatistics:
    """What calibration knows of the input of one projection, or of the two that share it.

    tokens: rows in `hessian`; 0 for an expert that saw none.
    hessian: FP32, the mean of x x^T over tokens: [in, in], or [in / 16, 16, 16] of BLOCK_HESSIAN. An expert's is shrunk
        to what all of its layer's tokens would make it: (1 - a) own + a layer, a = in / (in + tokens).
    held_out: FP32 [n, in], rows that are in no Hessian, at most `recipe.MAX_HELD_OUT`; n is 0 where there are none.
    """

    tokens: int
    hessian: Tensor
    held_out: Tensor


MAX_HELD_OUT = 4096
WEIGHTS_AT_ONCE = 2**23  # on a CPU, of a recipe that takes several copies of them


class SourceWeight(NamedTuple):
    """A weight as the source stores it.

    weight: [out, in].  scale_inv: of an FP8 one, FP32, one a block of `block` rows and columns.
    """

    weight: Tensor
    scale_inv: Tensor | None
    block: tuple[int, int] = (fp8_block.BLOCK, fp8_block.BLOCK)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Its values: the FP32 product of an FP8 one, rounded once to `dtype`."""
        if self.scale_inv is None:
            return self.weight.to(dtype)
        values = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        rows = self.block[0]
        step = max(_CHUNK // self.weight.shape[1] // rows, 1) * rows
        for start in range(0, self.weight.shape[0], step):
            chunk = self.weight[start : start + step]
            scales = self.scale_inv[start // rows : -(-(start + step) // rows)]
            values[start : start + step] = fp8_block.dequantize(chunk, scales, dtype, self.block)
        return values


class Rounding(NamedTuple):
    """Energies of a weight and of its quantization error, for SQNR; amax of the weight as the recipe got it."""

    signal: float
    noise: float
    amax: float


class Solution(NamedTuple):
    """One projection's result.

    choice: what it was made with, where a recipe chooses among ways (gptq falls back to local-hessian), else its name.
    """

    tensor: NVFP4Tensor
    rounding: Rounding
    choice: str


class Recipe(Protocol):
    """A way to quantize.

    name: what --recipe calls it.  summary: half a sentence for help and model card.
    needs: see Needs.  sequential: its layers are observed on what the layers before became, not on the source's.
    weight_dtype: in which the source's weights are handed over: FP32, or BF16 where ModelOpt goes through it.
    """

    name: str
    summary: str
    needs: Needs
    sequential: bool
    weight_dtype: torch.dtype

    def solve(self, weights: Sequence[Tensor], inputs: Any) -> list[Solution]:
        """Quantize weights that share an input and `weight_scale_2`: gate and up, or a single one.

        weights: [out, in] each in `weight_dtype`, finite, on the device to compute on.
        inputs: InputStatistics on the same device, or what `ready` made of them; None exactly where `needs` is NOTHING.
        """

    def input_scale(self, amax: Tensor) -> Tensor:
        """`input_scale` for inputs whose largest magnitude is `amax`, FP32 [], over all experts of the layer."""


@runtime_checkable
class FromSource(Protocol):
    """A recipe that can do without decoded weights, for speed; the bits are those of `solve`."""

    def solve_source(self, weights: Sequence[SourceWeight]) -> list[Solution] | None:
        """None where a weight holds NaN or infinity."""


@runtime_checkable
class ReadiesInputs(Protocol):
    """A recipe whose `solve` takes what `ready` made of the inputs as well as the inputs themselves."""

    def ready(self, inputs: InputStatistics) -> Any:
        """What solving reads of the inputs, the same for every weight. May use up `inputs.hessian`, to save memory."""


def measured(w: Tensor, quantized: NVFP4Tensor) -> Rounding:
    """The energies of `w` and of what `quantized` makes of it, summed in FP64 over chunks of rows."""
    step = max(1, _CHUNK // w.shape[1])
    signal = noise = 0.0
    for start in range(0, w.shape[0], step):
        rows = slice(start, start + step)
        chunk = w[rows].float()
        piece = NVFP4Tensor(quantized.packed[rows], quantized.scale[rows], quantized.scale_2)
        signal += float(chunk.square().sum(dtype=torch.float64))
        noise += float((nvfp4.dequantize(piece) - chunk).square().sum(dtype=torch.float64))
    return Rounding(signal, noise, float(w.abs().amax()))


def block_diagonal(rows: Tensor) -> Tensor:
    """The sum over rows of the 16 x 16 diagonal blocks of x x^T: FP32 [n, in] to [in / 16, 16, 16]."""
    blocks = rows.unflatten(1, (-1, BLOCK)).transpose(0, 1)
    return blocks.transpose(1, 2) @ blocks


def shrunk(own: Tensor, layer: Tensor, tokens: int, in_features: int) -> Tensor:
    """An expert's mean Hessian drawn to its layer's, the more the fewer tokens it saw."""
    a = in_features / (in_features + tokens)
    return own * (1 - a) + layer * a


_CHUNK = 2**22  # elements decoded at once: temporaries of 16 MB each
