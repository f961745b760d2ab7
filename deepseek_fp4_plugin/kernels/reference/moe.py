"""The routed experts' gated MLP, one expert after the other."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.weights import PreparedWeight

Observe = Callable[[str, int, Tensor], None]


def gated_mlp(x: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
    """down(silu(gate x) * up x): x [rows, hidden] to [rows, hidden]."""
    gate, up = gate_up.backend.linear(x, gate_up).chunk(2, -1)
    return down.backend.linear(torch.nn.functional.silu(gate) * up, down)


def experts_mlp(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: PreparedWeight,
    down: PreparedWeight,
    observe: Observe | None = None,
) -> Tensor:
    """y[t] = sum over k of weight[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]), e = expert_ids[t, k].

    x: [T, hidden].  expert_ids: [T, k] local expert numbers, -1 for one that is not here.  expert_weights: [T, k] FP32.
    Sums in FP32, in order of expert number.  Returns [T, hidden] in x's dtype.
    observe(projection, expert, rows) sees the input rows of "gate_up" and "down" of each expert that got tokens.
    """
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    add_experts(y, x, expert_ids, expert_weights, gate_up, down, observe)
    return y.to(x.dtype)


def add_experts(
    y: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: PreparedWeight,
    down: PreparedWeight,
    observe: Observe | None = None,
) -> None:
    """The sum of `experts_mlp` onto y, FP32 [T, hidden]: experts that come in groups make one sum, in their order."""
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat[flat >= 0], minlength=1).tolist()
    start = int((flat < 0).sum())
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        slots = order[start : start + count]
        start += count
        tokens = slots // expert_ids.shape[1]
        rows = x[tokens]
        gate, up = gate_up.backend.linear(rows, gate_up, expert).chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up
        if observe:
            observe("gate_up", expert, rows)
            observe("down", expert, hidden)
        output = down.backend.linear(hidden, down, expert).float() * expert_weights.flatten()[slots].unsqueeze(-1)
        y.index_add_(0, tokens, output)
