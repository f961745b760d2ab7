"""y = x W^T on decoded weights."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels.reference.linear import dequantized
from deepseek_fp4_plugin.kernels.reference.norm import rms_norm
from deepseek_fp4_plugin.kernels.weights import Activations, OptionalTensor, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.numerics import fp8_rows, int8, nvfp4


class Decoded(NamedTuple):
    """values: [(E,) out, in] in the compute dtype.  row_scale: FP32 [(E,) out], or None where values are final."""

    values: Tensor
    row_scale: Tensor | None


def prepare(
    parts: Sequence[WeightTensors], dtype: torch.dtype, activations: Activations, input_scale: OptionalTensor
) -> Decoded:
    """One tensor for all parts."""
    if parts[0].format is WeightFormat.NVFP4:
        values = torch.cat([nvfp4.block_values(part.weight, part.scale, dtype) for part in parts], -2)
        if activations == "fp8":
            values = fp8_rows.rounded_weights(values)
        scales = [part.scale_2.unsqueeze(-1).expand(*part.weight.shape[:-1]) for part in parts]
        row_scale = torch.cat(scales, -1)
        if activations == "fp4":
            row_scale = row_scale * input_scale
    else:
        values = torch.cat([dequantized(part).to(dtype) for part in parts], -2)
        row_scale = None
    return Decoded(values, row_scale)


def linear(x: Tensor, weight: PreparedWeight, expert: int | None = None) -> Tensor:
    """x: [rows, in].  Returns [rows, out] in x's dtype; `expert` picks one of a stack."""
    values, row_scale = weight.data.values, weight.data.row_scale
    if expert is not None:
        values = values[expert]
        row_scale = None if row_scale is None else row_scale[expert]
    y = torch.nn.functional.linear(_rounded(x, weight), values)
    return y if row_scale is None else (y * row_scale).to(x.dtype)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: PreparedWeight) -> Tensor:
    """See kernels/reference/linear.py."""
    return linear(rms_norm(x, norm, eps), weight)


def products(x: Tensor, weight: PreparedWeight) -> Tensor:
    """x: [E, rows, in], each expert's own.  Returns [E, rows, out] in x's dtype."""
    values, row_scale = weight.data.values, weight.data.row_scale
    y = _rounded(x, weight) @ values.transpose(1, 2)
    return y if row_scale is None else (y * row_scale.unsqueeze(1)).to(x.dtype)


def _rounded(x: Tensor, weight: PreparedWeight) -> Tensor:
    """`x`, or its rounding in its own dtype: integers or E4M3, or NVFP4 but for the input scale (see `prepare`)."""
    if weight.activations == "bf16":
        return x
    if weight.activations == "int8":
        return int8.values(*int8.quantize(x)).to(x.dtype)
    if weight.activations == "fp8":
        return fp8_rows.values(*fp8_rows.quantize(x)).to(x.dtype)
    packed, scale = nvfp4.quantize_activation(x.reshape(-1, x.shape[-1]), weight.input_scale)
    return nvfp4.block_values(packed, scale, x.dtype).view(x.shape)
