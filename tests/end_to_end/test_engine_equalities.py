"""The engine's equalities, greedy in FP32, token for token: how a request is scheduled never shows in its output."""

import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.engine_core import make_engine, make_request, run_all

TIE = 1e-3  # a differing token is excused only where the two best logits are this close


@pytest.fixture(scope="module")
def model(tiny_fp8):
    return DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, dtype="float32")


def prompts(count: int, seed: int = 0, longest: int = 90) -> dict[int, list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(320) for _ in range(longest)]
    out = {}
    for i in range(count):
        own = [rng.randrange(320) for _ in range(rng.randint(1, longest))]
        out[i] = (shared[: rng.randint(1, longest)] + own)[:longest] if rng.random() < 0.5 else own
    return out


@torch.inference_mode()
def reference(model, prompt: list[int], count: int) -> list[int]:
    """Greedy by whole forwards, no cache: independent of the engine."""
    tokens = list(prompt)
    for _ in range(count):
        hidden = model(ForwardBatch.from_sequences([tokens]))
        tokens.append(int(model.compute_logits(hidden[-1:]).argmax()))
    return tokens[len(prompt) :]


@torch.inference_mode()
def differing(model, prompt: list[int], one: list[int], other: list[int]) -> int:
    """0 where equal, 1 where the first difference is a near tie; anything else fails."""
    if one == other:
        return 0
    at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    hidden = model(ForwardBatch.from_sequences([prompt + one[:at]]))
    best = model.compute_logits(hidden[-1:]).topk(2).values[0]
    assert best[0] - best[1] < TIE, f"token {at} differs: {one[at]} and {other[at]}"
    return 1


def compare(model, given: dict[int, list[int]], one: dict, other: dict) -> None:
    excused = sum(differing(model, given[i], one[i], other[i]) for i in given)
    total = sum(map(len, one.values()))
    assert excused <= max(1, total // 1000), f"{excused} of {total} tokens were near ties"


@pytest.fixture(scope="module")
def crowd():
    return prompts(64)


@pytest.fixture(scope="module")
def expected(model, crowd):
    """Each request alone, whole prompt, no reuse, no drafts."""
    out = {}
    for i, prompt in crowd.items():
        out |= run_all(make_engine(model, reuse=False), [make_request(i, prompt)])
    return out


def test_alone_equals_the_model_without_a_cache(model, crowd, expected):
    for i in list(crowd)[:12]:
        differing(model, crowd[i], expected[i], reference(model, crowd[i], 16))


@pytest.mark.parametrize(
    "setup",
    [
        {"reuse": False},
        {"reuse": True},
        {"tokens": 13, "reuse": False},
        {"tokens": 13, "reuse": True},
        {"blocks": 24, "batch": 16},
        *({"drafts": k} for k in range(1, 6)),
        {"drafts": 3, "tokens": 17},
        {"drafts": 3, "tokens": 17, "blocks": 26, "batch": 16},
        {"drafts": 5, "blocks": 20, "reuse": False},
        {"overlap": True},
        {"overlap": True, "tokens": 13, "blocks": 24, "batch": 16},
        {"overlap": True, "drafts": 3, "tokens": 17, "blocks": 26, "batch": 16},
        {"overlap": True, "drafts": 2, "reads": False},
        {"seconds": 1e-9},  # five prompt tokens a step, after the first
        {"seconds": 1e-9, "drafts": 3, "blocks": 26, "batch": 16},
    ],
    ids=str,
)
def test_schedule_does_not_show(model, crowd, expected, setup):
    oracle = {i: crowd[i] + expected[i] for i in crowd} if setup.get("drafts") else None
    engine = make_engine(model, oracle=oracle, **setup)
    outputs = run_all(engine, [make_request(i, p) for i, p in crowd.items()])
    compare(model, crowd, expected, outputs)
    stats = engine.stats()
    if setup.get("blocks"):
        assert stats.preemptions > 0
    if setup.get("drafts"):
        accepted = stats.answer.accepted
        assert all(0 < a < d for a, d in zip(accepted, stats.answer.drafted, strict=True))
        assert stats.steps < 64 * 16
    if setup.get("reuse", True) and not setup.get("blocks"):
        second = run_all(engine, [make_request(i, p) for i, p in crowd.items()])
        compare(model, crowd, expected, second)
        assert engine.stats().cached_prompt_tokens > 0.4 * engine.stats().prompt_tokens  # nearly all of the second run


def test_drafts_are_the_same_with_and_without_reuse(model, crowd):
    """The MTP latents of reused blocks are those that would have been computed."""
    counts = []
    for reuse in (False, True):
        engine = make_engine(model, drafts=3, reuse=reuse, batch=4)
        seen = []
        inner = engine.executor.runner.collect

        def collect(inner=inner, seen=seen):
            result = inner()
            seen.extend(draft for tokens, draft in zip(result.tokens, result.drafts, strict=True) if tokens)
            return result

        engine.executor.runner.collect = collect
        shared = [token * 37 % 320 for token in range(100)]
        alone = [run_all(engine, [make_request(i, shared[: 70 + i])]) for i in range(8)]
        counts.append((alone, seen))
        if reuse:
            assert engine.stats().cached_prompt_tokens > 300
    assert counts[0] == counts[1]


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_schedules(model, crowd, expected, data):
    chosen = data.draw(st.lists(st.sampled_from(sorted(crowd)), min_size=1, max_size=24, unique=True))
    drafts = data.draw(st.integers(0, 5))
    engine = make_engine(
        model,
        drafts=drafts,
        blocks=data.draw(st.integers(18, 80)),
        batch=data.draw(st.integers(1, 24)),
        tokens=data.draw(st.integers(6, 200)),
        reuse=data.draw(st.booleans()),
        overlap=data.draw(st.booleans()),
        max_seq_len=120,
        oracle={i: crowd[i] + expected[i] for i in chosen} if drafts else None,
    )
    requests = [make_request(i, crowd[i], priority=data.draw(st.integers(-1, 1))) for i in chosen]
    outputs: dict[int, list[int]] = {i: [] for i in chosen}
    late = data.draw(st.integers(0, 10))
    aborted = set(data.draw(st.lists(st.sampled_from(chosen), max_size=3)))
    for request in requests[late:]:
        engine.add(request)
    step = 0
    while engine.has_work or step < 3:
        if step == 2:
            for request in requests[:late]:
                engine.add(request)
        for emission in engine.step():
            outputs[emission.request.request_id] += emission.tokens
        if step == 7:
            for request in [r for r in engine.schedulers[0].running if r.request_id in aborted]:
                engine.abort(request)
        engine.schedulers[0].blocks.check([r.blocks for r in engine.schedulers[0].running])
        step += 1
        assert step < 5000
    engine.schedulers[0].blocks.check([])
    for i in chosen:
        if len(outputs[i]) == 16:
            differing(model, crowd[i], expected[i], outputs[i])
        else:
            assert i in aborted
