"""Gated MLPs in one call: the routed experts, the shared one, the dense layers."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cpu.addresses import dense
from deepseek_fp4_plugin.kernels.cpu.extension import native, platform_is_faster, require_bf16
from deepseek_fp4_plugin.kernels.recording import cut
from deepseek_fp4_plugin.kernels.weights import PreparedWeight


def experts_mlp(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: PreparedWeight,
    down: PreparedWeight,
) -> Tensor:
    """See kernels/reference/moe.py; the same rounding points."""
    require_bf16(x)
    ids, weights = expert_ids.to(torch.int64).contiguous(), expert_weights.float().contiguous()
    return _run(x.contiguous(), ids, weights, gate_up, down)


def gated_mlp(x: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
    """See kernels/reference/moe.py: the grouped kernel with one expert."""
    require_bf16(x)
    if gate_up.format is WeightFormat.PLAIN and platform_is_faster(x.shape[0]):
        return cut(lambda x: (reference.gated_mlp(x, gate_up, down),), x)[0]
    return _run(x.contiguous(), None, None, gate_up, down)


def _run(
    x: Tensor, ids: Tensor | None, weights: Tensor | None, gate_up: PreparedWeight, down: PreparedWeight
) -> Tensor:
    """Without ids every row goes to the only expert, with weight 1."""
    tokens, k = x.shape[0], 1 if ids is None else ids.shape[1]
    y = torch.empty(tokens, down.out_features, dtype=torch.bfloat16)
    native.experts(
        gate_up.data.handle,
        down.data.handle,
        dense("x", x, torch.bfloat16, tokens, gate_up.in_features),
        0 if ids is None else dense("the expert ids", ids, torch.int64, tokens, k),
        0 if weights is None else dense("the experts' weights", weights, torch.float32, tokens, k),
        tokens,
        k,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
