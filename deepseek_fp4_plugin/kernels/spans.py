"""Requests whose rows lie one behind the other: how many each has, for the host and for the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.transfer import to_device


@dataclass(frozen=True)
class Spans:
    """queries: each request's newest tokens.  contexts: all its tokens, the newest among them.
    query_start, context_start: int32 [requests + 1] on the device, where the rows of each begin and end.
    """

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    query_start: Tensor
    context_start: Tensor

    @classmethod
    def of(cls, queries: Sequence[int], contexts: Sequence[int], device: torch.device) -> "Spans":
        starts = np.zeros((2, len(queries) + 1), dtype=np.int32)
        np.cumsum([queries, contexts], axis=1, out=starts[:, 1:])
        return cls(tuple(queries), tuple(contexts), *to_device(starts, device).unbind())

    def rows(self) -> Iterator[tuple[slice, slice]]:
        """Each request's rows among the queries, and among the contexts."""
        query = context = 0
        for length, seen in zip(self.queries, self.contexts, strict=True):
            yield slice(query, query + length), slice(context, context + seen)
            query, context = query + length, context + seen
