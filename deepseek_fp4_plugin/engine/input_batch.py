"""From a StepPlan to the tensors of a forward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepseek_fp4_plugin.engine.step_plan import PlanRow
from deepseek_fp4_plugin.layers.batch import Chunk, ForwardBatch

# Up to this many tokens attend in absorbed form; above, expanding the context once costs less than it saves.
MAX_ABSORBED_QUERY = 8


@dataclass(frozen=True, slots=True)
class InputBatch:
    """A step's forward, and where each plan row's tokens lie in it.

    order: plan row of each request of the batch (short queries first).  starts: first token of each plan row.
    """

    forward: ForwardBatch
    order: list[int]
    starts: list[int]


def build(
    rows: Sequence[PlanRow], block_size: int, device: torch.device, dp_tokens: tuple[int, ...] | None = None
) -> InputBatch:
    """One forward over all rows' tokens; of none, too, where other ranks have some (dp_tokens: see ForwardBatch)."""
    short = [i for i, row in enumerate(rows) if len(row.tokens) <= MAX_ABSORBED_QUERY]
    long = [i for i, row in enumerate(rows) if len(row.tokens) > MAX_ABSORBED_QUERY]
    order = short + long
    tokens: list[int] = []
    starts = [0] * len(rows)
    query_start, lengths, firsts = [0], [], []
    max_query = max_context = 0
    chunks: list[Chunk] = []
    for request, index in enumerate(order):
        row = rows[index]
        count, begin = len(row.tokens), len(tokens)
        starts[index] = begin
        tokens += row.tokens
        lengths.append(count)
        firsts.append(row.start)
        context = row.start + count
        if request < len(short):
            query_start.append(begin + count)
            max_query = max(max_query, count)
            max_context = max(max_context, context)
        else:
            chunks.append(Chunk(request, begin, begin + count, context))
    positions, table = _positions(firsts, lengths), _block_table([rows[i].blocks for i in order])
    request_of = np.repeat(np.arange(len(order)), np.asarray(lengths, dtype=np.int64))
    slots = table[request_of, positions // block_size] * block_size + positions % block_size
    contexts = np.asarray(firsts, dtype=np.int64) + np.asarray(lengths, dtype=np.int64)
    forward = ForwardBatch(
        input_ids=_tensor(np.asarray(tokens, dtype=np.int64), device),
        positions=_tensor(positions, device),
        slot_mapping=_tensor(slots, device),
        block_tables=_tensor(table, device),
        context_lens=_tensor(contexts, device),
        query_start=_tensor(np.asarray(query_start, dtype=np.int64), device),
        num_decode_requests=len(short),
        num_decode_tokens=query_start[-1],
        max_query=max_query,
        max_context=max_context,
        chunks=tuple(chunks),
        dp_tokens=dp_tokens,
    )
    return InputBatch(forward, order, starts)


def build_steps(
    firsts: np.ndarray, count: int, blocks: Sequence, block_size: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`count` steps of one token a request, the recurrent ones of the MTP module; request r's begin at firsts[r].

    Returns positions, slots and context lengths, int64 [count, R], query starts int64 [R + 1]; and the block tables.
    """
    positions = firsts + np.arange(count, dtype=np.int64)[:, None]
    table = _block_table(blocks)
    slots = table[np.arange(len(blocks)), positions // block_size] * block_size + positions % block_size
    starts = torch.arange(len(blocks) + 1, device=device)
    steps = _tensor(positions, device), _tensor(slots, device), _tensor(positions + 1, device), starts
    return steps, _tensor(table, device)


def _positions(firsts: list[int], lengths: list[int]) -> np.ndarray:
    """firsts[0], firsts[0] + 1, ... for lengths[0] tokens, then the next request's."""
    count = np.asarray(lengths, dtype=np.int64)
    offsets = np.asarray(firsts, dtype=np.int64) - (np.cumsum(count) - count)
    return np.arange(count.sum(), dtype=np.int64) + np.repeat(offsets, count)


def _block_table(blocks: Sequence) -> np.ndarray:
    """Requests' blocks as one int64 [R, B], padded with block 0 (never read beyond a request's context)."""
    table = np.zeros((len(blocks), max(map(len, blocks), default=0)), dtype=np.int64)
    for row, held in zip(table, blocks, strict=True):
        row[: len(held)] = held
    return table


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
