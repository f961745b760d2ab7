"""Gated MLPs on NVFP4 tiles: the routed experts, the shared one, the dense layers."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED, kernel, together
from deepseek_fp4_plugin.kernels.cuda.linear import MANY_ROWS, gated, launch, linear, rounded_input
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB, SLAB_BYTES, Tiles
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

_FEW_CHOICES = 512  # tokens times k; the kernels' lists hold as many
_SLICES = 4  # so many times as many are computed one list after the other
_ONE_LAUNCH = 4  # tokens whose experts' second products and sum are one launch; more share experts' weights


def experts_mlp(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight
) -> Tensor:
    """See kernels/reference/moe.py; rounded where it rounds. Many tokens take its loop, on these products.

    Up to `_SLICES` lists of choices it waits for nothing that the device computes, so that graphs hold it.
    """
    tiles: Tiles = gate_up.data
    tokens, k = expert_ids.shape
    if tokens * k > _SLICES * _FEW_CHOICES or k > _FEW_CHOICES or not tiles.half or down.out_features % 8:
        return reference.experts_mlp(x, expert_ids, expert_weights, gate_up, down)
    if tokens * k > _FEW_CHOICES:
        few = _FEW_CHOICES // k
        parts = zip(x.split(few), expert_ids.split(few), expert_weights.split(few), strict=True)
        return torch.cat([experts_mlp(rows, ids, weights, gate_up, down) for rows, ids, weights in parts])
    together(x, expert_ids, expert_weights, tiles.data, down.data.data)
    x = rounded_input(x, gate_up)
    ids, weights = expert_ids.to(torch.int64).contiguous(), expert_weights.float().contiguous()
    h = torch.empty(ids.numel(), tiles.half, dtype=torch.bfloat16, device=x.device)
    if not h.numel():
        return torch.zeros_like(x)
    launch(x, tiles, 0, h, gate_up.out_features, True, ids)
    h = rounded_input(h, down)
    if ids.shape[0] <= _ONE_LAUNCH and _down_groups(ids.shape[1], down.in_features):
        return _down_and_sum(h, ids, weights, down)
    outputs = torch.empty(ids.numel(), down.out_features, dtype=torch.bfloat16, device=x.device)
    launch(h, down.data, 0, outputs, down.out_features, False, ids, early=True)
    return _sum(outputs, ids, weights)


def _sum(outputs: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """y[t] = sum over k of weight[t, k] * outputs[t * k + k], where the id is not below 0."""
    tokens, k = ids.shape
    y = torch.empty(tokens, outputs.shape[1], dtype=torch.bfloat16, device=outputs.device)
    kernel("combine.cu", "combine", "4P2i", (), y.device.index)(
        (-(-y.shape[1] // 1024), tokens, 1),
        128,
        0,
        outputs.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        y.data_ptr(),
        y.shape[1],
        k,
    )
    return y


def _down_and_sum(h: Tensor, ids: Tensor, weights: Tensor, down: PreparedWeight) -> Tensor:
    """y[t] = sum over k of weight[t, k] * down_e h[t * k + k] in one launch, token by token.

    Must follow the kernel that made h, and that kernel's wait for the ids: their weights are asked for before it ends.
    """
    tiles: Tiles = down.data
    tokens, k = ids.shape
    y = torch.empty(tokens, down.out_features, dtype=torch.bfloat16, device=h.device)
    groups = _down_groups(k, down.in_features)
    kernel("nvfp4_experts_down.cu", "nvfp4_experts_down", "6P7i", (("GROUPS", groups),), h.device.index)(
        (-(-tiles.groups // groups), tokens, 1),
        32 * k,
        k * groups * tiles.slabs * SLAB_BYTES,
        tiles.data.data_ptr(),
        tiles.row_scale.data_ptr(),
        h.data_ptr(),
        y.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
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
