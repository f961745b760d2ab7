"""Mixture of experts: FP32 router, routed experts, shared expert."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.recording import beside, cut
from deepseek_fp4_plugin.kernels.reference.moe import Observe
from deepseek_fp4_plugin.kernels.weights import PreparedRouter, PreparedWeight
from deepseek_fp4_plugin.layers.exchange import all_gather, reduce_scatter
from deepseek_fp4_plugin.layers.mlp import GatedMLP
from deepseek_fp4_plugin.layers.weight_source import IN, OUT, Cut, WeightSource
from deepseek_fp4_plugin.parallel.mesh import Mesh

_BESIDE = 16  # tokens up to which neither the routed experts nor the shared one fill a GPU


class Router(nn.Module):
    """Scores experts in FP32 and picks each token's top k (see `ops.route`)."""

    weight: PreparedRouter

    def __init__(self, name: str, config):
        super().__init__()
        self.name, self.config = name, config

    def load(self, source: WeightSource, changed: Callable[[str, Tensor], Tensor] = lambda _, weight: weight) -> None:
        """changed(name, weight): what the source's weight is to be."""
        experts, hidden = self.config.n_routed_experts, self.config.hidden_size
        weight = source.tensor(f"{self.name}.weight", (experts, hidden), torch.float32)
        bias = source.tensor(f"{self.name}.e_score_correction_bias", (experts,), torch.float32)
        self.weight = ops.prepare_router(changed(self.name, weight), bias, source.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, hidden] to expert ids int64 [T, k] and weights FP32 [T, k]."""
        return ops.router(x, self.weight, *self._choice)

    def placed(self, x: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same, and the ids' slots where the choice finds them, too."""
        found = None if slots is None else ops.placed_router(x, self.weight, slots, *self._choice)
        return found or (*self(x), None)

    @property
    def _choice(self) -> tuple[int, int, int, bool, float]:
        c = self.config
        return c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob, c.routed_scaling_factor


class RoutedExperts(nn.Module):
    """This rank's experts, stacked. Output is a partial sum over all ranks."""

    gate_up: PreparedWeight
    down: PreparedWeight

    def __init__(self, name: str, layer: int, config, mesh: Mesh):
        super().__init__()
        self.name, self.config, self.mesh = name, config, mesh
        self.local = mesh.experts(layer, config.n_routed_experts)
        self.replicas = mesh.placement.replicas(layer, mesh.ep.index) if mesh.placement else None
        self.slots = torch.full((config.n_routed_experts,), -1)  # of each expert, where it is here once
        self.slots[torch.tensor(self.local)] = torch.arange(len(self.local))
        self.observer: Observe | None = None

    def load(self, source: WeightSource) -> None:
        hidden, inner, total = self.config.hidden_size, self.config.moe_intermediate_size, self.config.n_routed_experts
        shard = self.mesh.moe_tp
        self.gate_up = source.experts(
            self.name, ("gate_proj", "up_proj"), self.local, total, (inner, hidden), Cut(OUT, shard)
        )
        self.down = source.experts(self.name, ("down_proj",), self.local, total, (hidden, inner), Cut(IN, shard))

    def table(self, device: torch.device) -> Tensor | None:
        """The slots that ids become; None where all experts are here, or replicas take turns."""
        if len(self.local) == self.config.n_routed_experts or self.replicas is not None:
            return None
        self.slots = self.slots.to(device)
        return self.slots

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, places: Tensor | None = None) -> Tensor:
        """places: the ids' slots, where the router has found them."""
        if places is not None:
            ids = places
        elif len(self.local) < self.config.n_routed_experts or self.replicas is not None:
            (ids,) = cut(self._slots, ids)
        return ops.experts_mlp(x, ids, weights, self.gate_up, self.down, self.observer)

    def _slots(self, ids: Tensor) -> tuple[Tensor]:
        """Where this rank's stack holds each expert, -1 for another rank's. Replicas take turns at a batch's tokens."""
        if self.replicas is None:
            self.slots = self.slots.to(ids.device)
            return (ops.local_ids(ids, self.slots),)
        slots, counts = self.replicas = self.replicas[0].to(ids.device), self.replicas[1].to(ids.device)
        turn = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
        return (slots[ids, turn % counts[ids]],)


class MoE(nn.Module):
    """Routed plus shared experts. Output is a partial sum over the tensor-parallel ranks.

    Under attention data parallelism every rank's tokens meet all routed experts, wherever these are: they are gathered
    before, and each rank gets the sum of its own tokens' outputs after. The shared expert stays with its tokens.
    """

    def __init__(self, name: str, layer: int, config, mesh: Mesh):
        super().__init__()
        self.layer, self.mesh = layer, mesh
        self.load_count: Tensor | None = None  # int64 [experts]: tokens that chose each since counting began
        self.gate = Router(f"{name}.gate", config)
        self.experts = RoutedExperts(f"{name}.experts", layer, config, mesh)
        self.shared_experts = None
        if config.n_shared_experts:
            inner = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = GatedMLP(f"{name}.shared_experts", config.hidden_size, inner, mesh)

    def load(self, source: WeightSource) -> None:
        self.gate.load(source)
        self.experts.load(source)
        if self.shared_experts:
            self.shared_experts.load(source)

    def parts(self, x: Tensor, dp_tokens: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor | None]:
        """[T, hidden] to the routed experts' sum and the shared expert's output, to be added: [T, hidden] each.

        dp_tokens: see ForwardBatch. Ranks without a token take part.
        """
        group = self.mesh.dp_group
        if group.size > 1 and dp_tokens is None:
            raise ValueError("attention data parallelism needs every rank's token count in the batch's dp_tokens")
        if not self.shared_experts:
            return self._routed(x, dp_tokens), None
        shared = self.shared_experts
        if x.shape[0] > _BESIDE:
            return self._routed(x, dp_tokens), shared(x)
        return beside(x.device, lambda: self._routed(x, dp_tokens), lambda: shared(x))

    def _routed(self, x: Tensor, dp_tokens: tuple[int, ...] | None) -> Tensor:
        group = self.mesh.dp_group
        tokens = all_gather(group, x, dp_tokens)
        ids, weights, places = self.gate.placed(tokens, self.experts.table(x.device))
        if self.load_count is not None:
            cut(self._count, ids)
        return reduce_scatter(group, self.experts(tokens, ids, weights, places), dp_tokens)

    def _count(self, ids: Tensor) -> tuple[()]:
        assert self.load_count is not None
        chosen = ids.flatten()
        self.load_count.index_add_(0, chosen, torch.ones_like(chosen))
        return ()
