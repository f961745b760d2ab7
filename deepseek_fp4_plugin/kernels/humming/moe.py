"""The routed experts: rows in the order of their experts, two grouped products, and back."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.humming.linear import product
from deepseek_fp4_plugin.kernels.weights import PreparedWeight


def experts_mlp(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight
) -> Tensor:
    """See kernels/reference/moe.py. Nothing waits for the device, so that a graph can hold it."""
    tokens, k = expert_ids.shape
    if tokens == 0:
        return torch.empty_like(x)
    experts = down.data.parts[0].num_experts
    ids = expert_ids.flatten()
    ids, order = torch.where(ids < 0, experts, ids).sort(stable=True)  # those that are elsewhere come last
    layout = torch.searchsorted(ids, torch.arange(experts + 1, device=x.device))
    here = (ids < experts).unsqueeze(1)
    gate, up = product(x.index_select(0, order // k), gate_up, layout).chunk(2, -1)
    hidden = torch.where(here, torch.nn.functional.silu(gate) * up, 0)
    outputs = product(hidden, down, layout).float() * expert_weights.flatten()[order].unsqueeze(1)
    outputs = torch.where(here, outputs, 0)
    placed = torch.empty_like(outputs).index_copy_(0, order, outputs)
    return placed.unflatten(0, (tokens, k)).sum(1).to(x.dtype)
