"""Sampling: distributions by chi-square, cuts against a plain reference, seeds against company."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_fp4_plugin.engine import sampler
from deepseek_fp4_plugin.engine.slots import Slots
from deepseek_fp4_plugin.engine.step_plan import PlanRow, Sampling, Setup


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    n = len(u)

    def full(value, dtype):
        return torch.full((n,), value, dtype=dtype)

    return sampler.draw(
        logits.expand(n, -1).contiguous(),
        full(temperature, torch.float32),
        full(top_k, torch.int64),
        full(top_p, torch.float64),
        full(min_p, torch.float64),
        u,
    )


def reference_support(logits, temperature, top_k, top_p, min_p) -> set[int]:
    """Tokens left by min-p, top-k and top-p over the top-k's renormalized mass, in plain Python."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    order = order[: top_k or len(order)]
    mass = sum(p[i] for i in order)
    kept, total = [], 0.0
    for i in order:
        if kept and (total >= top_p * mass or p[i] < min_p * p[order[0]]):
            break
        kept.append(i)
        total += p[i]
    return set(kept)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([300, 1000]),
    st.sampled_from([0.3, 1.0, 3.0]),
    st.sampled_from([0, 1, 5, 280]),
    st.sampled_from([0.1, 0.6, 0.95, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
@example(
    seed=345, vocab=300, temperature=3.0, top_k=0, top_p=0.95, min_p=0.0
)  # 0.94999992 before a token: a tie in FP32
def test_cuts(seed, vocab, temperature, top_k, top_p, min_p):
    torch.manual_seed(seed)
    logits = torch.randn(1, vocab) * 2
    drawn = set(
        draw(logits, torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1], temperature, top_k, top_p, min_p).tolist()
    )
    tie = 1e-6  # probabilities are FP32, so a sum this near to a limit may fall on either side
    assert drawn <= reference_support(logits[0], temperature, top_k, top_p * (1 + tie), min_p * (1 - tie))
    support = reference_support(logits[0], temperature, top_k, top_p * (1 - tie), min_p * (1 + tie))
    p = (logits[0].double() / temperature).softmax(-1)
    likely = {i for i in support if p[i] / sum(p[j] for j in support) > 1e-3}
    assert likely <= drawn


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Statistic over its mean, in standard deviations; tokens expected less than 5 times are pooled."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5 if freedom else 0.0


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_draws_follow_the_distribution(top_p):
    torch.manual_seed(1)
    logits = torch.randn(1, 64)
    n = 40_000
    u = sampler.uniform(torch.arange(n), torch.full((n,), 7))
    tokens = draw(logits, u, top_p=top_p)
    support = reference_support(logits[0], 1.0, 0, top_p, 0.0)
    p = np.array([x if i in support else 0.0 for i, x in enumerate(logits[0].double().softmax(-1).tolist())])
    counts = np.bincount(tokens.numpy(), minlength=64)
    assert abs(chi_square(counts, p / p.sum() * n)) < 4
    assert chi_square(counts, np.full(64, n / 64)) > 50  # the test can fail


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions():
    n = 100_000
    many, same = torch.arange(n), torch.full((n,), 3)
    for seeds, positions in ((many, same), (same, many)):
        u = sampler.uniform(seeds, positions).numpy()
        counts = np.histogram(u, bins=100, range=(0, 1))[0]
        assert abs(chi_square(counts, np.full(100, n / 100))) < 4
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02


def sample(logits, *samplings: Sampling, reads: bool = True) -> list[int]:
    """One token each, all at position 11."""
    slots = Slots(len(samplings), 1, 0, 1, torch.device("cpu"))
    slots.enter(range(len(samplings)), [Setup(10, s) for s in samplings])
    rows = torch.arange(len(samplings))
    random = torch.tensor([i for i, s in enumerate(samplings) if not s.greedy])
    return sampler.sample(logits, logits.argmax(-1), slots, rows, torch.full_like(rows, 11), random, reads).tolist()


def test_a_seeded_row_does_not_depend_on_its_company():
    torch.manual_seed(0)
    logits = torch.randn(3, 500)
    seeded = Sampling(greedy=False, seed=5, top_p=0.9)
    alone = sample(logits[:1], seeded)
    crowd = sample(logits[[1, 0, 2]], Sampling(), seeded, Sampling(greedy=False, seed=6, top_k=3))
    assert alone[0] == crowd[1]
    assert crowd[0] == logits[1].argmax()


def test_a_draw_without_a_word_from_the_device_is_the_same():
    logits = torch.randn(40, 1000) * 2
    samplings = [
        Sampling(greedy=i % 8 == 0, temperature=0.3 + i / 20, top_k=(0, 5, 400)[i % 3], top_p=(1.0, 0.9)[i % 2], seed=i)
        for i in range(40)
    ]
    assert sample(logits, *samplings, reads=False) == sample(logits, *samplings)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniform_numbers_are_those_of_unsigned_arithmetic(seed, position):
    def splitmix(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    expected = (splitmix(splitmix(seed) ^ position * 0x9E3779B97F4A7C15 % 2**64) >> 11) * 2.0**-53
    signed = seed - 2**64 if seed >= 2**63 else seed
    assert sampler.uniform(torch.tensor([signed]), torch.tensor([position])).item() == expected


def test_penalties_count_the_drafts_before_a_row():
    s = Sampling(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=2.0)
    plan = PlanRow(0, [], 10, 1, True, history=[2, 3, 4], num_prompt_tokens=1)
    logits = torch.ones(2, 6)
    sampler.process(logits, plan, s)
    assert logits[0].tolist() == [1, 1, 0.5, 0.5 - 1.5, 1, 1]
    assert logits[1].tolist() == [1, 1, 0.5, 0.5 - 1.5, 0.5 - 1.5, 1]


def test_bias_bans_and_masks():
    mask = np.zeros((1, 2), dtype=np.int32)
    mask[0, 0], mask[0, 1] = 0b1110, 0b1
    plan = PlanRow(0, [], 10, 0, True, banned=((2,),), masks=mask)
    logits = torch.zeros(1, 40)
    sampler.process(logits, plan, Sampling(logit_bias=((1, 2.0),)))
    allowed = (logits[0] > -torch.inf).nonzero().flatten().tolist()
    assert allowed == [1, 3, 32]
    assert logits[0, 1] == 2.0


def test_logprobs_have_the_chosen_token_first():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    (entry,) = sampler.token_logprobs(logits, torch.tensor([1]), 2).entries([1])
    assert list(entry) == [1, 3, 2]
    assert entry[1].rank == 3
    assert entry[3].logprob == pytest.approx(logits.log_softmax(-1)[0, 3].item())
