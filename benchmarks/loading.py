"""What loading costs: seconds, and the engine's memory against the checkpoint's bytes.

    python benchmarks/loading.py FOLDER [--layers 26] [--json FILE]

Writes FOLDER/empty (one layer) and FOLDER/full (that many) of one random NVFP4 configuration if they are not there,
and starts an engine on each in a process of its own, with the same small cache. The difference of the two processes'
memory, over the difference of the two checkpoints' bytes, is what a byte of the checkpoint costs. `resident` counts
pages of the files that are still mapped, `own` does not; `peak` is the largest resident size while loading.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from random_checkpoint import CONFIG, write_checkpoint

SIZES = {"hidden_size": 2048, "moe_intermediate_size": 1024, "n_routed_experts": 16, "vocab_size": 4096}


def measure(folder: str) -> dict[str, float]:
    import psutil

    from deepseek_fp4_plugin import LLM, SamplingParams

    began = time.perf_counter()
    with LLM(folder, max_batch_size=1, max_seq_len=256, kv_cache_config={"max_tokens": 256}) as llm:
        seconds = time.perf_counter() - began
        llm.generate([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False))
        memory = psutil.Process().memory_full_info()
        with open("/proc/self/status") as status:
            peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        return {"seconds": seconds, "resident": memory.rss, "own": memory.uss, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(str(options.folder))))
        return
    results = {}
    for name, layers in (("empty", 1), ("full", options.layers)):
        folder = options.folder / name
        if not folder.exists():
            write_checkpoint(folder, {**CONFIG, **SIZES, "num_hidden_layers": layers}, quantized=True)
        command = [sys.executable, __file__, str(folder), "--measure"]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        results[name] = {
            "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            **json.loads(lines[-1]),
        }
        print(
            name,
            {key: f"{value / 1e9:.3f} GB" if value > 1e4 else f"{value:.2f}" for key, value in results[name].items()},
        )
    empty, full = results["empty"], results["full"]
    ratios = {key: (full[key] - empty[key]) / (full["bytes"] - empty["bytes"]) for key in ("resident", "own", "peak")}
    print("memory for a byte of the checkpoint:", {key: f"{value:.2f}" for key, value in ratios.items()})
    if options.json:
        Path(options.json).write_text(json.dumps({**results, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
