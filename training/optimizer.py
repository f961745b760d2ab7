"""Muon for matrices, AdamW for the rest. Sources: Keller Jordan's Muon (2024); update size as in arXiv 2502.16982."""

import torch
from torch import Tensor, nn

from training.model import Model

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalized(update: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix of [..., out, in], in BF16 on a GPU."""
    a, b, c = _NEWTON_SCHULZ
    x = update.bfloat16() if update.is_cuda else update
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; matrices of equal shape go through Newton-Schulz together."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(tuple(p.shape), []).append(p)
            for shape, members in by_shape.items():
                self._update(members, shape, group)

    def _update(self, members: list[nn.Parameter], shape: tuple[int, ...], group: dict) -> None:
        momentum = group["momentum"]
        for p in members:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in members]
        gradients = [p.grad for p in members]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, buffers, momentum)
        updates = orthogonalized(torch.stack(directions))
        size = 0.2 * max(shape[-2:]) ** 0.5
        torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(members, list(updates.float().unbind(0)), alpha=-group["lr"] * size)


def optimizers(model: Model, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the decoder layers' matrices, AdamW for embedding, head, router and norms."""
    others = {id(model.embed_tokens), id(model.lm_head)}
    others |= {id(p) for name, p in model.named_parameters() if name.endswith(".gate") or p.ndim < 2}
    matrices = [p for p in model.parameters() if id(p) not in others]
    rest = [p for p in model.parameters() if id(p) in others]
    fused = rest[0].device.type == "cuda"
    return [
        Muon(matrices, matrix_lr),
        torch.optim.AdamW(rest, other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
    ]
