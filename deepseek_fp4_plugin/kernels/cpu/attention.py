"""Absorbed attention over the paged latent cache."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import decoded
from deepseek_fp4_plugin.kernels.cpu.extension import native


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
    """See kernels/reference/attention.py. Scores and sums FP32, probabilities BF16; other dtypes take another path.

    A query's result does not depend on the other queries, on those behind it in its request, or on threads.
    """
    fp8 = cache.dtype is torch.float8_e4m3fn
    if q_latent.dtype is not torch.bfloat16 or not (fp8 or cache.dtype is torch.bfloat16):
        return decoded.absorbed_attention(
            q_latent, q_rope, cache, block_tables, query_start, context_lens, max_query, max_context, scale
        )
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
