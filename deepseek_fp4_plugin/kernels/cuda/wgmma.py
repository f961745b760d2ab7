"""Many rows times NVFP4 tiles on Hopper's matrix unit: how a product is cut, and the launch."""

import bisect
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED, kernel, together
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB_BYTES, Tiles


class Cut(NamedTuple):
    """rows: of a block.  outs: times 64 outputs of a warpgroup.  warps: of a block.  stages: slabs in its ring.
    cluster: blocks that share inputs."""

    rows: int
    outs: int
    warps: int
    stages: int
    cluster: int

    @property
    def outputs(self) -> int:
        return 16 * self.warps * self.outs

    @property
    def arrangers(self) -> int:
        """Warps that put a block's inputs in order: they share two halves of each row."""
        return 16 if 2 * self.rows % 32 else 32

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: the ring, and in its place at the end the sums."""
        ring = self.stages * (256 * self.rows + self.warps * self.outs * SLAB_BYTES)
        return 2048 + max(ring, 4 * self.rows * (self.outputs + 4))

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor is compiled to hold."""
        return max(1, min(MAX_SHARED // self.shared, 768 // (32 * self.warps + 128), 3))


# The fastest of each shape (groups of 16 outputs, slabs of 128 inputs) and of so many rows at most, as measured on an
# H200, 512 rows of 4608 x 7168 on an H100; None where another way is ahead. Behind the last the last.
_ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_MEASURED: dict[tuple[int, int], tuple[Cut | None, ...]] = {
    (448, 2): (
        Cut(16, 1, 4, 6, 1),
        Cut(16, 1, 4, 12, 1),
        Cut(16, 1, 8, 6, 1),
        Cut(32, 1, 8, 5, 1),
        Cut(64, 1, 8, 4, 1),
        Cut(64, 2, 8, 2, 1),
        None,
        None,
        None,
    ),
    (448, 16): (
        None,
        Cut(32, 1, 8, 5, 2),
        Cut(64, 1, 4, 8, 1),
        Cut(64, 1, 8, 8, 1),
        Cut(128, 1, 8, 4, 1),
        Cut(128, 2, 8, 4, 1),
        Cut(128, 2, 8, 4, 1),
        None,
        None,
    ),
    (448, 18): (
        None,
        Cut(32, 1, 4, 10, 1),
        Cut(64, 1, 4, 8, 1),
        Cut(64, 1, 8, 8, 1),
        Cut(128, 1, 8, 4, 1),
        Cut(128, 2, 8, 4, 1),
        Cut(128, 2, 8, 4, 1),
        None,
        None,
    ),
    (32, 56): (
        Cut(16, 1, 4, 12, 8),
        Cut(32, 1, 4, 5, 8),
        Cut(64, 1, 4, 8, 8),
        Cut(64, 1, 4, 8, 4),
        Cut(64, 1, 4, 4, 6),
        Cut(64, 1, 4, 8, 2),
        None,
        None,
        None,
    ),
    (256, 56): (
        Cut(16, 1, 4, 6, 4),
        Cut(32, 1, 4, 10, 2),
        Cut(64, 1, 4, 8, 2),
        Cut(64, 1, 4, 4, 2),
        Cut(128, 1, 8, 4, 2),
        Cut(128, 1, 8, 4, 1),
        Cut(128, 2, 8, 4, 1),
        Cut(128, 2, 8, 4, 1),
        None,
    ),
    (288, 56): (
        Cut(16, 1, 4, 6, 4),
        Cut(32, 1, 4, 5, 4),
        Cut(64, 1, 8, 6, 3),
        Cut(128, 1, 8, 4, 3),
        Cut(128, 1, 12, 4, 2),
        Cut(112, 1, 12, 4, 1),
        Cut(152, 2, 8, 3, 1),
        None,
        None,
    ),
    (2304, 56): (
        Cut(16, 1, 4, 6, 1),
        Cut(32, 1, 4, 5, 2),
        Cut(64, 1, 8, 4, 2),
        Cut(128, 1, 12, 4, 2),
        Cut(128, 1, 12, 4, 1),
        Cut(128, 1, 12, 4, 1),
        Cut(128, 2, 8, 4, 1),
        Cut(128, 2, 8, 4, 1),
        Cut(128, 2, 8, 4, 1),
    ),
    (448, 128): (
        None,
        Cut(32, 1, 8, 5, 4),
        Cut(64, 1, 8, 4, 4),
        Cut(128, 1, 8, 4, 2),
        Cut(128, 2, 8, 4, 2),
        Cut(128, 2, 8, 4, 1),
        Cut(128, 2, 8, 4, 1),
        None,
        None,
    ),
    (448, 144): (
        Cut(16, 1, 8, 6, 4),
        Cut(32, 1, 4, 5, 3),
        Cut(64, 1, 4, 4, 2),
        Cut(128, 1, 8, 4, 2),
        Cut(128, 2, 8, 4, 2),
        Cut(128, 2, 8, 4, 1),
        Cut(128, 2, 8, 4, 1),
        None,
        None,
    ),
}
_SECOND_CACHE = 50 << 20  # bytes
_FEW_ROWS = 8  # for which few-row kernels are ahead


@functools.cache
def choose(device: int, groups: int, slabs: int, rows: int) -> Cut | None:
    """The cut for `rows` rows by tiles of `groups` by `slabs` on this GPU: that of the measured shape nearest to it."""
    if rows <= _FEW_ROWS or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    return nearest(groups, slabs, rows)


def nearest(groups: int, slabs: int, rows: int) -> Cut | None:
    """`choose`, of a Hopper GPU."""
    shape = min(_MEASURED, key=lambda shape: abs(math.log(shape[0] / groups)) + abs(math.log(shape[1] / slabs)))
    cut = _MEASURED[shape][min(bisect.bisect_left(_ROWS, rows), len(_ROWS) - 1)]
    return cut and cut._replace(cluster=min(cut.cluster, slabs))


def launch(x: Tensor, tiles: Tiles, expert: int, y: Tensor, out: int, gated: bool, cut: Cut) -> None:
    """y = x W^T of one expert's tiles; gated: silu(gate x) * up x."""
    together(x, tiles.data)
    rows, width = x.shape
    defines = (
        ("ROWS", cut.rows),
        ("OUTS", cut.outs),
        ("WARPS", cut.warps),
        ("STAGES", cut.stages),
        ("MIN_BLOCKS", cut.resident),
        ("GATED", int(gated)),
    )
    row_blocks = -(-rows // cut.rows)
    arranged = torch.empty(row_blocks * cut.rows * tiles.slabs * 256, dtype=torch.uint8, device=x.device)
    kernel("nvfp4_wgmma.cu", "arrange", "2P4i", defines, x.device.index)(
        (tiles.slabs, row_blocks, 1),
        32 * cut.arrangers,
        0,
        x.data_ptr(),
        arranged.data_ptr(),
        rows,
        width,
        x.stride(0),
        tiles.slabs,
    )
    blocks = -(-tiles.groups // (cut.warps * cut.outs))
    kernel("nvfp4_wgmma.cu", "nvfp4_wgmma", "4P7i", defines, x.device.index)(
        (blocks * cut.cluster, row_blocks, 1),
        32 * cut.warps + 128,
        cut.shared,
        tiles.data[expert].data_ptr(),
        tiles.row_scale[expert].data_ptr(),
        arranged.data_ptr(),
        y.data_ptr(),
        rows,
        y.stride(0),
        tiles.groups,
        tiles.slabs,
        out,
        tiles.half,
        8 if tiles.data[expert].numel() > _SECOND_CACHE else 1,
        cluster=cut.cluster,
    )
