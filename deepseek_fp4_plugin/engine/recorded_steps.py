"""Decode steps of a few tokens, recorded once for each shape and then replayed: the host's share of a step goes away.

A replay reads its inputs where the recording read them, so they are copied there first; it computes exactly what the
function would have, kernel by kernel.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import select
from deepseek_fp4_plugin.layers.batch import ForwardBatch

MAX_TOKENS = 16  # beyond, computing takes so long that the host does not matter
MAX_RECORDINGS = 64


class StepFunction(Protocol):
    """A forward of T tokens whose tensors all have T rows; returns [T, n]."""

    def __call__(self, *tensors: Tensor, batch: ForwardBatch) -> Tensor: ...


class RecordedSteps:
    """Calls `function`, by replay where the step is short, all decode, and made of kernels that can be recorded.

    cache_blocks: of the whole cache; a request's block table has at most as many.
    """

    def __init__(self, function: StepFunction, device: torch.device, cache_blocks: int):
        self.function = function
        self.recorder = select.recorder(device)
        self.device, self.cache_blocks = device, cache_blocks
        self._inputs: list[Tensor] = []
        self._replays: dict[tuple[int, int, int], Callable[[], Tensor]] = {}

    def __call__(self, *tensors: Tensor, batch: ForwardBatch) -> Tensor:
        """The result is the caller's: it survives the next call."""
        tokens, requests = batch.num_decode_tokens, batch.num_decode_requests
        if self.recorder is None or batch.chunks or not 0 < tokens <= MAX_TOKENS:
            return self.function(*tensors, batch=batch)
        if not self._inputs:
            self._allocate(tensors)
        inputs, static = self._static(len(tensors), tokens, requests, batch)
        for mine, given in zip(inputs, tensors, strict=True):
            mine.copy_(given)
        key = tokens, requests, torch.get_num_threads()
        if key not in self._replays:
            if len(self._replays) == MAX_RECORDINGS:
                self._replays.pop(next(iter(self._replays)))  # the oldest
            try:
                self._replays[key] = self.recorder.record(lambda: self.function(*inputs, batch=static))
            except select.Unrecordable:
                self.recorder = None
                self._replays.clear()
                return self.function(*tensors, batch=batch)
        return self._replays[key]().clone()

    def _allocate(self, tensors: tuple[Tensor, ...]) -> None:
        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)

        self._inputs = [tensor.new_zeros(MAX_TOKENS, *tensor.shape[1:]) for tensor in tensors]
        self._slots, self._tables = whole(MAX_TOKENS), whole(MAX_TOKENS, self.cache_blocks)
        self._starts, self._contexts = whole(MAX_TOKENS + 1), whole(MAX_TOKENS)

    def _static(
        self, count: int, tokens: int, requests: int, batch: ForwardBatch
    ) -> tuple[list[Tensor], ForwardBatch]:
        """Places of the inputs, and the batch with its tensors copied to theirs."""
        tables = self._tables[:requests]
        pairs = [
            (self._slots[:tokens], batch.slot_mapping),
            (tables[:, : batch.block_tables.shape[1]], batch.block_tables),
            (self._starts[: requests + 1], batch.query_start),
            (self._contexts[:requests], batch.context_lens),
        ]
        for mine, given in pairs:
            mine.copy_(given)
        static = replace(
            batch,
            input_ids=torch.empty(0),
            positions=torch.empty(0),
            slot_mapping=pairs[0][0],
            block_tables=tables,
            query_start=pairs[2][0],
            context_lens=pairs[3][0],
            max_query=tokens,
            max_context=0,
        )
        return [tensor[:tokens] for tensor in self._inputs[:count]], static
