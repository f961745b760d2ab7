"""y = x W^T for every weight format. FP32 throughout; one rounding, of the result, to the activations' dtype."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels.reference.norm import rms_norm
from deepseek_fp4_plugin.kernels.weights import Activations, OptionalTensor, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.numerics import fp8_block, fp8_rows, int8, nvfp4


def prepare(
    parts: Sequence[WeightTensors], dtype: torch.dtype, activations: Activations, input_scale: OptionalTensor
) -> tuple[WeightTensors, ...]:
    """Keep the parts as they are; the product concatenates their outputs."""
    return tuple(parts)


def build_ahead(weights: Sequence[PreparedWeight], most_rows: int) -> None:
    """Nothing is made at a first call."""


def linear(x: Tensor, weight: PreparedWeight, expert: int | None = None) -> Tensor:
    """x: [rows, in].  Returns [rows, out] in x's dtype; `expert` picks one of a stack."""
    x32 = rounded_input(x, weight).float()
    outputs = []
    for part in weight.data:
        values, scale = _decode(part, expert)
        if weight.activations == "fp8":
            values = fp8_rows.rounded_weights(values)
        outputs.append((x32 @ values.T) * scale)
    return torch.cat(outputs, -1).to(x.dtype)


def linear_pair(x: Tensor, first: PreparedWeight, second: PreparedWeight) -> None:
    """One after the other."""


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: PreparedWeight) -> Tensor:
    """`linear` of the RMSNorm of x [rows, in] by norm [in].  Returns [rows, out]."""
    return linear(rms_norm(x, norm, eps), weight)


def decoded(weight: PreparedWeight, expert: int | None = None) -> PreparedWeight:
    """FP8 or plain weights, or one expert of them, in FP32: products are the same, and decode nothing any more."""
    parts = tuple(WeightTensors(WeightFormat.PLAIN, _decode(part, expert)[0]) for part in weight.data)
    return replace(weight, format=WeightFormat.PLAIN, data=parts)


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x: [rows, in] by an unquantized weight [out, in], in the weight's dtype (FP32 for the router): [rows, out]."""
    return torch.nn.functional.linear(x.to(weight.dtype), weight)


def dequantized(part: WeightTensors) -> Tensor:
    """FP32 values of one projection, [(E,) out, in]."""
    if part.format is WeightFormat.PLAIN:
        return part.weight.float()
    if part.format is WeightFormat.FP8_BLOCK:
        return fp8_block.dequantize(part.weight, part.scale, torch.float32, part.fp8_block)
    return nvfp4.dequantize(nvfp4.NVFP4Tensor(part.weight, part.scale, part.scale_2))


def rounded_input(x: Tensor, weight: PreparedWeight) -> Tensor:
    """`x`, or its FP32 rounding to NVFP4 (exact in BF16 up to the global scale), to integers or to E4M3."""
    if weight.activations == "bf16":
        return x
    if weight.activations == "int8":
        return int8.values(*int8.quantize(x))
    if weight.activations == "fp8":
        return fp8_rows.values(*fp8_rows.quantize(x))
    packed, scale = nvfp4.quantize_activation(x, weight.input_scale)
    return nvfp4.block_values(packed, scale) * weight.input_scale


def _decode(part: WeightTensors, expert: int | None) -> tuple[Tensor, Tensor | float]:
    """FP32 [out, in] values and the factor left for the product's result."""
    pick = (lambda t: t) if expert is None else (lambda t: t[expert])
    if part.format is WeightFormat.NVFP4:
        return nvfp4.block_values(pick(part.weight), pick(part.scale)), pick(part.scale_2)
    if part.format is WeightFormat.FP8_BLOCK:
        return fp8_block.dequantize(pick(part.weight), pick(part.scale), torch.float32, part.fp8_block), 1.0
    return pick(part.weight).float(), 1.0
