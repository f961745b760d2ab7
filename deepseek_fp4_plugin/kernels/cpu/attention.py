"""Absorbed attention over the paged latent cache, and the steps around it."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.addresses import dense, rows
from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16
from deepseek_fp4_plugin.kernels.cpu.rotary import rotary
from deepseek_fp4_plugin.kernels.weights import PreparedWeight


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
    """See kernels/reference/attention.py. Scores and sums FP32, probabilities BF16; cache in BF16 or FP8.

    A query's result does not depend on the other queries, on those behind it in its request, or on threads.
    """
    fp8 = cache.dtype is torch.float8_e4m3fn
    require_bf16(q_latent, q_rope, *([] if fp8 else [cache]))
    q_latent = q_latent if q_latent.stride(2) == 1 else q_latent.contiguous()
    q_rope = q_rope if q_rope.stride(2) == 1 else q_rope.contiguous()
    block_tables = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
    query_start, context_lens = query_start.contiguous(), context_lens.contiguous()
    tokens, heads, latent = q_latent.shape
    rope, (blocks, block_size, _) = q_rope.shape[2], cache.shape
    requests, columns = context_lens.shape[0], block_tables.shape[1]
    if query_start.shape[0] <= requests:
        raise ValueError(f"query_start has {query_start.shape[0]} values for {requests} requests; it needs one more")
    output = torch.empty(tokens, heads, latent, dtype=torch.bfloat16)
    native.attention(
        rows("q_latent", q_latent, torch.bfloat16, tokens, heads, latent),
        q_latent.stride()[:2],
        rows("q_rope", q_rope, torch.bfloat16, tokens, heads, rope),
        q_rope.stride()[:2],
        (heads, latent, rope),
        dense("one layer's latent cache", cache, cache.dtype, blocks, block_size, latent + rope),
        fp8,
        blocks,
        block_size,
        rows("block_tables", block_tables, torch.int64, requests, columns),
        block_tables.stride(0),
        columns,
        tokens,
        requests,
        dense("query_start", query_start, torch.int64, query_start.shape[0]),
        dense("context_lens", context_lens, torch.int64, requests),
        scale,
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output


def absorb(q_nope: Tensor, kv_b: PreparedWeight) -> Tensor:
    """See kernels/reference/attention.py; on the checkpoint's bytes."""
    nope = q_nope.shape[2]
    return _per_head(native.absorb, q_nope, kv_b, 0, nope, nope, kv_b.in_features)


def absorbed_queries(
    q_nope: Tensor, q_rope: Tensor, kv_b: PreparedWeight, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/attention.py."""
    return absorb(q_nope, kv_b), rotary(q_rope, cos, sin)


def values_from_latent(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
    """See kernels/reference/attention.py; on the checkpoint's bytes."""
    first = kv_b.out_features // attended.shape[1] - v
    return _per_head(native.per_head, attended, kv_b, first, v, kv_b.in_features, v)


def latent_entries(kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See kernels/reference/attention.py; BF16."""
    require_bf16(kv, weight)
    kv = kv if kv.stride(1) == 1 else kv.contiguous()
    tokens, width = kv.shape
    latent = weight.shape[0]
    rope = width - latent
    if rope < 0 or rope % 2:
        raise ValueError(f"entries of {width} values are no latents of {latent} and pairs to turn")
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(tokens, width, dtype=torch.bfloat16)
    native.latent_entries(
        rows("kv", kv, torch.bfloat16, tokens, width),
        kv.stride(0),
        tokens,
        latent,
        rope,
        dense("the norm's weight", weight, torch.bfloat16, latent),
        eps,
        dense("cos", cos, torch.float32, tokens, rope // 2),
        dense("sin", sin, torch.float32, tokens, rope // 2),
        y.data_ptr(),
    )
    return y


def store_entries(cache: Tensor, slots: Tensor, entries: Tensor) -> None:
    """See kernels/reference/attention.py; BF16 entries into a BF16 or FP8 cache."""
    fp8 = cache.dtype is torch.float8_e4m3fn
    require_bf16(entries, *([] if fp8 else [cache]))
    entries, slots = entries.contiguous(), slots.contiguous()
    tokens, (blocks, block_size, width) = entries.shape[0], cache.shape
    native.store_entries(
        dense("the entries", entries, torch.bfloat16, tokens, width),
        tokens,
        width,
        dense("the slots", slots, torch.int64, tokens),
        blocks * block_size,
        dense("one layer's latent cache", cache, cache.dtype, blocks, block_size, width),
        fp8,
    )


def store_latents(
    cache: Tensor, slots: Tensor, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """See kernels/reference/attention.py."""
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
    """See kernels/reference/attention.py."""
    store_latents(cache, slots, kv, norm, eps, cos, sin)
    return absorbed_queries(q_nope, q_rope, kv_b, cos, sin)


def _per_head(kernel, x: Tensor, kv_b: PreparedWeight, first: int, taken: int, width: int, out: int) -> Tensor:
    """Products by `taken` rows of every head from its `first` on: x [tokens, heads, width] to [tokens, heads, out]."""
    if x.dtype is not torch.bfloat16 or kv_b.activations != "bf16":
        raise ValueError(f"per-head products take BF16 activations, not {x.dtype} or FP4")
    x = x if x.stride(2) == 1 else x.contiguous()
    tokens, heads = x.shape[:2]
    each = kv_b.out_features // heads
    if heads * each != kv_b.out_features or not 0 <= first <= each - taken:
        raise ValueError(
            f"{taken} rows of each of {heads} heads do not fit kv_b [{kv_b.out_features}, {kv_b.in_features}]"
        )
    y = torch.empty(tokens, heads, out, dtype=torch.bfloat16)
    kernel(
        kv_b.data.handle,
        rows("x", x, torch.bfloat16, tokens, heads, width),
        x.stride(0),
        x.stride(1),
        tokens,
        heads,
        first,
        taken,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
