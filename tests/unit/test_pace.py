"""The pace of prompts on simulated devices of every speed: steps as long as they may be, and no longer."""

import pytest

from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.pace import FIRST, PromptPace, least_chunk
from deepseek_fp4_plugin.engine.request import Request, Stopping
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.step_plan import Sampling, StepResult

SECONDS, LEAST = 0.25, 20


def request(tokens: list[int], max_tokens: int) -> Request:
    return Request(0, tokens, Sampling(), Stopping(max_tokens))


def prefill(device, tokens: int, seconds: float | None = SECONDS, most: int = 8192) -> list[tuple[int, float]]:
    """(tokens, seconds) of a prompt's steps; device: seconds of a chunk from its tokens and its context."""
    pace = None if seconds is None else PromptPace(seconds, LEAST)
    blocks = BlockManager(-(-tokens // 32) + 8, 32, False, 0)
    scheduler = Scheduler(blocks, 4, most, tokens + 100, pace=pace)
    scheduler.add(request(list(range(1, tokens + 1)), max_tokens=2))
    steps, done = [], 0
    while done < tokens:
        plan = scheduler.schedule()
        count = sum(len(row.tokens) for row in plan.rows)
        steps.append((count, device(count, done)))
        if pace is not None:
            pace.took(count, 0, steps[-1][1])
        done += count
        scheduler.update(StepResult([[7] if row.sample else [] for row in plan.rows], [[] for _ in plan.rows]))
    return steps


def slow(tokens: int, context: int) -> float:
    """A CPU of the reports: 8,192 tokens took 30 s, and 99 s behind 55,000 others."""
    return 0.02 + 2e-6 * context + tokens * (0.0030 + 1.3e-7 * context)


def fast(tokens: int, context: int) -> float:
    return 0.01 + tokens * 1e-5


def test_steps_of_a_slow_device_are_short_after_the_first():
    steps = prefill(slow, 60_000)
    assert sum(count for count, _ in steps) == 60_000
    assert steps[0][0] == FIRST
    assert all(seconds <= 2 * SECONDS for _, seconds in steps[1:])
    assert steps[0][1] < 1  # nothing was known before it
    full = [seconds for count, seconds in steps[2:-1] if count > LEAST]
    assert sum(full) / len(full) > SECONDS / 2  # and no shorter than they need to be


def test_a_fast_device_soon_has_whole_steps():
    steps = prefill(fast, 200_000)
    assert [count for count, _ in steps[:6]] == [*(FIRST << i for i in range(5)), 8192]
    assert {count for count, _ in steps[6:-1]} == {8192}


def test_without_a_limit_only_tokens_count():
    assert [count for count, _ in prefill(slow, 20_000, seconds=None)] == [8192, 8192, 3616]


def test_a_chunk_is_never_so_small_that_its_context_takes_all_the_time():
    steps = prefill(lambda tokens, context: 10.0, 2_000)
    assert {count for count, _ in steps[2:-1]} == {LEAST}
    assert least_chunk(512, 128, 64, 128) == 102
    assert least_chunk(1, 1, 100, 1) == 1


def test_only_what_prompts_took_counts():
    pace = PromptPace(SECONDS, LEAST)
    pace.took(1, 0, 0.2)  # the last token of a prompt
    assert pace.allowance == FIRST
    pace.took(FIRST, 0, 0.2)
    assert pace.allowance == FIRST * 5 // 4
    pace.took(0, 64, 4.0)  # decoding alone takes long: that is not the prompts' doing
    pace.took(FIRST, 64, 4.125)
    assert pace.allowance == FIRST * 5 // 2
    pace.took(FIRST, 0, 4.125)  # but this is
    assert pace.allowance == LEAST
    for _ in range(20):
        pace.took(pace.allowance, 0, pace.allowance * 1e-3)
    assert pace.allowance == pytest.approx(SECONDS / 1e-3, rel=0.05)


def test_streams_are_not_cut_short_and_go_on_beside_a_prompt():
    """Decoding rows are no prompts: all of them are in every step, however little the prompts may take."""
    pace = PromptPace(SECONDS, LEAST)
    scheduler = Scheduler(BlockManager(400, 32, False, 0), 64, 512, 5000, pace=pace)
    for index in range(50):
        scheduler.add(request([1, 2, index], max_tokens=500))

    def step() -> list[int]:
        plan = scheduler.schedule()
        scheduler.update(StepResult([[7] if row.sample else [] for row in plan.rows], [[] for _ in plan.rows]))
        return [len(row.tokens) for row in plan.rows]

    step()
    pace.took(10_000, 50, 10_000.0)
    scheduler.add(request(list(range(1, 1001)), max_tokens=5))
    scheduler.add(request(list(range(1, 1001)), max_tokens=5))
    for _ in range(10):
        assert step() == [0] * 50 + [LEAST]
