"""A step asks its device nothing: on torch's meta device, which has shapes and no values, whatever looks at a value
raises (`.item()`, `.tolist()`, `bool()`, `nonzero`, indexing by a mask, copies to the host), and so does mixing it with
tensors of the host."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek_fp4_plugin.engine.recorded_steps import Kind
from deepseek_fp4_plugin.engine.step_plan import Sampling, StepPlan, StepResult
from deepseek_fp4_plugin.kernels import decoded
from deepseek_fp4_plugin.kernels.weights import PreparedRouter, PreparedWeight
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.engine_core import make_engine, make_request

META = torch.device("meta")
DRAFTS = 3


def moved(value: Any) -> Any:
    """The same on the meta device: tensors, and what holds them."""
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, PreparedWeight):
        return dataclasses.replace(value, data=moved(value.data), input_scale=moved(value.input_scale))
    if isinstance(value, PreparedRouter):
        return PreparedRouter(decoded, moved(value.data), moved(value.bias))
    if isinstance(value, tuple):
        parts = [moved(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, nn.Module):
        for name, part in list(vars(value).items()):
            if isinstance(part, Tensor | PreparedWeight | PreparedRouter):
                vars(value)[name] = moved(part)
        for child in value.children():
            moved(child)
    return value


@pytest.fixture(scope="module")
def model(tiny_fp8):
    return moved(DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, backend="decoded"))


def runner_and_scheduler(model):
    engine = make_engine(model, drafts=DRAFTS, batch=8, cache_dtype=torch.bfloat16, think_ids=(5, 6), overlap=True)
    return engine.executor.runner, engine.schedulers[0]


REQUESTS = {
    "greedy": {},
    "drawn": {"sampling": Sampling(greedy=False, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, seed=3)},
    "all of the vocabulary": {"sampling": Sampling(greedy=False, seed=3)},
    "relaxed": {"relaxed_topk": 4, "relaxed_delta": 0.5},
    "logprobs": {"sampling": Sampling(logprobs=2, prompt_logprobs=1)},
    "penalties": {"sampling": Sampling(presence_penalty=1.0, frequency_penalty=0.5, logit_bias=((3, 1.0),))},
    "bans": {"bad_words": ((7,), (8, 9))},
}


@pytest.mark.parametrize("kinds", [*([kind] for kind in REQUESTS), list(REQUESTS)], ids=lambda kinds: "+".join(kinds))
def test_no_step_looks_at_a_value(model, kinds):
    """A prompt in chunks, its end beside requests that decode, decoding alone."""
    runner, scheduler = runner_and_scheduler(model)
    scheduler.max_num_tokens = 24
    for i, kind in enumerate(kinds):
        scheduler.add(make_request(i, range(10, 40 + i), 50, **REQUESTS[kind]))
    seen = set()
    for _ in range(20):
        plan = scheduler.schedule()
        runner.submit(plan)
        seen |= {(bool(row.tokens), row.sample) for row in plan.rows}
        tokens = [[20, 21] if row.sample and not row.tokens else [20] * row.sample for row in plan.rows]
        scheduler.update(StepResult(tokens, [[22] * DRAFTS if row.sample else [] for row in plan.rows]))
    assert seen == {(True, False), (True, True), (False, True)}


def test_a_step_that_looks_is_caught(model):
    runner, scheduler = runner_and_scheduler(model)
    runner.reads = True
    scheduler.add(make_request(0, range(10, 30), 50, **REQUESTS["drawn"]))
    with pytest.raises((RuntimeError, NotImplementedError)):
        runner.submit(scheduler.schedule())


def test_a_uniform_step_can_be_captured(model):
    runner, _ = runner_and_scheduler(model)
    for kind in ({}, {"drawn": True}, {"relaxed_topk": 4}):
        places = torch.full((4,), runner.slots.dummy, device=META)
        with torch.inference_mode():
            packed, greatest, hidden, logits = runner._uniform(places, Kind(**kind), 1)()
        assert packed.shape == (4, 2 * (DRAFTS + 1)) and greatest.shape == (4, DRAFTS + 1)
        assert (hidden.shape[0], logits.shape[0]) == (16, 16)


def test_a_rank_without_requests_steps_along(model):
    """Its batch is empty; the drafting of the others has it take part in every forward of theirs."""
    runner, _ = runner_and_scheduler(model)
    steps, inner = [], runner.drafter._hidden

    def watched(hidden, batch):
        steps.append(batch.dp_tokens)
        return inner(hidden, batch)

    runner.drafter._hidden = watched
    runner.submit(StepPlan([], 0, True, (0, 8), (0, 2), True))
    runner.submit(StepPlan([], 0, True, (0, 8), (0, 0), False))
    assert steps == [(0, 8), *[(0, 2)] * (DRAFTS - 1), (0, 8)]


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3),
    ],
)
def test_the_device_refuses(look):
    with pytest.raises((RuntimeError, NotImplementedError)):
        look(torch.ones(3, device=META))
