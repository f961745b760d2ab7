"""The model card's own deployment on the GPUs of one machine: DeepSeek-R1's exact shapes, served and measured.

    python benchmarks/deployment.py --tp_size 8 --ep_size 2 [--pieces card ...] [--users 1 4] [--json FILE]
    python benchmarks/deployment.py --tiny --tp_size 2 --ep_size 2          (a dry run on a CPU)

Weights are random, made on the devices (`load_format: dummy`): 61 layers and the MTP module, formats of the published
checkpoint, an FP8 cache, r1_nano's tokenizer. Pieces, each a start of its own that takes one to three minutes:

card         the card's server command and its YAML: 4 requests a step, three drafts, relaxed acceptance
card-plain   the same without drafts
many         the card's command with --max_batch_size 256
many-plain   the same without drafts
dp-plain     many-plain with attention data parallelism, and without the MTP module, whose room that takes
sample       the card's API sample: tensor_parallel_size, attention data parallelism; its four prompts
nano         r1_nano's answers from all ranks beside those of one

Users send --input random tokens and ask for --output, all at once; what counts is the time from --settle seconds after
the last one's first token until --seconds later or the first end. With random weights hardly a draft is accepted, so
the speed with drafts is told twice: as it came, and **simulated**: steps a second times ACCEPTED tokens a step, as
published for R1 with three drafts.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from deepseek_fp4_plugin.checkpoint.hub import embedded_folder, is_small_file
from deepseek_fp4_plugin.checkpoint.quant_config import HF_QUANT_CONFIG, nvfp4_quant_config
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_r1 import CONFIG_JSON
from deepseek_fp4_plugin.quantization.plan import excluded_modules

ACCEPTED = 2.8
COMMAND = """serve {folder}
  --host 0.0.0.0
  --port {port}
  --backend pytorch
  --max_batch_size {batch}
  --tp_size {tp}
  --ep_size {ep}
  --max_num_tokens 32768
  --trust_remote_code
  --extra_llm_api_options {args}
  --kv_cache_free_gpu_memory_fraction 0.75
"""
YAML = "moe_backend: TRTLLM\nuse_cuda_graph: true\n"
DRAFTS = """speculative_config:
  decoding_type: MTP
  num_nextn_predict_layers: 3
  use_relaxed_acceptance_for_thinking: true
  relaxed_topk: 10
  relaxed_delta: 0.6
"""
SAMPLE = """
import time
from deepseek_fp4_plugin import LLM, SamplingParams

if __name__ == "__main__":
    prompts = [
        "Hello, my name is",
        "The president of the United States is",
        "The capital of France is",
        "The future of AI is",
    ]
    sampling_params = SamplingParams(max_tokens=32)
    began = time.perf_counter()
    llm = LLM(model={folder!r}, tensor_parallel_size={tp}, enable_attention_dp=True, load_format="dummy")
    loaded = time.perf_counter()
    for turn in range(2):
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling_params)
        took = time.perf_counter() - started
    assert [len(output.outputs[0].token_ids) for output in outputs] == [32] * 4, outputs
    print(f"loaded in {{loaded - began:.1f}} s; four answers of 32 tokens in {{took:.2f}} s the second time")
    llm.shutdown()
"""
NANO = """
from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.assets.held_out import load_held_out

with LLM("r1_nano", max_batch_size=8, max_seq_len=1024) as llm:
    prompts = [llm.tokenizer.encode_chat([{{"role": "user", "content": p.prompt}}]) for p in load_held_out()[:24]]
    alone = llm.generate(prompts, SamplingParams(max_tokens=96, logprobs=2))
sizes = dict(tensor_parallel_size={tp}, moe_expert_parallel_size={ep}, max_batch_size=8, max_seq_len=1024)
drafts = dict(speculative_config=dict(num_nextn_predict_layers=3))
for name, more in (("no drafts", {{}}), ("three drafts", drafts), ("attention DP", dict(enable_attention_dp=True))):
    with LLM("r1_nano", **sizes, **more) as llm:
        found = llm.generate(prompts, SamplingParams(max_tokens=96))
    excused = total = 0
    for one, other in zip(alone, found, strict=True):
        one, other = one.outputs[0], other.outputs[0]
        total += len(one.token_ids)
        at = next((i for i, (x, y) in enumerate(zip(one.token_ids, other.token_ids)) if x != y), None)
        if at is None:
            assert one.token_ids == other.token_ids
        else:
            best, second = sorted((entry.logprob for entry in one.logprobs[at].values()), reverse=True)[:2]
            assert best - second < 0.05, f"{{name}}: token {{at}} differs by {{best - second}}"
            excused += 1
    assert excused <= total // 100
    print(f"{{name}}: {{excused}} of {{total}} tokens differ from one rank's, all of them near ties")
"""

# Sizes for the dry run: of r1_nano's vocabulary, and quick on a CPU.
TINY = {
    "vocab_size": 1280, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A server. users: how many send at once, one load after the other."""

    batch: int
    drafts: bool
    users: tuple[int, ...]
    attention_dp: bool = False


PIECES = {
    "card": Piece(4, True, (1, 4)),
    "card-plain": Piece(4, False, (1, 4)),
    "many": Piece(256, True, (16, 64, 256)),
    "many-plain": Piece(256, False, (16, 64, 256)),
    "dp-plain": Piece(256, False, (64, 256), attention_dp=True),
}
PROGRAMS = {"sample": SAMPLE, "nano": NANO}


def write_folder(folder: Path, changes: dict[str, Any]) -> Path:
    """All of a checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in embedded_folder().iterdir():
        if is_small_file(path.name) and "index" not in path.name:
            shutil.copyfile(path, folder / path.name)
    values = CONFIG_JSON | changes
    (folder / "config.json").write_text(json.dumps(values))
    shape = DeepseekV3Config.from_dict(values)
    (folder / HF_QUANT_CONFIG).write_text(json.dumps(nvfp4_quant_config(excluded_modules(shape, "v1"), "FP8")))
    return folder


@contextlib.contextmanager
def served(command: list[str], log: Path, patience: float) -> Iterator[str]:
    """A running server's address; it must end with status 0."""
    with log.open("wb") as file:
        program = [sys.executable, "-c", "from deepseek_fp4_plugin.cli import main; main()", *command]
        process = subprocess.Popen(program, stdout=file, stderr=subprocess.STDOUT)
    url, began = f"http://127.0.0.1:{command[command.index('--port') + 1]}", time.monotonic()
    try:
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() - began > patience:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield url
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f"the server ended with status {process.returncode}:\n{log.read_text()}")
    finally:
        process.kill()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@dataclass
class Stream:
    """When each token of one user's answer came: (seconds, how many)."""

    sent: float = 0.0
    pieces: list[tuple[float, int]] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any], stream: Stream, stop: asyncio.Event) -> None:
    stream.sent = time.perf_counter()
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"status {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if stop.is_set():
                return
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise SystemExit(f"a stream failed: {chunk}")
                if chunk["choices"] and (count := len(chunk["choices"][0].get("token_ids", ()))):
                    stream.pieces.append((time.perf_counter(), count))


async def load(url: str, users: int, options: argparse.Namespace, vocabulary: int, drafts: int) -> dict[str, Any]:
    """One load, and what it was served like."""
    draws, stop = random.Random(users), asyncio.Event()
    streams = [Stream() for _ in range(users)]
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        name = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
        bodies = [
            {
                "model": name, "prompt": [draws.randrange(10, vocabulary) for _ in range(options.input)],
                "max_tokens": options.output, "ignore_eos": True, "temperature": 0.0, "stream": True,
                "return_token_ids": True,
            }
            for _ in streams
        ]  # fmt: skip
        tasks = [
            asyncio.create_task(ask(client, url, body, stream, stop))
            for body, stream in zip(bodies, streams, strict=True)
        ]
        while not all(stream.pieces for stream in streams) and not any(task.done() for task in tasks):
            await asyncio.sleep(0.02)
        await asyncio.sleep(options.settle)
        await client.get(f"{url}/iteration_stats")
        begin, steps = time.perf_counter(), []
        while time.perf_counter() - begin < options.seconds and not any(task.done() for task in tasks):
            await asyncio.sleep(min(0.5, options.seconds))
            steps += (await client.get(f"{url}/iteration_stats")).json()
        end = time.perf_counter()
        stop.set()
        await asyncio.gather(*tasks)
    return summary(streams, steps, begin, end, drafts)


def summary(streams: list[Stream], steps: list[dict], begin: float, end: float, drafts: int) -> dict[str, Any]:
    """Tokens a second are each user's own; milliseconds a step are medians of steps with all users and nothing else."""
    users = len(streams)
    tokens = sum(count for stream in streams for when, count in stream.pieces if begin <= when < end)
    whole = [s["seconds"] for s in steps if s["requests"] == users and s["computed_tokens"] == users * (1 + drafts)]
    first = [1e3 * (stream.pieces[0][0] - stream.sent) for stream in streams]
    row = {
        "users": users,
        "seconds": round(end - begin, 2),
        "steps": len(whole),
        "first token, ms": round(statistics.median(first), 1),
        "ms a step": round(1e3 * statistics.median(whole), 3) if whole else None,
        "tokens/s a user": round(tokens / users / (end - begin), 2),
    }
    if drafts and whole:
        row[f"tokens/s a user, simulated at {ACCEPTED} a step"] = round(ACCEPTED / statistics.median(whole), 1)
    return row


def gpu_memory() -> list[str]:
    """MiB in use on every GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(name: str, piece: Piece, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every load of a piece."""
    args, log = folder / f"{name}.yaml", folder / f"{name}.log"
    args.write_text(f"load_format: dummy\n{YAML}{DRAFTS if piece.drafts else ''}")
    batch = min(piece.batch, options.max_batch_size)
    given = dict(folder=folder, port=free_port(), batch=batch, tp=options.tp_size, ep=options.ep_size, args=args)
    command = COMMAND.format(**given).split() + ["--enable_attention_dp"] * piece.attention_dp
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    with served(command, log, options.patience) as url:
        loaded = re.search(r"loaded in .*", log.read_text())
        print(f"{name}: {loaded[0] if loaded else log.read_text()}", flush=True)
        if not options.tiny:
            print(f"{name}: MiB in use {gpu_memory()}", flush=True)
        for users in options.users or piece.users:
            if users <= batch:
                yield {"piece": name, **asyncio.run(load(url, users, options, vocabulary, 3 if piece.drafts else 0))}
        if not options.tiny:
            print(f"{name}: MiB in use {gpu_memory()}", flush=True)


def run_program(name: str, folder: Path, options: argparse.Namespace) -> None:
    program = PROGRAMS[name].format(folder=str(folder), tp=options.tp_size, ep=options.ep_size)
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for line in done.stdout.splitlines():
        print(f"{name}: {line}", flush=True)
    if done.returncode:
        raise SystemExit(f"{name} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp_size", type=int, default=8)
    parser.add_argument("--ep_size", type=int, default=2)
    parser.add_argument("--pieces", nargs="+", choices=[*PIECES, *PROGRAMS], default=["card"])
    parser.add_argument("--users", nargs="+", type=int, help="in place of each piece's own")
    parser.add_argument("--max_batch_size", type=int, default=256, help="of pieces that have more")
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a load that are measured")
    parser.add_argument("--settle", type=float, default=2.0, help="seconds between the first tokens and those")
    parser.add_argument("--patience", type=float, default=400.0, help="seconds for a server's start")
    parser.add_argument("--layers", type=int, help="fewer, where all do not fit")
    parser.add_argument("--tiny", action="store_true", help="a dry run: small sizes, no GPU needed")
    parser.add_argument("--folder", type=Path, default=Path("r1_dummy"), help="where configuration and logs go")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    changes = dict(TINY) if options.tiny else {}
    if options.layers:
        changes["num_hidden_layers"] = options.layers
    rows = []
    for name in options.pieces:
        piece = PIECES.get(name)
        without_mtp = {"num_nextn_predict_layers": 0} if name == "sample" or (piece and piece.attention_dp) else {}
        folder = write_folder(options.folder / name, {**changes, **without_mtp})
        if piece is None:
            run_program(name, folder, options)
            continue
        for row in serve(name, piece, folder, options):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if options.json:
        options.json.write_text(
            json.dumps({"sizes": [options.tp_size, options.ep_size], "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
