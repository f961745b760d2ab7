"""Verification rules against TensorRT-LLM's cases and hand-worked ones."""

import pytest
import torch

from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.input_batch import build_uniform
from deepseek_fp4_plugin.engine.model_runner import ModelRunner
from deepseek_fp4_plugin.engine.request import Request, Stopping
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.slots import Slots
from deepseek_fp4_plugin.engine.speculative import passes_relaxed, thinking_after, verify
from deepseek_fp4_plugin.engine.step_plan import Sampling, Setup, StepResult

LN = torch.log


@pytest.mark.parametrize(
    ("targets", "drafts", "emitted"),
    [
        ([1, 3, 2, 4], [1, 3, 4], [1, 3, 2]),
        ([4, 6, 5, 2], [4, 6, 5], [4, 6, 5, 2]),
        ([4, 3, 5, 7], [5, 7, 4], [4]),
        ([1, 3], [1], [1, 3]),
        ([4, 6], [5], [4]),
        ([4, 6, 5], [-1, -1], [4]),  # a request with fewer drafts than others
    ],
)
def test_strict(targets, drafts, emitted):
    out, accepted = verify(torch.tensor([targets]), torch.tensor([drafts]))
    assert out[0, : accepted[0] + 1].tolist() == emitted


def logits_of(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def relaxed(rows, draft, topk, delta):
    logits = logits_of(*rows).unsqueeze(0)
    return passes_relaxed(
        logits, torch.tensor([draft]), torch.tensor([topk]), torch.tensor([delta], dtype=torch.float32), topk
    )[0].tolist()


ROW = [0.5, 0.3, 0.15, 0.05]


@pytest.mark.parametrize(
    ("draft", "topk", "delta", "accepted"),
    [
        (0, 10, 0.0, True),  # the best token always passes
        (1, 10, 0.1, False),  # 0.3 < 0.5 - 0.1
        (1, 10, 0.25, True),
        (1, 1, 0.9, False),  # not among the one best
        (2, 2, 0.9, False),  # third of the two best
        (2, 3, 0.4, True),
        (3, 4, 0.6, True),  # 0.5 - 0.6 < 0: only membership counts
        (3, 10, 0.4, False),
    ],
)
def test_relaxed_by_hand(draft, topk, delta, accepted):
    assert relaxed([ROW], [draft], topk, delta) == [accepted]


def test_relaxed_accepts_equality_at_the_threshold():
    """p_2 == p_1 - delta in FP32: 0.5, 0.25 and 0.25 have no rounding."""
    assert relaxed([[0.5, 0.25, 0.125, 0.125]], [1], 4, 0.25) == [True]
    assert relaxed([[0.5, 0.25, 0.125, 0.125]], [1], 4, 0.249999) == [False]


def test_relaxed_emits_the_draft_and_then_the_target():
    targets, drafts = torch.tensor([[0, 0, 0, 0]]), torch.tensor([[1, 2, 0]])
    passed = torch.tensor([[True, False, True]])
    emitted, accepted = verify(targets, drafts, passed)
    assert accepted.tolist() == [1]
    assert emitted[0, :2].tolist() == [1, 0]


def test_a_missing_draft_never_passes():
    targets, drafts = torch.tensor([[0, 0]]), torch.tensor([[-1]])
    assert verify(targets, drafts, torch.tensor([[True]]))[1].tolist() == [0]


def one_request(prompt: list[int], **fields) -> tuple[Scheduler, Request]:
    scheduler = Scheduler(BlockManager(64, 8), 4, 512, 256, num_drafts=3, think_ids=(100, 101))
    request = Request(0, prompt, Sampling(), Stopping(50), relaxed_topk=10, relaxed_delta=0.6, **fields)
    scheduler.add(request)
    return scheduler, request


def test_phase_follows_what_was_emitted_from_the_next_step_on():
    """The scheduler counts by it, the rank judges by it: both come to the same."""
    scheduler, request = one_request([5, 6, 7])
    phases, device = [], torch.tensor([False])
    emissions = [[100], [8, 9], [8, 101, 9, 9], [8], [100, 101], [8]]
    for tokens in emissions:
        assert len(scheduler.schedule().rows) == 1
        phases.append(request.thinking)
        assert device.tolist() == [request.thinking]
        # `</think>` in the middle of a step: the drafts behind it were still judged relaxed in that step
        scheduler.update(StepResult([tokens], [[8, 8, 8]]))
        padded = torch.tensor(
            [tokens + [100] * (4 - len(tokens))]
        )  # filler behind the accepted ones counts for nothing
        device = thinking_after(device, padded, torch.tensor([len(tokens) - 1]), torch.tensor([[100, 101]]))
    assert phases == [False, True, True, False, False, False]
    assert request.thinking is False
    thinking = request.thinking_counts
    assert (thinking.steps, thinking.emitted) == (2, 6)


def test_a_prompt_inside_a_think_block_is_relaxed_at_once():
    scheduler, _ = one_request([5, 100, 7, 101, 8])  # the end token in a prompt is not looked at
    setup = scheduler.schedule().rows[0].setup
    assert setup.relaxed and setup.thinking and setup.think_ids == (100, 101)


def test_relaxed_rule_in_the_runner():
    """ModelRunner judges a row by its own top-k, delta and phase, and leaves strict rows strict."""
    runner = object.__new__(ModelRunner)
    runner.slots = Slots(4, 4, 2, 4, torch.device("cpu"))

    def setup(topk, delta, thinking=True):
        return Setup(10, Sampling(), topk, delta, thinking, (100, 101))

    runner.slots.enter([0, 1, 2, 3], [setup(10, 0.6), setup(1, 0.0), setup(2, 0.25), setup(10, 0.6, False)])
    step = build_uniform(torch.arange(4), runner.slots, False, 10)
    logits = logits_of(*[ROW] * 12)
    drafts = torch.tensor([[1, 2]] * 4)
    passed = runner._passes_relaxed(step, logits, drafts)
    emitted, accepted = verify(logits.argmax(-1)[step.where], drafts, passed)
    assert accepted.tolist() == [2, 0, 1, 0]
    assert [ids[: n + 1] for ids, n in zip(emitted.tolist(), accepted.tolist(), strict=True)] == [
        [1, 2, 0],
        [0],
        [1, 0],
        [0],
    ]
