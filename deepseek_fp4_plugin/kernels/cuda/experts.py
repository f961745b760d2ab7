"""Routed experts of more than a few tokens: by a list of the experts that were chosen, or all decoded at once."""

import functools

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.launcher import kernel
from deepseek_fp4_plugin.kernels.cuda.linear import decode, rounded_input
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB_BYTES, Tiles
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

_GROUPS, _WARPS, _STAGES = 2, 8, 4  # as source/nvfp4_experts.cu has them
_SLICE = 8192  # tokens whose rows are sorted and multiplied together


def listed(x: Tensor, ids: Tensor, weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
    """y[t] = sum over k of weight[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]), each expert's weights read once.

    x: BF16 [tokens, hidden].  ids: int64 [tokens, k], below 0 where an expert is not here.  weights: FP32 [tokens, k].
    """
    choices, experts = ids.numel(), gate_up.data.data.shape[0]
    order = torch.empty(choices, dtype=torch.int32, device=x.device)
    work = torch.empty(4 + 2 * experts, dtype=torch.int32, device=x.device)
    kernel("experts_work.cu", "experts_work", "3P2i", (), x.device.index)(
        (1, 1, 1), 512, 0, ids.data_ptr(), order.data_ptr(), work.data_ptr(), choices, experts
    )
    h = torch.empty(choices, gate_up.data.half, dtype=torch.bfloat16, device=x.device)
    _products(rounded_input(x, gate_up), gate_up.data, h, order, work, ids.shape, ids.shape[1], gated=True)
    outputs = torch.empty(choices, down.out_features, dtype=torch.bfloat16, device=x.device)
    _products(rounded_input(h, down), down.data, outputs, order, work, ids.shape, 1, gated=False, early=True)
    return combine(outputs, ids, weights)


def _products(
    x: Tensor,
    tiles: Tiles,
    y: Tensor,
    order: Tensor,
    work: Tensor,
    shape: torch.Size,
    k: int,
    gated: bool,
    early: bool = False,
) -> None:
    """Row i of y is expert ids[i]'s product with row i / k of x; shape: of the ids.

    early: the kernel ahead waited for `work` before it let this one begin.
    """
    team = team_of(tiles.slabs)
    columns = next((c for c in (1, 2) if shape[0] <= (8, 384)[c - 1]), 4)
    held = 0 if team > 1 or tiles.slabs > 4 else 2 * tiles.slabs
    defines = (("ROWS8", columns), ("GROUPS", _GROUPS), ("GATED", int(gated)), ("HELD", held), ("EARLY", int(early)))
    own = kernel("nvfp4_experts.cu", "nvfp4_experts", "6P8i", defines, x.device.index)
    own(
        (_multiprocessors(x.device.index) * (2 if columns <= 2 else 1), 1, 1),
        32 * _WARPS,
        shared_bytes(columns),
        tiles.data.data_ptr(),
        tiles.row_scale.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        order.data_ptr(),
        work.data_ptr(),
        x.shape[1],
        x.stride(0),
        y.stride(0),
        tiles.groups,
        tiles.slabs,
        team,
        y.shape[1],
        k,
    )


def team_of(slabs: int) -> int:
    """Warps that share the inputs of a product: about four slabs each."""
    return next(team for team in (1, 2, 4, 8) if slabs <= 4 * team or team == 8)


def shared_bytes(columns: int) -> int:
    """Of a block: the warps' rings, and two sets of sums each."""
    outputs = _GROUPS * 16
    return _WARPS * (_STAGES * _GROUPS * SLAB_BYTES + 2 * outputs * (8 * columns + 1) * 4)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def grouped(x: Tensor, ids: Tensor, weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
    """As `listed`, for so many rows that every expert is decoded once and the library multiplies them by groups.

    The scratch memory holds one of the layer's two decoded stacks at a time.
    """
    slices = zip(x.split(_SLICE), ids.split(_SLICE), weights.split(_SLICE), strict=True)
    return torch.cat([_grouped(*slice_, gate_up, down) for slice_ in slices])


def _grouped(x: Tensor, ids: Tensor, weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
    tiles: Tiles = gate_up.data
    experts, k = tiles.data.shape[0], ids.shape[1]
    sorted_ids, order = torch.where(ids < 0, experts, ids).flatten().to(torch.int16).sort(stable=True)
    numbers = torch.arange(experts, dtype=torch.int16, device=x.device)
    ends = torch.searchsorted(sorted_ids, numbers, right=True, out_int32=True)
    x = rounded_input(x, gate_up)
    rows = torch.empty(len(order), x.shape[1], dtype=torch.bfloat16, device=x.device)
    kernel("combine.cu", "gather", "4P4i", (), x.device.index)(
        (len(order), 1, 1),
        256,
        0,
        x.data_ptr(),
        order.data_ptr(),
        sorted_ids.data_ptr(),
        rows.data_ptr(),
        x.shape[1],
        x.stride(0),
        experts,
        k,
    )
    gate_and_up = _by_group(rows, gate_up, ends)
    h = torch.empty(len(order), tiles.half, dtype=torch.bfloat16, device=x.device)
    kernel("combine.cu", "activate", "4P3i", (), x.device.index)(
        (len(order), -(-tiles.half // 1024), 1),
        128,
        0,
        gate_and_up.data_ptr(),
        tiles.row_scale.data_ptr(),
        sorted_ids.data_ptr(),
        h.data_ptr(),
        tiles.half,
        tiles.row_scale.shape[1],
        experts,
    )
    del rows, gate_and_up
    outputs = _by_group(rounded_input(h, down), down, ends)
    places = torch.empty(len(order), dtype=torch.int32, device=x.device)
    places[order] = torch.arange(len(order), dtype=torch.int32, device=x.device)
    return combine(outputs, ids, weights * down.data.row_scale[:, 0][ids.clamp(min=0)], places)


def _by_group(rows: Tensor, weight: PreparedWeight, ends: Tensor) -> Tensor:
    """rows [n, in], those of expert e ending at ends[e], times its weights without their tensor scale: [n, out]."""
    values = decode(weight.data, None, weight.out_features, weight.in_features)
    return torch.nn.functional.grouped_mm(rows, values.transpose(1, 2), offs=ends)


def combine(outputs: Tensor, ids: Tensor, weights: Tensor, places: Tensor | None = None) -> Tensor:
    """y[t] = sum over k of weight[t, k] * outputs[t * k + k], where the id is not below 0.

    places: int32 [tokens * k], which row of `outputs` is each choice's; None: they are in order.
    """
    tokens, k = ids.shape
    y = torch.empty(tokens, outputs.shape[1], dtype=torch.bfloat16, device=outputs.device)
    kernel("combine.cu", "combine", "5P2i", (), y.device.index)(
        (-(-y.shape[1] // 1024), tokens, 1),
        128,
        0,
        outputs.data_ptr(),
        0 if places is None else places.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        y.data_ptr(),
        y.shape[1],
        k,
    )
    return y
