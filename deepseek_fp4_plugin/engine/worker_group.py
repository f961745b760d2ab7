"""WorkerGroup: the executor over workers in processes of their own, wherever they run.

Every rank gets every step's plan over its own connection and computes its share; results come from rank 0, or from
each rank where each has a scheduler. A group lives and dies whole: the first rank that is lost ends it.
"""

import atexit
import pickle
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, cast

from torch.distributed import TCPStore

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine.door import Arrival, hang_up
from deepseek_fp4_plugin.engine.executor import Alarm, WorkerError
from deepseek_fp4_plugin.engine.heartbeat import SILENCE, Monitor
from deepseek_fp4_plugin.engine.step_plan import StepPlan, StepResult
from deepseek_fp4_plugin.engine.worker import Progress, WorkerFacts
from deepseek_fp4_plugin.engine.worker_process import Advance, Assignment, Question


class Process(Protocol):
    """What a launcher knows of a worker that it started."""

    def __str__(self) -> str:
        """Where it runs: `process 4711`."""
        ...

    def fate(self) -> str:
        """How it ended: `was killed by SIGKILL`; called when its connection has closed."""
        ...

    def kill(self) -> None:
        """End it at once, if it can be reached. Twice is once."""
        ...

    def join(self) -> None:
        """Wait a little for an end that has been asked for, then kill it."""
        ...


@dataclass(frozen=True)
class Member:
    """One rank, as its front sees it.

    device: cpu or cuda:N, as its process numbers them.  ranks_here: that share its machine.
    """

    process: Process
    work: Connection
    beat: Connection
    device: str
    ranks_here: int

    @classmethod
    def of(cls, arrival: Arrival, process: Process) -> "Member":
        """A worker that came through a door."""
        return cls(process, arrival.work, arrival.beat, arrival.caller.device, arrival.caller.ranks_here)


class WorkerGroup:
    """members: by rank, waiting for their assignments.  model: a folder or name that every rank's machine knows.
    host: this machine, as the ranks see it.  release: called once, when all of them have ended.

    Loads the model on all ranks at once. Raises what a rank raised if that was a ValueError, else WorkerError.
    """

    def __init__(
        self,
        members: Sequence[Member],
        config: EngineConfig,
        model: str | Path,
        host: str,
        progress: Progress | None = None,
        release: Callable[[], None] | None = None,
    ):
        self._members, self._release = list(members), release
        self._answering = [member.work for member in members] if config.enable_attention_dp else [members[0].work]
        self.num_schedulers = len(self._answering)
        self._under_way = 0  # steps submitted whose results have not been received
        self._collected: deque[list[StepResult]] = deque()  # received early
        self._failure: BaseException | None = None
        self._lost = threading.Event()
        self._alarm: Alarm | None = None
        self._ended = False
        self._ending = threading.Lock()
        atexit.register(self.close)  # a script that ends leaves no worker behind, not for a moment
        self._monitor = Monitor({rank: member.beat for rank, member in enumerate(members)}, self._lose)
        try:
            # Where the ranks find each other; port 0 is a free one.
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            self.facts = self._start(config, model, (host, self._store.port), progress)
        except BaseException:  # nothing is under way that anybody waits for
            self._monitor.close()
            self._end(gently=False)
            raise

    def _start(
        self, config: EngineConfig, model: str | Path, store: tuple[str, int], progress: Progress | None
    ) -> WorkerFacts:
        for rank, member in enumerate(self._members):
            answers = member.work in self._answering
            assignment = Assignment(rank, member.ranks_here, model, config, member.device, store, answers)
            self._send(member.work, pickle.dumps(assignment))
        facts: list[WorkerFacts] = self._answers(progress)
        blocks = min(fact.cache_blocks for fact in facts)
        for member in self._members:
            self._send(member.work, pickle.dumps(blocks))
        warmed = self._answers(progress)
        first = facts[0]
        return replace(
            first,
            warm_up=warmed[0],
            cache_blocks=blocks,
            asynchronous=True,  # on a CPU, too: the front plans while the ranks compute
            weight_bytes=max(fact.weight_bytes for fact in facts),
            cache_bytes=first.cache_bytes // first.cache_blocks * blocks,
        )

    def _answers(self, progress: Progress | None) -> list[Any]:
        """What each rank says next, rank by rank, and meanwhile how far they are."""
        answers: dict[Connection, Any] = {}
        while len(answers) < len(self._members):
            for work in wait([member.work for member in self._members if member.work not in answers]):
                message = self._receive(cast(Connection, work))
                if not isinstance(message, Advance):
                    answers[cast(Connection, work)] = message
                elif progress is not None:
                    progress(message.what, message.done, message.parts)
        return [answers[member.work] for member in self._members]

    def submit(self, plans: Sequence[StepPlan]) -> None:
        self._under_way += 1
        if len(plans) == 1:
            pickled = [pickle.dumps(plans[0], pickle.HIGHEST_PROTOCOL)] * len(self._members)
        else:
            pickled = [pickle.dumps(plan, pickle.HIGHEST_PROTOCOL) for plan in plans]
        for member, data in zip(self._members, pickled, strict=True):
            self._send(member.work, data)

    def collect(self) -> list[StepResult]:
        if self._collected:
            return self._collected.popleft()
        results = [self._receive(work) for work in self._answering]
        self._under_way -= 1
        return results

    def explain(self, token_ids: Sequence[int]) -> str:
        while self._under_way:  # answers come in the order of the questions
            self._collected.append([self._receive(work) for work in self._answering])
            self._under_way -= 1
        for member in self._members:
            self._send(member.work, pickle.dumps(Question(list(token_ids))))
        answers = [self._receive(work) for work in self._answering]
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    def watch(self, alarm: Alarm) -> None:
        self._alarm = alarm
        if self._failure is not None:
            alarm(self._failure)

    def close(self) -> None:
        self._monitor.close()
        self._end(gently=self._failure is None)

    def _send(self, work: Connection, data: bytes) -> None:
        try:
            work.send_bytes(data)
        except OSError as error:
            raise self._why(error) from None

    def _receive(self, work: Connection) -> Any:
        try:
            return work.recv()
        except (EOFError, OSError) as error:
            raise self._why(error) from None

    def _why(self, error: BaseException) -> BaseException:
        """What the monitor has found, or is about to find, behind a connection that broke."""
        self._lost.wait(2 * SILENCE)
        return self._failure or WorkerError(f"a worker's connection broke: {error}")

    def _lose(self, rank: int, words: bytes | None, silent: bool) -> None:
        process = self._members[rank].process
        who = f"rank {rank} of {len(self._members)} ({process})"
        said = pickle.loads(words) if words is not None else None
        if isinstance(said, ValueError):
            self._failure = said
        elif said is not None:
            self._failure = WorkerError(f"{who} failed with {said}")
        elif silent:
            self._failure = WorkerError(f"{who} has not answered for {SILENCE:.0f} s: it is stopped, or cut off")
        else:
            self._failure = WorkerError(f"{who} {process.fate()}")
        self._lost.set()
        self._end(gently=False)
        if self._alarm is not None:
            self._alarm(self._failure)

    def _end(self, gently: bool) -> None:
        """Close every connection, which wakes whoever waits on one, and see every process end."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
            atexit.unregister(self.close)
            if not gently:
                for member in self._members:
                    member.process.kill()
            for member in self._members:
                hang_up(member.work)
            for member in self._members:
                member.process.join()
                hang_up(member.beat)
            self._monitor.join()
            for member in self._members:
                member.work.close()
                member.beat.close()
            if self._release is not None:
                self._release()
