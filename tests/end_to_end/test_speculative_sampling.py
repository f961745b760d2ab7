"""Speculative sampling follows the target's distribution: chi-square against the model's own probabilities."""

import numpy as np
import pytest
import torch

from deepseek_fp4_plugin.engine import model_runner, speculative
from deepseek_fp4_plugin.engine.step_plan import Sampling
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from tests.engine_core import make_engine, make_request
from tests.tiny import tiny_config, write_checkpoint
from tests.unit.test_sampler import chi_square, reference_support

DRAWS = 20_000
PROMPT = [5, 17, 200, 31, 8, 77]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model with a sharp head, so that drafts which repeat its favourites are often right.

    A hundred thousand answers are sampled here, and what they cost is the model: two layers, four experts.
    """
    config = tiny_config(num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    folder = write_checkpoint(tmp_path_factory.mktemp("small"), config)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32")
    model.lm_head.weight = model.lm_head.weight * 4
    return model


@torch.inference_mode()
def distribution(model, prompt, temperature, top_p) -> np.ndarray:
    logits = model.compute_logits(model(ForwardBatch.from_sequences([prompt]))[-1:])[0]
    support = reference_support(logits, temperature, 0, top_p, 0.0)
    p = (logits.double() / temperature).softmax(-1).tolist()
    kept = np.array([x if i in support else 0.0 for i, x in enumerate(p)])
    return kept / kept.sum()


def favourites(model, temperature) -> list[int]:
    """The likeliest continuation, used as every draft: accepted often, but far from always."""
    tokens = list(PROMPT)
    for _ in range(4):
        tokens.append(int(distribution(model, tokens, temperature, 1.0).argmax()))
    return tokens[len(PROMPT) :]


def sampled(model, temperature, top_p, monkeypatch) -> tuple[np.ndarray, int]:
    """First three tokens of DRAWS requests whose drafts are the favourites; and how many drafts were accepted."""
    engine = make_engine(model, drafts=3, batch=2048, tokens=1 << 15, blocks=8192)
    likely = favourites(model, temperature)
    runner = engine.executor.runner
    submit, slots = runner.submit, runner.slots

    def with_favourites(plan):
        submit(plan)
        for row in plan.rows:
            at = int(slots.starts[row.slot]) + 1 - len(PROMPT)
            slots.tokens[row.slot, 1:] = torch.tensor([*likely[at:], 0, 0, 0][:3])

    monkeypatch.setattr(runner, "submit", with_favourites)
    out = {i: [] for i in range(DRAWS)}
    for i in out:
        engine.add(make_request(i, PROMPT, 3, Sampling(greedy=False, temperature=temperature, top_p=top_p, seed=i)))
    while engine.has_work:
        for emission in engine.step():
            out[emission.request.request_id] += emission.tokens
    return np.array(list(out.values())), sum(engine.stats().answer.accepted)


def deviation(model, tokens: np.ndarray, temperature, top_p) -> list[float]:
    """Chi-square, in standard deviations from its mean, of the first token and of later ones after likely prefixes."""
    out = []
    first = distribution(model, PROMPT, temperature, top_p)
    out.append(chi_square(np.bincount(tokens[:, 0], minlength=320), first * len(tokens)))
    for length in (1, 2):
        prefixes, counts = np.unique(tokens[:, :length], axis=0, return_counts=True)
        for which in np.argsort(-counts)[:3]:
            prefix = prefixes[which]
            rows = tokens[(tokens[:, :length] == prefix).all(1)]
            p = distribution(model, PROMPT + prefix.tolist(), temperature, top_p)
            out.append(chi_square(np.bincount(rows[:, length], minlength=320), p * len(rows)))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_distribution_is_the_targets(model, temperature, top_p, monkeypatch):
    tokens, accepted = sampled(model, temperature, top_p, monkeypatch)
    assert accepted > DRAWS // 10
    assert max(map(abs, deviation(model, tokens, temperature, top_p))) < 5


@pytest.mark.slow
def test_a_broken_rule_is_seen(model, monkeypatch):
    """Accepting one wrong draft in twenty moves the distribution far beyond what chance allows."""
    rule = speculative.verify

    def broken(targets, drafts, relaxed=None):
        return rule(targets, drafts, (torch.rand(drafts.shape) < 0.05) & (drafts >= 0))

    monkeypatch.setattr(model_runner, "verify", broken)
    tokens, _ = sampled(model, 1.0, 1.0, monkeypatch)
    assert max(deviation(model, tokens, 1.0, 1.0)) > 8
