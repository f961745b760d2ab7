"""`max`: scales from the largest magnitudes, bit for bit as nvidia-modelopt 0.47.0 exports them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.recipe import InputStatistics, Needs, Rounding, Solution, SourceWeight

_BLOCK = (fp8_block.BLOCK, fp8_block.BLOCK)


class Max:
    """See docs/format.md for the arithmetic, step by step."""

    name = "max"
    summary = "from the largest magnitude, as ModelOpt does"
    needs = Needs.NOTHING
    sequential = False
    weight_dtype = torch.bfloat16

    def solve(self, weights: Sequence[Tensor], inputs: InputStatistics | None) -> list[Solution]:
        solutions = self.solve_source([SourceWeight(weight, None) for weight in weights])
        if solutions is None:
            raise ValueError("NVFP4 cannot hold NaN or infinity, and a weight has some")
        return solutions

    def solve_source(self, weights: Sequence[SourceWeight]) -> list[Solution] | None:
        amax = torch.stack([ops.weight_amax(*weight) for weight in weights])
        if not torch.isfinite(amax).all():
            return None
        scale_2 = nvfp4.tensor_scale(amax.amax())
        return [
            Solution(tensor, Rounding(signal, noise, float(largest)), self.name)
            for weight, largest in zip(weights, amax, strict=True)
            for tensor, signal, noise in [ops.convert_weight(*weight, scale_2)]
        ]

    def input_scale(self, amax: Tensor) -> Tensor:
        return nvfp4.tensor_scale(amax)


def quantize_weight(w: Tensor, scale_2: Tensor) -> tuple[NVFP4Tensor, Rounding]:
    """`nvfp4.quantize(w, scale_2)` and the error it makes.  w: BF16 [out, in], finite."""
    tensor, signal, noise = ops.convert_weight(w, None, _BLOCK, scale_2)
    return tensor, Rounding(signal, noise, float(w.abs().amax()))
