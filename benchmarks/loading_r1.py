"""Loading DeepSeek-R1's first layers from disk onto the GPUs of one machine.

    python benchmarks/loading_r1.py FOLDER --layers 6 --ranks 2 [--json FILE]
    python benchmarks/loading_r1.py FOLDER --layers 1 --device cpu         (a dry run)

Writes a checkpoint of exact shapes in the published formats (v1; three layers are dense) if it is not there, values all
alike, and starts an engine on it over so many ranks, experts dealt: from the disk, with its pages let go first, and
then from memory. Seconds are the engine's whole start, its ranks' processes included.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from deepseek_fp4_plugin.checkpoint.quant_config import HF_QUANT_CONFIG, WeightFormat, nvfp4_quant_config
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_r1 import CONFIG_JSON
from deepseek_fp4_plugin.models.inventory import weights
from deepseek_fp4_plugin.quantization.plan import Conversion, becomes_nvfp4, excluded_modules, result_tensors


def write(folder: Path, layers: int) -> None:
    values = {**CONFIG_JSON, "num_hidden_layers": layers, "num_nextn_predict_layers": 0}
    config = DeepseekV3Config.from_dict(values)
    specs = [
        spec
        for weight in weights(config)
        for spec in result_tensors(
            Conversion(weight, WeightFormat.PLAIN, becomes_nvfp4(weight, config, "v1")),
            torch.float32 if weight.name.endswith("bias") else torch.bfloat16,
        )
    ]
    writer = CheckpointWriter(folder, specs, {"kind": "benchmark"}, 10**10)
    for spec in specs:
        writer.write(spec.name, torch.ones(spec.shape, dtype=torch.uint8).to(spec.dtype))
    quantization = nvfp4_quant_config(excluded_modules(config, "v1"), "FP8")
    writer.finish({"config.json": json.dumps(values), HF_QUANT_CONFIG: json.dumps(quantization)})


def let_go(folder: Path) -> None:
    """The files' pages leave the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


PROGRAM = """
import json, sys, time
from deepseek_fp4_plugin import LLM
if __name__ == "__main__":
    folder, ranks, device = sys.argv[1:]
    began = time.perf_counter()
    sizes = dict(tensor_parallel_size=int(ranks), moe_expert_parallel_size=int(ranks)) if int(ranks) > 1 else {}
    more = dict(max_batch_size=1, max_seq_len=256, kv_cache_config={"max_tokens": 256})
    with LLM(folder, device=device, **sizes, **more) as llm:
        print(json.dumps(time.perf_counter() - began))
"""


def started(folder: Path, options: argparse.Namespace) -> float:
    """Seconds of a start in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, str(folder), str(options.ranks), options.device]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    folder, began = options.folder / f"layers_{options.layers}", time.perf_counter()
    if not folder.exists():
        write(folder, options.layers)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB written in {time.perf_counter() - began:.1f} s", flush=True)
    rows = {"bytes": size, "ranks": options.ranks}
    for name in ("from disk", "from memory"):
        if name == "from disk":
            let_go(folder)
        rows[name] = started(folder, options)
        print(f"{name}: {rows[name]:.2f} s, {size / 1e9 / rows[name]:.2f} GB/s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
