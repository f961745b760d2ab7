"""The engine's equalities on a trained model: r1_nano in FP32, greedy, whole answers; and transformers as the judge."""

import importlib.util
import logging

import pytest
import torch

from deepseek_fp4_plugin.assets.held_out import grade, load_held_out
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.tokenizer import Tokenizer
from tests.end_to_end.test_engine_equalities import differing
from tests.engine_core import make_engine, make_request, run_all

pytestmark = pytest.mark.slow
PROBLEMS, LIMIT = load_held_out()[:12], 160
SETUPS = {
    "crowd": {},
    "chunked": {"tokens": 24},
    "preempted": {"blocks": 60, "reuse": False},
    "one draft": {"drafts": 1},
    "three drafts, chunked, preempted": {"drafts": 3, "tokens": 40, "blocks": 44},
    "five drafts": {"drafts": 5},
}


@pytest.fixture(scope="module")
def model():
    return DeepseekV3ForCausalLM.from_pretrained("r1_nano", dtype="float32")


@pytest.fixture(scope="module")
def prompts(model):
    tokenizer = Tokenizer.from_folder(model.path)
    return {i: tokenizer.encode_chat([{"role": "user", "content": p.prompt}]) for i, p in enumerate(PROBLEMS)}


def answers(model, prompts, **setup):
    engine = make_engine(model, block_size=16, **setup)
    requests = []
    for i, prompt in prompts.items():
        request = make_request(i, prompt, LIMIT)
        request.stopping.stop_ids = request.stopping.eos_ids = frozenset({1})
        requests.append(request)
    return run_all(engine, requests), engine.stats()


@pytest.fixture(scope="module")
def alone(model, prompts):
    out = {}
    for i, prompt in prompts.items():
        out |= answers(model, {i: prompt}, reuse=False)[0]
    return out


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_schedule_does_not_show(model, prompts, alone, setup):
    outputs, stats = answers(model, prompts, **setup)
    assert sum(differing(model, prompts[i], alone[i], outputs[i]) for i in prompts) == 0
    if setup.get("blocks"):
        assert stats.preemptions > 0
    if setup.get("drafts") == 3:
        assert stats.answer.emitted / stats.answer.steps > 2.5
    second, _ = answers(model, prompts, **setup)
    assert second == outputs


def test_answers_are_right(model, prompts, alone):
    tokenizer = Tokenizer.from_folder(model.path)
    right = sum(grade(p.answer, tokenizer.decode(alone[i])) for i, p in enumerate(PROBLEMS))
    assert right >= 10  # LIMIT cuts the longest answers off


def test_acceptance_is_the_same_with_and_without_reuse(model, prompts):
    """Every prompt twice, so that the second finds the first's blocks."""
    doubled = prompts | {100 + i: prompt for i, prompt in prompts.items()}
    with_reuse, one = answers(model, doubled, drafts=3, batch=4)
    without, other = answers(model, doubled, drafts=3, batch=4, reuse=False)
    assert with_reuse == without
    assert one.cached_prompt_tokens > 0
    assert one.answer.outcomes == other.answer.outcomes


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the reference model is not installed")
def test_greedy_equals_transformers(model, prompts, alone, tmp_path):
    import transformers

    from benchmarks.throughput import dequantized

    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = dequantized("r1_nano", tmp_path / "bf16")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for i in list(prompts)[:6]:
        ids = torch.tensor([prompts[i]])
        with torch.inference_mode():
            output = theirs.generate(ids, max_new_tokens=LIMIT, do_sample=False, eos_token_id=1, pad_token_id=2)
        expected = output[0, len(prompts[i]) :].tolist()
        # Their weights went through BF16, ours are FP8 values times FP32 scales: the text is the same all the same.
        assert alone[i] == expected
