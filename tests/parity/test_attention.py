"""Attention kernels against the reference: mixed query lengths, long contexts, poisoned memory."""

import functools
from dataclasses import dataclass

import pytest
import torch

from deepseek_fp4_plugin.kernels import decoded, ops, reference
from deepseek_fp4_plugin.kernels.decoded import attention as decoded_attention
from deepseek_fp4_plugin.kernels.spans import Spans


@dataclass(frozen=True)
class Case:
    name: str
    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32


CASES = [
    Case("one row", (1,), (1,)),
    Case("equal queries", (1, 1, 1), (5, 32, 33)),
    Case("drafts", (4, 4), (4, 70)),
    Case("mixed queries", (1, 4, 2), (9, 64, 2)),
    Case("mixed queries of many", (1, 3, 2, 1, 4), (9, 40, 2, 33, 12)),
    Case("bf16", (2, 1), (40, 17), torch.bfloat16, torch.bfloat16),
    Case("fp8 cache", (2, 1), (40, 17), torch.bfloat16, torch.float8_e4m3fn),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_absorbed_attention(case, monkeypatch):
    heads, latent, rope, block = 4, 32, 16, 16
    blocks_each = [-(-context // block) for context in case.contexts]
    total = sum(blocks_each) + 2
    cache = torch.randn(total, block, latent + rope).to(case.cache_dtype)
    order = torch.randperm(total).tolist()
    width = max(blocks_each) + 1
    tables = torch.full((len(case.contexts), width), order[-1])  # past a request's blocks: any block id
    for row, (count, context) in enumerate(zip(blocks_each, case.contexts, strict=True)):
        mine = [order.pop(0) for _ in range(count)]
        tables[row, :count] = torch.tensor(mine)
        if context % block and case.cache_dtype != torch.float8_e4m3fn:
            cache[mine[-1], context % block :] = float("nan")  # unread memory is poisoned
    if case.cache_dtype != torch.float8_e4m3fn:
        cache[order[-1]] = float("nan")
    q_latent = torch.randn(sum(case.queries), heads, latent, dtype=case.dtype)
    q_rope = torch.randn(sum(case.queries), heads, rope, dtype=case.dtype)
    arguments = (
        q_latent,
        q_rope,
        cache,
        tables,
        torch.tensor([0, *case.queries]).cumsum(0),
        torch.tensor(case.contexts),
        max(case.queries),
        max(case.contexts),
        0.2,
    )
    expected = reference.absorbed_attention(*arguments).float()
    bound = 1e-5 if case.dtype == torch.float32 else 2e-2  # BF16 probabilities carry 8 bits
    kernels = [ops.absorbed_attention]
    for entries in (1 << 18, 100, 1):  # that `decoded` gathers at a time: of all requests, of some, of one
        kernels.append(functools.partial(gathering, monkeypatch, entries))
    for attention in kernels:
        error = (attention(*arguments).float() - expected).abs().max() / expected.abs().max()
        assert error < bound, attention


def gathering(monkeypatch, entries: int, *arguments) -> torch.Tensor:
    monkeypatch.setattr(decoded_attention, "_GATHERED", entries)
    return decoded.absorbed_attention(*arguments)


SPANS = [((1,), (1,)), ((1,), (9,)), ((7,), (7,)), ((3,), (20,)), ((2, 1, 7, 3), (2, 9, 7, 20))]


@pytest.mark.parametrize(("queries", "contexts"), SPANS)
def test_expanded_attention(queries, contexts):
    spans = Spans.of(queries, contexts, torch.device("cpu"))
    q, k, v = torch.randn(sum(queries), 4, 24), torch.randn(sum(contexts), 4, 24), torch.randn(sum(contexts), 4, 16)
    expected = reference.expanded_attention(q, k, v, 0.3, spans)
    assert (ops.expanded_attention(q, k, v, 0.3, spans) - expected).abs().max() < 1e-5


def test_requests_do_not_see_each_other():
    queries, contexts = (3, 5), (9, 5)
    spans = Spans.of(queries, contexts, torch.device("cpu"))
    q, k, v = torch.randn(8, 2, 24), torch.randn(14, 2, 24), torch.randn(14, 2, 16)
    k[9:], v[9:] = float("nan"), float("nan")
    alone = Spans.of(queries[:1], contexts[:1], torch.device("cpu"))
    for attention in (ops.expanded_attention, reference.expanded_attention):
        own = attention(q[:3], k[:9], v[:9], 0.3, alone)
        assert torch.equal(attention(q, k, v, 0.3, spans)[:3], own) and own.isfinite().all()


@pytest.mark.parametrize("length", [1, 4, 20])
@pytest.mark.parametrize(("what", "value"), [("q", float("nan")), ("q", float("inf")), ("k", float("nan"))])
def test_nothing_that_is_not_finite_is_lost_in_expanded_attention(length, what, value):
    q, k, v = torch.randn(length, 4, 24), torch.randn(length + 2, 4, 24), torch.randn(length + 2, 4, 24)
    {"q": q, "k": k}[what][:, 1] = value  # a whole head, as a damaged scale makes it
    spans = Spans.of([length], [length + 2], torch.device("cpu"))
    expected = reference.expanded_attention(q, k, v, 0.3, spans).isfinite()
    assert not expected[:, 1].any()
    assert (ops.expanded_attention(q, k, v, 0.3, spans).isfinite() == expected).all()
