"""Decode steps of a few tokens, recorded once for each shape and then replayed: the host's share of a step goes away.

A replay reads its inputs where the recording read them, so they are copied there first; it computes exactly what the
function would have, kernel by kernel.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import select
from deepseek_fp4_plugin.kernels.recording import Unrecordable
from deepseek_fp4_plugin.layers.batch import ForwardBatch

MAX_TOKENS = 16  # beyond, computing takes so long that the host does not matter
MAX_RECORDINGS = 64


# function(*tensors, batch=...): what a decode step computes of a batch, and of tensors beside it.
StepFunction = Callable[..., tuple[Tensor, ...]]


class RecordedSteps:
    """Replays `function` where the step is short, all decode, and made of kernels that can be recorded.

    cache_blocks: of the whole cache; a request's block table has at most as many.
    """

    def __init__(self, function: StepFunction, device: torch.device, cache_blocks: int, block_size: int):
        self.function = function
        self.recorder = select.recorder(device)
        self.device, self.cache_blocks, self.max_context = device, cache_blocks, cache_blocks * block_size
        self._inputs: list[Tensor] = []
        self._recordings: dict[tuple, tuple[list[Tensor], Callable[[], tuple[Tensor, ...]]]] = {}

    def __call__(self, *tensors: Tensor, batch: ForwardBatch) -> tuple[Tensor, ...] | None:
        """The function's results, which the next call overwrites; None for a step that is not replayed."""
        tokens, requests = batch.num_decode_tokens, batch.num_decode_requests
        if self.recorder is None or batch.chunks or not 0 < tokens <= MAX_TOKENS:
            return None
        if not self._inputs:
            self._allocate()
        key = tokens, requests, torch.get_num_threads(), *(tensor.shape for tensor in tensors)
        static = self._fill(batch)
        if key in self._recordings:
            places, replay = self._recordings[key] = self._recordings.pop(key)  # now the youngest
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor)
            return replay()
        if len(self._recordings) == MAX_RECORDINGS:
            self._recordings.pop(next(iter(self._recordings)))  # the least recently used
        places = [tensor.clone() for tensor in tensors]
        try:
            replay, results = self.recorder.record(lambda: self.function(*places, batch=static))
        except Unrecordable:
            self.recorder = None
            self._recordings.clear()
            return None
        self._recordings[key] = places, replay
        return results

    def _allocate(self) -> None:
        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)

        self._inputs = [whole(MAX_TOKENS) for _ in range(3)]  # ids, positions, slots
        self._inputs += [whole(MAX_TOKENS + 1), whole(MAX_TOKENS)]  # query starts, context lengths
        self._tables = whole(MAX_TOKENS, self.cache_blocks)

    def _fill(self, batch: ForwardBatch) -> ForwardBatch:
        """Copies the batch to where recordings read it."""
        assert batch.block_tables is not None
        given = batch.input_ids, batch.positions, batch.slot_mapping, batch.query_start, batch.context_lens
        places = []
        for place, tensor in zip(self._inputs, given, strict=True):
            assert tensor is not None
            places.append(place[: tensor.shape[0]].copy_(tensor))
        ids, positions, slots, starts, contexts = places
        tables = self._tables[: batch.num_decode_requests]
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables
        return replace(
            batch,
            input_ids=ids,
            positions=positions,
            slot_mapping=slots,
            block_tables=tables,
            query_start=starts,
            context_lens=contexts,
            max_query=batch.num_decode_tokens,
            max_context=self.max_context,
        )
