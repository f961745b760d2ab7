"""Gated MLPs on NVFP4 tiles: the routed experts, the shared one, the dense layers."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import decoded, reference
from deepseek_fp4_plugin.kernels.cuda import experts_wgmma, matvec
from deepseek_fp4_plugin.kernels.cuda.experts import combine, expected_rows, grouped, listed
from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED, kernel, together
from deepseek_fp4_plugin.kernels.cuda.linear import gated, linear, rounded_input
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB_BYTES, Tiles
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

_FEW_TOKENS, _FEW_CHOICES = 4, 16  # of a token; more tokens share experts' weights
_LONG_SLABS = 8  # inputs of a second product that several warps share; of fewer product and sum are one launch
_DOWN_WARPS = 24  # of these launches, that a multiprocessor holds
# Rows of an expert on average above which Hopper's matrix unit is ahead; elsewhere, decoding every expert.
LISTED_ROWS_HOPPER, LISTED_ROWS = 7, 128
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
    if few_tokens(tokens, k, down.data.slabs):
        return _few_tokens(x, ids, weights, gate_up, down)
    rows, hopper = expected_rows(tokens, k, experts), experts_wgmma.available(x.device.index)
    # Which of two FP4 numbers a hidden value becomes follows from its last bit; the others round it differently.
    if rows <= (LISTED_ROWS_HOPPER if hopper else LISTED_ROWS) or down.activations == "fp4":
        return listed(x, ids, weights, gate_up, down)
    if hopper:
        cut = experts_wgmma.blocks_for(rows, gate_up.activations)
        return experts_wgmma.by_blocks(x, ids, weights, gate_up, down, cut)
    return grouped(x, ids, weights, gate_up, down)


def few_tokens(tokens: int, k: int, slabs: int) -> bool:
    """Whether no list is made.  slabs: of a second product; where they are many, a list is ahead from two tokens on."""
    return tokens <= (_FEW_TOKENS if slabs < _LONG_SLABS else 1) and k <= _FEW_CHOICES


def _few_tokens(x: Tensor, ids: Tensor, weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
    """As `experts.listed`, without a list: choices of the same expert find each other."""
    tiles: Tiles = gate_up.data
    (tokens, k), experts = ids.shape, tiles.data.shape[0]
    # Of the choices as many as are here on average fill the multiprocessors; blocks of the others end at once.
    here = max(2, round(expected_rows(tokens, k, experts) * experts))
    h = torch.empty(ids.numel(), tiles.half, dtype=torch.bfloat16, device=x.device)
    cut = matvec.choose_experts(tiles.groups, tiles.slabs, here, ids.numel())
    matvec.launch(rounded_input(x, gate_up), tiles, 0, h, gate_up.out_features, True, cut, ids)
    h, tiles = rounded_input(h, down), down.data
    if tiles.slabs < _LONG_SLABS:
        return _down_and_sum(h, ids, weights, down)
    outputs = torch.empty(ids.numel(), down.out_features, dtype=torch.bfloat16, device=x.device)
    cut = matvec.choose_experts(tiles.groups, tiles.slabs, here, ids.numel())
    matvec.launch(h, tiles, 0, outputs, down.out_features, False, cut, ids)
    return combine(outputs, ids, weights)


def _down_and_sum(h: Tensor, ids: Tensor, weights: Tensor, down: PreparedWeight) -> Tensor:
    """y[t] = sum over k of weight[t, k] * down_e h[t * k + k] in one launch, token by token.

    Must follow the kernel that made h, and that kernel's wait for the ids: their weights are asked for before it ends.
    """
    tiles: Tiles = down.data
    tokens, k = ids.shape
    y = torch.empty(tokens, down.out_features, dtype=torch.bfloat16, device=h.device)
    groups = _down_groups(k, tiles.slabs)
    defines = ("GROUPS", groups), ("WARPS", k), ("MIN_BLOCKS", max(1, _DOWN_WARPS // k))
    kernel("nvfp4_experts_down.cu", "nvfp4_experts_down", "6P7i", defines, h.device.index)(
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


def _down_groups(k: int, slabs: int) -> int:
    """Groups of outputs that a block of `k` experts' warps has room for."""
    return min(2, MAX_SHARED // (k * slabs * SLAB_BYTES))


def gated_mlp(x: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
    """See kernels/reference/moe.py; rounded where it rounds."""
    if not isinstance(gate_up.data, Tiles) or not gate_up.data.half:
        return reference.gated_mlp(x, gate_up, down)
    return linear(gated(x, gate_up), down)
