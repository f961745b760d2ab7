"""`local-hessian`: block scales of smallest output error, as far as the inputs within a block go together.

The error of a block of 16 weights is weighed by the 16 x 16 second moments of their inputs, those of an expert drawn to
its layer's (recipe.py). Source of the idea: nvidia-modelopt's local_hessian, which does not draw them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.quantization.recipe import InputStatistics, Needs, Solution
from deepseek_fp4_plugin.quantization.recipes.scale_search import roomy_input_scale, search, shared_scale, solutions

OFFSETS = range(-8, 13)


class LocalHessian:
    """Searched per block of 16 weights, in the source's FP32 values."""

    name = "local-hessian"
    summary = "block scales of smallest output error, by what each block's inputs were"
    needs = Needs.BLOCK_HESSIAN
    sequential = True
    weight_dtype = torch.float32

    def solve(self, weights: Sequence[Tensor], inputs: InputStatistics | None) -> list[Solution]:
        assert inputs is not None
        found = search(torch.cat(list(weights)), shared_scale(weights), OFFSETS, inputs.hessian)
        return solutions(weights, found, [self.name] * len(weights))

    def input_scale(self, amax: Tensor) -> Tensor:
        return roomy_input_scale(amax)
