"""What rounding costs each kind of module at its output, on real inputs: those that the source's modules see in a text.

Both models' projections get the source's inputs, so that every figure is one module's own error and nothing that came
from a layer before it. With FP4 or 8-bit activations the rounding of the inputs is in it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.weights import PreparedWeight
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.linear import Linear
from deepseek_fp4_plugin.layers.moe import RoutedExperts
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.models.inventory import weights
from deepseek_fp4_plugin.quantization.report import class_of
from deepseek_fp4_plugin.quantization.smoothing import Smoothing, read_smoothing


@torch.inference_mode()
def output_errors(
    reference: DeepseekV3ForCausalLM, model: DeepseekV3ForCausalLM, texts: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Module class -> energy of the output's change in percent of the output's, of the modules that `model` has in
    NVFP4.  texts: token ids, each one forward of `reference`.

    Modules of a smoothed `model` get the inputs smoothed."""
    smoothing = read_smoothing(model.path) if model.path else Smoothing({})
    kinds = {weight.module: class_of(weight, model.config) for weight in weights(model.config)}
    energy: dict[str, list[Tensor]] = {}

    def compare(module: str, ours: Tensor, theirs: Tensor) -> None:
        total = energy.setdefault(kinds[module], [torch.zeros((), dtype=torch.float64) for _ in range(2)])
        total[0] += (theirs.float() - ours.float()).square().sum(dtype=torch.float64).cpu()
        total[1] += ours.float().square().sum(dtype=torch.float64).cpu()

    watched: list[Linear | RoutedExperts] = []
    try:
        for ours, theirs in zip(reference.model.modules(), model.model.modules(), strict=True):
            if isinstance(ours, Linear) and isinstance(theirs, Linear) and _four_bit(theirs.weight):
                ours.observer = _of_linear(ours, theirs, smoothing, compare)
                watched.append(ours)
            elif isinstance(ours, RoutedExperts) and isinstance(theirs, RoutedExperts) and _four_bit(theirs.gate_up):
                ours.observer = _of_experts(ours, theirs, smoothing, compare)
                watched.append(ours)
        device = reference.model.norm.weight.device
        for ids in texts:
            reference(ForwardBatch.from_sequences([ids], device))
    finally:
        for part in watched:
            part.observer = None
    return {kind: 100 * float(noise / signal) for kind, (noise, signal) in energy.items() if float(signal) > 0}


def _four_bit(weight: PreparedWeight) -> bool:
    return weight.format is WeightFormat.NVFP4


_Compare = Callable[[str, Tensor, Tensor], None]


def _of_linear(ours: Linear, theirs: Linear, smoothing: Smoothing, compare: _Compare) -> Callable[[Tensor], None]:
    module = ours.modules_named[0]

    def observe(x: Tensor) -> None:
        compare(module, ops.linear(x, ours.weight), ops.linear(smoothing.of_inputs(module, x), theirs.weight))

    return observe


def _of_experts(
    ours: RoutedExperts, theirs: RoutedExperts, smoothing: Smoothing, compare: _Compare
) -> Callable[[str, int, Tensor], None]:
    def observe(projection: str, expert: int, rows: Tensor) -> None:
        name = "down_proj" if projection == "down" else "gate_proj"
        module = f"{ours.name}.{ours.local[expert]}.{name}"
        both: list[PreparedWeight] = [getattr(part, projection) for part in (ours, theirs)]
        inputs = rows, smoothing.of_inputs(module, rows)
        compare(module, *(weight.backend.linear(x, weight, expert) for x, weight in zip(inputs, both, strict=True)))

    return observe
