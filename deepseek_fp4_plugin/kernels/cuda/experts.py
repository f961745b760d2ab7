"""Routed experts of more than a few tokens: by a list of the experts that were chosen, or all decoded at once."""

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.decode import decode
from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, multiprocessors
from deepseek_fp4_plugin.kernels.cuda.linear import rounded_input
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB_BYTES, Tiles
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

_WARPS, _RING = 8, 8  # of a block, slabs of a warp's ring
_ONE_BLOCK, _CLUSTER = 4096, 8  # choices that one block sorts at most, blocks that sort more
_MANY_TOKENS = 512  # from which a block sums up more of a token
_SLICE = 8192  # tokens whose rows are sorted and multiplied together


def listed(x: Tensor, ids: Tensor, weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
    """y[t] = sum over k of weight[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]), each expert's weights read once.

    x: BF16 [tokens, hidden].  ids: int64 [tokens, k], below 0 where an expert is not here.  weights: FP32 [tokens, k].
    """
    choices, experts = ids.numel(), gate_up.data.data.shape[0]
    order = torch.empty(choices, dtype=torch.int32, device=x.device)
    work = torch.empty(4 + 2 * (experts + choices // 8), dtype=torch.int32, device=x.device)
    sort_choices(ids, order, experts, work, residence(ids.shape[0], ids.shape[1], experts).columns)
    h = torch.empty(choices, gate_up.data.half, dtype=torch.bfloat16, device=x.device)
    _products(rounded_input(x, gate_up), gate_up.data, h, order, work, ids.shape, ids.shape[1], gated=True)
    outputs = torch.empty(choices, down.out_features, dtype=torch.bfloat16, device=x.device)
    _products(rounded_input(h, down), down.data, outputs, order, work, ids.shape, 1, gated=False, early=True)
    return combine(outputs, ids, weights, early=True)


def sort_choices(
    ids: Tensor,
    order: Tensor,
    experts: int,
    work: Tensor | None = None,
    columns: int = 0,
    blocks: Tensor | None = None,
    rows: int = 0,
    first: int = 0,
    step: int = 1,
) -> None:
    """Fills `order`, and `work` or `blocks`, sorted by size: see source/experts_work.cu.

    columns: of 8 rows, that `work` has multiplied at a time, at most.  rows: of a block, at most.
    """
    cluster = _CLUSTER if ids.numel() > _ONE_BLOCK else 1
    kernel("experts_work.cu", "experts_work", "4P6i", (), ids.device.index)(
        (cluster, 1, 1),
        512,
        0,
        ids.data_ptr(),
        order.data_ptr(),
        0 if work is None else work.data_ptr(),
        0 if blocks is None else blocks.data_ptr(),
        ids.numel(),
        experts,
        columns,
        rows,
        first,
        step,
        cluster=cluster,
    )


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
    team, fit = team_of(tiles.slabs), residence(shape[0], shape[1], tiles.data.shape[0])
    alone = team == 1  # its activations stay in registers; a team of many reads them again for each item
    defines = (
        ("ROWS8", fit.columns),
        ("GROUPS", _groups(team)),
        ("GATED", int(gated)),
        ("HELD", 2 * tiles.slabs if alone else 0),
        ("RING", _RING),
        ("WARPS", _WARPS),
        ("BLOCKS", fit.blocks),
        ("EARLY", int(early)),
    )
    kernel("nvfp4_experts.cu", "nvfp4_experts", "6P8i", defines, x.device.index)(
        (multiprocessors(x.device.index) * fit.blocks, 1, 1),
        32 * _WARPS,
        fit.shared(team),
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


def _groups(team: int) -> int:
    """Groups of outputs that are multiplied by the same activations, at most: a warp alone keeps those, others ask for
    them again."""
    return 2 if team == 1 else 4


class Residence(NamedTuple):
    """columns: of 8 rows that a warp multiplies at a time, at most.  blocks: that a multiprocessor holds."""

    columns: int
    blocks: int

    def shared(self, team: int) -> int:
        """Bytes of shared memory of a block: the warps' rings, and their sums where they share a product."""
        sums = 0 if team == 1 else _groups(team) * 16 * (8 * self.columns + 1) * 4
        return _WARPS * (_RING * SLAB_BYTES + sums)


def residence(tokens: int, k: int, experts: int) -> Residence:
    """What fits the rows of an expert, about as many as it has; the kernel takes fewer columns where they are fewer."""
    rows = expected_rows(tokens, k, experts)
    return Residence(2, 2) if rows <= 12 else Residence(4, 1)


def expected_rows(tokens: int, k: int, experts: int) -> float:
    """Rows of each of these experts on average, where the host cannot count them. A rank may hold a few of a model's
    experts; that a model has 32 times as many as a token takes is right for DeepSeek-V3."""
    return tokens * k / max(experts, 32 * k)


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


def combine(outputs: Tensor, ids: Tensor, weights: Tensor, places: Tensor | None = None, early: bool = False) -> Tensor:
    """y[t] = sum over k of weight[t, k] * outputs[t * k + k], where the id is not below 0.

    places: int32 [tokens * k], which row of `outputs` is each choice's; None: they are in order.
    early: the kernels ahead waited for ids and weights before they let this one begin.
    """
    tokens, k = ids.shape
    y = torch.empty(tokens, outputs.shape[1], dtype=torch.bfloat16, device=outputs.device)
    name, chunks = ("combine_many", 4) if tokens >= _MANY_TOKENS else ("combine", 1)
    kernel("combine.cu", name, "5P3i", (), y.device.index)(
        (-(-y.shape[1] // (1024 * chunks)), tokens, 1),
        128,
        0,
        outputs.data_ptr(),
        0 if places is None else places.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        y.data_ptr(),
        y.shape[1],
        k,
        int(early),
    )
    return y
