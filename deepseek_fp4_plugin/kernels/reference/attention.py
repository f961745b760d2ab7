"""Multi-head latent attention's two forms: expanded heads over one request, absorbed heads over a paged cache."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.reference.linear import dequantized
from deepseek_fp4_plugin.kernels.reference.norm import rms_norm
from deepseek_fp4_plugin.kernels.reference.rotary import rotary
from deepseek_fp4_plugin.kernels.spans import Spans
from deepseek_fp4_plugin.kernels.weights import PreparedWeight


def expanded_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Spans) -> Tensor:
    """Causal attention of each request's newest tokens over its whole context, one request after the other.

    q: [T, heads, d].  k: [S, heads, d] and v: [S, heads, dv]; of a request's t queries and s keys query i sees keys
    0 .. s - t + i.  Scores and softmax FP32.  Returns [T, heads, dv] in q's dtype.
    """
    output = q.new_empty(*q.shape[:2], v.shape[2])
    for own, seen in spans.rows():
        scores = torch.einsum("thd,shd->hts", q[own].float(), k[seen].float()) * scale
        scores = scores.masked_fill(_future(scores.shape[1], scores.shape[2], q.device), float("-inf"))
        output[own] = torch.einsum("hts,shv->thv", scores.softmax(-1), v[seen].float()).to(q.dtype)
    return output


def absorbed_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query: int,
    max_context: int,
    scale: float,
) -> Tensor:
    """Attention of the few newest tokens of each request, in latent space, one request after the other.

    q_latent: [T, heads, latent], q_rope: [T, heads, rope].  cache: [blocks, block_size, latent + rope], the newest
    tokens' entries already in it.  block_tables: int [R, B].  query_start: int [R + 1].  context_lens: int [R], the
    newest tokens included.  max_query and max_context bound both; unused here.
    Returns [T, heads, latent] in q's dtype.
    """
    output = torch.empty_like(q_latent)
    latent, block_size = q_latent.shape[-1], cache.shape[1]
    starts, contexts = query_start.tolist(), context_lens.tolist()
    for request in range(len(starts) - 1):
        rows, context = slice(starts[request], starts[request + 1]), contexts[request]
        blocks = block_tables[request, : -(-context // block_size)]
        entries = torch.stack([cache[int(block)].float() for block in blocks]).flatten(0, 1)[:context]
        q = torch.cat((q_latent[rows], q_rope[rows]), -1).float()
        scores = torch.einsum("thd,sd->hts", q, entries) * scale
        scores = scores.masked_fill(_future(q.shape[0], context, q.device), float("-inf"))
        output[rows] = torch.einsum("hts,sd->thd", scores.softmax(-1), entries[:, :latent]).to(output.dtype)
    return output


def absorb(q_nope: Tensor, kv_b: PreparedWeight) -> Tensor:
    """Queries into latent space: [T, heads, nope] times each head's first `nope` rows of kv_b, [T, heads, latent].

    kv_b: [heads * (nope + v), latent].
    """
    w_uk = _by_head(kv_b, q_nope.shape[1])[:, : q_nope.shape[2]]
    return torch.einsum("thn,hnl->thl", q_nope.float(), w_uk).to(q_nope.dtype)


def absorbed_queries(
    q_nope: Tensor, q_rope: Tensor, kv_b: PreparedWeight, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """What `absorbed_attention` takes: q_nope in latent space, and q_rope [T, heads, rope] rotated."""
    return absorb(q_nope, kv_b), rotary(q_rope, cos, sin)


def attended_values(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query: int,
    max_context: int,
    scale: float,
    kv_b: PreparedWeight,
    v: int,
) -> None:
    """One after the other."""


def values_from_latent(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
    """Attended latents [T, heads, latent] to values [T, heads, v], by each head's last `v` rows of kv_b."""
    w_uv = _by_head(kv_b, attended.shape[1])[:, -v:]
    return torch.einsum("thl,hvl->thv", attended.float(), w_uv).to(attended.dtype)


def latent_entries(kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """What the cache holds for each token: the normed latent and the rotated key, [T, latent + rope].

    kv: [T, latent + rope], kv_a_proj's output.  weight: [latent], the norm's.  cos, sin: FP32 [T, rope / 2].
    """
    latent, rope = kv.split([weight.shape[0], kv.shape[1] - weight.shape[0]], -1)
    return torch.cat((rms_norm(latent, weight, eps), rotary(rope.unsqueeze(1), cos, sin).squeeze(1)), -1)


def store_entries(cache: Tensor, slots: Tensor, entries: Tensor) -> None:
    """Write entries [T, width] at their slots int64 [T] of cache [blocks, block_size, width]; FP8 saturates at 448."""
    if cache.dtype == torch.float8_e4m3fn:
        entries = entries.float().clamp(-448.0, 448.0).to(cache.dtype)
        cache.view(torch.uint8).flatten(0, 1)[slots] = entries.view(torch.uint8)
    else:
        cache.flatten(0, 1)[slots] = entries.to(cache.dtype)


def store_latents(
    cache: Tensor, slots: Tensor, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """The latents' entries, written at their slots and returned: [T, latent + rope]."""
    entries = latent_entries(kv, weight, eps, cos, sin)
    store_entries(cache, slots, entries)
    return entries


def absorb_and_store(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_b: PreparedWeight,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`absorbed_queries`, and `store_latents` of kv [T, latent + rope] by norm [latent]."""
    store_latents(cache, slots, kv, norm, eps, cos, sin)
    return absorbed_queries(q_nope, q_rope, kv_b, cos, sin)


def _by_head(weight: PreparedWeight, heads: int) -> Tensor:
    """FP32 values [heads, out / heads, in]."""
    return torch.cat([dequantized(part) for part in weight.data], -2).unflatten(0, (heads, -1))


def _future(length: int, context: int, device: torch.device) -> Tensor:
    """True where a key lies after the query: [length, context]."""
    return torch.ones(length, context, dtype=torch.bool, device=device).triu(context - length + 1)
