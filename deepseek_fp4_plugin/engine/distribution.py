"""Which rank's scheduler serves which request, under attention data parallelism. TensorRT-LLM's rule.

Requests wait here, in the order of priority and age, until a rank has room for them; so late ones go where work has
ended meanwhile. One pinned to a rank waits for that rank, unless it may be relaxed. The others are dealt longest prompt
first to the rank with the fewest tokens, and no rank gets more than its share of the requests.
"""

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_fp4_plugin.engine.request import Request
from deepseek_fp4_plugin.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Balance:
    """Hold new prompts back, in steps, so that all ranks compute theirs together: a step takes as long as its slowest.

    timeout_iters: until every rank can have one.  batching_wait_iters: then, to let more of them come.
    """

    timeout_iters: int = 50
    batching_wait_iters: int = 10


class Distributor:
    """schedulers: one a rank. Each gets at most `max_batch_size` requests at a time."""

    def __init__(self, schedulers: Sequence[Scheduler], balance: Balance | None = None):
        self._schedulers, self._balance = list(schedulers), balance
        self._waiting: list[tuple[int, int, Request]] = []  # heap of (-priority, arrival, request)
        self._deadlines: list[tuple[float, int, Request]] = []
        self._arrivals = 0
        self._without_all = self._with_all = 0  # steps held back, before and since every rank can have a prompt
        self.num_waiting = 0

    def add(self, request: Request) -> None:
        self._arrivals += 1
        heapq.heappush(self._waiting, (-request.priority, self._arrivals, request))
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, self._arrivals, request))
        self.num_waiting += 1

    def finish(self, request: Request, reason: str) -> None:
        """End a request that waits here."""
        request.finish_reason = reason
        self.num_waiting -= 1  # its heap entries are dropped when they come up

    def expired(self) -> list[Request]:
        """Requests waiting here whose deadline has passed; the caller finishes them."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            late.append(heapq.heappop(self._deadlines)[2])
        return late

    def assign(self) -> list[tuple[Request, Scheduler]]:
        """Requests that leave, each with its scheduler, in the order in which they should be added."""
        if not self.num_waiting:
            return []
        loads = [len(s.running) + s.num_waiting for s in self._schedulers]
        room = [s.max_batch_size - load for s, load in zip(self._schedulers, loads, strict=True)]
        taken = self._take(room)
        if self._balance is not None and self._hold(len(taken), room, self._balance):
            dealt: dict[int, int] = {}
        else:
            dealt = self._deal([entry[2] for entry in taken], loads)
        leaving = []
        for index, entry in enumerate(taken):
            if index in dealt:
                leaving.append((entry[2], self._schedulers[dealt[index]]))
                self.num_waiting -= 1
            else:
                heapq.heappush(self._waiting, entry)
        return leaving

    def _take(self, room: Sequence[int]) -> list[tuple[int, int, Request]]:
        """The first that find room; a request that waits for its own rank holds nobody up."""
        free, left = sum(room), list(room)
        taken: list[tuple[int, int, Request]] = []
        stay = []
        while self._waiting and len(taken) < free:
            entry = heapq.heappop(self._waiting)
            request = entry[2]
            if request.finish_reason is not None:
                continue
            if request.dp_rank is not None and not request.dp_relax:
                left[request.dp_rank] -= 1
                if left[request.dp_rank] < 0:
                    stay.append(entry)
                    continue
            taken.append(entry)
        for entry in stay:
            heapq.heappush(self._waiting, entry)
        return taken

    def _deal(self, requests: Sequence[Request], loads: Sequence[int]) -> dict[int, int]:
        """The rank of each request, by its index."""
        loads = list(loads)
        tokens = [sum(len(request.token_ids) for request in s.running) for s in self._schedulers]
        dealt: dict[int, int] = {}

        def give(index: int, rank: int) -> None:
            dealt[index] = rank
            loads[rank] += 1
            tokens[rank] += len(requests[index].token_ids)

        pinned = [i for i, request in enumerate(requests) if request.dp_rank is not None]
        for index in sorted(pinned, key=lambda i: requests[i].dp_relax):  # those that can go nowhere else first
            rank = requests[index].dp_rank
            assert rank is not None
            if loads[rank] < self._schedulers[rank].max_batch_size:
                give(index, rank)
        free = [i for i, r in enumerate(requests) if i not in dealt and (r.dp_rank is None or r.dp_relax)]
        expected = max(-(-(sum(loads) + len(free)) // len(loads)), *loads)
        heap = [(tokens[rank], loads[rank], rank) for rank in range(len(loads)) if loads[rank] < expected]
        heapq.heapify(heap)
        for index in sorted(free, key=lambda i: -len(requests[i].token_ids)):
            if not heap:
                break
            rank = heapq.heappop(heap)[2]
            give(index, rank)
            if loads[rank] < expected:
                heapq.heappush(heap, (tokens[rank], loads[rank], rank))
        return dealt

    def _hold(self, prompts: int, room: Sequence[int], balance: Balance) -> bool:
        """Whether the new prompts wait one step more."""
        all_generate = all(scheduler.running for scheduler in self._schedulers)
        if prompts >= len(room) and min(room) > 0:
            self._without_all = 0
            self._with_all += 1
            hold = all_generate and self._with_all <= balance.batching_wait_iters
        else:
            self._without_all += 1
            hold = all_generate and self._without_all < balance.timeout_iters
        if not hold:
            self._without_all = self._with_all = 0
        return hold
