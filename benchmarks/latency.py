"""One request at a time: time to the first token by prompt length, time a token with and without MTP.

    python benchmarks/latency.py [--model r1_nano] [--repeats 5] [--path avx2] [--json FILE]

Sides take turns; medians are printed. `ms a token` is over an r1_nano problem (its natural text, so that drafts are as
good as they get) where the model is r1_nano, else over a random prompt.
"""

import argparse
import contextlib
import json
import random
import statistics
import time
from pathlib import Path

import torch

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.kernels import cpu

DRAFTS = (0, 1, 2, 3, 5)
PROMPTS = (32, 128, 512, 2048)


def first_token(llm: LLM, length: int, seed: int) -> float:
    rng = random.Random(seed)
    prompt = [rng.randrange(3, 500) for _ in range(length)]
    output = llm.generate(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    return output.metrics.first_token - output.metrics.arrival


def problem(llm: LLM) -> list[int]:
    if llm.tokenizer is not None and llm.tokenizer.chat_template:
        return llm.tokenizer.encode_chat([{"role": "user", "content": "What is 123 + 456?"}])
    return list(range(5, 37))


def per_token(llm: LLM, prompt: list[int]) -> tuple[float, float]:
    """Seconds a token behind the first, and tokens a step."""
    began = time.perf_counter()
    output = llm.generate(prompt, SamplingParams(max_tokens=96, ignore_eos=True), cache_salt=str(began))
    m, tokens = output.metrics, output.outputs[0].length
    return (m.finished - m.first_token) / (tokens - 1), tokens / m.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="r1_nano")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--path", choices=("avx512", "avx2_vnni", "avx2", "portable"), help="another instruction set")
    parser.add_argument("--nvfp4-activations", choices=("bf16", "fp4", "int8"), default="bf16")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with cpu.use_path(options.path) if options.path else contextlib.nullcontext():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    engines = {}
    for k in DRAFTS:
        speculative = {"num_nextn_predict_layers": k} if k else None
        engines[k] = LLM(
            options.model,
            max_seq_len=4096,
            max_batch_size=4,
            speculative_config=speculative,
            nvfp4_activations=options.nvfp4_activations,
        )
        if not engines[k].model_config.num_nextn_predict_layers:
            break
    prompt = problem(engines[0])
    rows = []
    if torch.cuda.is_available():  # then `LLM` takes it
        where = torch.cuda.get_device_name()
    else:
        where = f"{torch.get_num_threads()} threads, path {cpu.path() if cpu.available() else 'without native kernels'}"
    print(f"{options.model}, one request, {where}; medians of {options.repeats}")
    for length in PROMPTS:
        times = [first_token(engines[0], length, seed) for seed in range(options.repeats + 1)][1:]
        rows.append({"measure": "first token", "prompt": length, "seconds": statistics.median(times)})
        print(f"  first token, prompt of {length:>5}: {statistics.median(times) * 1e3:8.1f} ms")
    seen: dict[int, list[tuple[float, float]]] = {k: [] for k in engines}
    for repeat in range(options.repeats + 1):
        for k, llm in engines.items():
            value = per_token(llm, prompt)
            if repeat:
                seen[k].append(value)
    plain = statistics.median(seconds for seconds, _ in seen[0])
    for k, values in seen.items():
        seconds, steps = statistics.median(s for s, _ in values), values[0][1]
        rows.append({"measure": "token", "drafts": k, "seconds": seconds, "tokens_per_step": steps})
        print(f"  {k} drafts: {seconds * 1e3:7.2f} ms a token, {steps:.2f} tokens a step, {plain / seconds:.2f} times")
    for llm in engines.values():
        llm.shutdown()
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
