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
    for expert, (tokens, weights) in enumerate(by_expert(expert_ids, expert_weights)):
        if len(tokens):
            add_expert(y, x, tokens, weights, gate_up, down, expert, observe)
    return y.to(x.dtype)


def by_expert(expert_ids: Tensor, expert_weights: Tensor, experts: int = 0) -> list[tuple[Tensor, Tensor]]:
    """For each expert the tokens that chose it, ascending, and their weights. Arguments as of `experts_mlp`.

    experts: the length of the list; 0 ends it with the last expert that was chosen.
    """
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat[flat >= 0], minlength=experts).tolist()
    slots = order[flat.shape[0] - sum(counts) :].split(counts)
    return [(own // expert_ids.shape[1], expert_weights.flatten()[own]) for own in slots]


def add_expert(
    y: Tensor,
    x: Tensor,
    tokens: Tensor,
    weights: Tensor,
    gate_up: PreparedWeight,
    down: PreparedWeight,
    expert: int | None = None,
    observe: Observe | None = None,
) -> None:
    """One expert's part of `experts_mlp`, onto y, FP32 [T, hidden]: experts that come in their order make one sum.

    expert: which of a stack; None for weights that are one expert's, which `observe` knows as 0.
    """
    rows = x[tokens]
    gate, up = gate_up.backend.linear(rows, gate_up, expert).chunk(2, -1)
    hidden = torch.nn.functional.silu(gate) * up
    if observe:
        observe("gate_up", expert or 0, rows)
        observe("down", expert or 0, hidden)
    output = down.backend.linear(hidden, down, expert).float() * weights.unsqueeze(-1)
    y.index_add_(0, tokens, output)
