"""Gated MLPs on NVFP4 tiles: the routed experts, the shared one, the dense layers."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED, kernel
from deepseek_fp4_plugin.kernels.cuda.linear import MANY_ROWS, gated, launch, linear, rounded_input
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB, SLAB_BYTES, Tiles
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

_FEW_CHOICES = 512  # tokens times k; the kernels' lists hold as many


def experts_mlp(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight
) -> Tensor:
    """See kernels/reference/moe.py; gate and up are not rounded before SiLU. Many tokens take the reference's loop over
    experts, on these products."""
    tiles: Tiles = gate_up.data
    few = expert_ids.numel() <= _FEW_CHOICES and _down_groups(expert_ids.shape[1], down.in_features) > 0
    if not few or not tiles.half:
        return reference.experts_mlp(x, expert_ids, expert_weights, gate_up, down)
    x = rounded_input(x, gate_up)
    ids, weights = expert_ids.to(torch.int64).contiguous(), expert_weights.float().contiguous()
    h = torch.empty(ids.numel(), tiles.half, dtype=torch.bfloat16, device=x.device)
    launch(x, tiles, 0, h, gate_up.out_features, True, ids)
    return combine(rounded_input(h, down), ids, weights, down)


def combine(h: Tensor, ids: Tensor, weights: Tensor, down: PreparedWeight, shared: Tensor | None = None) -> Tensor:
    """y[t] = sum over k of weight[t, k] * down_e h[t * k + k], and `shared` [T, out] where given.

    Must follow the kernel that made h: weights of `ids` are asked for before that one has ended.
    """
    tiles: Tiles = down.data
    tokens, k = ids.shape
    y = torch.empty(tokens, down.out_features, dtype=torch.bfloat16, device=h.device)
    if tokens == 0:
        return y
    groups = _down_groups(k, down.in_features)
    kernel("nvfp4_experts_down.cu", "nvfp4_experts_down", "7P7i", (("GROUPS", groups),), h.device.index)(
        (-(-tiles.groups // groups), tokens, 1),
        32 * k,
        k * groups * tiles.slabs * SLAB_BYTES,
        tiles.data.data_ptr(),
        tiles.row_scale.data_ptr(),
        h.data_ptr(),
        y.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        0 if shared is None else shared.data_ptr(),
        down.in_features,
        h.stride(0),
        y.stride(0),
        tiles.groups,
        tiles.slabs,
        down.out_features,
        k,
    )
    return y


def _down_groups(k: int, inner: int) -> int:
    """Groups of outputs that a block of `k` experts' warps has room for; 0 where there is no kernel."""
    each = k * -(-inner // SLAB) * SLAB_BYTES
    return 0 if k > 16 else min(2, MAX_SHARED // each)


def gated_mlp(x: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
    """See kernels/reference/moe.py; gate and up of few rows are not rounded before SiLU."""
    if x.shape[0] > MANY_ROWS or not gate_up.data.half:
        return reference.gated_mlp(x, gate_up, down)
    return linear(gated(x, gate_up), down)
