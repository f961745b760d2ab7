"""LLMEngine: requests in, emissions out, one step at a time. Token ids only; text is its callers' affair."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deepseek_fp4_plugin.engine.distribution import Balance, Distributor
from deepseek_fp4_plugin.engine.executor import Executor
from deepseek_fp4_plugin.engine.request import (
    Emission,
    GenerationError,
    Request,
    RequestError,
    SpeculationCounts,
    too_long,
)
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.step_plan import StepPlan

logger = logging.getLogger(__name__)


@dataclass
class EngineStats:
    """A snapshot. Counts are since the engine started; times are seconds, over all steps."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    cache_blocks: int = 0
    cache_blocks_used: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0  # of these, found in the prefix cache
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # by reason
    waits: dict[str, int] = field(default_factory=dict)  # steps awaited before the next was planned, by reason
    schedule_seconds: float = 0.0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    draft_seconds: float = 0.0
    update_seconds: float = 0.0
    expert_load: dict[int, list[int]] = field(default_factory=dict)  # layer -> tokens of each expert, where counted
    thinking: SpeculationCounts = field(default_factory=SpeculationCounts)  # of finished requests
    answer: SpeculationCounts = field(default_factory=SpeculationCounts)

    @property
    def tokens_per_step(self) -> float:
        """Emitted tokens a sampled step, over finished requests; 1 without speculation."""
        steps = self.thinking.steps + self.answer.steps
        return (self.thinking.emitted + self.answer.emitted) / steps if steps else 0.0


class LLMEngine:
    """Owns the schedulers and calls the executor. Not thread-safe: AsyncEngine gives it a thread.

    schedulers: one for each attention-data-parallel rank; all alike.  balance: of their prompts, if any.
    overlap: plan a step while the one before it is computed; requests that look back at their last tokens
    (Request.looks_back) make the steps they run in wait.
    """

    def __init__(
        self,
        schedulers: Sequence[Scheduler],
        executor: Executor,
        vocab_size: int,
        balance: Balance | None = None,
        overlap: bool = False,
    ):
        assert len(schedulers) == executor.num_schedulers
        self.schedulers, self.executor, self.vocab_size = list(schedulers), executor, vocab_size
        self.overlap = overlap
        self._under_way: deque[tuple[float, list[StepPlan]]] = deque()  # when planned; a plan a scheduler
        self._ended = 0.0  # when the last step was collected
        self._distributor = Distributor(self.schedulers, balance)
        self._home: dict[Request, Scheduler | Distributor] = {}
        self._stats = EngineStats()
        self._iterations: deque[dict[str, Any]] = deque(maxlen=1000)
        self._finished: Counter[str] = Counter()

    @property
    def has_work(self) -> bool:
        waiting = self._distributor.num_waiting > 0
        return waiting or bool(self._under_way) or any(scheduler.has_work for scheduler in self.schedulers)

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt + output that one request may have."""
        scheduler = self.schedulers[0]
        blocks = scheduler.blocks
        return min(scheduler.max_seq_len, blocks.num_blocks * blocks.block_size - scheduler.num_lookahead)

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that could never run. Changes nothing; any thread may call it."""
        prompt, limit = request.num_prompt_tokens, self.max_request_tokens
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if prompt >= limit:
            raise RequestError(too_long(str(prompt), limit))
        if request.dp_rank is not None and not 0 <= request.dp_rank < len(self.schedulers):
            raise RequestError(
                f"attention_dp_rank={request.dp_rank} is none of the {len(self.schedulers)} attention-data-parallel "
                "ranks; leave it out"
            )
        low, high = min(request.token_ids), max(request.token_ids)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}")

    def add(self, request: Request) -> None:
        """Queue a request that `check` accepted."""
        if len(self.schedulers) > 1:
            self._distributor.add(request)
            self._home[request] = self._distributor
        else:
            self.schedulers[0].add(request)
            self._home[request] = self.schedulers[0]

    def abort(self, request: Request, reason: str = "cancelled") -> Emission | None:
        """End a request in any state; None when it had ended already."""
        if request.finish_reason is not None:
            return None
        self._home[request].finish(request, reason)
        self._count(request)
        return Emission(request, finish_reason=reason)

    def step(self) -> list[Emission]:
        """Run one step. With overlap the next one is planned and started before the results of this one are awaited,
        so the first call after an idle time gives nothing. Does nothing when there is no work."""
        late = self._distributor.expired() + [request for s in self.schedulers for request in s.expired()]
        emissions = [e for e in (self.abort(request, "timeout") for request in late) if e]
        if not self.has_work:
            return emissions
        if self._under_way and (waits := self._must_wait()):
            self._stats.waits[waits] = self._stats.waits.get(waits, 0) + 1
            emissions += self._collect()
        submitted = self._submit()
        if self._under_way and not (self.overlap and submitted and len(self._under_way) == 1):
            emissions += self._collect()
        return emissions

    def _must_wait(self) -> str | None:
        return next((why for scheduler in self.schedulers if (why := scheduler.must_wait)), None)

    def _submit(self) -> bool:
        """Plan a step and start it; False where there is nothing to compute now."""
        began = time.perf_counter()
        for request, scheduler in self._distributor.assign():
            self._home[request] = scheduler
            scheduler.add(request)
        plans = [scheduler.schedule() for scheduler in self.schedulers]
        if not any(plan.rows for plan in plans):
            for scheduler in self.schedulers:
                scheduler.withdraw()
            return False
        plans = _together(plans)
        self._stats.schedule_seconds += time.perf_counter() - began
        self.executor.submit(plans)
        self._under_way.append((began, plans))
        return True

    def _collect(self) -> list[Emission]:
        """The oldest step's results, waiting for them."""
        results, (began, plans) = self.executor.collect(), self._under_way.popleft()
        came = time.perf_counter()
        emitted = [e for s, result in zip(self.schedulers, results, strict=True) for e in s.update(result)]
        stats = self._stats
        generated = 0
        for emission in emitted:
            generated += len(emission.tokens)
            if emission.finish_reason is not None:
                self._count(emission.request)
            if emission.failure is not None and not emission.failure.own_fault:
                emission.failure = self._explained(emission)
        computed = sum(plan.num_tokens for plan in plans)
        stats.generated_tokens += generated
        stats.steps += 1
        stats.computed_tokens += computed
        stats.forward_seconds += max(result.forward_seconds for result in results)
        stats.sample_seconds += max(result.sample_seconds for result in results)
        stats.draft_seconds += max(result.draft_seconds for result in results)
        if results[0].expert_load is not None:  # every rank counts the tokens of all
            stats.expert_load = results[0].expert_load
        ended = time.perf_counter()
        stats.update_seconds += ended - came
        seconds = ended - max(began, self._ended)
        for scheduler, plan in zip(self.schedulers, plans, strict=True):
            if scheduler.pace is not None and plan.rows:
                prompts = [len(row.tokens) for row in plan.rows if row.tokens]
                scheduler.pace.took(sum(prompts), len(plan.rows) - len(prompts), seconds)
        self._iterations.append(
            {
                "iteration": stats.steps,
                "seconds": seconds,
                "requests": sum(len(plan.rows) for plan in plans),
                "running": self._total("running"),
                "waiting": self._total("waiting") + self._distributor.num_waiting,
                "computed_tokens": computed,
                "generated_tokens": generated,
                "cache_blocks_used": self._total("cache_blocks_used"),
            }
        )
        self._ended = ended
        return emitted

    def _explained(self, emission: Emission) -> GenerationError:
        """The failure with its cause. A fault of the explanation must not end the others' requests."""
        try:
            reason = self.executor.explain(emission.request.token_ids)
        except Exception as error:
            reason = f"{emission.failure} (and looking for the cause failed: {error})"
        logger.error("request %d: %s", emission.request.request_id, reason)
        return GenerationError(reason)

    def take_iterations(self) -> list[dict[str, Any]]:
        """One entry for each step since the last call, the newest thousand at most. Any thread may call it."""
        return [self._iterations.popleft() for _ in range(len(self._iterations))]

    def stats(self) -> EngineStats:
        """The live counters, with the present state filled in."""
        stats = self._stats
        for name in _TOTALS:
            setattr(stats, name, self._total(name))
        stats.waiting += self._distributor.num_waiting
        stats.finished = dict(self._finished)
        return stats

    def _total(self, name: str) -> int:
        return sum(_TOTALS[name](scheduler) for scheduler in self.schedulers)

    def _count(self, request: Request) -> None:
        assert request.finish_reason is not None
        del self._home[request]
        self._finished[request.finish_reason] += 1
        self._stats.thinking.add(request.thinking_counts)
        self._stats.answer.add(request.answer_counts)


def _together(plans: list[StepPlan]) -> list[StepPlan]:
    """The plans of all ranks, each knowing how much the others do: an idle rank steps along with them."""
    if len(plans) == 1:
        return plans
    tokens = tuple(plan.num_tokens for plan in plans)
    sampled = tuple(sum(row.sample for row in plan.rows) for plan in plans)
    uniform = all(plan.uniform for plan in plans)
    return [replace(plan, dp_tokens=tokens, dp_sampled=sampled, dp_uniform=uniform) for plan in plans]


_TOTALS: dict[str, Callable[[Scheduler], int]] = {
    "running": lambda s: len(s.running),
    "waiting": lambda s: s.num_waiting,
    "cache_blocks": lambda s: s.blocks.num_blocks,
    "cache_blocks_used": lambda s: s.blocks.num_blocks - s.blocks.num_free,
    "prompt_tokens": lambda s: s.prompt_tokens,
    "cached_prompt_tokens": lambda s: s.cached_tokens,
    "preemptions": lambda s: s.num_preemptions,
}
