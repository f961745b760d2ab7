"""y = x W^T of NVFP4 weights and NVFP4 activations, and the routed experts: the checkpoint's own bytes."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cuda, reference
from deepseek_fp4_plugin.kernels.weights import Activations, Case, OptionalTensor, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.numerics import nvfp4


class Stack(NamedTuple):
    """weight: uint8 [experts, out, in / 2].  scale: E4M3 [experts, out, in / 16].  factor: FP32 [experts, out], the
    tensor scales of weights and activations.  A dense weight is a stack of one."""

    weight: Tensor
    scale: Tensor
    factor: Tensor


def prepare(
    parts: Sequence[WeightTensors], dtype: torch.dtype, activations: Activations, input_scale: OptionalTensor
) -> Stack:
    """Raises ValueError for other formats than NVFP4 and other activations than FP4."""
    if parts[0].format is not WeightFormat.NVFP4 or activations != "fp4":
        raise ValueError("kernel backend 'blackwell' multiplies NVFP4 weights by FP4 activations")
    experts = parts[0].weight.shape[0] if parts[0].weight.ndim == 3 else 1

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(experts, *tensor.shape[-2:]) for tensor in tensors], 1).contiguous()

    factors = [(part.scale_2.float() * input_scale).reshape(-1, 1).expand(experts, part.out_features) for part in parts]
    scale = stacked([part.scale.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return Stack(stacked([part.weight for part in parts]), scale, torch.cat(factors, 1).contiguous())


def linear(x: Tensor, weight: PreparedWeight, expert: int | None = None) -> Tensor:
    """x: BF16 [rows, in].  Returns BF16 [rows, out]; `expert` picks one of a stack."""
    from deepseek_fp4_plugin.kernels.blackwell.product import ROWS

    rows = x.shape[0]
    row = torch.arange(-(-rows // ROWS) * ROWS, dtype=torch.int32, device=x.device)
    expert_of = torch.full((len(row) // ROWS,), expert or 0, dtype=torch.int32, device=x.device)
    return _product(x, torch.where(row < rows, row, -1), expert_of, weight)[:rows]


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: PreparedWeight) -> Tensor:
    """See kernels/reference/linear.py."""
    return linear(_rms_norm(x.device)(x, norm, eps), weight)


def experts_mlp(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight
) -> Tensor:
    """See kernels/reference/moe.py. Nothing waits for the device, so that a graph can hold it."""
    from deepseek_fp4_plugin.kernels.blackwell.product import ROWS

    (tokens, k), experts = expert_ids.shape, down.data.weight.shape[0]
    if tokens == 0:
        return torch.empty_like(x)
    ids = expert_ids.flatten()
    ids, order = torch.where(ids < 0, experts, ids).sort(stable=True)  # those that are elsewhere come last
    begins = torch.searchsorted(ids, torch.arange(experts + 1, device=x.device))  # of each expert's choices
    blocks = (begins.diff() + ROWS - 1) // ROWS
    ends = blocks.cumsum(0)  # each expert's blocks of rows follow the others'
    most = tokens * k // ROWS + min(experts, tokens * k)  # blocks at the most
    block = torch.arange(most, device=x.device)
    expert_of = torch.searchsorted(ends, block, right=True)
    expert_of = torch.where(expert_of < experts, expert_of, -1).int()
    # Where a choice's row lies; the choices of nobody share a row that is cut off.
    own = ids.clamp(max=experts - 1)
    place = (ends - blocks)[own] * ROWS + torch.arange(tokens * k, device=x.device) - begins[own]
    place = torch.where(ids < experts, place, most * ROWS)
    source = torch.full((most * ROWS + 1,), -1, dtype=torch.int32, device=x.device)
    source = source.index_copy_(0, place, (order // k).int())[:-1]
    gate, up = _product(x, source, expert_of, gate_up).chunk(2, -1)
    there = (source >= 0).unsqueeze(1)
    hidden = torch.where(there, torch.nn.functional.silu(gate) * up, 0)
    row = torch.arange(len(source), dtype=torch.int32, device=x.device)
    outputs = _product(hidden, torch.where(source >= 0, row, -1), expert_of, down)
    chosen = outputs[place.clamp(max=most * ROWS - 1)].float() * expert_weights.flatten()[order].unsqueeze(1)
    chosen = torch.where((ids < experts).unsqueeze(1), chosen, 0)
    placed = torch.empty_like(chosen).index_copy_(0, order, chosen)
    return placed.unflatten(0, (tokens, k)).sum(1).to(x.dtype)


@functools.cache
def _rms_norm(device: torch.device) -> Callable[[Tensor, Tensor, float], Tensor]:
    """`cuda`'s, in one launch, where it serves."""
    return reference.rms_norm if cuda.refuses(Case(device, torch.bfloat16)) else cuda.rms_norm


def _product(x: Tensor, source: Tensor, expert_of: Tensor, weight: PreparedWeight) -> Tensor:
    from deepseek_fp4_plugin.kernels.blackwell.product import product

    packed, scale = nvfp4.quantize_activation(x, weight.input_scale)
    return product(packed, scale, source, expert_of, *weight.data)
