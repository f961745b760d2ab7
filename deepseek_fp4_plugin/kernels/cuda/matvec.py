"""One to eight rows times NVFP4 tiles, or a few tokens' times their experts': how a product is cut, and the launch."""

import functools
from typing import NamedTuple

from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, together
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB_BYTES, Tiles

_MULTIPROCESSORS = 132
_ROWS, _WARPS = 8, 8
_BLOCKS = 2 * _MULTIPROCESSORS  # of experts' products, that run at once
_TURNS = 4  # of such a block, at most


class Cut(NamedTuple):
    """groups: of 16 outputs a warp has.  warps: of a block, over inputs.  stages: slabs in a warp's ring.  depth: tiles
    of activations under way.  resident: blocks that a multiprocessor is compiled to hold.  cluster: blocks that share
    inputs.  blocks: clusters of them."""

    groups: int
    warps: int
    stages: int
    depth: int
    resident: int
    cluster: int
    blocks: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: two sets of sums, and the warps' rings."""
        return self.warps * self.groups * (2 * 4 * 16 * 9 + self.stages * SLAB_BYTES) + 128


@functools.cache
def choose(groups: int, slabs: int, rows: int) -> Cut | None:
    """The cut for `rows` rows by tiles of `groups` by `slabs`; None for more rows, and for so few inputs that warps
    would have none."""
    if not 0 < rows <= _ROWS or slabs < _WARPS:
        return None
    if groups > 3 * _MULTIPROCESSORS:  # activations serve two groups at once
        sets = -(-groups // 2)
        turns = -(-sets // (2 * _MULTIPROCESSORS))
        return Cut(2, _WARPS, 3, 4, 2, 1, -(-sets // turns))
    cluster = 1
    while cluster < 4 and 2 * cluster * groups <= 2 * _MULTIPROCESSORS and 2 * cluster * _WARPS <= slabs:
        cluster *= 2
    if cluster * groups <= 2 * _MULTIPROCESSORS:
        return Cut(1, _WARPS, 4, 4, 2, cluster, groups)
    return Cut(1, _WARPS, 4, 2, 3, cluster, groups)


@functools.cache
def choose_experts(groups: int, slabs: int, choices: int, most: int) -> Cut:
    """The cut for each of about so many choices, `most` at most, by tiles of `groups` by `slabs`; its blocks are one
    choice's."""
    each, warps = 1 if groups * choices <= _BLOCKS else 2, min(_WARPS, slabs)
    sets, cluster = -(-groups // each), 1
    while cluster < 4 and 2 * cluster * sets * choices <= _BLOCKS and 2 * cluster * warps <= slabs:
        cluster *= 2
    turns = min(_TURNS, max(1, round(sets * choices * cluster / _BLOCKS)))
    # Where more choices may be here than on average, there is room for them: a second turn would take as long again.
    return Cut(each, warps, 3, 4, 3 if each == 1 and choices < most else 2, cluster, -(-sets // turns))


def launch(
    x: Tensor, tiles: Tiles, expert: int, y: Tensor, out: int, gated: bool, cut: Cut, ids: Tensor | None = None
) -> None:
    """y = x W^T of one expert's tiles and 1 to 8 rows; gated: silu(gate x) * up x.

    With ids int64 [tokens, k], 64 at most, row i of y is a product of choice i's expert, unwritten where none is here:
    gated with row i / k of x; else with row i, and it must follow the kernel that made x and waited for the ids.
    """
    choices = 1 if ids is None else ids.numel()
    more = () if ids is None else (ids.data_ptr(), choices, choices // x.shape[0])
    together(x, tiles.data)
    defines = (
        ("ROWS8", 1),
        ("GROUPS", cut.groups),
        ("WARPS", cut.warps),
        ("STAGES", cut.stages),
        ("DEPTH", cut.depth),
        ("MIN_BLOCKS", cut.resident),
        ("GATED", int(gated)),
        ("EXPERTS", int(ids is not None)),
    )
    kernel("nvfp4_matvec.cu", "nvfp4_matvec", "4P8i" if ids is None else "4P8iP2i", defines, x.device.index)(
        (cut.blocks * cut.cluster, choices, 1),
        32 * cut.warps,
        cut.shared,
        tiles.data[expert].data_ptr(),
        tiles.row_scale[expert].data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        *x.shape,
        x.stride(0),
        y.stride(0),
        tiles.groups,
        tiles.slabs,
        out,
        tiles.half,
        *more,
        cluster=cut.cluster,
    )
