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

_PROMPTS = tuple(2**n for n in range(3, 13))  # tokens: kernels differ by powers of two, and not above
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
    """Tokens of prompts, the longest first: as many as a step can have, with room for the drafts behind them."""
    room = runner.slots.max_blocks * runner.block_size - 1 - 2 * runner.num_drafts
    most = max(1, min(max_num_tokens, room))
    return most, *(count for count in reversed(_PROMPTS) if count < most)


def warm_up(
    runner: ModelRunner,
    sizes: Sequence[int],
    kinds: Sequence[Kind],
    prompts: Sequence[int],
    progress: WarmUpProgress | None = None,
) -> None:
    """Uniform steps of each size and kind, then prompts of so many tokens, and chunks behind others.

    progress: called with (steps done, steps in all). Raises ValueError where a GPU's memory does not suffice.
    """
    steps = [(f"{size} requests", partial(runner.prepare, size, kind)) for size in sizes for kind in kinds]
    steps += [(f"{count} prompt tokens", partial(_prompt, runner, count)) for count in prompts]
    chunks = [(count, start) for start in _CONTEXTS for count in (*_SHORT, start) if count + start <= max(prompts)]
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
    """So many tokens of a prompt behind `start` others on every rank, and a token drawn behind them."""
    tokens = [token % runner.model.config.vocab_size for token in range(count)]
    row = PlanRow(runner.slots.dummy, tokens, start, 0, True, setup=Setup(start, Sampling(greedy=False)))
    ranks = runner.dp_ranks
    runner.run(StepPlan([row], count, False, (count,) * ranks, (1,) * ranks, False))
