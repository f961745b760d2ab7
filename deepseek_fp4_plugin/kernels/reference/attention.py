"""Multi-head latent attention's two forms: expanded heads over one request, absorbed heads over a paged cache."""

import torch
from torch import Tensor


def expanded_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of one request's newest tokens over its whole context.

    q: [T, heads, d].  k: [S, heads, d] and v: [S, heads, dv], S >= T; query t sees keys 0 .. S - T + t.
    Scores and softmax FP32.  Returns [T, heads, dv] in q's dtype.
    """
    length, context = q.shape[0], k.shape[0]
    scores = torch.einsum("thd,shd->hts", q.float(), k.float()) * scale
    if length > 1:
        future = torch.ones(length, context, dtype=torch.bool, device=q.device).triu(context - length + 1)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("hts,shv->thv", scores.softmax(-1), v.float()).to(q.dtype)


def absorbed_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Attention of a few newest tokens of each request, in latent space.

    q_latent: [T, heads, latent], q_rope: [T, heads, rope].  cache: [blocks, block_size, latent + rope], the newest
    tokens' entries already in it.  block_tables: [R, B].  query_start: int [R + 1].  context_lens: int [R], the newest
    tokens included.  Returns [T, heads, latent] in q's dtype.
    """
    output = torch.empty_like(q_latent)
    latent = q_latent.shape[-1]
    starts, contexts = query_start.tolist(), context_lens.tolist()
    block_size = cache.shape[1]
    for request, context in enumerate(contexts):
        rows = slice(starts[request], starts[request + 1])
        blocks = block_tables[request, : -(-context // block_size)]
        entries = cache[blocks].flatten(0, 1)[:context].float()
        q = torch.cat((q_latent[rows], q_rope[rows]), -1).float()
        scores = torch.einsum("thd,sd->hts", q, entries) * scale
        length = q.shape[0]
        future = torch.ones(length, context, dtype=torch.bool, device=q.device).triu(context - length + 1)
        scores = scores.masked_fill(future, float("-inf"))
        output[rows] = torch.einsum("hts,sd->thd", scores.softmax(-1), entries[:, :latent]).to(output.dtype)
    return output
