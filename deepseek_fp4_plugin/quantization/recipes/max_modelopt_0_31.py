"""`max` as nvidia-modelopt 0.31.0 computed it, the release that made the published DeepSeek-R1-0528-FP4.

Its divisions come in another order than 0.47.0's, so that scales differ in a last bit here and there, and it has no
smallest block scale: a block far below the tensor's largest value gets scale 0 and decodes to zero, whatever its codes.
docs/format.md, section 6, has the differences; tests hold frozen results of 0.31.0's own compiled code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics import e2m1
from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK, E4M3_MAX, NVFP4Tensor
from deepseek_fp4_plugin.quantization.recipe import InputStatistics, Needs, Solution
from deepseek_fp4_plugin.quantization.recipes.scale_search import solutions

_CHUNK = 2**20  # weights quantized at once


class MaxModelOpt031:
    """The same choices as `Max`, in 0.31.0's arithmetic."""

    name = "max"
    summary = "from the largest magnitude, as ModelOpt 0.31.0 did"
    needs = Needs.NOTHING
    sequential = False
    weight_dtype = torch.bfloat16

    def solve(self, weights: Sequence[Tensor], inputs: InputStatistics | None) -> list[Solution]:
        scale_2 = tensor_scale(torch.stack([weight.abs().amax() for weight in weights]).amax())
        return solutions(weights, quantize(torch.cat(list(weights)), scale_2), [self.name] * len(weights))

    def input_scale(self, amax: Tensor) -> Tensor:
        return tensor_scale(amax)


def tensor_scale(amax: Tensor) -> Tensor:
    """`weight_scale_2` or `input_scale`, FP32: two divisions."""
    return _divided(_divided(amax.float(), e2m1.MAX), E4M3_MAX)


def quantize(w: Tensor, scale_2: Tensor) -> NVFP4Tensor:
    """w: BF16 or FP32 [rows, cols], finite, cols a multiple of 16.  scale_2: FP32 []."""
    step = max(1, _CHUNK // w.shape[1])
    pieces = [_quantize_rows(w[start : start + step], scale_2) for start in range(0, w.shape[0], step)]
    return NVFP4Tensor(torch.cat([p for p, _ in pieces]), torch.cat([s for _, s in pieces]), scale_2)


def _quantize_rows(w: Tensor, scale_2: Tensor) -> tuple[Tensor, Tensor]:
    blocks = w.unflatten(-1, (-1, BLOCK))
    scale = _divided(blocks.abs().amax(-1).float(), e2m1.MAX) / scale_2
    scale = torch.where((scale == 0) | scale.isnan(), 1.0, scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    # A scale of 0 makes quotients infinite or NaN, and their codes 7 and 15; they decode to zero.
    codes = e2m1.encode(blocks.float() / (scale.float() * scale_2).unsqueeze(-1))
    return e2m1.pack(codes.flatten(-2)), scale


def _divided(x: Tensor, divisor: float) -> Tensor:
    """A true division, on CUDA too, where torch multiplies by the reciprocal of a number."""
    return x / torch.full_like(x, divisor)
