"""Cuts of NVFP4 products on Hopper's matrix unit, measured; and the costs in kernels/cuda/cuts.py, fitted to them.

    python benchmarks/cuda_cuts.py --json FILE [--shapes 4608x7168 ...] [--rows N ...] [--keep 14] [--humming]
    python benchmarks/cuda_cuts.py --fit FILE ... [--most-rows 1024]

The cuts that the present costs put first are measured at each shape and number of rows, beside what is chosen, decoding
once, torch's BF16 product and humming if asked for; as in cuda_kernels.py, by graphs that rotate 100 MB of weights or
more. Each product's largest error against what is chosen is checked. --fit needs no GPU: least squares of relative
errors, outliers counted less. Beyond 1,024 rows the card's power limits large products, which these costs cannot say.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda import compiler, cuts
from deepseek_fp4_plugin.kernels.cuda.cuts import Cut
from deepseek_fp4_plugin.kernels.cuda.launcher import multiprocessors

SHAPES = ("4096x7168", "7168x2048", "4608x7168", "7168x2304", "36864x7168", "7168x18432", "7168x16384")
ROWS = (96, 160, 192, 224, 256, 288, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024)
ROWS += (1152, 1280, 1408, 1536, 1792, 2048, 2560, 3072)
ROTATED = 100_000_000  # bytes
_TOLERANCE = 2**-6  # of the largest result


def tiles_of(shape: str) -> tuple[int, int]:
    """Groups of 16 outputs, slabs of 128 inputs."""
    out, width = map(int, shape.split("x"))
    return -(-out // 16), -(-width // 128)


def candidates(groups: int, slabs: int, rows: int, keep: int, processors: int) -> list[Cut]:
    """Those that the present costs put first."""
    by_time = sorted(cuts.estimated(slabs), key=lambda cut: cuts.estimate(cut, groups, slabs, rows, processors))
    return by_time[:keep]


def build(cut: Cut) -> None:
    """Compiled ahead, by several processes."""
    defines = {"ROWS": cut.rows, "OUTS": cut.outs, "WARPS": cut.warps, "STAGES": cut.stages}
    defines |= {"MIN_BLOCKS": cut.resident, "GATED": 0, "EVEN": int(cut.cluster == cuts.EVEN)}
    compiler.cubin("nvfp4_wgmma.cu", tuple(defines.items()), "sm_90a")


def measure(shape: str, rows: list[int], keep: int, humming: bool) -> Iterable[dict]:
    """A line for each number of rows: microseconds of each side."""
    from cuda_kernels import BF16, DEVICE, humming_layers, nvfp4_bytes, prepared, random_part, timed

    from deepseek_fp4_plugin.kernels import ops
    from deepseek_fp4_plugin.kernels.cuda import wgmma
    from deepseek_fp4_plugin.kernels.cuda.linear import _many_rows

    (out, width), processors = map(int, shape.split("x")), multiprocessors(0)
    parts = [random_part(out, width) for _ in range(max(3, min(12, int(ROTATED // nvfp4_bytes(out, width)) + 1)))]
    weights, peers = [prepared([part]) for part in parts], humming_layers(parts) if humming else []
    plain = [
        torch.randn(out, width, device=DEVICE, dtype=BF16) for _ in range(max(3, min(12, ROTATED // (2 * out * width))))
    ]
    for count in rows:
        x = torch.randn(count, width, device=DEVICE, dtype=BF16)
        y = torch.empty(count, out, device=DEVICE, dtype=BF16)
        sides = {
            "chosen": [partial(ops.linear, x, w) for w in weights],
            "decoded": [partial(_many_rows, x, w, 0, y) for w in weights],
            "torch": [partial(torch.nn.functional.linear, x, w) for w in plain],
        }
        if peers:
            sides["humming"] = [partial(peer, x) for peer in peers]
        exact = ops.linear(x, weights[0])
        tiles = weights[0].data
        for cut in candidates(tiles.groups, tiles.slabs, count, keep, processors):
            wgmma.launch(x, tiles, 0, y, out, False, cut)
            if not (y - exact).abs().max() <= _TOLERANCE * exact.abs().max():
                raise SystemExit(f"{cut} is wrong for {count} rows of {shape}")
            name = " ".join(map(str, cut))
            sides[name] = [partial(wgmma.launch, x, w.data, 0, y, out, False, cut) for w in weights]
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for order in (list(sides), list(sides)[::-1]):  # the clock sinks under load: none is always first
            for side in order:
                taken[side].append(timed(sides[side], 4))
        yield {
            "shape": shape,
            "rows": count,
            "multiprocessors": processors,
            "microseconds": {side: min(of) for side, of in taken.items()},
        }


def shown(line: dict) -> str:
    sides = dict(line["microseconds"])
    fixed = {side: sides.pop(side) for side in ("chosen", "decoded", "torch", "humming") if side in sides}
    best = sorted(sides, key=sides.__getitem__)[:4]
    first = ", ".join(f"{side} {us:.1f}" for side, us in fixed.items())
    return f"{line['shape']} {line['rows']}: {first} | " + ", ".join(f"({cut}) {sides[cut]:.1f}" for cut in best)


Costs = dict[tuple[int, int, int], tuple[float, float]]


def fit(lines: list[dict]) -> tuple[Costs, Tensor]:
    """Costs of each kind of block, and those that all share: of a launch, of sums, of parts, of EVEN."""
    points = []
    for line in lines:
        for name, us in line["microseconds"].items():
            if name[0].isdigit():
                cut = Cut(*map(int, name.split()))
                points.append(
                    (cut, cuts.times(cut, *tiles_of(line["shape"]), line["rows"], line["multiprocessors"]), us)
                )
    kinds = sorted({cut[:3] for cut, _, _ in points})
    matrix = torch.zeros(len(points), 2 * len(kinds) + 4, dtype=torch.float64)
    for row, (cut, counts, us) in zip(matrix, points, strict=True):
        at = 2 * kinds.index(cut[:3])
        row[at], row[at + 1], row[-4:] = counts.slabs, counts.blocks, torch.tensor([1.0, *counts[2:]])
        row /= us
    weight = torch.ones(len(points), 1, dtype=torch.float64)
    for _ in range(20):  # towards absolute errors beyond 4 %
        found = torch.linalg.lstsq(weight * matrix, weight, driver="gelsd").solution
        weight = (1 + ((matrix @ found - 1) / 0.04) ** 2) ** -0.25
    error = (matrix @ found - 1).squeeze(1)
    print(f"{len(points)} products, {float(error.square().mean().sqrt()):.1%} root mean square")
    return {kind: (float(found[2 * i]), float(found[2 * i + 1])) for i, kind in enumerate(kinds)}, found[-4:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--keep", type=int, default=14, help="cuts of each product that are measured")
    parser.add_argument("--humming", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="a line for each shape and number of rows")
    parser.add_argument("--fit", nargs="+", metavar="FILE", help="such files")
    parser.add_argument("--most-rows", type=int, default=1024, help="of a line that --fit uses")
    options = parser.parse_args()
    if options.fit:
        lines = [json.loads(line) for file in options.fit for line in Path(file).read_text().splitlines()]
        kinds, shared = fit([line for line in lines if line["rows"] <= options.most_rows])
        print(*(f"{kind}: ({slab:.3f}, {block:.1f})," for kind, (slab, block) in kinds.items()), sep="\n")
        print(f"launch {shared[0]:.1f}, sums {shared[1]:.2e}, parts {shared[2]:.2e}, evenly {shared[3]:.1f}")
        return
    products = [(tiles_of(shape), rows) for shape in options.shapes for rows in options.rows]
    wanted = {cut for tiles, rows in products for cut in candidates(*tiles, rows, options.keep, multiprocessors(0))}
    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.map(build, sorted({cut._replace(cluster=min(cut.cluster, 1)) for cut in wanted}), chunksize=1)
    with torch.inference_mode():
        for shape in options.shapes:
            for line in measure(shape, options.rows, options.keep, options.humming):
                print(shown(line), flush=True)
                if options.json:
                    with Path(options.json).open("a") as file:
                        file.write(json.dumps(line) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
