"""`mse-sweep`: block scales of smallest squared weight error. Looks at no data but for `input_scale`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.quantization.recipe import InputStatistics, Needs, Solution
from deepseek_fp4_plugin.quantization.recipes.scale_search import roomy_input_scale, search, shared_scale, solutions

OFFSETS = range(-2, 8)  # what all 126 codes find beyond these is below 0.1 % (docs/quantization.md)


class MseSweep:
    """Searched per block of 16 weights, in the source's FP32 values."""

    name = "mse-sweep"
    summary = "block scales of smallest squared error, searched"
    needs = Needs.NOTHING
    sequential = False
    weight_dtype = torch.float32

    def solve(self, weights: Sequence[Tensor], inputs: InputStatistics | None) -> list[Solution]:
        found = search(torch.cat(list(weights)), shared_scale(weights), OFFSETS)
        return solutions(weights, found, [self.name] * len(weights))

    def input_scale(self, amax: Tensor) -> Tensor:
        return roomy_input_scale(amax)
