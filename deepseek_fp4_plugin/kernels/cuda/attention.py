"""Absorbed latent attention: the per-head products around it."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.linear import decode
from deepseek_fp4_plugin.kernels.cuda.tiles import VALUE_SCALE
from deepseek_fp4_plugin.kernels.weights import PreparedWeight


def absorb(q_nope: Tensor, kv_b: PreparedWeight) -> Tensor:
    """See kernels/reference/attention.py; an NVFP4 kv_b is decoded on every call, no published checkpoint has one."""
    w_uk = _by_head(kv_b, q_nope.shape[1])[:, : q_nope.shape[2]]
    return _scaled(torch.einsum("thn,hnl->thl", q_nope, w_uk), kv_b)


def values_from_latent(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
    """See kernels/reference/attention.py."""
    w_uv = _by_head(kv_b, attended.shape[1])[:, -v:]
    return _scaled(torch.einsum("thl,hvl->thv", attended, w_uv), kv_b)


def _by_head(kv_b: PreparedWeight, heads: int) -> Tensor:
    values = decode(kv_b.data, 0, kv_b.out_features, kv_b.in_features)
    return values.unflatten(0, (heads, -1))


def _scaled(y: Tensor, kv_b: PreparedWeight) -> Tensor:
    """One projection has one tensor scale. Values are off by a power of two, which costs no bits."""
    return (y.float() * (kv_b.data.scales[0][0] * VALUE_SCALE)).to(y.dtype)
