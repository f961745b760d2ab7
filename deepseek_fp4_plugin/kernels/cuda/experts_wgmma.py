"""Routed experts of many rows on Hopper's matrix unit: each expert's rows, in blocks, by its weights in tiles."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.experts import combine, multiprocessors, sort_choices
from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED, kernel
from deepseek_fp4_plugin.kernels.cuda.linear import rounded_input
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB, SLAB_BYTES, Tiles
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

_GROUPS = 16  # of outputs that a block of threads has
_WARPS = 8 + 4  # of a block: those that multiply, and those that copy
_SIZES = 8  # numbers of columns of a block's rows, as in source/experts_work.cu
_SLICE = 8192  # tokens whose rows are sorted and multiplied together


class Blocks(NamedTuple):
    """rows: of a block, at most.  first, first + step, ... rows: columns of the matrix unit that there is code for.
    stages: slabs in the ring.  resident: blocks that a multiprocessor holds.  launches: one for each number of columns.
    """

    rows: int
    first: int
    step: int
    stages: int
    resident: int
    launches: bool = False

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the ring, and what aligns it."""
        return 1024 + self.stages * (256 * self.rows + _GROUPS * SLAB_BYTES)

    @property
    def columns(self) -> list[int]:
        """Of each launch, the largest first; 0: all that there is code for."""
        return list(range(self.rows, self.first - 1, -self.step)) if self.launches else [0]

    def of(self, columns: int) -> "Blocks":
        """Of the launch for so many columns: with as many slabs as there is room for."""
        if not columns:
            return self
        slab = Blocks(columns, columns, columns, 1, 1).shared - 1024
        return self._replace(rows=columns, stages=min(self.stages, (MAX_SHARED - 1024) // slab))


# The fastest for experts of so many rows at most, as measured on an H100; the last for all that have more.
MEASURED = {
    10: Blocks(16, 16, 16, 4, 2),
    24: Blocks(32, 32, 32, 4, 2),
    40: Blocks(48, 48, 48, 3, 2),
    96: Blocks(128, 64, 32, 4, 1),
    128: Blocks(160, 96, 16, 4, 1, True),
}


def blocks_for(rows: float) -> Blocks:
    """What fits experts of so many rows on average."""
    return next((cut for most, cut in MEASURED.items() if rows <= most), MEASURED[128])


@functools.cache
def available(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def by_blocks(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight, cut: Blocks
) -> Tensor:
    """As `experts.listed`; hidden values have no FP4 rounding of their own."""
    slices = zip(x.split(_SLICE), ids.split(_SLICE), weights.split(_SLICE), strict=True)
    results = [_by_blocks(*slice_, gate_up, down, cut) for slice_ in slices]
    return results[0] if len(results) == 1 else torch.cat(results)


def _by_blocks(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight, cut: Blocks
) -> Tensor:
    tiles: Tiles = gate_up.data
    choices, experts, device = ids.numel(), tiles.data.shape[0], x.device
    most = choices // cut.rows + min(experts, choices)  # blocks; how many there are the device knows
    order = torch.empty(choices, dtype=torch.int32, device=device)
    blocks = torch.empty(_SIZES + 4 * most, dtype=torch.int32, device=device)
    first, step = (cut.first, cut.step) if cut.launches else (cut.rows, 1)
    sort_choices(ids, order, experts, blocks=blocks, rows=cut.rows, first=first, step=step)
    arranged = _arranged(rounded_input(x, gate_up), tiles.slabs, order, blocks, most, ids.shape[1], cut)
    h = torch.empty(most * down.data.slabs * cut.rows * 2 * SLAB, dtype=torch.uint8, device=device)
    _product(arranged, tiles, h, order, blocks, 0, cut)
    del arranged
    outputs = torch.empty(choices, down.out_features, dtype=torch.bfloat16, device=device)
    _product(h, down.data, outputs, order, blocks, down.out_features, cut)
    return combine(outputs, ids, weights)


def _arranged(x: Tensor, slabs: int, order: Tensor, blocks: Tensor, most: int, k: int, cut: Blocks) -> Tensor:
    """The blocks' rows of x, as the product's kernel reads them."""
    arranged = torch.empty(most * slabs * cut.rows * 2 * SLAB, dtype=torch.uint8, device=x.device)
    kernel("nvfp4_experts_wgmma.cu", "arrange_rows", "4P4i", _defines(cut, True, cut.columns[0]), x.device.index)(
        (3 * multiprocessors(x.device.index), 1, 1),
        512,
        0,
        x.data_ptr(),
        arranged.data_ptr(),
        order.data_ptr(),
        blocks.data_ptr(),
        x.shape[1],
        x.stride(0),
        slabs,
        k,
    )
    return arranged


def _product(x: Tensor, tiles: Tiles, y: Tensor, order: Tensor, blocks: Tensor, out: int, cut: Blocks) -> None:
    """Each block's rows by its expert's tiles; out: outputs of a row, 0 where hidden values are what is stored."""
    for columns in cut.columns:
        kernel(
            "nvfp4_experts_wgmma.cu", "nvfp4_experts_wgmma", "6P3i", _defines(cut, not out, columns), x.device.index
        )(
            (multiprocessors(x.device.index) * cut.resident, 1, 1),
            32 * _WARPS,
            cut.of(columns).shared,
            tiles.data.data_ptr(),
            tiles.row_scale.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            order.data_ptr(),
            blocks.data_ptr(),
            tiles.groups,
            tiles.slabs,
            out,
        )


def _defines(cut: Blocks, gated: bool, columns: int) -> tuple[tuple[str, int], ...]:
    return (
        ("ROWS", cut.rows),
        ("FIRST", cut.first),
        ("STEP", cut.step),
        ("STAGES", cut.of(columns).stages),
        ("MIN_BLOCKS", cut.resident),
        ("GATED", int(gated)),
        ("ONLY", columns),
    )
