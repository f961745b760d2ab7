"""Routed experts of many rows on Hopper's matrix unit: each expert's rows, in blocks, by its weights in tiles."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.experts import combine, sort_choices
from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED, kernel, multiprocessors
from deepseek_fp4_plugin.kernels.cuda.linear import rounded_input
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB, SLAB_BYTES, Tiles
from deepseek_fp4_plugin.kernels.weights import Activations, PreparedWeight

_WARPS = 8 + 4  # of a block: those that multiply, and those that copy
_SUMS = 320  # columns times outs that a block's registers hold
_SIZES = 8  # numbers of columns of a block's rows, as in source/experts_work.cu
_SLICE, _SLICE_FP8 = 8192, 16384  # tokens whose rows are sorted and multiplied together


class Blocks(NamedTuple):
    """rows: of a block, at most.  first, first + step, ... rows: columns of the matrix unit that there is code for.
    stages: slabs in the ring.  resident: blocks that a multiprocessor holds.  launches: one for each number of columns.
    outs: times 128 outputs of a block of threads, where there are registers for them.
    gathers: the first product gathers rows from tokens in order, which for few rows is faster than from rows in order.
    fp8: both sides are rounded to E4M3.
    """

    rows: int
    first: int
    step: int
    stages: int
    resident: int
    launches: bool = False
    outs: int = 2
    gathers: bool = False
    fp8: bool = False

    @property
    def input_bytes(self) -> int:
        """Of a row's slab."""
        return SLAB if self.fp8 else 2 * SLAB

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the ring, and what aligns it."""
        return 1024 + self.stages * (self.input_bytes * self.rows + 8 * self.outs * SLAB_BYTES)

    @property
    def columns(self) -> list[int]:
        """Of each launch, the largest first; 0: all that there is code for."""
        return list(range(self.rows, self.first - 1, -self.step)) if self.launches else [0]

    def of(self, columns: int) -> "Blocks":
        """Of the launch for so many columns: with as many outputs and slabs as there is room for."""
        if not columns:
            return self
        outs = self.outs if self.outs * columns <= _SUMS else 1
        slab = self._replace(rows=columns, stages=1, outs=outs).shared - 1024
        return self._replace(rows=columns, stages=min(self.stages, (MAX_SHARED - 1024) // slab), outs=outs)


# The fastest for experts of so many rows at most, as measured on an H200.
MEASURED = {
    9: Blocks(16, 16, 16, 4, 2, gathers=True),
    23: Blocks(32, 16, 8, 4, 2, gathers=True),
    34: Blocks(48, 16, 8, 4, 2, outs=1, gathers=True),
    56: Blocks(64, 16, 8, 4, 2, outs=1, gathers=True),
    96: Blocks(128, 64, 32, 4, 1),
    192: Blocks(160, 80, 16, 4, 1, True),
    math.inf: Blocks(208, 96, 16, 4, 1, True),
}


# Of FP8 products; for fewer rows of an expert BF16 ones are ahead.
FP8_ROWS = 384
FP8 = Blocks(256, 128, 32, stages=5, resident=1, launches=True, outs=1, fp8=True)


def blocks_for(rows: float, activations: Activations = "bf16") -> Blocks:
    """What fits experts of so many rows on average."""
    if activations == "fp8" and rows >= FP8_ROWS:
        return FP8
    return next(cut for most, cut in MEASURED.items() if rows <= most)


@functools.cache
def available(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def by_blocks(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight, cut: Blocks
) -> Tensor:
    """As `experts.listed`; hidden values have no FP4 rounding of their own."""
    most = _SLICE_FP8 if cut.fp8 else _SLICE
    each = -(-len(x) // -(-len(x) // most))
    slices = zip(x.split(each), ids.split(each), weights.split(each), strict=True)
    results = [_by_blocks(*slice_, gate_up, down, cut) for slice_ in slices]
    return results[0] if len(results) == 1 else torch.cat(results)


def _by_blocks(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight, cut: Blocks
) -> Tensor:
    tiles: Tiles = gate_up.data
    turns = Turns.of(ids, tiles.data.shape[0], cut)
    x = rounded_input(x, gate_up)
    if cut.fp8:
        h = torch.empty(ids.numel(), tiles.half, dtype=torch.bfloat16, device=x.device)
        _product(_rounded(x, tiles.slabs, turns, ids.shape[1]), tiles, h, turns, 0)
        hidden = _rounded(h, down.data.slabs, turns, 0)
    else:
        h = torch.empty(turns.most * down.data.slabs * cut.rows * 2 * SLAB, dtype=torch.uint8, device=x.device)
        rows = _tokens(x, ids, tiles.slabs, cut) if cut.gathers else _arranged(x, tiles.slabs, turns, ids.shape[1])
        _product(rows, tiles, h, turns, 0, ids.shape[1])
        hidden = Rows(h)
    outputs = torch.empty(ids.numel(), down.out_features, dtype=torch.bfloat16, device=x.device)
    _product(hidden, down.data, outputs, turns, down.out_features)
    return combine(outputs, ids, weights)


class Turns(NamedTuple):
    """Choices in the order of experts, cut into blocks: see source/experts_work.cu.  most: blocks that there may be;
    how many there are the device knows."""

    order: Tensor
    blocks: Tensor
    most: int
    cut: Blocks

    @classmethod
    def of(cls, ids: Tensor, experts: int, cut: Blocks) -> "Turns":
        choices, device = ids.numel(), ids.device
        most = choices // cut.rows + min(experts, choices)
        order = torch.empty(choices, dtype=torch.int32, device=device)
        blocks = torch.empty(_SIZES + 4 * most, dtype=torch.int32, device=device)
        first, step = (cut.first, cut.step) if cut.launches else (cut.rows, 1)
        sort_choices(ids, order, experts, blocks=blocks, rows=cut.rows, first=first, step=step)
        return cls(order, blocks, most, cut)


class Rows(NamedTuple):
    """The blocks' rows, or tokens, as the product's kernel reads them; of FP8 the scale of each row, FP32 [choices]."""

    data: Tensor
    scale: Tensor | None = None


def _arranged(x: Tensor, slabs: int, turns: Turns, k: int) -> Rows:
    """Choice i takes row i / k of x."""
    cut = turns.cut
    data = torch.empty(turns.most * slabs * cut.rows * 2 * SLAB, dtype=torch.uint8, device=x.device)
    kernel("nvfp4_experts_wgmma.cu", "arrange_rows", "4P4i", _defines(cut, True, cut.columns[0]), x.device.index)(
        (3 * multiprocessors(x.device.index), 1, 1),
        512,
        0,
        x.data_ptr(),
        data.data_ptr(),
        turns.order.data_ptr(),
        turns.blocks.data_ptr(),
        x.shape[1],
        x.stride(0),
        slabs,
        k,
    )
    return Rows(data)


def _tokens(x: Tensor, ids: Tensor, slabs: int, cut: Blocks) -> Rows:
    """The tokens that an expert here was chosen for; others' bytes are anything."""
    data = torch.empty(len(x) * slabs * 2 * SLAB, dtype=torch.uint8, device=x.device)
    kernel("nvfp4_experts_wgmma.cu", "arrange_tokens", "3P4i", _defines(cut, True, cut.columns[0]), x.device.index)(
        (len(x), 1, 1),
        256,
        0,
        x.data_ptr(),
        ids.data_ptr(),
        data.data_ptr(),
        x.shape[1],
        x.stride(0),
        slabs,
        ids.shape[1],
    )
    return Rows(data)


def _rounded(x: Tensor, slabs: int, turns: Turns, k: int) -> Rows:
    """As `_arranged`, in E4M3.  k: 0 where rows are in the order of experts."""
    cut = turns.cut
    data = torch.empty(turns.most * slabs * cut.rows * SLAB, dtype=torch.uint8, device=x.device)
    scale = torch.empty(turns.order.numel(), dtype=torch.float32, device=x.device)
    kernel("nvfp4_experts_wgmma.cu", "round_rows", "5P4i", _defines(cut, True, cut.columns[0]), x.device.index)(
        (12 * multiprocessors(x.device.index), 1, 1),
        128,
        0,
        x.data_ptr(),
        data.data_ptr(),
        scale.data_ptr(),
        turns.order.data_ptr() if k else 0,
        turns.blocks.data_ptr(),
        x.shape[1],
        x.stride(0),
        slabs,
        k,
    )
    return Rows(data, scale)


def _product(x: Rows, tiles: Tiles, y: Tensor, turns: Turns, out: int, k: int = 0) -> None:
    """Each block's rows by its expert's tiles; out: outputs of a row, 0 where hidden values are what is stored.

    k: choices of a token, where x may be tokens.
    """
    cut, device = turns.cut, y.device.index
    for columns in cut.columns:
        kernel("nvfp4_experts_wgmma.cu", "nvfp4_experts_wgmma", "7P5i", _defines(cut, not out, columns), device)(
            (multiprocessors(device) * cut.resident, 1, 1),
            32 * _WARPS,
            cut.of(columns).shared,
            tiles.data.data_ptr(),
            tiles.row_scale.data_ptr(),
            x.data.data_ptr(),
            y.data_ptr(),
            turns.order.data_ptr(),
            turns.blocks.data_ptr(),
            0 if x.scale is None else x.scale.data_ptr(),
            tiles.groups,
            tiles.slabs,
            out,
            tiles.half,
            k,
        )


def _defines(cut: Blocks, gated: bool, columns: int) -> tuple[tuple[str, int], ...]:
    return (
        ("ROWS", cut.rows),
        ("FIRST", cut.first),
        ("STEP", cut.step),
        ("STAGES", cut.of(columns).stages),
        ("MIN_BLOCKS", cut.resident),
        ("OUTS", cut.of(columns).outs),
        ("GATED", int(gated)),
        ("GATHERS", int(cut.gathers)),
        ("FP8", int(cut.fp8)),
        ("ONLY", columns),
    )
