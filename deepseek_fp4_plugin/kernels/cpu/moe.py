"""The routed experts' gated MLP in one call."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cpu.extension import native
from deepseek_fp4_plugin.kernels.reference.moe import Observe
from deepseek_fp4_plugin.kernels.weights import PreparedWeight


def experts_mlp(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: PreparedWeight,
    down: PreparedWeight,
    observe: Observe | None = None,
) -> Tensor:
    """See kernels/reference/moe.py; the same rounding points."""
    if observe or down.backend is not gate_up.backend:
        return reference.experts_mlp(x, expert_ids, expert_weights, gate_up, down, observe)
    if x.dtype is not torch.bfloat16:
        raise ValueError(f"the CPU kernels multiply BF16 activations, not {x.dtype}")
    x, ids, weights = x.contiguous(), expert_ids.to(torch.int64).contiguous(), expert_weights.float().contiguous()
    y = torch.empty(x.shape[0], down.out_features, dtype=torch.bfloat16)
    native.experts(
        gate_up.data.handle,
        down.data.handle,
        x.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        *ids.shape,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
