"""A step as tensors: what the host says of it, and from that and the slots the forward's inputs.

R requests in the batch's order, short queries first; T tokens; S requests that sample, in the plan's order; N rows of
the batch whose logits are wanted: of each sampled request the last known token's and its drafts'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek_fp4_plugin.engine.slots import Slots
from deepseek_fp4_plugin.engine.step_plan import PlanRow
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.transfer import to_device
from deepseek_fp4_plugin.layers.batch import Chunk, ForwardBatch, grouped

# Up to this many tokens attend in absorbed form; above, expanding the context once costs less than it saves.
MAX_ABSORBED_QUERY = 8


@dataclass(frozen=True, slots=True)
class Step:
    """Tensors are int64 on the device.

    slots, counts: [R], each request's slot and tokens.  request_of, offsets: [T], a token's request and place in it.
    known: [T], token ids, -1 where the slot has it.  A uniform step says nothing of counts, request_of, offsets, known
    and following, and of sample_of where nothing is drawn.  query_start: see ForwardBatch.
    sampled_slots, first, drafts: [S], slot, row of the last known token, number of drafts.
    where: [S, drafts + 1], which of the N rows holds each; past a request's drafts, its last.
    wanted: [N], rows of the batch; None for all.  sample_of: [N], of the S.
    following: [N], places in a flat [S, drafts + 1].
    random: [.], of the N rows those whose token may be drawn; None where none is.
    ends, behind: [.], last rows of chunks that are not sampled, and the known token behind each.
    relaxed_topk: the largest of the requests', 1 where all verification is strict.
    """

    slots: Tensor
    counts: Tensor
    request_of: Tensor
    offsets: Tensor
    known: Tensor
    query_start: Tensor
    sampled_slots: Tensor
    first: Tensor
    drafts: Tensor
    where: Tensor
    wanted: Tensor | None
    sample_of: Tensor
    following: Tensor
    ends: Tensor
    behind: Tensor
    num_short: int
    num_short_tokens: int
    max_query: int
    num_blocks: int
    relaxed_topk: int
    random: Tensor | None = None
    chunks: tuple[Chunk, ...] = ()
    dp_tokens: tuple[int, ...] = ()
    dp_sampled: tuple[int, ...] = ()

    @property
    def uniform(self) -> bool:
        return self.wanted is None

    def inputs(self, slots: Slots, block_size: int) -> tuple[Tensor, ...]:
        """Token ids, positions, cache slots [T], block tables [R, blocks], context lengths [R]."""
        if self.uniform:
            return ops.step_inputs(self.slots, slots.starts, slots.tokens, slots.tables, self.num_blocks, block_size)
        starts = slots.starts.index_select(0, self.slots)
        tables = slots.tables[:, : self.num_blocks].index_select(0, self.slots)
        positions = starts[self.request_of] + self.offsets
        mapping = tables[self.request_of, positions // block_size] * block_size + positions % block_size
        held = slots.tokens[self.slots[self.request_of], self.offsets.clamp(max=slots.tokens.shape[1] - 1)]
        return torch.where(self.known >= 0, self.known, held), positions, mapping, tables, starts + self.counts

    def forward(self, inputs: Sequence[Tensor], block_size: int) -> ForwardBatch:
        ids, positions, mapping, tables, contexts = inputs
        return ForwardBatch(
            input_ids=ids,
            positions=positions,
            slot_mapping=mapping,
            block_tables=tables,
            context_lens=contexts,
            query_start=self.query_start,
            num_decode_requests=self.num_short,
            num_decode_tokens=self.num_short_tokens,
            max_query=self.max_query,
            max_context=self.num_blocks * block_size,
            groups=grouped(self.chunks, tables.device, tables, block_size),
            dp_tokens=self.dp_tokens or None,
        )


def in_batch_order(rows: Sequence[PlanRow]) -> list[int]:
    """Plan rows as the batch has them: short queries first."""
    return sorted(range(len(rows)), key=lambda i: rows[i].num_tokens > MAX_ABSORBED_QUERY)


def most_blocks(rows: Sequence[PlanRow], slots: Slots, block_size: int) -> int:
    """That a step writes or reads of one request, drafting included."""
    end = max((row.start + row.num_tokens for row in rows), default=0) + slots.tokens.shape[1]
    return min(-(-end // block_size), slots.max_blocks)


def build(
    rows: Sequence[PlanRow],
    slots: Slots,
    block_size: int,
    dp_tokens: tuple[int, ...] = (),
    dp_sampled: tuple[int, ...] = (),
) -> Step:
    """The step of any plan."""
    width = slots.tokens.shape[1]
    order = in_batch_order(rows)
    num_short = sum(row.num_tokens <= MAX_ABSORBED_QUERY for row in rows)
    counts = np.array([rows[i].num_tokens for i in order], dtype=np.int64)
    begins = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts)))
    known = np.full(begins[-1], -1, dtype=np.int64)
    begin_of = [0] * len(rows)
    chunks = []
    for request, index in enumerate(order):
        row, begin = rows[index], int(begins[request])
        begin_of[index] = begin
        if row.tokens:
            known[begin : begin + len(row.tokens)] = row.tokens
        if request >= num_short:
            stop = begin + row.num_tokens
            chunks.append(Chunk(request, begin, stop, row.start + row.num_tokens))
    sampled = [i for i, row in enumerate(rows) if row.sample]
    drafts = np.array([rows[i].num_drafts for i in sampled], dtype=np.int64)
    first = [begin_of[i] + rows[i].num_tokens - 1 - rows[i].num_drafts for i in sampled]
    bases = np.cumsum(drafts + 1) - (drafts + 1)
    request_of = np.repeat(np.arange(len(order)), counts)
    sample_of = np.repeat(np.arange(len(sampled)), drafts + 1)
    place = np.arange(len(sample_of)) - bases[sample_of]
    setups = [slots.setups[rows[i].slot] for i in sampled]
    greedy = np.array([setup.sampling.greedy for setup in setups], dtype=bool)
    random = np.flatnonzero(~greedy[sample_of]) if len(sampled) else np.zeros(0, dtype=np.int64)
    behind = [i for i, row in enumerate(rows) if not row.sample]
    firsts = np.array(first, dtype=np.int64)
    tensors = _packed(
        slots.device,
        slots=np.array([rows[i].slot for i in order], dtype=np.int64),
        counts=counts,
        request_of=request_of,
        offsets=np.arange(len(known)) - begins[request_of],
        known=known,
        query_start=begins[: num_short + 1],
        sampled_slots=np.array([rows[i].slot for i in sampled], dtype=np.int64),
        first=firsts,
        drafts=drafts,
        where=bases[:, None] + np.minimum(np.arange(width), drafts[:, None]),
        wanted=firsts[sample_of] + place,
        sample_of=sample_of,
        following=sample_of * width + place,
        random=random,
        ends=np.array([begin_of[i] + rows[i].num_tokens - 1 for i in behind], dtype=np.int64),
        behind=np.array([rows[i].next_token for i in behind], dtype=np.int64),
    )
    if not len(random):
        del tensors["random"]
    return Step(
        **tensors,
        num_short=num_short,
        num_short_tokens=int(begins[num_short]),
        max_query=int(max(counts[:num_short], default=0)),
        num_blocks=most_blocks(rows, slots, block_size),
        relaxed_topk=max((setup.relaxed_topk for setup in setups if setup.relaxed), default=1),
        chunks=tuple(chunks),
        dp_tokens=dp_tokens,
        dp_sampled=dp_sampled,
    )


def build_uniform(
    places: Tensor,
    slots: Slots,
    drawn: bool,
    relaxed_topk: int,
    dp_tokens: tuple[int, ...] = (),
    dp_sampled: tuple[int, ...] = (),
    num_blocks: int | None = None,
) -> Step:
    """The step in which the requests of these slots, int64 [R], all decode with all their drafts.

    num_blocks: that none has more than; None: whatever they may have.
    """
    width, count = slots.tokens.shape[1], places.shape[0]
    rows = slots.numbers[: count * width]
    none = rows[:0]
    query_start = slots.numbers[: count * width + 1 : width].contiguous()
    return Step(
        slots=places,
        counts=none,
        request_of=none,
        offsets=none,
        known=none,
        query_start=query_start,
        sampled_slots=places,
        first=query_start[:-1],
        drafts=slots.all_drafts[:count],
        where=rows.view(count, width),
        wanted=None,
        sample_of=rows // width if drawn else none,
        following=none,
        random=rows if drawn else None,
        ends=none,
        behind=none,
        num_short=count,
        num_short_tokens=count * width,
        max_query=width,
        num_blocks=num_blocks or slots.max_blocks,
        relaxed_topk=relaxed_topk,
        dp_tokens=dp_tokens,
        dp_sampled=dp_sampled,
    )


def _packed(device: torch.device, **arrays: np.ndarray) -> dict[str, Any]:
    """int64 arrays on the device, in one transfer."""
    whole = to_device(np.concatenate([array.reshape(-1) for array in arrays.values()]), device)
    parts = whole.split([array.size for array in arrays.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}
