"""An executor without a model: it keeps token ids in the cache's slots and answers from what it reads back through the
block table. So a wrong block, a lost or unwritten slot or a stale prefix shows in the output."""

import zlib
from array import array
from collections.abc import Sequence

from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.engine import LLMEngine
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.step_plan import PlanRow, StepPlan, StepResult

VOCAB = 1000


def next_token(context: Sequence[int]) -> int:
    """What the "model" says behind these tokens: depends on every one of them and on their order."""
    return zlib.crc32(array("q", context).tobytes()) % VOCAB


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeExecutor:
    """`plans` keeps every step's plan. num_drafts: proposed after each step; the last of a third of them is wrong."""

    def __init__(self, blocks: BlockManager, num_drafts: int = 0):
        self.block_size, self.num_drafts = blocks.block_size, num_drafts
        self.slots: list[int | None] = [None] * (blocks.num_blocks * blocks.block_size)
        self.plans: list[StepPlan] = []
        self.rows: list[tuple[int, int, int]] = []  # a request's first token, start, tokens: of every row of every plan

        self.num_schedulers = 1
        self._results: list[StepResult] = []

    def submit(self, plans: Sequence[StepPlan]) -> None:
        (plan,) = plans
        self.plans.append(plan)
        self._results.append(self._run(plan))

    def collect(self) -> list[StepResult]:
        return [self._results.pop(0)]

    def _run(self, plan: StepPlan) -> StepResult:
        tokens, drafts = [], []
        for row in plan.rows:
            for position, token in enumerate(row.tokens, row.start):
                self.slots[self._slot(row, position)] = token
            if row.sample:
                for ahead in range(self.num_drafts - 1):  # the drafts' own latents are written behind the row
                    self.slots[self._slot(row, row.start + len(row.tokens) + ahead)] = None
            self.rows.append((self._context(row, 1)[0], row.start, len(row.tokens)))
            emitted = self._verify(row) if row.sample else []
            tokens.append(emitted)
            drafts.append(self._draft(row, emitted) if emitted else [])
        return StepResult(tokens, drafts)

    def _slot(self, row: PlanRow, position: int) -> int:
        return row.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def _context(self, row: PlanRow, end: int) -> list[int]:
        context = [self.slots[self._slot(row, position)] for position in range(end)]
        assert None not in context, "a slot is read that nobody wrote"
        return context

    def _verify(self, row: PlanRow) -> list[int]:
        """Accepted drafts and the token behind them."""
        context = self._context(row, row.start + len(row.tokens))
        drafts = context[len(context) - row.num_drafts :] if row.num_drafts else []
        known = context[: len(context) - row.num_drafts]
        emitted = [next_token(known)]
        for draft in drafts:
            if draft != emitted[-1]:
                break
            emitted.append(next_token(known + emitted))
        return emitted

    def _draft(self, row: PlanRow, emitted: list[int]) -> list[int]:
        known = self._context(row, row.start + len(row.tokens) - row.num_drafts) + emitted
        drafts = continuation(known, self.num_drafts)
        if drafts and emitted[-1] % 3 == 0:
            drafts[-1] = (drafts[-1] + 1) % VOCAB
        return drafts


def fake_engine(
    *,
    blocks: int = 64,
    block_size: int = 4,
    batch: int = 8,
    tokens: int = 64,
    max_seq_len: int = 200,
    drafts: int = 0,
    reuse: bool = True,
) -> LLMEngine:
    manager = BlockManager(blocks, block_size, reuse, lookahead=1 if drafts else 0)
    scheduler = Scheduler(manager, batch, tokens, max_seq_len, drafts)
    return LLMEngine([scheduler], FakeExecutor(manager, drafts), VOCAB)
