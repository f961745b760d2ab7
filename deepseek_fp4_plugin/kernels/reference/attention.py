"""Multi-head latent attention's two forms: expanded heads over one request, absorbed heads over a paged cache."""

import torch
from torch import Tensor


def expanded_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of one request's newest tokens over its whole context.

    q: [T, heads, d].  k: [S, heads, d] and v: [S, heads, dv], S >= T; query t sees keys 0 .. S - T + t.
    Scores and softmax FP32.  Returns [T, heads, dv] in q's dtype.
    """
    scores = torch.einsum("thd,shd->hts", q.float(), k.float()) * scale
    scores = scores.masked_fill(_future(q.shape[0], k.shape[0], q.device), float("-inf"))
    return torch.einsum("hts,shv->thv", scores.softmax(-1), v.float()).to(q.dtype)


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


def _future(length: int, context: int, device: torch.device) -> Tensor:
    """True where a key lies after the query: [length, context]."""
    return torch.ones(length, context, dtype=torch.bool, device=device).triu(context - length + 1)
