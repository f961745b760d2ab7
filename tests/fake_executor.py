"""An executor without a model: it keeps token ids in the cache and answers from what it reads back through the
block table. So a wrong block, a lost or unwritten slot or a stale prefix shows in the output."""

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from deepseek_fp4_plugin.engine.block_manager import BlockManager
from deepseek_fp4_plugin.engine.engine import LLMEngine
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.step_plan import StepPlan, StepResult

VOCAB = 1000


def next_token(context: Sequence[int]) -> int:
    """What the "model" says behind these tokens: depends on every one of them and on their order."""
    return zlib.crc32(array("q", context).tobytes()) % VOCAB


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class Slot:
    """What a rank keeps of a request: its blocks, the next position to compute, its newest token and drafts."""

    blocks: list[int] = field(default_factory=list)
    start: int = 0
    tokens: list[int] = field(default_factory=list)


class FakeExecutor:
    """`plans` keeps every step's plan. num_drafts: proposed after each step; the last of a third of them is wrong."""

    num_schedulers = 1

    def __init__(self, blocks: BlockManager, num_drafts: int = 0):
        self.block_size, self.num_drafts = blocks.block_size, num_drafts
        self.cache: list[int | None] = [None] * (blocks.num_blocks * blocks.block_size)
        self.plans: list[StepPlan] = []
        self.rows: list[tuple[int, int, int]] = []  # a request's first token, start, tokens: of every row of every plan
        self._slots: dict[int, Slot] = {}
        self._results: list[StepResult] = []

    def submit(self, plans: Sequence[StepPlan]) -> None:
        (plan,) = plans
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        self.plans.append(plan)
        self._results.append(self._run(plan))

    def collect(self) -> list[StepResult]:
        return [self._results.pop(0)]

    def _run(self, plan: StepPlan) -> StepResult:
        tokens, drafts = [], []
        for row in plan.rows:
            if row.setup is not None:
                self._slots[row.slot] = Slot(start=row.setup.start)
            slot = self._slots[row.slot]
            slot.blocks += row.new_blocks
            known = list(row.tokens) or slot.tokens[: 1 + row.num_drafts]
            assert len(known) == row.num_tokens
            assert slot.start == row.start if row.tokens else slot.start <= row.start
            for position, token in enumerate(known, slot.start):
                self.cache[self._place(slot, position)] = token
            end = slot.start + len(known)
            if row.sample:
                for ahead in range(self.num_drafts - 1):  # the drafts' own latents are written behind the row
                    self.cache[self._place(slot, end + ahead)] = None
            self.rows.append((self._context(slot, 1)[0], slot.start, len(known)))
            slot.start = end
            emitted: list[int] = []
            if row.sample:
                context = self._context(slot, end)
                emitted = self._verify(context, row.num_drafts)
                slot.start = end - row.num_drafts + len(emitted) - 1
                slot.tokens = [emitted[-1], *self._draft(context[: slot.start - len(emitted) + 1] + emitted)]
            tokens.append(emitted)
            drafts.append(slot.tokens[1:] if emitted else [])
        return StepResult(tokens, drafts)

    def _place(self, slot: Slot, position: int) -> int:
        return slot.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def _context(self, slot: Slot, end: int) -> list[int]:
        context = [self.cache[self._place(slot, position)] for position in range(end)]
        assert None not in context, "a cache slot is read that nobody wrote"
        return context  # type: ignore[return-value]

    def _verify(self, context: list[int], num_drafts: int) -> list[int]:
        """Accepted drafts and the token behind them."""
        known, drafts = context[: len(context) - num_drafts], context[len(context) - num_drafts :]
        emitted = [next_token(known)]
        for draft in drafts:
            if draft != emitted[-1]:
                break
            emitted.append(next_token(known + emitted))
        return emitted

    def _draft(self, known: list[int]) -> list[int]:
        drafts = continuation(known, self.num_drafts)
        if drafts and known[-1] % 3 == 0:
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
    overlap: bool = False,
) -> LLMEngine:
    manager = BlockManager(blocks, block_size, reuse, lookahead=1 if drafts else 0)
    scheduler = Scheduler(manager, batch, tokens, max_seq_len, drafts)
    return LLMEngine([scheduler], FakeExecutor(manager, drafts), VOCAB, overlap=overlap)
