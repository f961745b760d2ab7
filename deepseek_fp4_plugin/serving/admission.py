"""How many requests the server takes on: a batch and a bounded queue behind it, 429 beyond, 503 while it drains."""

import collections
import math
import time

from deepseek_fp4_plugin.serving.api_errors import ApiError, bad_request
from deepseek_fp4_plugin.serving.generation import Job
from deepseek_fp4_plugin.serving.metrics import Metrics


class Admission:
    """Counts sequences (choices being generated). Used on the event loop's thread only."""

    def __init__(self, batch: int, queue: int, metrics: Metrics) -> None:
        self.batch, self.capacity, self.metrics = batch, batch + queue, metrics
        self.jobs: set[Job] = set()
        self.sequences = 0
        self.draining = False
        self._finished: collections.deque[float] = collections.deque(maxlen=64)  # when sequences ended, newest last

    def reserve(self, sequences: int) -> None:
        """Take a place for so many sequences, to be given back by `release`. Raises ApiError where there is none."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", "ServiceUnavailableError",
                           headers={"Retry-After": "10", "Connection": "close"})  # fmt: skip
        if sequences > self.capacity:
            raise bad_request(
                f"n times the number of prompts is {sequences}; this server takes {self.capacity} at most"
            )
        if self.sequences + sequences > self.capacity:
            self.metrics.rejected.inc()
            raise ApiError(429, f"the queue is full: {self.sequences} answers are being generated or wait; try again "
                           "later", "RateLimitError", code="queue_full",
                           headers={"Retry-After": str(self.retry_after(sequences))})  # fmt: skip
        self.sequences += sequences
        self.metrics.active.set(self.sequences)

    def release(self, sequences: int) -> None:
        """Give `sequences` places back."""
        self.sequences -= sequences
        self.metrics.active.set(self.sequences)
        now = time.monotonic()
        self._finished.extend([now] * min(sequences, 64))

    def retry_after(self, sequences: int) -> int:
        """Seconds until places may be free, from the pace of the last answers; 1 to 60."""
        if len(self._finished) < 2:
            return 1
        pace = len(self._finished) / max(1e-3, time.monotonic() - self._finished[0])
        return min(60, max(1, math.ceil(sequences / pace)))

    def abort_all(self) -> None:
        """End what is running; each client is told."""
        for job in self.jobs:
            job.abort()
