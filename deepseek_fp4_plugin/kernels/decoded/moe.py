"""The routed experts without a word from the device."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.decoded.linear import products
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

# Up to so many tokens of 8 experts each, nearly all of 256 experts are wanted, and reading their weights is the cost.
_EVERY_EXPERT = 64


def experts_mlp(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight
) -> Tensor:
    """See kernels/reference/moe.py. On a GPU few tokens see every expert, in one batched product, because to count
    each one's tokens the host would wait for the device; many are dealt out, which is worth the wait, but for a step
    that is being captured, where nobody can wait."""
    if x.is_cpu or (x.shape[0] > _EVERY_EXPERT and not torch.cuda.is_current_stream_capturing()):
        return reference.experts_mlp(x, expert_ids, expert_weights, gate_up, down)
    experts = gate_up.data.values.shape[0]
    gate, up = products(x.expand(experts, *x.shape), gate_up).chunk(2, -1)
    outputs = products(torch.nn.functional.silu(gate) * up, down).float()  # [E, T, hidden]
    chosen = expert_ids == torch.arange(experts, device=x.device).view(-1, 1, 1)  # [E, T, k]
    weights = (expert_weights * chosen).sum(-1, keepdim=True)
    return torch.where(chosen.any(-1, keepdim=True), outputs * weights, 0.0).sum(0).to(x.dtype)
