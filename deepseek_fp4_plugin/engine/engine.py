"""LLMEngine: requests in, emissions out, one step at a time. Token ids only; text is its callers' affair."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from deepseek_fp4_plugin.engine.request import Emission, Request, RequestError, SpeculationCounts
from deepseek_fp4_plugin.engine.scheduler import Scheduler
from deepseek_fp4_plugin.engine.step_plan import StepPlan, StepResult


class Runner(Protocol):
    """What computes a step: a ModelRunner, or one that stands for many ranks."""

    def run(self, plan: StepPlan) -> StepResult: ...


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
    schedule_seconds: float = 0.0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    draft_seconds: float = 0.0
    update_seconds: float = 0.0
    thinking: SpeculationCounts = field(default_factory=SpeculationCounts)  # of finished requests
    answer: SpeculationCounts = field(default_factory=SpeculationCounts)

    @property
    def tokens_per_step(self) -> float:
        """Emitted tokens a sampled step, over finished requests; 1 without speculation."""
        steps = self.thinking.steps + self.answer.steps
        return (self.thinking.emitted + self.answer.emitted) / steps if steps else 0.0


class LLMEngine:
    """Owns the scheduler and calls the runner. Not thread-safe: AsyncEngine gives it a thread."""

    def __init__(self, scheduler: Scheduler, runner: Runner, vocab_size: int):
        self.scheduler, self.runner, self.vocab_size = scheduler, runner, vocab_size
        self._stats = EngineStats()
        self._iterations: deque[dict[str, Any]] = deque(maxlen=1000)
        self._finished: Counter[str] = Counter()

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt + output that one request may have."""
        blocks = self.scheduler.blocks
        return min(self.scheduler.max_seq_len, blocks.num_blocks * blocks.block_size - self.scheduler.num_lookahead)

    def check(self, request: Request) -> None:
        """Raises RequestError for a request that could never run. Changes nothing; any thread may call it."""
        prompt, limit = request.num_prompt_tokens, self.max_request_tokens
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if prompt >= limit:
            raise RequestError(
                f"the prompt has {prompt} tokens and at most {limit - 1} fit (max_seq_len and the cache allow {limit} "
                "with the answer); shorten it or raise max_seq_len / kv_cache_config.max_tokens"
            )
        low, high = min(request.token_ids), max(request.token_ids)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}")

    def add(self, request: Request) -> None:
        """Queue a request that `check` accepted."""
        self.scheduler.add(request)

    def abort(self, request: Request, reason: str = "cancelled") -> Emission | None:
        """End a request in any state; None when it had ended already."""
        if request.finish_reason is not None:
            return None
        self.scheduler.finish(request, reason)
        self._count(request)
        return Emission(request, finish_reason=reason)

    def step(self) -> list[Emission]:
        """Run one step. Does nothing when there is no work."""
        emissions = [e for e in (self.abort(late, "timeout") for late in self.scheduler.expired()) if e]
        if not self.scheduler.has_work:
            return emissions
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        planned = time.perf_counter()
        result = self.runner.run(plan)
        ran = time.perf_counter()
        emitted = self.scheduler.update(result)
        stats = self._stats
        generated = 0
        for emission in emitted:
            generated += len(emission.tokens)
            if emission.finish_reason is not None:
                self._count(emission.request)
        stats.generated_tokens += generated
        stats.steps += 1
        stats.computed_tokens += plan.num_tokens
        stats.schedule_seconds += planned - began
        stats.forward_seconds += result.forward_seconds
        stats.sample_seconds += result.sample_seconds
        stats.draft_seconds += result.draft_seconds
        ended = time.perf_counter()
        stats.update_seconds += ended - ran
        scheduler = self.scheduler
        self._iterations.append(
            {
                "iteration": stats.steps,
                "seconds": ended - began,
                "requests": len(plan.rows),
                "running": len(scheduler.running),
                "waiting": scheduler.num_waiting,
                "computed_tokens": plan.num_tokens,
                "generated_tokens": generated,
                "cache_blocks_used": scheduler.blocks.num_blocks - scheduler.blocks.num_free,
            }
        )
        return emissions + emitted if emissions else emitted

    def take_iterations(self) -> list[dict[str, Any]]:
        """One entry for each step since the last call, the newest thousand at most. Any thread may call it."""
        return [self._iterations.popleft() for _ in range(len(self._iterations))]

    def stats(self) -> EngineStats:
        """The live counters, with the present state filled in."""
        scheduler, stats = self.scheduler, self._stats
        stats.running, stats.waiting = len(scheduler.running), scheduler.num_waiting
        stats.cache_blocks = scheduler.blocks.num_blocks
        stats.cache_blocks_used = scheduler.blocks.num_blocks - scheduler.blocks.num_free
        stats.prompt_tokens, stats.cached_prompt_tokens = scheduler.prompt_tokens, scheduler.cached_tokens
        stats.preemptions, stats.finished = scheduler.num_preemptions, dict(self._finished)
        return stats

    def _count(self, request: Request) -> None:
        assert request.finish_reason is not None
        self._finished[request.finish_reason] += 1
        self._stats.thinking.add(request.thinking_counts)
        self._stats.answer.add(request.answer_counts)
