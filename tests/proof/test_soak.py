"""Ten thousand requests through a cache far too small, with drafts, prefix reuse and random aborts: nothing leaks."""

import gc
import os
import random

import psutil
import pytest

from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.end_to_end.test_engine_equalities import differing
from tests.engine_core import make_engine, make_request, run_all

REQUESTS, LONGEST = 10_000, 100


@pytest.mark.proof
def test_ten_thousand_requests(tiny_fp8):
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")
    rng = random.Random(0)
    shared = [rng.randrange(320) for _ in range(LONGEST)]
    engine = make_engine(model, drafts=3, blocks=96, batch=32, tokens=256, max_seq_len=160)
    process = psutil.Process(os.getpid())
    started: dict[int, list[int]] = {}
    live, outputs, aborted, memory = {}, {}, set(), []
    submitted = finished = 0
    while submitted < REQUESTS or engine.scheduler.has_work:
        while submitted < REQUESTS and engine.scheduler.num_waiting < 16:
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
        engine.scheduler.blocks.check([request.blocks for request in engine.scheduler.running])
        if engine.stats().steps % 500 == 0:
            gc.collect()
            memory.append(process.memory_info().rss / 2**20)
    assert finished + len(aborted) == REQUESTS
    engine.scheduler.blocks.check([])
    stats = engine.stats()
    assert stats.preemptions > 100
    assert stats.cached_prompt_tokens > 10_000
    assert memory[-1] - memory[len(memory) // 4] < 30, f"memory grew (MiB): {memory}"
    excused = total = 0
    for number, prompt in started.items():
        if number not in aborted:
            alone = run_all(make_engine(model, reuse=False), [make_request(0, prompt, len(outputs[number]))])[0]
            excused += differing(model, prompt, alone, outputs[number])
            total += len(alone)
    assert excused <= max(1, total // 1000)
    print(
        f"{REQUESTS} requests, {len(aborted)} aborted, {stats.steps} steps, {stats.preemptions} preemptions, "
        f"{stats.cached_prompt_tokens} of {stats.prompt_tokens} prompt tokens reused, "
        f"memory {memory[0]:.0f} to {memory[-1]:.0f} MiB, {excused} of {total} tokens were near ties"
    )
