"""How a product of many rows is cut for Hopper's matrix unit: as measured for few of them, by an estimate for more."""

import functools
import math
import operator
from typing import NamedTuple

import torch

from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED, multiprocessors
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB_BYTES

EVEN = 0  # as a cut's `cluster`


class Cut(NamedTuple):
    """rows: of a block.  outs: times 64 outputs of a warpgroup.  warps: of a block.  stages: slabs in its ring.
    cluster: blocks that share inputs; EVEN: a block a multiprocessor, all of which share all slabs."""

    rows: int
    outs: int
    warps: int
    stages: int
    cluster: int

    @property
    def outputs(self) -> int:
        return 16 * self.warps * self.outs

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: the ring, and in its place at the end the sums."""
        ring = self.stages * (256 * self.rows + self.warps * self.outs * SLAB_BYTES)
        return 2048 + max(ring, 4 * self.rows * (self.outputs + 4))

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor is compiled to hold."""
        return max(1, min(MAX_SHARED // self.shared, 768 // (32 * self.warps + 128), 3))


_ALL = 1 << 62
# 7168 outputs of 2,048 and 2,304 inputs.
_FEW_INPUTS = (
    (40, Cut(40, 1, 4, 8, 1)),
    (48, Cut(48, 1, 4, 8, 1)),
    (64, Cut(64, 1, 4, 6, 1)),
    (80, Cut(80, 1, 4, 8, 1)),
    (96, Cut(96, 1, 4, 6, 1)),
    (112, Cut(112, 1, 4, 6, 1)),
    (128, Cut(128, 1, 4, 6, 1)),
    (160, Cut(80, 1, 8, 6, 1)),
    (192, Cut(96, 1, 8, 6, 1)),
    (224, Cut(112, 1, 8, 5, 1)),
    (256, Cut(128, 1, 8, 5, 1)),
    (272, Cut(136, 1, 8, 5, 1)),
    (288, Cut(144, 1, 8, 4, 1)),
    (304, Cut(152, 1, 8, 4, 1)),
    (320, Cut(160, 1, 8, 4, 1)),
    (336, Cut(168, 1, 8, 4, 1)),
    (352, Cut(176, 1, 8, 4, 1)),
    (384, Cut(192, 1, 8, 3, 1)),
)
# 7168 outputs of 16,384 inputs and more: blocks that share inputs among more outputs are ahead of what is estimated.
_MANY_INPUTS = (
    (256, Cut(256, 1, 8, 3, EVEN)),
    (272, Cut(136, 1, 8, 5, EVEN)),
    (288, Cut(144, 1, 8, 4, EVEN)),
    (304, Cut(152, 1, 8, 4, EVEN)),
    (320, Cut(160, 1, 8, 4, EVEN)),
    (336, Cut(168, 1, 8, 4, EVEN)),
    (352, Cut(176, 1, 8, 4, EVEN)),
    (384, Cut(192, 1, 8, 3, EVEN)),
    (416, Cut(208, 1, 8, 3, EVEN)),
    (448, Cut(152, 1, 12, 4, EVEN)),
    (480, Cut(160, 1, 12, 4, EVEN)),
    (512, Cut(256, 1, 8, 3, EVEN)),
    (544, Cut(136, 2, 8, 4, EVEN)),
    (576, Cut(144, 2, 8, 4, EVEN)),
    (608, Cut(152, 2, 8, 3, EVEN)),
    (640, Cut(160, 1, 12, 4, EVEN)),
    (672, Cut(136, 2, 8, 4, EVEN)),
    (704, Cut(144, 2, 8, 4, EVEN)),
    (736, Cut(152, 2, 8, 3, EVEN)),
    (768, Cut(256, 1, 8, 3, EVEN)),
    (800, Cut(160, 1, 8, 4, EVEN)),
    (832, Cut(168, 1, 8, 4, EVEN)),
)
# The fastest of each shape (groups of 16 outputs, slabs of 128 inputs) for so many rows at most, as measured on an
# H200; None where another way is ahead. More rows than the last entry's are estimated, and those of other shapes and
# GPUs beyond _ALIKE: how blocks fill waves is a matter of both.
_MEASURED: dict[tuple[int, int], tuple[tuple[int, Cut | None], ...]] = {
    (448, 2): (
        (16, Cut(16, 1, 4, 6, 1)),
        (32, Cut(32, 1, 4, 12, 1)),
        (40, Cut(40, 1, 4, 8, 1)),
        (48, Cut(48, 1, 4, 8, 1)),
        (64, Cut(32, 1, 8, 12, 1)),
        (128, Cut(64, 1, 8, 8, 1)),
        (192, Cut(64, 1, 12, 6, 1)),
        (256, Cut(64, 1, 8, 4, 1)),
        (288, Cut(96, 1, 12, 5, 1)),
        (384, Cut(128, 1, 12, 4, 1)),
        (448, Cut(112, 2, 8, 4, 1)),
        (_ALL, None),
    ),
    (448, 16): (
        (16, None),
        (32, Cut(32, 1, 8, 5, 2)),
        *_FEW_INPUTS,
    ),
    (448, 18): (
        (16, None),
        (32, Cut(32, 1, 8, 6, 2)),
        *_FEW_INPUTS,
    ),
    (32, 56): (
        (16, Cut(16, 1, 4, 12, 8)),
        (32, Cut(32, 1, 4, 5, 8)),
        (40, Cut(40, 1, 4, 5, 8)),
        (56, Cut(56, 1, 4, 4, 8)),
        (64, Cut(64, 1, 4, 8, 8)),
        (96, Cut(96, 1, 4, 6, 8)),
        (112, Cut(112, 1, 4, 6, 8)),
        (128, Cut(64, 1, 4, 10, 6)),
        (192, Cut(64, 1, 4, 8, 4)),
        (256, Cut(64, 1, 4, 4, 6)),
        (_ALL, None),
    ),
    (256, 56): (
        (16, Cut(16, 1, 4, 10, 3)),
        (24, Cut(24, 1, 4, 8, 3)),
        (32, Cut(32, 1, 4, 8, 3)),
        (40, Cut(40, 1, 4, 5, 3)),
        (48, Cut(48, 1, 4, 5, 3)),
        (64, Cut(64, 1, 4, 8, 2)),
        (80, Cut(80, 1, 4, 8, 2)),
        (96, Cut(96, 1, 4, 6, 2)),
        (112, Cut(112, 1, 4, 6, 2)),
        (128, Cut(128, 1, 4, 6, 2)),
        (136, Cut(136, 1, 8, 5, 3)),
        (144, Cut(144, 1, 8, 4, 3)),
        (160, Cut(80, 1, 8, 6, 2)),
        (192, Cut(96, 1, 8, 6, 2)),
        (224, Cut(112, 1, 8, 5, 2)),
        (256, Cut(128, 1, 8, 5, 2)),
        (272, Cut(136, 1, 8, 5, 2)),
        (288, Cut(144, 1, 8, 4, 2)),
        (304, Cut(152, 1, 8, 4, 2)),
        (320, Cut(160, 1, 8, 4, 2)),
    ),
    # None of 72 clusters of three blocks, two on a multiprocessor: they do not always find room at once.
    (288, 56): (
        (16, Cut(16, 1, 8, 8, 3)),
        (32, Cut(32, 1, 4, 5, 4)),
        (40, Cut(40, 1, 4, 5, 3)),
        (48, Cut(48, 1, 8, 10, 3)),
        (64, Cut(64, 1, 8, 8, 3)),
        (80, Cut(80, 1, 8, 6, 3)),
        (96, Cut(96, 1, 8, 6, 3)),
        (112, Cut(112, 1, 8, 5, 3)),
        (128, Cut(128, 1, 8, 4, 3)),
        (136, Cut(136, 1, 8, 5, 3)),
        (144, Cut(144, 1, 8, 4, 3)),
        (160, Cut(160, 1, 8, 4, 3)),
        (168, Cut(168, 1, 8, 4, 3)),
        (176, Cut(176, 1, 8, 4, 3)),
        (192, Cut(192, 1, 8, 3, 3)),
        (208, Cut(208, 1, 8, 3, 3)),
        (224, Cut(112, 1, 8, 5, EVEN)),
        (256, Cut(128, 1, 8, 5, EVEN)),
        (272, Cut(136, 1, 8, 5, EVEN)),
        (288, Cut(144, 1, 8, 4, EVEN)),
        (304, Cut(152, 1, 8, 4, EVEN)),
        (320, Cut(160, 1, 8, 4, EVEN)),
        (336, Cut(168, 1, 8, 4, EVEN)),
        (352, Cut(176, 1, 8, 4, EVEN)),
        (384, Cut(128, 1, 8, 5, 1)),
        (432, Cut(144, 1, 8, 4, 1)),
        (456, Cut(152, 1, 8, 4, 1)),
        (480, Cut(160, 1, 8, 4, 1)),
        (504, Cut(168, 1, 8, 4, 1)),
        (528, Cut(176, 1, 8, 4, 1)),
        (576, Cut(192, 1, 8, 3, 1)),
    ),
    (2304, 56): (
        (16, Cut(16, 1, 4, 6, 1)),
        (24, Cut(24, 1, 4, 5, 1)),
        (32, Cut(32, 1, 4, 5, 1)),
        (40, Cut(40, 1, 4, 4, 1)),
        (48, Cut(48, 1, 4, 4, 1)),
        (56, Cut(56, 2, 8, 6, EVEN)),
        (64, Cut(64, 2, 8, 6, EVEN)),
        (80, Cut(80, 2, 8, 5, EVEN)),
        (96, Cut(96, 2, 8, 5, EVEN)),
        (112, Cut(112, 2, 8, 4, EVEN)),
        (128, Cut(128, 2, 8, 4, EVEN)),
        (136, Cut(136, 2, 8, 4, EVEN)),
        (144, Cut(144, 2, 8, 4, EVEN)),
        (160, Cut(160, 1, 8, 4, EVEN)),
        (168, Cut(168, 1, 8, 4, EVEN)),
        (176, Cut(176, 1, 8, 4, EVEN)),
    ),
    (448, 128): (
        (16, None),
        (24, Cut(24, 1, 4, 5, 3)),
        (32, Cut(32, 1, 8, 5, 4)),
        (40, Cut(40, 1, 4, 4, 3)),
        (48, Cut(48, 1, 4, 4, 3)),
        (64, Cut(64, 1, 4, 5, 2)),
        (80, Cut(80, 2, 8, 5, 4)),
        (96, Cut(96, 1, 8, 6, 2)),
        (112, Cut(112, 1, 8, 5, 2)),
        (128, Cut(128, 1, 8, 4, 2)),
        (136, Cut(136, 1, 8, 5, 2)),
        (144, Cut(144, 1, 8, 4, 2)),
        (160, Cut(160, 1, 8, 4, 2)),
        (168, Cut(168, 1, 8, 4, 2)),
        (176, Cut(176, 1, 8, 4, 2)),
        (192, Cut(192, 1, 8, 3, 2)),
        (208, Cut(208, 1, 8, 3, 2)),
        (224, Cut(112, 1, 8, 5, EVEN)),
        *_MANY_INPUTS,
    ),
    (448, 144): (
        (16, Cut(16, 1, 4, 6, 3)),
        (24, Cut(24, 1, 4, 5, 3)),
        (32, Cut(32, 1, 4, 5, 3)),
        (40, Cut(40, 1, 4, 4, 3)),
        (48, Cut(48, 1, 4, 4, 3)),
        (56, Cut(56, 1, 4, 5, 2)),
        (64, Cut(64, 1, 4, 4, 2)),
        (80, Cut(80, 1, 8, 6, 2)),
        (96, Cut(96, 1, 8, 6, 2)),
        (112, Cut(112, 1, 8, 5, 2)),
        (128, Cut(128, 1, 8, 4, 2)),
        (136, Cut(136, 1, 8, 5, 2)),
        (144, Cut(144, 1, 8, 4, 2)),
        (160, Cut(160, 1, 8, 4, 2)),
        (168, Cut(168, 1, 8, 4, 2)),
        (176, Cut(176, 1, 8, 4, 2)),
        (192, Cut(192, 1, 8, 3, 2)),
        (208, Cut(208, 1, 8, 3, 2)),
        (224, Cut(112, 2, 8, 4, 2)),
        *_MANY_INPUTS,
    ),
}
_FEW_ROWS = 8  # for which few-row kernels are ahead
_ALIKE = 128  # rows up to which a shape takes the cuts of the nearest measured one

# Blocks run in waves, one on each multiprocessor. A block takes so many microseconds for a slab, and beside its slabs:
# benchmarks/cuda_cuts.py measures products and fits these numbers to them: those of 72 to 1,024 rows on an H200,
# 2.9 % root mean square. Chosen by the estimate, a product takes 0.6 % longer on average than by the best cut tried.
COSTS = {
    (80, 1, 8): (0.616, 2.4),
    (80, 1, 12): (0.910, 1.9),
    (80, 2, 8): (1.078, 3.3),
    (96, 1, 8): (0.640, 2.7),
    (96, 1, 12): (0.973, 2.0),
    (96, 2, 8): (1.184, 3.2),
    (112, 1, 8): (0.699, 2.5),
    (112, 1, 12): (1.055, 1.9),
    (112, 2, 8): (1.306, 2.7),
    (128, 1, 8): (0.760, 2.2),
    (128, 1, 12): (1.104, 2.1),
    (128, 2, 8): (1.412, 2.8),
    (136, 1, 8): (0.777, 2.4),
    (136, 1, 12): (1.144, 2.1),
    (136, 2, 8): (1.462, 3.4),
    (144, 1, 8): (0.812, 2.3),
    (144, 1, 12): (1.188, 2.2),
    (144, 2, 8): (1.524, 3.7),
    (152, 1, 8): (0.825, 2.8),
    (152, 1, 12): (1.218, 3.1),
    (152, 2, 8): (1.608, 3.8),
    (160, 1, 8): (0.869, 2.5),
    (160, 1, 12): (1.297, 2.5),
    (168, 1, 8): (0.905, 2.6),
    (168, 1, 12): (1.357, 2.4),
    (176, 1, 8): (0.949, 2.6),
    (176, 1, 12): (1.418, 2.5),
    (192, 1, 8): (1.021, 2.8),
    (208, 1, 8): (1.104, 3.0),
    (256, 1, 8): (1.350, 3.4),
}
# Microseconds of a launch; of a cluster's sums, and of parts of sums that meet in memory, times rows, outs and warps;
# and of EVEN beside those.
_START, _SUMS, _PARTS, _EVENLY = 0.9, 2.45e-3, 1.26e-3, 1.3
# Part of the multiprocessors that clusters of so many blocks find room on: those of a cluster are neighbours.
CLUSTERS = {1: 1.0, 2: 0.97, 3: 0.82}
# Decoding once, then the library's product: microseconds of both launches, of a weight, and of a weight by a row.
_DECODED = 4.0, 0.952e-6, 2.517e-9
_AHEAD = 0.94  # of what decoding is estimated at, a product in one launch must be below
FITTED = 132  # multiprocessors


@functools.cache
def choose(device: int, groups: int, slabs: int, rows: int) -> Cut | None:
    """The cut for `rows` rows by tiles of `groups` by `slabs` on this GPU; None where another way is ahead."""
    if rows <= _FEW_ROWS or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    return on_hopper(groups, slabs, rows, multiprocessors(device))


def up_to(device: int, groups: int, slabs: int, most_rows: int) -> set[Cut]:
    """What `choose` says of so many rows at most, every eighth asked for."""
    rows = range(_FEW_ROWS + 1, most_rows + 8, 8)
    return {cut for count in rows if (cut := choose(device, groups, slabs, min(count, most_rows)))}


def on_hopper(groups: int, slabs: int, rows: int, processors: int = FITTED) -> Cut | None:
    """`choose`, on a Hopper GPU of so many multiprocessors: as the measured shape nearest to it, or by the estimate."""
    shape = min(_MEASURED, key=lambda shape: abs(math.log(shape[0] / groups)) + abs(math.log(shape[1] / slabs)))
    cuts, same = _MEASURED[shape], shape == (groups, slabs) and processors == FITTED
    if same or rows <= _ALIKE or cuts[-1][0] == _ALL:
        for limit, cut in cuts:
            if rows <= limit:
                return cut and cut._replace(cluster=min(cut.cluster, slabs))
    decoded = _decoded(groups, slabs, rows, processors)
    best = min(estimated(slabs), key=lambda cut: estimate(cut, groups, slabs, rows, processors))
    return best if estimate(best, groups, slabs, rows, processors) < _AHEAD * decoded else None


@functools.cache
def estimated(slabs: int) -> tuple[Cut, ...]:
    """All that are estimated, with the longest rings that there is room for."""
    kinds = ((kind, cluster) for kind in COSTS for cluster in (EVEN, *CLUSTERS) if cluster <= slabs)
    rings = ((Cut(*kind, stages, cluster) for stages in (6, 5, 4, 3)) for kind, cluster in kinds)
    return tuple(next(cut for cut in cuts if cut.shared <= MAX_SHARED) for cuts in rings)


def every() -> tuple[Cut, ...]:
    """All that can be chosen."""
    measured = {cut for cuts in _MEASURED.values() for _, cut in cuts if cut}
    return tuple(sorted(measured | set(estimated(max(CLUSTERS)))))


class Times(NamedTuple):
    """How often a multiprocessor has each cost: slabs, blocks' other time, sums of clusters, parts of sums, EVEN."""

    slabs: int
    blocks: int
    sums: int
    parts: int
    evenly: int


def times(cut: Cut, groups: int, slabs: int, rows: int, processors: int) -> Times:
    products = -(-groups // (cut.warps * cut.outs)) * -(-rows // cut.rows)
    size = cut.rows * cut.outs * cut.warps
    if cut.cluster == EVEN:
        whole = max(0, products // processors - 1)  # of each multiprocessor, then the rest evenly
        rest = products - whole * processors
        share = -(-rest * slabs // processors)
        if rest % processors == 0:  # nobody's part
            return Times(whole * slabs + share, whole + share // slabs, 0, 0, 1)
        parts = 1 + -(-(slabs - 1) // share)  # that it leaves, and that it takes
        return Times(whole * slabs + share, whole + (share - 2) // slabs + 2, 0, size * parts, 1)
    waves = -(-products // max(1, int(CLUSTERS[cut.cluster] * processors / cut.cluster)))
    return Times(waves * -(-slabs // cut.cluster), waves, waves * size * (cut.cluster > 1), 0, 0)


def estimate(cut: Cut, groups: int, slabs: int, rows: int, processors: int) -> float:
    """Microseconds."""
    costs = *COSTS[cut.rows, cut.outs, cut.warps], _SUMS, _PARTS, _EVENLY
    return _START + sum(map(operator.mul, times(cut, groups, slabs, rows, processors), costs))


def _decoded(groups: int, slabs: int, rows: int, processors: int) -> float:
    """Microseconds."""
    both, weight, product = _DECODED
    return both + 16 * groups * 128 * slabs * (weight + product * rows * FITTED / processors)
