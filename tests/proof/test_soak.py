"""Ten thousand requests through a cache far too small, with drafts, prefix reuse and random aborts: nothing leaks."""

import gc
import os
import random
import time
from pathlib import Path

import psutil
import pytest
import torch

from deepseek_fp4_plugin.assets.held_out import load_held_out
from deepseek_fp4_plugin.config import EngineConfig, KvCacheConfig, SpeculativeConfig
from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.engine import LLMEngine
from deepseek_fp4_plugin.engine.launch import start_executor
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.tokenizer import Tokenizer
from tests.end_to_end.test_engine_equalities import differing
from tests.engine_core import make_engine, make_request, run_all
from tests.ranks import MAPPINGS

REQUESTS, LONGEST = 10_000, 100


@pytest.mark.proof
def test_ten_thousand_requests(tiny_fp8):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")
    soak(model, make_engine(model, drafts=3, blocks=96, batch=32, tokens=256, max_seq_len=160), REQUESTS)


@pytest.mark.proof
@pytest.mark.parametrize("mapping", ["TP2", "DP2"])
def test_two_ranks(tiny_fp8, mapping):
    """The same over two processes, planned ahead; every block returns on every rank."""
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")
    soak_ranks(model, tiny_fp8, mapping, "float32", "cpu")


def soak_ranks(
    model: DeepseekV3ForCausalLM | None,
    folder: Path,
    mapping: str,
    dtype: str,
    device: str,
    seconds: float | None = None,
) -> None:
    """seconds: requests go on coming for so long, in place of REQUESTS."""
    config = EngineConfig(
        model=str(folder),
        dtype=dtype,
        max_batch_size=32,
        max_num_tokens=256,
        max_seq_len=160,
        speculative_config=SpeculativeConfig(num_nextn_predict_layers=3),
        kv_cache_config=KvCacheConfig(max_tokens=96 * 8, tokens_per_block=8),
        **MAPPINGS[mapping],
    )
    group = start_executor(config, str(folder), folder, torch.device(device), None)
    try:
        facts = group.facts
        assert (facts.cache_blocks, group.num_schedulers) == (96, 2 if mapping == "DP2" else 1)
        schedulers = [
            Scheduler(BlockManager(96, 8, True, lookahead=1), 32, 256, 160, 3) for _ in range(group.num_schedulers)
        ]
        engine = LLMEngine(schedulers, group, facts.model_config.vocab_size, overlap=facts.asynchronous)
        soak(model, engine, REQUESTS, seconds)
    finally:
        group.close()


def soak(model: DeepseekV3ForCausalLM | None, engine: LLMEngine, requests: int, seconds: float | None = None) -> None:
    """Serve requests with random lengths, priorities and aborts; the books are checked at every step.

    seconds: as many requests as come in that time, in place of `requests`.
    model: what a hundredth of the requests is computed with again, alone; None: where rounding would tell them apart.
    """
    rng = random.Random(0)
    shared = [rng.randrange(320) for _ in range(LONGEST)]
    process = psutil.Process(os.getpid())
    started: dict[int, list[int]] = {}
    live, outputs, aborted, memory = {}, {}, set(), []
    submitted = finished = 0
    began = time.monotonic()

    def more() -> bool:
        return submitted < requests if seconds is None else time.monotonic() - began < seconds

    while more() or engine.has_work:
        while more() and engine.stats().waiting < 16 * len(engine.schedulers):
            own = [rng.randrange(320) for _ in range(rng.randint(1, 30))]
            prompt = shared[: rng.randint(0, LONGEST - 40)] + own
            request = make_request(submitted, prompt, rng.randint(1, 40), priority=rng.choice((0, 0, 0, 1)))
            engine.add(request)
            live[submitted], outputs[submitted] = request, []
            if submitted % 100 == 0:
                started[submitted] = prompt
            submitted += 1
        for emission in engine.step():
            number = emission.request.request_id
            if number in started:
                outputs[number] += emission.tokens
            if emission.finish_reason:
                del live[number]
                if number not in started:
                    del outputs[number]
                finished += 1
        if rng.random() < 0.1 and live:
            number = rng.choice(list(live))
            assert engine.abort(live.pop(number)) is not None
            aborted.add(number)
        for scheduler in engine.schedulers:
            scheduler.blocks.check([request.blocks for request in scheduler.running])
        if engine.stats().steps % 500 == 0:
            gc.collect()
            memory.append(process.memory_info().rss / 2**20)
    assert finished + len(aborted) == submitted
    for scheduler in engine.schedulers:
        assert not scheduler.running
        scheduler.blocks.check([])
    stats = engine.stats()
    assert stats.preemptions > 100
    assert stats.cached_prompt_tokens > 10_000
    assert memory[-1] - memory[len(memory) // 4] < 30, f"memory grew (MiB): {memory}"
    excused = total = 0
    for number, prompt in started.items():
        if number not in aborted and model is not None:
            alone = run_all(make_engine(model, reuse=False), [make_request(0, prompt, len(outputs[number]))])[0]
            excused += differing(model, prompt, alone, outputs[number])
            total += len(alone)
    assert excused <= max(1, total // 1000)
    print(
        f"{submitted} requests in {time.monotonic() - began:.0f} s, {len(aborted)} aborted, {stats.steps} steps, "
        f"{stats.preemptions} preemptions, "
        f"{stats.cached_prompt_tokens} of {stats.prompt_tokens} prompt tokens reused, "
        f"memory {memory[0]:.0f} to {memory[-1]:.0f} MiB, {excused} of {total} tokens were near ties"
    )


@pytest.mark.proof
def test_two_hundred_on_r1_nano():
    """Real answers, three drafts, a cache for a quarter of them: all finish, and a sample equals its solo runs."""
    model = DeepseekV3ForCausalLM.from_pretrained("r1_nano", dtype="float32")
    tokenizer = Tokenizer.from_folder(model.path)
    prompts = {
        i: tokenizer.encode_chat([{"role": "user", "content": p.prompt}]) for i, p in enumerate(load_held_out()[:200])
    }
    rng = random.Random(0)

    def request(i: int):
        made = make_request(i, prompts[i], 96)
        made.stopping.stop_ids = made.stopping.eos_ids = frozenset({1})
        return made

    engine = make_engine(model, drafts=3, blocks=100, block_size=16, batch=32)
    live = {i: request(i) for i in prompts}
    outputs: dict[int, list[int]] = {i: [] for i in prompts}
    aborted = set()
    for made in live.values():
        engine.add(made)
    while engine.has_work:
        for emission in engine.step():
            outputs[emission.request.request_id] += emission.tokens
            if emission.finish_reason:
                del live[emission.request.request_id]
        if live and rng.random() < 0.1:
            number = rng.choice(list(live))
            engine.abort(live.pop(number))
            aborted.add(number)
        engine.schedulers[0].blocks.check([made.blocks for made in engine.schedulers[0].running])
    engine.schedulers[0].blocks.check([])
    assert not live
    assert engine.stats().preemptions > 0
    excused = 0
    for i in [i for i in range(0, 200, 20) if i not in aborted]:
        alone = run_all(make_engine(model, block_size=16, reuse=False), [request(i)])[i]
        excused += differing(model, prompts[i], alone, outputs[i])
    assert excused == 0
    print(f"200 requests, {len(aborted)} aborted, {engine.stats().preemptions} preemptions")
