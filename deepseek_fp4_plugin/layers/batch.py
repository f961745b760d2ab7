"""ForwardBatch: what a forward needs beside weights. Nothing about requests, sampling or scheduling is in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """A prompt chunk: rows [start, stop) of the batch belong to request `request`, whose context is `context` long."""

    request: int
    start: int
    stop: int
    context: int


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of R requests, request after request: short queries (decode, drafts) first, then prompt chunks.

    input_ids: int64 [T].  positions: int64 [T].
    With a cache: slot_mapping int64 [T] (block * block_size + offset, where a token's latent goes), block_tables
    int64 [R, B], context_lens int64 [R] (tokens in the cache after this forward). Without one all three are None and
    every chunk's tokens are its whole context.
    query_start: int64 [num_decode_requests + 1], where each short query begins; they attend in absorbed form.
    max_query, max_context: host bounds of the short queries, so that no kernel must ask the device.
    chunks: the others; they attend one after the other in expanded form.
    dp_tokens: under attention data parallelism every rank's T, in rank order (this rank's may be 0); else None.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor | None = None
    block_tables: Tensor | None = None
    context_lens: Tensor | None = None
    query_start: Tensor | None = None
    num_decode_requests: int = 0
    num_decode_tokens: int = 0
    max_query: int = 0
    max_context: int = 0
    chunks: tuple[Chunk, ...] = ()
    dp_tokens: tuple[int, ...] | None = None

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "ForwardBatch":
        """Whole sequences, no cache: for calibration, tests and plain scoring. None is a batch too."""
        chunks: list[Chunk] = []
        tokens: list[int] = []
        positions: list[int] = []
        for request, sequence in enumerate(sequences):
            start, count = len(tokens), len(sequence)
            chunks.append(Chunk(request, start, start + count, count))
            tokens += sequence
            positions += range(count)
        return cls(
            input_ids=torch.tensor(tokens, dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            chunks=tuple(chunks),
        )
