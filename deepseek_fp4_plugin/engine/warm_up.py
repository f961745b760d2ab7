"""Warm-up: steps of the sizes that will come are run before anybody waits for them.

What a first use would make is made now: kernels are compiled and loaded, libraries take their work spaces, decode steps
are recorded. All of it is computed on the dummy's slot and block, which no request ever has, and leaves nothing behind
that a token could depend on. Every rank does the same things in the same order, which follows from the configuration
alone, so that their exchanges meet.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from deepseek_fp4_plugin.config import SpeculativeConfig
from deepseek_fp4_plugin.engine.model_runner import ModelRunner
from deepseek_fp4_plugin.engine.recorded_steps import Kind
from deepseek_fp4_plugin.engine.step_plan import PlanRow, Sampling, Setup, StepPlan

WarmUpProgress = Callable[[int, int], None]

# Tokens: kernels that `ops.build_ahead` has not made differ so at most; the experts' do between 1,024 and 2,048, too.
_PROMPTS = (*(2**n for n in range(3, 11)), 1536, 2048, 4096)
_SHORT = (1, 8)  # tokens of chunks that attend in absorbed form, whose kernels differ by the context
_CONTEXTS = (64, 128, 256)
_UNRECORDED = tuple(2**n for n in range(8))  # requests that decode, where nothing is recorded


def kinds_of(speculative: SpeculativeConfig | None) -> tuple[Kind, ...]:
    """The uniform steps that requests without wishes of their own come to, drawn and greedy."""
    relaxed = speculative is not None and speculative.use_relaxed_acceptance_for_thinking
    topk = speculative.relaxed_topk if speculative is not None and relaxed and speculative.relaxed_delta > 0 else 1
    return Kind(True, topk), Kind(False, topk)


def sizes_of(runner: ModelRunner, max_num_tokens: int) -> tuple[int, ...]:
    """Numbers of requests of decode steps, the largest first: recorded so, they share memory."""
    most = min(runner.slots.count, max_num_tokens // (1 + runner.num_drafts))
    wanted = runner.recorded.sizes.sizes or _UNRECORDED
    return tuple(size for size in sorted(wanted, reverse=True) if size <= most)


def prompts_of(runner: ModelRunner, max_num_tokens: int) -> tuple[int, ...]:
    """Tokens of prompts in a step, the most first: as many as one can have."""
    most = min(max_num_tokens, _room(runner) * runner.slots.count)
    return most, *(count for count in reversed(_PROMPTS) if count < most)


def _room(runner: ModelRunner) -> int:
    """Tokens of one prompt, with room for the drafts behind them."""
    return max(1, runner.slots.max_blocks * runner.block_size - 1 - 2 * runner.num_drafts)


def warm_up(
    runner: ModelRunner,
    sizes: Sequence[int],
    kinds: Sequence[Kind],
    prompts: Sequence[int],
    progress: WarmUpProgress | None = None,
) -> None:
    """Uniform steps of each size and kind, then prompts of so many tokens in all, and chunks behind others.

    progress: called with (steps done, steps in all). Raises ValueError where a GPU's memory does not suffice.
    """
    steps = [(f"{size} requests", partial(runner.prepare, size, kind)) for size in sizes for kind in kinds]
    steps += [(f"{count} prompt tokens", partial(_prompt, runner, count)) for count in prompts]
    longest = min(max(prompts), _room(runner))
    chunks = [(count, start) for start in _CONTEXTS for count in (*_SHORT, start) if count + start <= longest]
    steps += [(f"{count} prompt tokens", partial(_prompt, runner, count, start)) for count, start in chunks]
    for done, (what, step) in enumerate(steps):
        if progress is not None:
            progress(done, len(steps))
        try:
            step()
        except torch.OutOfMemoryError:
            raise ValueError(
                f"a step of {what} does not fit into the GPU's memory beside the weights; lower max_batch_size or "
                "max_num_tokens, or have more ranks"
            ) from None
    runner.slots.renew_dummy()
    for counts in runner.expert_load.values():
        counts.zero_()
    if progress is not None:
        progress(len(steps), len(steps))


def _prompt(runner: ModelRunner, count: int, start: int = 0) -> None:
    """So many tokens on every rank, each prompt's behind `start` others, and a token drawn behind each prompt."""
    each, vocabulary = _room(runner) - start, runner.model.config.vocab_size
    parts = [range(first, min(first + each, count)) for first in range(0, count, each)]
    setup = Setup(start, Sampling(greedy=False))
    rows = [
        PlanRow(runner.slots.dummy, [token % vocabulary for token in part], start, 0, True, setup=setup)
        for part in parts
    ]
    ranks = runner.dp_ranks
    runner.run(StepPlan(rows, count, False, (count,) * ranks, (len(rows),) * ranks, False))
