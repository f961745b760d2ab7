"""ForwardBatch: what a forward needs beside weights. Nothing about requests, sampling or scheduling is in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """T tokens of R requests, request after request; short queries (decode, drafts) before long ones (prompt chunks).

    input_ids: int64 [T].  positions: int64 [T].  query_start: int32 [R + 1], where each request's tokens begin.
    With a cache: slot_mapping int64 [T] (block * block_size + offset, where a token's latent goes), block_tables
    int32 [R, B], context_lens int32 [R] (tokens in the cache after this forward). Without one all three are None and
    every request's tokens are its whole context.
    num_decode_requests: how many leading requests have a query short enough for absorbed attention.
    """

    input_ids: Tensor
    positions: Tensor
    query_start: Tensor
    slot_mapping: Tensor | None = None
    block_tables: Tensor | None = None
    context_lens: Tensor | None = None
    num_decode_requests: int = 0

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "ForwardBatch":
        """Whole sequences, no cache: for calibration, tests and plain scoring."""
        lengths = [len(sequence) for sequence in sequences]
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(
            input_ids=torch.tensor([token for sequence in sequences for token in sequence], device=device),
            positions=torch.cat([torch.arange(length, device=device) for length in lengths]),
            query_start=starts.to(device),
        )
