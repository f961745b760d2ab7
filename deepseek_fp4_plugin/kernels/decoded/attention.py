"""Attention through the platform's batched matrix products."""

import contextlib

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepseek_fp4_plugin.kernels.reference.attention import store_latents
from deepseek_fp4_plugin.kernels.reference.rotary import rotary
from deepseek_fp4_plugin.kernels.spans import Spans
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

# cuDNN's attention is up to twice as fast as the others, but plans each new pair of query and context lengths, and
# hardly two prompts are alike: 45 to 100 ms where they are equal, a second where a mask is needed (H100, torch 2.11).
_UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_PLANNED_QUERIES = 4096  # without a mask, from here on the plan is the smaller part
_GATHERED = 1 << 18  # entries of the cache that are gathered at a time: gigabytes with their scores, not all of a GPU


def expanded_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Spans) -> Tensor:
    """See kernels/reference/attention.py; fused softmax, on a GPU all requests in one launch."""
    # Only with values as wide as keys does the platform take its fused path; unfused it holds every score in memory.
    width = v.shape[-1]
    v = torch.nn.functional.pad(v, (0, max(0, k.shape[-1] - width)))
    planned = len(spans.queries) == 1 and q.shape[0] == k.shape[0] >= _PLANNED_QUERIES
    if not planned and _at_once(q, v):
        from torch.nn.attention.varlen import varlen_attn  # brings torch's compiler along, which takes a while

        most = max(spans.queries), max(spans.contexts)
        # Queries are the last of what they see, and see nothing behind themselves.
        y = varlen_attn(q, k, v, spans.query_start, spans.context_start, *most, scale=scale, window_size=(-1, 0))
        assert isinstance(y, Tensor)
        return y[..., :width]
    outputs = [_of_one(q[own], k[seen], v[seen], scale)[..., :width] for own, seen in spans.rows()]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _at_once(q: Tensor, v: Tensor) -> bool:
    """Whether the platform has attention of several requests of different lengths."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[2] != v.shape[2]:
        return False
    return torch.cuda.get_device_capability(q.device)[0] >= 8 and q.shape[2] % 8 == 0 and q.shape[2] <= 256


def _of_one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Of one request; heads in front."""
    length, context = q.shape[0], k.shape[0]
    mask = None
    if 1 < length < context:
        mask = torch.ones(length, context, dtype=torch.bool, device=q.device).tril(context - length)
    # The platform's CPU kernel takes scores that are all NaN for a query without keys, and answers zeros.
    broken = None
    if q.device.type == "cpu":
        broken = ~q.isfinite().all(-1, keepdim=True) | k[context - length :].isnan().any(-1, keepdim=True)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    quick = q.device.type == "cuda" and (mask is not None or length < _PLANNED_QUERIES)
    with sdpa_kernel(_UNPLANNED) if quick else contextlib.nullcontext():
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=length == context and length > 1, scale=scale
        )
    output = output.squeeze(0).transpose(0, 1)
    return output if broken is None else output.masked_fill(broken, torch.nan)


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
    """See kernels/reference/attention.py; many requests at once, padded to the longest query and context."""
    requests, latent, block_size = context_lens.shape[0], q_latent.shape[-1], cache.shape[1]
    blocks = block_tables[:, : -(-max_context // block_size)]
    lengths = query_start.diff()
    q = torch.cat((q_latent, q_rope), -1)
    padded = q.shape[0] != requests * max_query
    row = torch.arange(max_query, device=q.device).expand(requests, -1)
    if padded:
        source = (query_start[:-1, None] + row).clamp(max=q.shape[0] - 1)
        q = q[source]
    else:
        q = q.unflatten(0, (requests, max_query))
    position = context_lens.unsqueeze(1) - lengths.unsqueeze(1) + row  # of each query
    each = max(1, _GATHERED // max(1, blocks.shape[1] * block_size))
    parts = zip(q.split(each), blocks.split(each), context_lens.split(each), position.split(each), strict=True)
    output = torch.cat([_gathered(*part, cache, latent, scale) for part in parts])
    if not padded:
        return output.flatten(0, 1)
    token = torch.arange(q_latent.shape[0], device=q.device)
    request = torch.searchsorted(query_start, token, right=True) - 1
    return output[request, token - query_start[request]]


def _gathered(
    q: Tensor, blocks: Tensor, context_lens: Tensor, position: Tensor, cache: Tensor, latent: int, scale: float
) -> Tensor:
    """Of some requests whose queries stand at `position` [R, Q].  q: [R, Q, heads, latent + rope]."""
    # A row of the block table past a request's blocks may hold anything: masked scores must not meet NaN values.
    key = torch.arange(blocks.shape[1] * cache.shape[1], device=cache.device)
    present = key < context_lens.unsqueeze(1)
    in_use = present[:, :: cache.shape[1]]
    raw = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
    entries = raw[torch.where(in_use, blocks, 0)].flatten(1, 2).view(cache.dtype).to(q.dtype)
    entries = entries.masked_fill(~present.unsqueeze(-1), 0)
    scores = (q.flatten(1, 2) @ entries.transpose(1, 2)).float() * scale  # [R, Q * heads, S]
    visible = key <= position.unsqueeze(-1)  # [R, Q, S]
    scores = scores.unflatten(1, q.shape[1:3]).masked_fill(~visible.unsqueeze(2), float("-inf"))
    weights = scores.softmax(-1).to(q.dtype).flatten(1, 2)
    return (weights @ entries[..., :latent]).unflatten(1, q.shape[1:3])


def absorb(q_nope: Tensor, kv_b: PreparedWeight) -> Tensor:
    """See kernels/reference/attention.py."""
    values, row_scale = kv_b.data.values, kv_b.data.row_scale
    w_uk = values.unflatten(0, (q_nope.shape[1], -1))[:, : q_nope.shape[2]]
    return _scaled(torch.einsum("thn,hnl->thl", q_nope, w_uk), row_scale)


def absorbed_queries(
    q_nope: Tensor, q_rope: Tensor, kv_b: PreparedWeight, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/attention.py."""
    return absorb(q_nope, kv_b), rotary(q_rope, cos, sin)


def values_from_latent(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
    """See kernels/reference/attention.py."""
    values, row_scale = kv_b.data.values, kv_b.data.row_scale
    w_uv = values.unflatten(0, (attended.shape[1], -1))[:, -v:]
    return _scaled(torch.einsum("thl,hvl->thv", attended, w_uv), row_scale)


def _scaled(y: Tensor, row_scale: Tensor | None) -> Tensor:
    """One projection has one tensor scale, so every row's is the first's."""
    return y if row_scale is None else (y * row_scale[0]).to(y.dtype)


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
    """See kernels/reference/attention.py."""
    store_latents(cache, slots, kv, norm, eps, cos, sin)
    return absorbed_queries(q_nope, q_rope, kv_b, cos, sin)
