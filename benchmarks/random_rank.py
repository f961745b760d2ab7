"""One rank of DeepSeek-R1 without a checkpoint and without the other ranks: random weights of exact shapes, or shapes
alone, and a group whose other members are absent."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.weights import Activations, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.random_weights import RandomWeights
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization.plan import becomes_nvfp4

BF16 = torch.bfloat16


class Absent:
    """A group that is this rank alone: nothing is sent, nothing is waited for.

    What others would have sent is random and made once; the sum of all ranks' parts is this rank's. So a step costs
    what it costs here, communication left out, and every tensor has the shape that it has among all.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self._others: dict[tuple, Tensor] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def sum_and_norm(
        self, x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, hidden, weight, eps, other)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        sizes = [x.shape[0]] * self.size if sizes is None else list(sizes)
        before, after = sum(sizes[: self.rank]), sum(sizes[self.rank + 1 :])
        key = (before + after, *x.shape[1:], x.dtype)
        others = self._others.get(key)
        if others is None:
            others = torch.randn(*key[:-1], device=x.device).to(x.dtype)
            # FP32 are each rank's best logits with their tokens: numbers of tokens, then.
            self._others[key] = others = others.abs() if x.dtype is torch.float32 else others
        return torch.cat((others[:before], x, others[before:]))

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        own = x.shape[0] // self.size if sizes is None else sizes[self.rank]
        start = self.rank * own if sizes is None else sum(sizes[: self.rank])
        return x[start : start + own]

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        return x


class RandomRank(RandomWeights):
    """Random weights in a published checkpoint's formats; on the device `meta` shapes alone, multiplied by `Shapes`."""

    def __init__(
        self,
        config: DeepseekV3Config,
        layout: str,
        device: torch.device,
        mesh: Mesh,
        activations: Activations = "bf16",
    ):
        super().__init__(config, lambda weight: becomes_nvfp4(weight, config, layout), device, BF16, mesh, activations)

    def _prepare(self, parts: Sequence[WeightTensors], activations: Activations | None = None) -> PreparedWeight:
        if self.device.type != "meta":
            return super()._prepare(parts, activations)
        out, first = sum(part.out_features for part in parts), parts[0]
        return PreparedWeight(Shapes, first.format, out, first.in_features, BF16, "bf16", None, first.weight.shape[:-2])


class Shapes:
    """A backend of weights without values: every product checks the shapes that meet and gives its result's."""

    @staticmethod
    def linear(x: Tensor, weight: PreparedWeight) -> Tensor:
        _same(x.shape, (x.shape[0], weight.in_features))
        return x.new_empty(x.shape[0], weight.out_features)

    @staticmethod
    def gated_mlp(x: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
        gate, _ = Shapes.linear(x, gate_up).chunk(2, -1)
        return Shapes.linear(gate, down)

    @staticmethod
    def experts_mlp(x: Tensor, ids: Tensor, weights: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
        _same(ids.shape, weights.shape)
        _same(ids.shape[:1], x.shape[:1])
        _same(gate_up.data, down.data)  # as many experts
        return Shapes.gated_mlp(x, gate_up, down)

    @staticmethod
    def absorb(q_nope: Tensor, kv_b: PreparedWeight) -> Tensor:
        tokens, heads, _ = q_nope.shape
        assert kv_b.out_features % heads == 0
        return q_nope.new_empty(tokens, heads, kv_b.in_features)

    @staticmethod
    def linear_pair(x: Tensor, first: PreparedWeight, second: PreparedWeight) -> tuple[Tensor, Tensor]:
        return Shapes.linear(x, first), Shapes.linear(x, second)

    @staticmethod
    def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: PreparedWeight) -> Tensor:
        return Shapes.linear(x, weight)

    @staticmethod
    def absorbed_queries(
        q_nope: Tensor, q_rope: Tensor, kv_b: PreparedWeight, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        _same(cos.shape, (q_rope.shape[0], q_rope.shape[2] // 2))
        return Shapes.absorb(q_nope, kv_b), torch.empty_like(q_rope)

    @staticmethod
    def absorb_and_store(
        q_nope: Tensor,
        q_rope: Tensor,
        kv_b: PreparedWeight,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
        kv: Tensor,
        norm: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        _same(kv.shape, (len(slots), norm.shape[0] + q_rope.shape[2]))
        return Shapes.absorbed_queries(q_nope, q_rope, kv_b, cos, sin)

    @staticmethod
    def values_from_latent(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
        tokens, heads, latent = attended.shape
        _same((latent, kv_b.out_features % heads), (kv_b.in_features, 0))
        return attended.new_empty(tokens, heads, v)


def _same(given: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(given) != tuple(wanted):
        raise ValueError(f"shape {list(given)} where {list(wanted)} is wanted")
