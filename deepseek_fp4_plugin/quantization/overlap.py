"""Reading, computing and writing at the same time, with a bound on what is in memory between them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TypeVar

Job = TypeVar("Job")
Loaded = TypeVar("Loaded")
Result = TypeVar("Result")

_ROOM = 64 << 20  # bytes: what two threads take to begin, and some to spare


def overlapped(
    jobs: Iterable[Job],
    load: Callable[[Job], Loaded],
    work: Callable[[Job, Loaded], Result],
    store: Callable[[Job, Result], None],
    cost: Callable[[Job], int],
    budget: int,
) -> Iterator[Job]:
    """Does `store(job, work(job, load(job)))` for every job, and yields each, in their order, once that is done.

    `load` runs in a thread of its own, `store` in another, `work` in the caller's; each does the jobs in their order.
    cost: bytes that a job holds from its load to the end of its store. Loads begin ahead while the sum stays within
    `budget`; one job is always under way. An error of a job is raised in its turn: all in front of it are stored, and
    nothing behind it. Raises MemoryError where there is no room for the threads.
    """
    waiting: deque[tuple[Job, Future[Loaded]]] = deque()
    storing: deque[tuple[Job, Future[None]]] = deque()
    failed = Event()
    error: Exception | None = None
    held = 0
    upcoming = iter(jobs)
    following = next(upcoming, None)

    def store_in_turn(job: Job, result: Result) -> None:
        if failed.is_set():  # the error is raised when its job's turn comes
            return
        try:
            store(job, result)
        except BaseException:
            failed.set()
            raise

    bytearray(_ROOM)  # a thread that finds no memory ends before it has begun, and whoever began it waits forever
    with ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "write") as writing:
        for threads in (reading, writing):
            threads.submit(int).result()
        try:
            while following is not None or waiting or storing:
                while following is not None and (not held or held + cost(following) <= budget):
                    held += cost(following)
                    waiting.append((following, reading.submit(load, following)))
                    following = next(upcoming, None)
                if waiting:
                    job, loading = waiting.popleft()
                    try:
                        storing.append((job, writing.submit(store_in_turn, job, work(job, loading.result()))))
                    except Exception as raised:  # those in front of it are stored first
                        error, following = raised, None
                        waiting.clear()
                    del loading
                while storing and (not waiting or storing[0][1].done()):
                    job, stored = storing.popleft()
                    stored.result()
                    held -= cost(job)
                    yield job
                    if following is not None:
                        break
            if error is not None:
                raise error
        finally:
            failed.set()
            for threads in (reading, writing):
                threads.shutdown(wait=True, cancel_futures=True)
