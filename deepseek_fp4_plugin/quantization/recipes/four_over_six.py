"""`four-over-six`: each block's largest value becomes 6 or 4, whichever rounds the block better.

The steps and their order are those of nvidia-modelopt 0.47.0's NVFP4_FOUR_OVER_SIX_CFG, bit for bit: the tensor scale
is amax / (6 * 256), so that 1.5 times the largest block scale is still exact, and the choice is made with the scales as
its calibration rounds them. Source: arXiv 2512.02010.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics import e2m1, nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK, E4M3_MAX, E4M3_MIN, NVFP4Tensor
from deepseek_fp4_plugin.quantization.recipe import InputStatistics, Needs, Solution
from deepseek_fp4_plugin.quantization.recipes.scale_search import encoded, solutions

LARGEST_SCALE = 256.0  # of a block of the tensor's largest magnitude, where `max` has 448
_CHUNK = 2**18  # weights rounded at once


class FourOverSix:
    """Weights pass through BF16, as in ModelOpt."""

    name = "four-over-six"
    summary = "the better of two scales a block, as ModelOpt does"
    needs = Needs.NOTHING
    sequential = False
    weight_dtype = torch.bfloat16

    def solve(self, weights: Sequence[Tensor], inputs: InputStatistics | None) -> list[Solution]:
        amax = torch.stack([weight.abs().amax() for weight in weights]).amax()
        return solutions(weights, quantize(torch.cat(list(weights)), amax), [self.name] * len(weights))

    def input_scale(self, amax: Tensor) -> Tensor:
        return nvfp4.tensor_scale(amax)


def quantize(w: Tensor, amax: Tensor) -> NVFP4Tensor:
    """w: BF16 or FP32 [rows, cols], finite.  amax: [], the largest magnitude of all that share the tensor scale."""
    amax = amax.float()
    scale_2 = amax / torch.full_like(amax, e2m1.MAX * LARGEST_SCALE)
    step = max(1, _CHUNK // w.shape[1])
    codes = [_codes(w[start : start + step].float(), amax) for start in range(0, w.shape[0], step)]
    return encoded(w, torch.cat(codes), scale_2)


def _codes(w: Tensor, amax: Tensor) -> Tensor:
    """E4M3 codes of the better scales, uint8 [rows, blocks]."""
    blocks = w.unflatten(-1, (-1, BLOCK))
    block_amax = blocks.abs().amax(-1)
    six, four = (_squared_error(blocks, multiple * block_amax, amax) for multiple in (1.0, 1.5))
    chosen = torch.where(four < six, 1.5 * block_amax, block_amax) / e2m1.MAX
    chosen = torch.where(chosen == 0, 1.0, chosen)
    scale = chosen * LARGEST_SCALE / (amax / e2m1.MAX)
    return scale.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _squared_error(blocks: Tensor, block_amax: Tensor, amax: Tensor) -> Tensor:
    """Of every block, with its scale rounded to E4M3 as ModelOpt's calibration does: by a factor, not by a quotient."""
    factor = E4M3_MAX / (amax * (E4M3_MAX / LARGEST_SCALE) / e2m1.MAX)
    scale = (block_amax / e2m1.MAX * factor).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() / factor
    scale = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    return (blocks - e2m1.round_to_values(blocks / scale) * scale).square().sum(-1)
