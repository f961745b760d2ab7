"""How fast weights become NVFP4: decoding FP8, rounding, rounding with its error measured, in million weights a second.

    python benchmarks/quantize.py [--device cpu] [--threads 1] [--json FILE]

One up_proj of an R1 expert, [2048, 7168], in memory: reading and writing files is not in it. The last column is what
all 657.65e9 weights that layout v1 converts would take at that speed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from deepseek_fp4_plugin.quantization.recipe import SourceWeight
from deepseek_fp4_plugin.quantization.recipes import RECIPES

SHAPE, R1_WEIGHTS = (2048, 7168), 657.65e9


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of `repeats` runs after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    weight, scale_inv = fp8_block.quantize(w)
    scale_2 = nvfp4.tensor_scale(w.abs().amax())
    solve_source = RECIPES["max"].solve_source
    steps = {
        "decode FP8 blocks": lambda: fp8_block.dequantize(weight, scale_inv),
        "round to NVFP4": lambda: nvfp4.quantize(w, scale_2),
        "round, and measure the error": lambda: solve_source([SourceWeight(w, None)]),
        "all of a conversion": lambda: solve_source([SourceWeight(weight, scale_inv)]),
    }
    rows = []
    print(f"{'':<30} {'M weights/s':>12} {'hours for R1':>13}")
    for name, work in steps.items():
        rate = w.numel() / seconds(work, device, options.repeats)
        rows.append({"step": name, "weights_per_second": rate, "device": options.device, "threads": options.threads})
        print(f"{name:<30} {rate / 1e6:>12.1f} {R1_WEIGHTS / rate / 3600:>13.2f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
