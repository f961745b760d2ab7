"""Absorbed attention over the paged latent cache, and the steps around it."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16
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
    tokens, heads, latent = q_latent.shape
    if not cache.is_contiguous():
        raise ValueError(f"one layer's latent cache must be contiguous; strides are {cache.stride()}")
    output = torch.empty(tokens, heads, latent, dtype=torch.bfloat16)
    native.attention(
        q_latent.data_ptr(),
        q_latent.stride()[:2],
        q_rope.data_ptr(),
        q_rope.stride()[:2],
        (heads, latent, q_rope.shape[2]),
        cache.data_ptr(),
        fp8,
        cache.shape[1],
        block_tables.data_ptr(),
        block_tables.stride(0),
        context_lens.shape[0],
        query_start.contiguous().data_ptr(),
        context_lens.contiguous().data_ptr(),
        scale,
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output


def absorb(q_nope: Tensor, kv_b: PreparedWeight) -> Tensor:
    """See kernels/reference/attention.py; on the checkpoint's bytes."""
    return _per_head(native.absorb, q_nope, kv_b, 0, q_nope.shape[2], kv_b.in_features)


def values_from_latent(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
    """See kernels/reference/attention.py; on the checkpoint's bytes."""
    first = kv_b.out_features // attended.shape[1] - v
    return _per_head(native.per_head, attended, kv_b, first, v, v)


def latent_entries(kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See kernels/reference/attention.py; BF16."""
    require_bf16(kv, weight)
    kv = kv if kv.stride(1) == 1 else kv.contiguous()
    tokens, width = kv.shape
    latent = weight.shape[0]
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(tokens, width, dtype=torch.bfloat16)
    native.latent_entries(
        kv.data_ptr(),
        kv.stride(0),
        tokens,
        latent,
        width - latent,
        weight.data_ptr(),
        eps,
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
    )
    return y


def store_entries(cache: Tensor, slots: Tensor, entries: Tensor) -> None:
    """See kernels/reference/attention.py; BF16 entries into a BF16 or FP8 cache."""
    fp8 = cache.dtype is torch.float8_e4m3fn
    require_bf16(entries, *([] if fp8 else [cache]))
    if not cache.is_contiguous():
        raise ValueError(f"one layer's latent cache must be contiguous; strides are {cache.stride()}")
    entries, slots = entries.contiguous(), slots.contiguous()
    native.store_entries(entries.data_ptr(), *entries.shape, slots.data_ptr(), cache.data_ptr(), fp8)


def _per_head(kernel, x: Tensor, kv_b: PreparedWeight, first: int, rows: int, out: int) -> Tensor:
    if x.dtype is not torch.bfloat16 or kv_b.activations == "fp4":
        raise ValueError(f"per-head products take BF16 activations, not {x.dtype} or FP4")
    x = x if x.stride(2) == 1 else x.contiguous()
    tokens, heads, width = x.shape
    each = kv_b.out_features // heads
    if heads * each != kv_b.out_features or not 0 <= first <= each - rows or width not in (rows, kv_b.in_features):
        raise ValueError(f"{heads} heads of width {width} do not fit kv_b [{kv_b.out_features}, {kv_b.in_features}]")
    y = torch.empty(tokens, heads, out, dtype=torch.bfloat16)
    kernel(
        kv_b.data.handle,
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        tokens,
        heads,
        first,
        rows,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
