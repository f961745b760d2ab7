"""Quantizing layers of R1's exact shapes under a memory cap: conversion against the disk, calibration, interruptions.

    python benchmarks/quantize_layers.py FOLDER [--small] [--max-memory 4GB] [--kills 20] [--no-calibration]
    python benchmarks/quantize_layers.py FOLDER --only-calibration [--recipe gptq] [--experts 8] [--device cuda]

Writes into FOLDER, and removes again, a source of random weights: one dense layer and one of 256 experts, embedding and
head (16 GB in FP8; --small: a tiny model). Then

    conversion    with a given calibration (its numbers are made up, of which no time depends), in turns with `cp` and
                  fsync of 8 GB of the source; neither finds its input in memory
    killed        the same conversion, killed so many times at random moments, then left to end
    shared        the same conversion by two processes at once
    calibration   8,192 tokens through both layers on the CPU, and a conversion behind it (--no-calibration: left out);
                  alone with --only-calibration, then also under a recipe that solves layers from their inputs, with
                  fewer experts, or on a GPU

Rates are bytes read and written a second, also per second of CPU time, for machines with other work; memory is the
process's largest resident set by the kernel's account (VmHWM), page cache not in it. Every output's tensors must have
the same digest, or the command fails.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deepseek_fp4_plugin.checkpoint.durable import forget
from deepseek_fp4_plugin.checkpoint.hub import embedded_folder
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter, TensorSpec
from deepseek_fp4_plugin.cli.quantize import Bytes
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_r1 import CONFIG_JSON
from deepseek_fp4_plugin.models.inventory import weights
from deepseek_fp4_plugin.numerics import fp8_block
from deepseek_fp4_plugin.quantization.memory import peak
from deepseek_fp4_plugin.quantization.observer import LayerAmax
from deepseek_fp4_plugin.quantization.plan import becomes_nvfp4
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.quantization.saved_calibration import SavedCalibration

LAYERS = {
    **CONFIG_JSON,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
SMALL = {
    **LAYERS,
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
}
SAMPLES, TOKENS = 64, 128
COPIED = 8 * 10**9


def write_source(folder: Path, config: dict, shard_bytes: int) -> int:
    """Random FP8 weights, the same for the same config, with r1_nano's tokenizer. Returns the bytes of the tensors."""
    pool = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(100)
    pool = pool.clamp_(-fp8_block.E4M3_MAX, fp8_block.E4M3_MAX).to(
        torch.float8_e4m3fn
    )  # some torch makes NaN of larger
    inventory = list(weights(DeepseekV3Config.from_dict(config)))
    specs = []
    for weight in inventory:
        shape = tuple(weight.shape)
        fp8 = weight.linear
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        specs.append(TensorSpec(weight.name, torch.float32 if weight.name.endswith("bias") else dtype, shape))
        if fp8:
            blocks = tuple(-(-size // fp8_block.BLOCK) for size in shape)
            specs.append(TensorSpec(f"{weight.module}.weight_scale_inv", torch.float32, blocks))
    writer = CheckpointWriter(folder, specs, {"kind": "benchmark"}, shard_bytes)
    for turn, spec in enumerate(specs):
        writer.write(spec.name, _values(spec, pool, turn))
    files = {"config.json": json.dumps(config, indent=1)}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        files[name] = (embedded_folder() / name).read_text()
    writer.finish(files)
    return sum(spec.nbytes for spec in specs)


def _values(spec: TensorSpec, pool: torch.Tensor, turn: int) -> torch.Tensor:
    if len(spec.shape) == 1:
        return torch.zeros(spec.shape) if spec.dtype is torch.float32 else torch.ones(spec.shape).bfloat16()
    if spec.dtype is torch.float32:
        return torch.rand(spec.shape, generator=torch.Generator().manual_seed(turn)) * 2e-4 + 1e-5
    count = spec.shape[0] * spec.shape[1]
    start = turn * 1_000_003 % (len(pool) // 2)
    part = pool[start : start + len(pool) // 2]
    if spec.dtype is torch.bfloat16:
        part = part.bfloat16() / 5000
    return part.repeat(-(-count // len(part)))[:count].view(spec.shape)


def drop(folder: Path) -> None:
    """Have the kernel forget what it holds of the folder's files."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            forget(file.fileno())


def copy_rate(source: Path, folder: Path) -> tuple[float, int]:
    """Bytes read and written a second by `cp` and fsync of 8 GB of the source, or of all of it, and how many."""
    drop(source)
    folder.mkdir()
    began, size = time.perf_counter(), 0
    for path in sorted(source.glob("*.safetensors")):
        if size < COPIED * 0.9:
            subprocess.run(["cp", path, folder], check=True)
            with open(folder / path.name, "rb+") as file:
                os.fsync(file.fileno())
            size += path.stat().st_size
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return 2 * size / seconds, size


class Run:
    """A quantization in a process of its own, forked so that none waits for its imports."""

    def __init__(self, source: Path, target: Path, options: dict):
        context = multiprocessing.get_context("fork")
        self._receive, send = context.Pipe(duplex=False)
        self.process = context.Process(target=_quantize, args=(send, source, target, options))
        self.process.start()
        send.close()

    def begun(self) -> None:
        """Wait until it converts."""
        self._receive.recv()

    def result(self) -> dict[str, float]:
        """Wait for its end: seconds, CPU seconds, peak resident bytes; of each layer's calibration, and of its end,
        seconds and CPU seconds since the beginning."""
        said: dict[str, float] = {}
        try:
            while True:
                said = self._receive.recv()
        except EOFError:
            self.process.join()
        if self.process.exitcode:
            raise SystemExit("a quantization failed")
        return said


def _quantize(send, source: Path, target: Path, options: dict) -> None:
    torch.set_num_threads(2)
    began, layers, seen = time.perf_counter(), {}, set()

    def tell(stage: str, done: int, total: int) -> None:
        if stage == "calibrate":
            if done % (total // 2) == 0:  # a layer begins, or the last one has ended
                layers.setdefault(done, [round(time.perf_counter() - began, 1), round(time.process_time(), 1)])
        elif not seen:
            send.send({})
            seen.add(stage)

    quantize_checkpoint(source, target, progress=tell, **options)
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    figures = {"seconds": time.perf_counter() - began, "cpu": cpu, "peak": peak(), "layers": [*layers.values()]}
    if options.get("device") == "cuda":
        figures["gpu_peak"] = torch.cuda.max_memory_allocated()
    send.send(figures)


def killed(source: Path, target: Path, options: dict, times: int, seconds: float) -> int:
    """Kill a run so many times, each somewhere in its work and the first as it begins, then let it end.

    Returns how many died before their end.
    """
    chance, deaths = random.Random(0), 0
    while deaths < times and not target.exists():
        run = Run(source, target, options)
        run.begun()
        if deaths:
            run.process.join(chance.uniform(0, 2 * seconds / times))
        run.process.kill()
        run.process.join()
        deaths += run.process.exitcode == -signal.SIGKILL
    if not target.exists():
        Run(source, target, options).result()
    return deaths


def digest(folder: Path) -> str:
    """Of all tensors' files and the index; the card names its folder."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.index.json")]):
        found.update(path.name.encode())
        with open(path, "rb") as file:
            while data := file.read(2**22):
                found.update(data)
            forget(file.fileno())
    return found.hexdigest()


def measure(source: Path, folder: Path, max_memory: int | None, options: argparse.Namespace) -> dict:
    """Everything of the head comment, with outputs in `folder`."""
    config = DeepseekV3Config.from_folder(source)
    shard = max(path.stat().st_size for path in source.glob("*.safetensors"))
    source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    kept = folder / "kept.json"
    make_up(kept, config)
    common = {"max_memory": max_memory, "max_shard_bytes": shard}
    given = {**common, "calibration": str(kept)}
    digests, rows = {}, []

    def note(what: str, **figures) -> None:
        rows.append({"what": what, "load": os.getloadavg()[0], **figures})
        print(json.dumps(rows[-1]), flush=True)

    def taken(name: str) -> int:
        digests[name] = digest(folder / name)
        size = sum(path.stat().st_size for path in (folder / name).glob("*.safetensors"))
        shutil.rmtree(folder / name)
        return size

    if options.only_calibration:
        calibrate(source, folder, {**common, "recipe": options.recipe, "device": options.device}, note, taken)
        return {"source_bytes": source_bytes, "rows": rows, "digest": digests["calibrated"]}
    for turn in range(options.repeats):
        rate, size = copy_rate(source, folder / "copy")
        note("cp and fsync", rate=rate, bytes=size)
        drop(source)
        figures = Run(source, folder / f"converted-{turn}", given).result()
        written = taken(f"converted-{turn}")
        own, alone = ((source_bytes + written) / figures[clock] for clock in ("seconds", "cpu"))
        note("conversion", rate=own, of_cp=own / rate, rate_of_a_core=alone, **figures)
    began = time.perf_counter()
    shared = [Run(source, folder / "shared", {**given, "share": True}) for _ in range(2)]
    peaks = [run.result()["peak"] for run in shared]
    seconds = time.perf_counter() - began
    taken("shared")
    note("shared by two", seconds=seconds, peak=max(peaks))
    deaths = killed(source, folder / "killed", given, options.kills, seconds)
    taken("killed")
    note("killed", deaths=deaths)
    if len(set(digests.values())) > 1:
        raise SystemExit(f"the outputs differ: {digests}")
    same = digests["killed"]
    print(f"{len(digests)} outputs of {written:,} bytes with one digest: {same}", flush=True)
    if options.calibrate:
        calibrate(source, folder, common, note, taken)
    return {"source_bytes": source_bytes, "written": written, "rows": rows, "digest": same}


def calibrate(source: Path, folder: Path, options: dict, note: Callable, taken: Callable) -> None:
    """8,192 tokens through both layers, and a conversion."""
    text = {"calibration": "builtin", "samples": SAMPLES, "tokens": TOKENS}
    figures = Run(source, folder / "calibrated", {**options, **text}).result()
    taken("calibrated")
    note("calibration", tokens=SAMPLES * TOKENS, **figures)


def make_up(path: Path, config: DeepseekV3Config) -> None:
    """A calibration in which every projection saw values up to 1."""
    modules = [weight.module for weight in weights(config) if becomes_nvfp4(weight, config, "v1")]
    found = LayerAmax(dict.fromkeys(modules, 1.0), dict.fromkeys(modules, 1))
    SavedCalibration(found, "no text", 1, 1).write(path, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--source", type=Path, metavar="DIR", help="one that is there already")
    parser.add_argument("--max-memory", type=lambda text: Bytes().convert(text, None, None), default=4 * 10**9)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--no-calibration", dest="calibrate", action="store_false")
    parser.add_argument("--only-calibration", action="store_true")
    parser.add_argument("--recipe", default="max", help="of --only-calibration")
    parser.add_argument("--device", default="cpu", help="of --only-calibration")
    parser.add_argument("--experts", type=int, help="fewer routed experts, with as many tokens each")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)  # no thread of this process may be lost in a fork
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source = options.source or Path(scratch) / "source"
        if options.source is None:
            config = dict(SMALL if options.small else LAYERS)
            if options.experts:
                config |= {"n_routed_experts": options.experts, "num_experts_per_tok": max(1, options.experts // 32)}
                config |= {"n_group": 1, "topk_group": 1}
            write_source(source, config, 2_000_000 if options.small else 4_000_000_000)
        result = measure(source, Path(scratch), options.max_memory, options)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
