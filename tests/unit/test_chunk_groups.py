"""Chunks of prompts that attend together: how many, and where their contexts lie in the cache."""

import torch

from deepseek_fp4_plugin.layers.batch import Chunk, ForwardBatch, grouped

CPU = torch.device("cpu")


def test_groups_are_as_large_as_may_attend_at_once():
    """A chunk with a longer context than that is alone; requests 0 and 1 are short queries, ahead of all chunks."""
    contexts, queries, block = [10, 4000, 100, 5000, 3, 7], [10, 50, 9, 600, 3, 4], 32
    tables = torch.randperm(2000)[: 8 * 160].view(8, 160)
    chunks, row = [], 2
    for request, (context, count) in enumerate(zip(contexts, queries, strict=True), 2):
        chunks.append(Chunk(request, row, row + count, context))
        row += count
    groups = grouped(chunks, CPU, tables, block)
    assert [[chunk.context for chunk in group.chunks] for group in groups] == [[10, 4000], [100], [5000], [3, 7]]
    assert [(group.rows.start, group.rows.stop) for group in groups] == [(2, 62), (62, 71), (71, 671), (671, 678)]
    for group in groups:
        expected = [
            tables[chunk.request, torch.arange(chunk.context) // block] * block + torch.arange(chunk.context) % block
            for chunk in group.chunks
        ]
        assert group.slots is not None and torch.equal(group.slots, torch.cat(expected))
        assert group.spans.contexts == tuple(chunk.context for chunk in group.chunks)
        starts = torch.tensor([0, *group.spans.queries]).cumsum(0)
        assert torch.equal(group.spans.query_start, starts.int())
        assert [own.stop for own, _ in group.spans.rows()] == starts[1:].tolist()


def test_whole_sequences_have_no_cache():
    batch = ForwardBatch.from_sequences([[1, 2, 3], [4]])
    (group,) = batch.groups
    assert group.slots is None and group.spans.queries == group.spans.contexts == (3, 1)
    assert batch.chunks == [Chunk(0, 0, 3, 3), Chunk(1, 3, 4, 1)]
    assert ForwardBatch.from_sequences([]).groups == ()
