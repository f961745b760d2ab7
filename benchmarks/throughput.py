"""Tokens a second: the engine, the bare model loop at the same batch, and transformers, on the same weights in one run.

    python benchmarks/throughput.py [--model r1_nano] [--requests 64] [--repeats 3] [--device cpu] [--json FILE]

engine      LLM.generate over requests of mixed prompt and answer lengths
loop        the model called in a bare decode loop at a fixed batch: what scheduling, sampling and bookkeeping add
transformers  generate() of DeepseekV3ForCausalLM on the dequantized weights, in padded batches of 16 (skipped where
            transformers is not installed)
Where there is a GPU all sides run there. Sides take turns; medians are printed. Greedy, end-of-text ignored, so that
every side writes the same number of tokens.
"""

import argparse
import gc
import json
import logging
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.checkpoint.hub import resolve
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader, read_json
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter, TensorSpec
from deepseek_fp4_plugin.engine import kv_cache
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.numerics import fp8_block
from deepseek_fp4_plugin.settings.engine import EngineConfig

MTP = {"decoding_type": "MTP", "num_nextn_predict_layers": 3}


def workload(count: int, vocab: int) -> list[tuple[list[int], int]]:
    """(prompt, answer length) pairs, both lengths spread over a factor of eight."""
    rng = random.Random(0)
    return [
        ([rng.randrange(3, vocab) for _ in range(rng.choice((16, 32, 64, 128)))], rng.choice((16, 32, 64, 128)))
        for _ in range(count)
    ]


def run_engine(llm: LLM, requests: list[tuple[list[int], int]]) -> float:
    """Tokens a second over the whole workload. The prefix cache gets a new salt, so that nothing is reused."""
    params = [SamplingParams(max_tokens=n, ignore_eos=True, detokenize=False) for _, n in requests]
    began = time.perf_counter()
    llm.generate([prompt for prompt, _ in requests], params, cache_salt=str(began))
    return sum(n for _, n in requests) / (time.perf_counter() - began)


@torch.inference_mode()
def run_loop(model: DeepseekV3ForCausalLM, batch: int, steps: int, context: int) -> float:
    """Tokens a second of the model alone: `batch` requests, one token each a step, argmax and nothing else."""
    size, each = 32, -(-(context + steps + 1) // 32)
    shape, weight = model.config, model.model.norm.weight
    cache = kv_cache.allocate(shape, shape.num_hidden_layers, batch * each, size, weight.dtype, weight.device)
    cache.zero_()  # its pages are there before the clock runs
    device = weight.device
    tables = torch.arange(batch * each, device=device).view(batch, each)
    ids, starts = torch.full((batch,), 5, device=device), torch.arange(batch + 1, device=device)
    began = time.perf_counter()
    for step in range(steps):
        position = context + step
        forward = ForwardBatch(
            ids,
            torch.full((batch,), position, device=device),
            tables[:, position // size] * size + position % size,
            tables,
            torch.full((batch,), position + 1, device=device),
            starts,
            batch,
            batch,
            max_query=1,
            max_context=position + 1,
        )
        ids = model.compute_logits(model(forward, cache)).argmax(-1)
    ids.tolist()  # waits for a GPU
    return batch * steps / (time.perf_counter() - began)


def run_engine_steady(llm: LLM, batch: int, steps: int, context: int) -> float:
    """The engine's tokens a second at the same fixed batch and context, its own prompt step left out."""
    prompts = [[5 + i % 100] * context for i in range(batch)]
    params = SamplingParams(max_tokens=steps + 1, ignore_eos=True, detokenize=False)
    handles = [llm.generate_async(p, params, cache_salt=str(time.perf_counter())) for p in prompts]
    outputs = [handle.result() for handle in handles]
    first = max(o.metrics.first_token for o in outputs)
    return batch * steps / (max(o.metrics.finished for o in outputs) - first)


def dequantized(model: str, folder: Path) -> Path:
    """The checkpoint with every weight in BF16 and without its MTP layer, for transformers."""
    source = resolve(model)
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    config["num_nextn_predict_layers"] = 0
    reader, last = CheckpointReader(source), f"model.layers.{config['num_hidden_layers']}."
    names = [n for n in reader if not n.endswith("_scale_inv") and not n.startswith(last)]

    def value(name: str) -> torch.Tensor:
        tensor = reader.get(name)
        if tensor.dtype is torch.float8_e4m3fn:
            return fp8_block.dequantize(tensor, reader.get(f"{name}_scale_inv"), torch.bfloat16)
        return tensor

    plan = [
        TensorSpec(n, torch.bfloat16 if (i := reader.info(n)).dtype is torch.float8_e4m3fn else i.dtype, tuple(i.shape))
        for n in names
    ]
    writer = CheckpointWriter(folder, plan, {"kind": "benchmark"}, 10**9)
    for name in names:
        writer.write(name, value(name))
    writer.finish({"config.json": json.dumps(config)})
    return folder


def load_transformers(folder: Path, device: torch.device):
    try:
        import transformers
    except ImportError:
        return None
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)


@torch.inference_mode()
def run_transformers(model, requests: list[tuple[list[int], int]], batch: int = 16) -> float:
    """Tokens a second that were asked for; requests of like length share a batch, as a careful user would do."""
    ordered = sorted(requests, key=lambda request: (request[1], len(request[0])))
    began = time.perf_counter()
    for at in range(0, len(ordered), batch):
        part = ordered[at : at + batch]
        width = max(len(prompt) for prompt, _ in part)
        ids = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt, _ in part], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in part], device=model.device
        )
        count = max(n for _, n in part)
        model.generate(
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=2
        )
    return sum(n for _, n in requests) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="r1_nano")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    device = torch.device(EngineConfig(device=options.device).resolved_device())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as scratch:
        model = DeepseekV3ForCausalLM.from_pretrained(options.model, device=device)
        llm = LLM(model, max_seq_len=1024)
        drafting = (
            LLM(model, max_seq_len=1024, speculative_config=MTP) if llm.model_config.num_nextn_predict_layers else None
        )
        peer = load_transformers(dequantized(options.model, Path(scratch) / "bf16"), device)
        requests = workload(options.requests, llm.tokenizer.vocab_size if llm.tokenizer else llm.vocab_size)
        sides = {"engine": lambda: run_engine(llm, requests)}
        if drafting is not None:
            sides["engine, 3 MTP drafts"] = lambda: run_engine(drafting, requests)
        if peer is not None:
            sides["transformers"] = lambda: run_transformers(peer, requests)
        sides["loop, batch 64"] = lambda: run_loop(model, 64, 24, 100)
        sides["engine, batch 64"] = lambda: run_engine_steady(llm, 64, 24, 100)
        for side in sides.values():
            side()  # warm up
        gc.collect()
        gc.freeze()  # as a server does: one collection through four models would take longer than a short side
        seen: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.repeats):
            for name, side in sides.items():
                seen[name].append(side())
        medians = {name: statistics.median(values) for name, values in seen.items()}
        print(f"{options.requests} mixed requests of {options.model}, {where}, tokens/s:")
        for name, value in medians.items():
            print(f"  {name:<22}{value:>10.1f}   ({min(seen[name]):.1f} to {max(seen[name]):.1f})")
        ratios = {"engine / loop": medians["engine, batch 64"] / medians["loop, batch 64"]}
        if peer is not None:
            ratios["engine / transformers"] = medians["engine"] / medians["transformers"]
        for name, value in ratios.items():
            print(f"  {name:<22}{value:>10.2f}")
        llm.shutdown()
        if drafting is not None:
            drafting.shutdown()
        if options.json:
            Path(options.json).write_text(json.dumps({"tokens_per_second": seen, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
