"""ForwardBatch: what a forward needs beside weights. Nothing about requests, sampling or scheduling is in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.spans import Spans

# Tokens of context that several chunks have together at the most: enough for a device to be busy, and few enough that
# their keys and values take little memory.
_AT_ONCE = 4096


class Chunk(NamedTuple):
    """A prompt chunk: rows [start, stop) of the batch belong to request `request`, whose context is `context` long."""

    request: int
    start: int
    stop: int
    context: int


class ChunkGroup(NamedTuple):
    """Chunks of requests one behind the other, which attend at once.

    slots: int64 [their contexts' tokens], where in the cache these lie, request after request; None without a cache.
    """

    chunks: tuple[Chunk, ...]
    spans: Spans
    slots: Tensor | None

    @property
    def rows(self) -> slice:
        """Of the batch."""
        return slice(self.chunks[0].start, self.chunks[-1].stop)


def grouped(
    chunks: Sequence[Chunk], device: torch.device, block_tables: Tensor | None = None, block_size: int = 0
) -> tuple[ChunkGroup, ...]:
    """Chunks of requests one behind the other and without gaps, as many in a group as may attend at once.

    block_tables: int64 [requests, blocks] of cache blocks of block_size tokens; None without a cache.
    """
    parts: list[list[Chunk]] = []
    tokens = 0
    for chunk in chunks:
        tokens += chunk.context
        if not parts or tokens > _AT_ONCE:
            parts.append([])
            tokens = chunk.context
        assert not parts[-1] or (chunk.request, chunk.start) == (parts[-1][-1].request + 1, parts[-1][-1].stop)
        parts[-1].append(chunk)
    groups = []
    for part in parts:
        contexts = [chunk.context for chunk in part]
        spans = Spans.of([chunk.stop - chunk.start for chunk in part], contexts, device)
        slots = None
        if block_tables is not None:
            token = torch.arange(sum(contexts), device=device)
            which = torch.searchsorted(spans.context_start[1:], token, right=True)
            token = token - spans.context_start[which]
            slots = block_tables[part[0].request + which, token // block_size] * block_size + token % block_size
        groups.append(ChunkGroup(tuple(part), spans, slots))
    return tuple(groups)


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of R requests, request after request: short queries (decode, drafts) first, then prompt chunks.

    input_ids: int64 [T].  positions: int64 [T].
    With a cache: slot_mapping int64 [T] (block * block_size + offset, where a token's latent goes), block_tables
    int64 [R, B], context_lens int64 [R] (tokens in the cache after this forward). Without one all three are None and
    every chunk's tokens are its whole context.
    query_start: int64 [num_decode_requests + 1], where each short query begins; they attend in absorbed form.
    max_query, max_context: host bounds of the short queries, so that no kernel must ask the device.
    groups: of the others' chunks; they attend in expanded form.
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
    groups: tuple[ChunkGroup, ...] = ()
    dp_tokens: tuple[int, ...] | None = None

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for group in self.groups for chunk in group.chunks]

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
            groups=grouped(chunks, torch.device(device)),
        )
