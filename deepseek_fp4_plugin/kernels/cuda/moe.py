"""Gated MLPs on NVFP4 tiles: the routed experts, the shared one, the dense layers."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import decoded, reference
from deepseek_fp4_plugin.kernels.cuda import experts_wgmma
from deepseek_fp4_plugin.kernels.cuda.experts import expected_rows, grouped, listed
from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED, kernel, together
from deepseek_fp4_plugin.kernels.cuda.linear import gated, geometry, launch, linear, rounded_input
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB, SLAB_BYTES, Tiles
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

_ONE_LAUNCH = 4  # tokens whose experts' second products and sum are one launch; more share experts' weights
# Rows of an expert on average above which Hopper's matrix unit is ahead; elsewhere, decoding every expert.
LISTED_ROWS_HOPPER, LISTED_ROWS = 5, 128
_MAX_EXPERTS = 512  # of a list


def experts_mlp(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight
) -> Tensor:
    """See kernels/reference/moe.py; rounded where it rounds. It waits for nothing that the device computes, so that
    graphs hold it.
    """
    if gate_up.format is not down.format:
        return reference.experts_mlp(x, expert_ids, expert_weights, gate_up, down)
    if not isinstance(gate_up.data, Tiles):
        return decoded.experts_mlp(x, expert_ids, expert_weights, gate_up, down)
    tiles = gate_up.data
    (tokens, k), experts = expert_ids.shape, tiles.data.shape[0]
    if not tiles.half or tiles.half % 8 or down.out_features % 8 or experts > _MAX_EXPERTS:
        return reference.experts_mlp(x, expert_ids, expert_weights, gate_up, down)
    if not tokens * k:
        return torch.zeros_like(x)
    together(x, expert_ids, expert_weights, tiles.data, down.data.data)
    ids, weights = expert_ids.to(torch.int64).contiguous(), expert_weights.float().contiguous()
    if tokens <= _ONE_LAUNCH and _down_groups(k, down.in_features):
        h = torch.empty(ids.numel(), tiles.half, dtype=torch.bfloat16, device=x.device)
        # Of the choices as many as are here on average fill the multiprocessors; blocks of the others end at once.
        here = max(2, round(expected_rows(tokens, k, experts) * experts))
        cut = geometry(tiles.groups, tiles.slabs, 1, here)
        launch(rounded_input(x, gate_up), tiles, 0, h, gate_up.out_features, True, ids, cut)
        return _down_and_sum(rounded_input(h, down), ids, weights, down)
    rows, hopper = expected_rows(tokens, k, experts), experts_wgmma.available(x.device.index)
    # Which of two FP4 numbers a hidden value becomes follows from its last bit; the others round it differently.
    if rows <= (LISTED_ROWS_HOPPER if hopper else LISTED_ROWS) or down.activations == "fp4":
        return listed(x, ids, weights, gate_up, down)
    if hopper:
        return experts_wgmma.by_blocks(x, ids, weights, gate_up, down, experts_wgmma.blocks_for(rows))
    return grouped(x, ids, weights, gate_up, down)


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
    """See kernels/reference/moe.py; rounded where it rounds."""
    if not isinstance(gate_up.data, Tiles) or not gate_up.data.half:
        return reference.gated_mlp(x, gate_up, down)
    return linear(gated(x, gate_up), down)
