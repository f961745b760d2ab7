"""AsyncEngine: the engine on a thread of its own, and a handle for each request that any thread or event loop reads.

The thread takes commands between steps and puts emissions into the handles' queues; a reader decodes them to text when
it looks. An event loop is woken once a step, whatever the number of its readers.
"""

import asyncio
import atexit
import collections
import logging
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from deepseek_fp4_plugin.engine.engine import EngineStats, LLMEngine
from deepseek_fp4_plugin.engine.executor import WorkerError
from deepseek_fp4_plugin.engine.output import CompletionOutput, RequestOutput
from deepseek_fp4_plugin.engine.request import Emission, GenerationError, Request
from deepseek_fp4_plugin.engine.wakes import Wakes
from deepseek_fp4_plugin.tokenizer import IncrementalDetokenizer

logger = logging.getLogger(__name__)

_AT_EXIT = 10.0  # seconds that a program which ends waits for the step under way
_WHOLE = 32  # steps after which the reader of a whole answer looks, so that its end is little work


class EngineDeadError(RuntimeError):
    """The engine stopped because of an error of its own; nothing more will come from it."""


class AsyncEngine:
    """Starts its thread at once. `close` ends it; requests still in work are then cancelled.

    stream_interval: a streaming reader is woken when so many steps have given it something; at once for its first
    tokens and its end.  piece_rate: an event loop's readers are woken so often a second, all together (wakes.py).
    """

    def __init__(self, engine: LLMEngine, stream_interval: int = 1, piece_rate: float | None = None):
        self.engine = engine
        self.stream_interval, self.piece_rate = stream_interval, piece_rate
        self._wakes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Wakes] = weakref.WeakKeyDictionary()
        self.failure: BaseException | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._handles: dict[Request, RequestHandle] = {}
        self._closed = False
        self._lock = threading.Lock()  # nothing is queued after the thread's last look
        self._thread = threading.Thread(target=self._run, name="deepseek-fp4-engine", daemon=True)
        self._thread.start()
        # A program that ends with a step under way would end in an abort: the interpreter takes its threads away in the
        # middle of native code.
        atexit.register(self.close, _AT_EXIT)
        engine.executor.watch(self._lose)

    def submit(self, handle: "RequestHandle") -> None:
        """Queue a handle's requests. Raises RequestError for one that cannot run, EngineDeadError when nothing can."""
        for request in handle.requests:
            self.engine.check(request)
        handle.engine = self
        handle._enough = (self.stream_interval if handle.streaming else _WHOLE) * len(handle.requests)

        def start() -> None:
            for request in handle.requests:
                self._handles[request] = handle
                self.engine.add(request)

        with self._lock:
            self.check_health()
            self._commands.put(start)

    def abort(self, handle: "RequestHandle") -> None:
        """End a handle's requests; it gets its last output with finish reason "cancelled"."""
        self._commands.put(lambda: self._deliver([e for r in handle.requests if (e := self.engine.abort(r))]))

    def stats(self) -> EngineStats:
        """A snapshot of the engine's counters."""
        return replace(self.engine.stats())

    def check_health(self) -> None:
        """Raises EngineDeadError when the engine has stopped."""
        if self.failure is not None:
            raise EngineDeadError(f"the engine stopped: {self.failure}") from self.failure
        if self._closed:
            raise EngineDeadError("the engine was shut down")

    def close(self, patience: float | None = None) -> None:
        """Cancel what is running and end the thread.  patience: seconds to wait for it at the most."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._commands.put(None)
        self._thread.join(patience)

    def _lose(self, failure: BaseException) -> None:
        """Any thread: a worker is lost. A step under way ends with the same failure; an idle engine learns it here."""

        def fail() -> None:
            if self.failure is None and not self._closed:
                raise failure

        self._commands.put(fail)

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._deliver(self.engine.step())
            self._deliver([e for r in list(self._handles) if (e := self.engine.abort(r))])
        except BaseException as failure:  # whatever it was, no reader may be left waiting
            told = isinstance(failure, WorkerError)  # by its sentence; an error of our own needs its traceback
            logger.error("the engine stopped: %s", failure, exc_info=None if told else failure)
            self.failure = failure
            self._deliver([Emission(request, finish_reason="error") for request in list(self._handles)])
        with self._lock:
            self._closed = True
        while not self._commands.empty():  # requests that came too late must be answered too
            command = self._commands.get()
            if command is not None:
                command()
        reason = "cancelled" if self.failure is None else "error"
        self._deliver([Emission(request, finish_reason=reason) for request in list(self._handles)])
        atexit.unregister(self.close)

    def _take_commands(self) -> bool:
        """Run the commands that have come, waiting for one when there is nothing else to do; False to stop."""
        block = not self.engine.has_work
        while True:
            try:
                command = self._commands.get(block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _deliver(self, emissions: Sequence[Emission]) -> None:
        loops: dict[asyncio.AbstractEventLoop, list[RequestHandle]] = {}
        for emission in emissions:
            handle = self._handles.get(emission.request)
            if handle is None:
                continue
            if emission.finish_reason is not None:
                del self._handles[emission.request]
            handle._emissions.append((time.perf_counter(), emission))
            if emission.finish_reason is not None or handle.output.metrics.first_token is None:
                handle._urgent = True
            if not handle._ready():
                continue
            waiter = handle._waiter  # read after the append: see RequestHandle._wait
            if isinstance(waiter, threading.Event):
                waiter.set()
            elif waiter is not None:
                loops.setdefault(waiter.get_loop(), []).append(handle)
        for loop, handles in loops.items():
            try:
                loop.call_soon_threadsafe(self._wake, loop, handles)
            except RuntimeError:  # the loop is closed, its readers are gone
                for handle in handles:
                    self._commands.put(lambda handle=handle: self._forget(handle))  # type: ignore[misc]

    def _wake(self, loop: asyncio.AbstractEventLoop, handles: list["RequestHandle"]) -> None:
        """On that loop's thread."""
        wakes = self._wakes.get(loop)
        if wakes is None:
            wakes = self._wakes[loop] = Wakes(self.piece_rate)
        wakes.add(handles)

    def _forget(self, handle: "RequestHandle") -> None:
        for request in handle.requests:
            self.engine.abort(request)
            self._handles.pop(request, None)


class RequestHandle:
    """A request under way: a future and, when streaming, an iterator of its output; one reader at a time.

    `for output in handle`, `async for output in handle`, `handle.result()`, `await handle`. An iteration step takes all
    that has come since the last one.
    """

    def __init__(
        self,
        output: RequestOutput,
        requests: Sequence[Request],
        detokenizers: Sequence[IncrementalDetokenizer | None],
        streaming: bool,
        include_stop: bool = False,
    ):
        self.output, self.requests, self.streaming = output, tuple(requests), streaming
        self.engine: AsyncEngine | None = None
        self._index = {request: i for i, request in enumerate(requests)}
        self._detokenizers, self._include_stop = detokenizers, include_stop
        self._emissions: collections.deque[tuple[float, Emission]] = collections.deque()
        self._enough, self._urgent = 1, False  # emissions that are worth a look; one that is in any case
        self._waiter: threading.Event | asyncio.Future[None] | None = None
        self.failure: GenerationError | None = None
        output.metrics.arrival = time.perf_counter()

    @property
    def request_id(self) -> int:
        return self.output.request_id

    @property
    def outputs(self) -> list[CompletionOutput]:
        return self.output.outputs

    @property
    def finished(self) -> bool:
        return self.output.finished

    def abort(self) -> None:
        """Stop generating. The output so far, with finish reason "cancelled", is still delivered."""
        if self.engine is not None and not self.finished:
            self.engine.abort(self)

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the whole output.

        Raises TimeoutError after `timeout` seconds, GenerationError if it cannot be finished, EngineDeadError if the
        engine has stopped.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.finished:
            self._wait(deadline)
            self._take()
        self._raise_failure()
        return self.output

    async def aresult(self) -> RequestOutput:
        while not self.finished:
            await self._wait_async()
            self._take()
        self._raise_failure()
        return self.output

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[RequestOutput]:
        if not self.streaming:
            yield self.result()
            return
        while not self.finished:
            self._wait(None)
            if self._take():
                yield self.output

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        if not self.streaming:
            yield await self.aresult()
            return
        while not self.finished:
            await self._wait_async()
            if self._take():
                yield self.output

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    # The engine appends before it looks for a waiter and a reader sets one before it looks again: no wake-up is lost.

    def _ready(self) -> bool:
        return self._urgent or len(self._emissions) >= self._enough

    @property
    def urgent(self) -> bool:
        """Whether what has come is to be looked at now."""
        return self._urgent

    def wake(self) -> None:
        """Wake the reader on this thread's event loop, if it waits."""
        waiter = self._waiter
        if isinstance(waiter, asyncio.Future) and not waiter.done():
            waiter.set_result(None)

    def _wait(self, deadline: float | None) -> None:
        if self._ready():
            return
        event = self._waiter = threading.Event()
        while not self._ready():
            rest = None if deadline is None else deadline - time.monotonic()
            if rest is not None and rest <= 0:
                raise TimeoutError(f"request {self.request_id} is not finished")
            event.wait(rest)
        self._waiter = None

    async def _wait_async(self) -> None:
        if self._ready():
            return
        future = self._waiter = asyncio.get_running_loop().create_future()
        if not self._ready():
            await future
        self._waiter = None

    def _take(self) -> bool:
        """Work the emissions that have come into the output; whether there is something new to see."""
        output, metrics = self.output, self.output.metrics
        for completion in output.outputs:
            completion.begin_update()
        changed = self._urgent = False
        while self._emissions:
            when, emission = self._emissions.popleft()
            request, index = emission.request, self._index[emission.request]
            completion = output.outputs[index]
            last = emission.finish_reason is not None
            completion.extend(emission, self._text(index, emission, last))
            if emission.finish_reason == "error":
                assert self.engine is not None
                output.finished, self.failure = True, emission.failure
                self.engine.check_health()
                self.engine.abort(self)  # its other answers
                self._raise_failure()
            changed = True
            if emission.tokens and metrics.first_token is None:
                metrics.first_token = when
            if last:
                self._finish(completion, request)
                output.finished = all(c.finish_reason is not None for c in output.outputs)
                if output.finished:
                    metrics.finished = when
        return changed

    def _text(self, index: int, emission: Emission, last: bool) -> str:
        detokenizer, stop_text = self._detokenizers[index], emission.request.stop_text
        if stop_text is not None:
            return emission.text if emission.text is not None else stop_text.add((), True)
        if detokenizer is None:
            return ""
        tokens = emission.tokens
        if emission.stop_reason is not None and not self._include_stop:
            tokens = tokens[:-1]
        return detokenizer.add(tokens) + (detokenizer.flush() if last else "")

    def _finish(self, completion: CompletionOutput, request: Request) -> None:
        metrics = self.output.metrics
        metrics.cached_tokens = max(metrics.cached_tokens, request.num_cached)
        metrics.preemptions += request.num_preemptions
        for counts in (request.thinking_counts, request.answer_counts):
            metrics.steps += counts.steps
            metrics.drafted += sum(counts.drafted)
            metrics.accepted += sum(counts.accepted)
        if isinstance(completion.stop_reason, int) and not self._include_stop:
            completion.drop_tail(1)
        elif isinstance(completion.stop_reason, str) and request.stop_text is not None:
            completion.drop_tail(len(completion.token_ids) - request.stop_text.num_kept_tokens)
