"""`max`: scales from the largest magnitudes, bit for bit as nvidia-modelopt 0.47.0 exports them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics import nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.recipe import InputStatistics, Needs, Rounding, Solution

_CHUNK = 2**22  # elements quantized at once: temporaries of 16 MB each


class Max:
    """See docs/format.md for the arithmetic, step by step."""

    name = "max"
    summary = "from the largest magnitude, as ModelOpt does"
    needs = Needs.NOTHING
    sequential = False
    weight_dtype = torch.bfloat16

    def solve(self, weights: Sequence[Tensor], inputs: InputStatistics | None) -> list[Solution]:
        scale_2 = nvfp4.tensor_scale(torch.stack([weight.abs().amax() for weight in weights]).amax())
        return [Solution(*quantize_weight(weight, scale_2), self.name) for weight in weights]

    def input_scale(self, amax: Tensor) -> Tensor:
        return nvfp4.tensor_scale(amax)


def quantize_weight(w: Tensor, scale_2: Tensor) -> tuple[NVFP4Tensor, Rounding]:
    """`nvfp4.quantize(w, scale_2)` in chunks of rows, and the error it makes.  w: BF16 [out, in], finite."""
    rows, cols = w.shape
    step = max(1, _CHUNK // cols)
    pieces, signal, noise = [], 0.0, 0.0
    for start in range(0, rows, step):
        chunk = w[start : start + step]
        piece = nvfp4.quantize(chunk, scale_2)
        pieces.append(piece)
        signal += float(chunk.float().square().sum(dtype=torch.float64))
        noise += float((nvfp4.dequantize(piece) - chunk.float()).square().sum(dtype=torch.float64))
    packed, scale = torch.cat([p.packed for p in pieces]), torch.cat([p.scale for p in pieces])
    return NVFP4Tensor(packed, scale, scale_2), Rounding(signal, noise, float(w.abs().amax()))
