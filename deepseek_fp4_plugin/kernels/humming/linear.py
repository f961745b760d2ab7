"""y = x W^T by humming-kernels: block scales times values in BF16, FP32 sums, times the tensor scale, one rounding."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels.humming import tuning
from deepseek_fp4_plugin.kernels.reference.norm import rms_norm
from deepseek_fp4_plugin.kernels.weights import Activations, OptionalTensor, PreparedWeight, WeightTensors

_MULTIPLE = 128  # of outputs and inputs, in its layout
_FORMAT = {"quant_method": "modelopt", "quant_algo": "nvfp4"}


class Layers(NamedTuple):
    """parts: a HummingLayer for each part of a fused weight, each with a tensor scale of its own; filled up with zeros.
    kernels: see tuning.py.  outputs: that each has.  width: inputs that they are given.  values: see per_head.py."""

    parts: tuple[Any, ...]
    kernels: tuple[str, ...]
    outputs: tuple[int, ...]
    width: int
    values: list[Tensor]


def prepare(
    parts: Sequence[WeightTensors], dtype: torch.dtype, activations: Activations, input_scale: OptionalTensor
) -> Layers:
    """Raises ValueError for other formats than NVFP4 and other activations than BF16."""
    if parts[0].format is not WeightFormat.NVFP4 or dtype is not torch.bfloat16 or activations != "bf16":
        raise ValueError("kernel backend 'humming' multiplies NVFP4 weights by BF16 activations")
    width = -(-parts[0].in_features // _MULTIPLE) * _MULTIPLE
    outputs = tuple(part.out_features for part in parts)
    with torch.cuda.device(parts[0].weight.device):  # humming looks at the current one, and launches on it
        layers = tuple(_layer(part, width) for part in parts)
        return Layers(layers, tuple(tuning.kernels(layer) for layer in layers), outputs, width, [])


def linear(x: Tensor, weight: PreparedWeight, expert: int | None = None) -> Tensor:
    """x: BF16 [rows, in].  Returns BF16 [rows, out]; `expert` picks one of a stack."""
    if expert is None:
        return product(x, weight)
    experts = weight.data.parts[0].num_experts
    rows = torch.arange(experts + 1, device=x.device)
    return product(x, weight, torch.where(rows <= expert, 0, x.shape[0]))


def product(x: Tensor, weight: PreparedWeight, layout: Tensor | None = None) -> Tensor:
    """x: BF16 [rows, in], of experts from row layout[e] to layout[e + 1] expert e's, int64 [experts + 1]; rows behind
    the last are not written.  Returns BF16 [rows, out]."""
    layers: Layers = weight.data
    if x.shape[0] == 0:
        return x.new_empty(0, weight.out_features)
    x = pad(x, (0, layers.width - x.shape[1])).contiguous()
    grouped = {} if layout is None else {"expert_layout": layout, "compute_config": tuning.GROUPED}
    with torch.cuda.device(x.device):
        outputs = [
            part(x, tuning_config=kernels, **grouped)[:, :out]
            for part, kernels, out in zip(layers.parts, layers.kernels, layers.outputs, strict=True)
        ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: PreparedWeight) -> Tensor:
    """See kernels/reference/linear.py."""
    return linear(rms_norm(x, norm, eps), weight)


def _layer(part: WeightTensors, width: int) -> Any:
    from humming.layer import HummingLayer

    out = part.out_features
    experts = part.weight.shape[0] if part.weight.ndim == 3 else None
    more = 0, 0, 0, -(-out // _MULTIPLE) * _MULTIPLE - out  # rows; of codes and scales the columns that are missing
    scale = part.scale.view(torch.uint8)
    with torch.device(part.weight.device):
        layer = HummingLayer(
            shape_n=out + more[3],
            shape_k=width,
            num_experts=experts,
            weight_config=dict(_FORMAT),
            torch_dtype=torch.bfloat16,
        )
    layer.load_from_tensors(
        {
            "weight": pad(part.weight, (0, width // 2 - part.weight.shape[-1], *more[2:])),
            "weight_scale": pad(scale, (0, width // 16 - scale.shape[-1], *more[2:])).view(torch.float8_e4m3fn),
            "weight_scale_2": part.scale_2.float().reshape(experts or 1),
        }
    )
    layer.transform()
    return layer
