"""Which recorded size a step takes: the same on every rank, whatever each of them has to do."""

import pytest
import torch

from deepseek_fp4_plugin.config import CudaGraphConfig
from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.recorded_steps import Sizes
from deepseek_fp4_plugin.engine.request import Request, Stopping
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.step_plan import PlanRow, Sampling, StepPlan, StepResult

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PADDED = Sizes((1, 2, 4, 8), padded=True)


def ranks(*counts: int, drafts: int = 1, uniform: bool = True) -> list[StepPlan]:
    """The plans of ranks that decode so many requests each, as the engine hands them out."""
    tokens = tuple(count * (1 + drafts) for count in counts)
    rows = [[PlanRow(i, [], 9, drafts, True) for i in range(count)] for count in counts]
    return [StepPlan(own, n, uniform, tokens, counts, uniform) for own, n in zip(rows, tokens, strict=True)]


def alone(count: int, uniform: bool = True) -> StepPlan:
    return StepPlan([PlanRow(i, [], 9, 1, True) for i in range(count)], count * 2, uniform)


def test_one_rank_takes_the_next_size_where_padding_is_allowed():
    assert [PADDED.choose(alone(n)) for n in (0, 1, 3, 8, 9)] == [None, 1, 4, 8, None]
    exact = Sizes(PADDED.sizes)
    assert [exact.choose(alone(n)) for n in (1, 3, 8)] == [1, None, 8]
    assert PADDED.choose(alone(2, uniform=False)) is None


@pytest.mark.parametrize("counts", [(3, 5), (0, 1), (8, 8, 8, 8), (1, 2, 3, 4)])
def test_every_rank_takes_the_size_of_the_fullest(counts):
    """Not its own count's, and not the sum's, which would be beyond the largest size."""
    sizes = {PADDED.choose(plan) for plan in ranks(*counts)}
    assert sizes == {next(size for size in PADDED.sizes if size >= max(counts))}


def test_without_padding_ranks_that_differ_replay_nothing():
    exact = Sizes((1, 2, 4, 8))
    assert {exact.choose(plan) for plan in ranks(2, 4)} == {None}
    assert {exact.choose(plan) for plan in ranks(4, 4)} == {4}


def test_a_rank_with_a_prompt_keeps_all_from_replaying():
    plans = ranks(2, 2)
    mixed = [StepPlan(p.rows, p.num_tokens, i == 0, p.dp_tokens, p.dp_sampled, False) for i, p in enumerate(plans)]
    assert [PADDED.choose(plan) for plan in mixed] == [None, None]


def test_nothing_to_do_anywhere_is_no_step():
    assert {PADDED.choose(plan) for plan in ranks(0, 0)} == {None}


def decoding(drafts: int, budget: int = 100, **fields) -> tuple[Scheduler, StepPlan]:
    """The second step of a request with three prompt tokens."""
    scheduler = Scheduler(BlockManager(16, 8), 4, budget, 100, num_drafts=drafts)
    scheduler.add(Request(0, [5, 6, 7], fields.pop("sampling", Sampling()), Stopping(50), **fields))
    assert not scheduler.schedule().uniform
    scheduler.update(StepResult([[8]], [[9] * drafts]))
    return scheduler, scheduler.schedule()


def test_steps_that_decode_are_uniform():
    assert decoding(0)[1].uniform
    scheduler, plan = decoding(3)
    assert plan.uniform and plan.num_tokens == 4
    scheduler.add(Request(1, [5, 6, 7], Sampling(), Stopping(50)))
    scheduler.update(StepResult([[8]], [[9] * 3]))
    assert not scheduler.schedule().uniform  # a prompt came in


def test_a_step_with_only_bonus_tokens_is_not_taken_for_one_with_drafts():
    plan = decoding(3, budget=3)[1]  # a budget of three tokens leaves no room for the third draft
    assert (plan.num_tokens, plan.rows[0].num_drafts, plan.uniform) == (3, 2, False)
    assert decoding(2, budget=3)[1].uniform


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": Sampling(presence_penalty=1.0)},
        {"sampling": Sampling(logit_bias=((1, 1.0),))},
        {"bad_words": ((3,),)},
    ],
    ids=str,
)
def test_what_slots_do_not_know_is_not_uniform(fields):
    assert not decoding(1, **fields)[1].uniform
    assert decoding(1, sampling=Sampling(greedy=False, seed=3))[1].uniform


def test_sizes_from_the_configuration():
    def of(**values):
        return Sizes.of(CudaGraphConfig(**values), CUDA, 1, 512)

    assert of(batch_sizes=[8, 1, 1024]).sizes == (1, 8)  # no more than a batch has
    assert of() == Sizes((1, 2, 4, *range(8, 129, 8)), True)
    assert of(max_batch_size=256, enable_padding=True) == Sizes((1, 2, 4, *range(8, 129, 8), 256), True)
    assert of(max_batch_size=300).sizes[-2:] == (256, 300)  # the largest itself, so that all below are filled up to it
    assert of(enable_padding=False) == Sizes((*range(1, 32), 32, 64, 128))  # TensorRT-LLM's
    assert Sizes.of(CudaGraphConfig(), CUDA, 1, 6) == Sizes((1, 2, 4, 6), True)
    assert Sizes.of(None, CUDA, 1, 512).sizes == ()  # use_cuda_graph=False
    # Every size of up to 16 tokens, and every eighth of up to 256.
    assert Sizes.of(None, CPU, 1, 512) == Sizes((*range(1, 9), *range(16, 129, 8)))
    assert Sizes.of(None, CPU, 0, 30, dp_ranks=2) == Sizes((*range(1, 9), 16, 24))
    assert Sizes.of(CudaGraphConfig(), CPU, 3, 2) == Sizes((1, 2))
