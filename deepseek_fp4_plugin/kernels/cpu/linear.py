"""y = x W^T on the checkpoint's bytes.

Products are summed in FP32, multiplied by the tensor scale and rounded to BF16 once, as in the reference; activations
in FP4 or 8-bit integers give exact integers for each block of 16. Up to 32 rows (16 of BF16 weights with AVX-512) a
row's result does not depend on the others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cpu import addresses
from deepseek_fp4_plugin.kernels.cpu.extension import native, platform_is_faster, require_bf16
from deepseek_fp4_plugin.kernels.cpu.norm import rms_norm
from deepseek_fp4_plugin.kernels.recording import cut
from deepseek_fp4_plugin.kernels.weights import Activations, OptionalTensor, PreparedWeight, WeightTensors

_FORMATS = {WeightFormat.PLAIN: 0, WeightFormat.FP8_BLOCK: 1, WeightFormat.NVFP4: 2}
_ACTIVATIONS = ("bf16", "fp4", "int8")  # numbered as in native/kernels.h
_FEW_ROWS = 16  # up to this many rows of FP32 weights our product beats the platform's


class NativeWeight(NamedTuple):
    """handle: the extension's description.  parts: owners of the memory that it points into."""

    handle: Any
    parts: tuple[WeightTensors, ...]


def prepare(
    parts: Sequence[WeightTensors], dtype: torch.dtype, activations: Activations, input_scale: OptionalTensor
) -> NativeWeight:
    """Keep the parts' bytes, and describe them to the extension."""
    kept = tuple(_contiguous(part) for part in parts)
    experts = kept[0].weight.shape[0] if kept[0].weight.ndim == 3 else 1
    handle = native.weight(
        _FORMATS[kept[0].format],
        kept[0].in_features,
        experts,
        *kept[0].fp8_block,
        _ACTIVATIONS.index(activations),
        float(input_scale) if activations == "fp4" else 0.0,
        [(*_addresses(part, kept[0].in_features, experts), part.out_features) for part in kept],
    )
    return NativeWeight(handle, kept)


def linear(x: Tensor, weight: PreparedWeight, expert: int | None = None) -> Tensor:
    """x: BF16 [rows, in].  Returns BF16 [rows, out]; `expert` picks one of a stack."""
    require_bf16(x)
    rows = x.shape[0]
    if weight.format is WeightFormat.PLAIN and platform_is_faster(rows):
        return cut(partial(_by_the_platform, weight, expert), x)[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(rows, weight.out_features, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    x_address = addresses.rows("x", x, torch.bfloat16, rows, weight.in_features)
    native.linear(weight.data.handle, expert or 0, x_address, x.stride(0), rows, y.data_ptr(), threads)
    return y


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: PreparedWeight) -> Tensor:
    """See kernels/reference/linear.py."""
    return linear(rms_norm(x, norm, eps), weight)


def _by_the_platform(weight: PreparedWeight, expert: int | None, x: Tensor) -> tuple[Tensor]:
    values = [part.weight if expert is None else part.weight[expert] for part in weight.data.parts]
    return (torch.cat([torch.nn.functional.linear(x, value) for value in values], -1),)


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See kernels/reference/linear.py. BF16 rows by BF16 or FP32 weights; many by whichever is faster, it or torch."""
    rows, (out, width) = x.shape[0], weight.shape
    faster = platform_is_faster(rows) if weight.dtype is torch.bfloat16 else rows > _FEW_ROWS
    if faster or not weight.is_contiguous() or x.shape[1] != width:
        return cut(lambda x: (reference.plain_linear(x, weight),), x)[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(rows, out, dtype=weight.dtype)
    threads = torch.get_num_threads()
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return reference.plain_linear(x, weight)
    x_address = addresses.rows("x", x, torch.bfloat16, rows, width)
    w_address = addresses.dense("the weight", weight, weight.dtype, out, width)
    if weight.dtype is torch.float32:
        native.linear_fp32(x_address, x.stride(0), rows, width, out, w_address, y.data_ptr(), threads)
    else:
        handle = native.weight(_FORMATS[WeightFormat.PLAIN], width, 1, 1, 1, 0, 0.0, [(w_address, 0, 0, out)])
        native.linear(handle, 0, x_address, x.stride(0), rows, y.data_ptr(), threads)
    return y


def _contiguous(part: WeightTensors) -> WeightTensors:
    weight, scale, scale_2 = part.weight, part.scale, part.scale_2
    if part.format is WeightFormat.PLAIN:
        weight = weight.to(torch.bfloat16)
    if part.format is WeightFormat.FP8_BLOCK:
        scale = scale.float()
    if part.format is WeightFormat.NVFP4:
        if weight.shape[-1] * 2 != scale.shape[-1] * 16:
            raise ValueError(f"weight_scale {list(scale.shape)} does not fit packed weights {list(weight.shape)}")
        experts = weight.shape[0] if weight.ndim == 3 else 1
        scale_2 = scale_2.float().expand(experts).contiguous() if scale_2.ndim else scale_2.float().repeat(experts)
        # The widest unit reads the bits of a NaN scale as 480; as NaN in scale_2 it is not lost.
        broken = (scale.view(torch.uint8) & 0x7F == 0x7F).reshape(experts, -1).any(-1)
        scale_2 = scale_2.masked_fill(broken, torch.nan)
    return WeightTensors(
        part.format,
        weight.contiguous(),
        None if scale is None else scale.contiguous(),
        scale_2,
        part.input_scale,
        part.fp8_block,
    )


def _addresses(part: WeightTensors, width: int, experts: int) -> tuple[int, int, int]:
    """Of the values, their scales and scale_2; 0 for what the format has not."""
    lead, out = part.weight.shape[:-2], part.out_features
    if lead not in ((), (experts,)):
        raise ValueError(f"a weight is [out, in] or [experts, out, in] with as many experts as its parts, not {lead}")
    if part.format is WeightFormat.PLAIN:
        return addresses.dense("a BF16 weight", part.weight, torch.bfloat16, *lead, out, width), 0, 0
    if part.format is WeightFormat.FP8_BLOCK:
        values = addresses.dense("an FP8 weight", part.weight, torch.float8_e4m3fn, *lead, out, width)
        height, across = (-(-size // block) for size, block in zip((out, width), part.fp8_block, strict=True))
        return values, addresses.dense("its weight_scale_inv", part.scale, torch.float32, *lead, height, across), 0
    return (
        addresses.dense("an NVFP4 weight", part.weight, torch.uint8, *lead, out, width // 2),
        addresses.dense("its weight_scale", part.scale, torch.float8_e4m3fn, *lead, out, width // 16),
        addresses.dense("its weight_scale_2", part.scale_2, torch.float32, experts),
    )
