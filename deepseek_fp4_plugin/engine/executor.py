"""Executor: owns the workers. Plans go in, results come out in the same order; who computes them is its affair."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from deepseek_fp4_plugin.engine.step_plan import StepPlan, StepResult
from deepseek_fp4_plugin.engine.worker import Worker, WorkerFacts

Alarm = Callable[[BaseException], None]


class WorkerError(RuntimeError):
    """A worker has died, has stopped, cannot be reached or has failed; its group is of no use any more."""


class Executor(Protocol):
    """A step has one plan for each attention-data-parallel rank (one in all without it), and as many results."""

    @property
    def facts(self) -> WorkerFacts:
        """Cache sizes are the smallest of all ranks, bytes those of one rank."""
        ...

    @property
    def num_schedulers(self) -> int:
        """How many plans a step has."""
        ...

    def submit(self, plans: Sequence[StepPlan]) -> None:
        """Start a step. Plans must not change afterwards. Raises WorkerError when a worker is lost."""
        ...

    def collect(self) -> list[StepResult]:
        """Wait for the oldest step that was submitted and not collected. Raises WorkerError when a worker is lost."""
        ...

    def watch(self, alarm: Alarm) -> None:
        """Call `alarm`, on any thread, as soon as a worker is lost; also between steps."""
        ...

    def explain(self, token_ids: Sequence[int]) -> str:
        """Why the logits of a request with these tokens are not finite, one sentence."""
        ...

    def close(self) -> None:
        """Ends the workers. Twice is once."""
        ...


class Runner(Protocol):
    """What computes one rank's steps."""

    def submit(self, plan: StepPlan) -> None:
        """Start a step behind those submitted before."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest step that was submitted and not collected."""
        ...

    def explain(self, token_ids: Sequence[int]) -> str:
        """Why the logits of a request with these tokens are not finite."""
        ...


class InProcessExecutor:
    """One rank, in this process and thread: on a CPU `submit` computes, on a GPU it starts the step."""

    num_schedulers = 1

    def __init__(self, runner: Runner, facts: WorkerFacts):
        self.runner, self.facts = runner, facts

    @classmethod
    def of(cls, worker: Worker) -> "InProcessExecutor":
        warmed = worker.allocate(worker.facts.cache_blocks)
        return cls(worker.runner, replace(worker.facts, warm_up=warmed))

    def submit(self, plans: Sequence[StepPlan]) -> None:
        (plan,) = plans
        self.runner.submit(plan)

    def collect(self) -> list[StepResult]:
        return [self.runner.collect()]

    def explain(self, token_ids: Sequence[int]) -> str:
        return self.runner.explain(token_ids)

    def watch(self, alarm: Alarm) -> None:
        pass  # an error reaches the caller of `submit`

    def close(self) -> None:
        vars(self).pop("runner", None)  # and with it the model's memory
