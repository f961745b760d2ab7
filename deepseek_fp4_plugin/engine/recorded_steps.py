"""Uniform steps recorded once for each size and then replayed: the host's share of a step goes away.

A recording is a whole step of `size` requests: forward, sampling, verification, drafts, and what slots hold afterwards.
It is made on the dummy's slot alone, and a replay with fewer requests fills the rest up with the dummy. Which size a
step takes follows from its plan: all ranks, told of the same plans, record and replay the same sizes in the same steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepseek_fp4_plugin.config import CudaGraphConfig
from deepseek_fp4_plugin.engine.step_plan import StepPlan
from deepseek_fp4_plugin.kernels import select
from deepseek_fp4_plugin.kernels.recording import Recorder, Results, Unrecordable
from deepseek_fp4_plugin.kernels.transfer import to_device

# On a CPU every row costs its time, so nothing is filled up: every size of few tokens is recorded, then every eighth
# while the host's share of a step still shows.
_CPU_FEW_TOKENS, _CPU_TOKENS, _CPU_STRIDE = 16, 256, 8
# A GPU's without `batch_sizes`, TensorRT-LLM's: filled up or not, up to 128 requests and then powers of two.
_PADDED, _EXACT, _LARGE = (1, 2, 4, *range(8, 129, 8)), (*range(1, 32), 32, 64, 128), (256, 512, 1024, 2048)
_GPU_MOST = 128  # requests, where `max_batch_size` does not say
_LEAST_KEPT, _KINDS = 64, 4  # recordings that are kept at the least, and of each size

StepFunction = Callable[[Tensor, "Kind", int], Callable[[], Results]]


@dataclass(frozen=True)
class Kind:
    """Uniform steps of one size that differ in what they compute: whether tokens are drawn, whether some verification
    is relaxed and how many tokens it looks at (1: none)."""

    drawn: bool = False
    relaxed_topk: int = 1


@dataclass(frozen=True)
class Sizes:
    """Numbers of requests that steps are recorded for, ascending; `padded`: a step may take the next larger one."""

    sizes: tuple[int, ...]
    padded: bool = False

    @classmethod
    def of(
        cls,
        config: CudaGraphConfig | None,
        device: torch.device,
        num_drafts: int,
        max_batch_size: int,
        dp_ranks: int = 1,
    ) -> "Sizes":
        """What a device records: on a GPU what `config` says, on a CPU every size of few tokens and some of more.

        dp_ranks: whose tokens meet at the experts."""
        if device.type == "cpu":
            each = (1 + num_drafts) * dp_ranks  # tokens
            few, most = _CPU_FEW_TOKENS // each, min(max_batch_size, _CPU_TOKENS // each)
            return cls(tuple(n for n in range(1, most + 1) if n <= few or n % _CPU_STRIDE == 0))
        if config is None:
            return cls(())
        padded = config.enable_padding
        if config.batch_sizes:
            sizes = {size for size in config.batch_sizes if size <= max_batch_size}
        else:
            largest = min(config.max_batch_size or _GPU_MOST, max_batch_size)
            sizes = {size for size in (*(_PADDED if padded else _EXACT), *_LARGE) if size < largest} | {largest}
        return cls(tuple(sorted(sizes)), padded)

    def choose(self, plan: StepPlan) -> int | None:
        """The size that this step is replayed with; None for one that is not. Every rank comes to the same."""
        if not (plan.dp_uniform if plan.dp_sampled else plan.uniform):
            return None
        counts = set(plan.dp_sampled or (len(plan.rows),))  # all rows of a uniform plan are sampled
        size = next((size for size in self.sizes if size >= max(counts)), None)
        return size if max(counts) and (self.padded or counts == {size}) else None


class RecordedSteps:
    """function: computes a uniform step of the requests in these slots, int64 [size], for so many ranks that step
    together.  dummy: the slot that fills up.  recorder: None where nothing can be recorded."""

    def __init__(self, function: StepFunction, sizes: Sizes, dummy: int, device: torch.device):
        self.function, self.sizes, self.dummy, self.device = function, sizes, dummy, device
        self.recorder: Recorder | None = select.recorder(device)
        self.recordings: dict[tuple, tuple[Tensor, Callable[[], Results]]] = {}
        self._placed: dict[tuple, list[int]] = {}  # what each recording's slots are now
        self.num_replays = 0

    def __call__(self, plan: StepPlan, kind: Kind) -> Results | None:
        """The step's results, row by row of the plan and then the dummy's, which the next call overwrites; None for a
        step that is not replayed."""
        size = self.sizes.choose(plan) if self.recorder is not None else None
        if size is None:
            return None
        ranks = len(plan.dp_sampled)
        key = self._key(size, kind, ranks)
        if key not in self.recordings and not self._record(key, size, kind, ranks):
            return None
        places, replay = self.recordings[key] = self.recordings.pop(key)  # now the youngest
        slots = [row.slot for row in plan.rows] + [self.dummy] * (size - len(plan.rows))
        if self._placed.get(key) != slots:
            places.copy_(to_device(np.array(slots, dtype=np.int64), self.device))
            self._placed[key] = slots
        self.num_replays += 1
        return replay()

    def prepare(self, size: int, kind: Kind, ranks: int) -> None:
        """Record a step before it comes; where nothing can be recorded, compute it once.  ranks: 0 without attention
        data parallelism."""
        key = self._key(size, kind, ranks)
        if key in self.recordings or (self.recorder is not None and self._record(key, size, kind, ranks)):
            self.recordings[key][1]()  # a graph's first replay takes it to the device
        else:
            self.function(self._all_dummies(size), kind, ranks)()

    def _key(self, size: int, kind: Kind, ranks: int) -> tuple:
        return size, kind, ranks, torch.get_num_threads() if self.device.type == "cpu" else 0

    def _all_dummies(self, size: int) -> Tensor:
        return torch.full((size,), self.dummy, dtype=torch.int64, device=self.device)

    def _record(self, key: tuple, size: int, kind: Kind, ranks: int) -> bool:
        assert self.recorder is not None
        if len(self.recordings) == max(_LEAST_KEPT, _KINDS * len(self.sizes.sizes)):
            oldest = next(iter(self.recordings))  # the least recently used
            del self.recordings[oldest]
            self._placed.pop(oldest, None)
        places = self._all_dummies(size)
        try:
            replay, _ = self.recorder.record(self.function(places, kind, ranks))
        except Unrecordable:
            self.recorder = None
            self.recordings.clear()
            return False
        self.recordings[key] = places, replay
        return True
