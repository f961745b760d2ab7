"""One rank of DeepSeek-R1 without a checkpoint and without the other ranks: random weights of exact shapes made on the
device, and a group whose other members are absent."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.weights import PreparedWeight, WeightTensors
from deepseek_fp4_plugin.layers.weight_source import IN, UNCUT, Cut, WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.inventory import Weight, weights
from deepseek_fp4_plugin.parallel.collectives import Separate
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization.plan import becomes_nvfp4

BF16 = torch.bfloat16
_E2M1_RMS = 2.93  # of a random code's value
_SCALES = 48, 64  # random bytes of block scales, 0.5 to 2: about 1.2


class Absent(Separate):
    """A group that is this rank alone: nothing is sent, nothing is waited for.

    What others would have sent is random and made once; the sum of all ranks' parts is this rank's. So a step costs
    what it costs here, communication left out, and every tensor has the shape that it has among all.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self._others: dict[tuple, Tensor] = {}

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

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


class RandomWeights(WeightSource):
    """Hands layers random weights in the formats of the published checkpoint; outputs are about as large as inputs.

    On the device `meta` there are shapes alone, multiplied by `Shapes`.
    """

    def __init__(self, config: DeepseekV3Config, layout: str, device: torch.device, mesh: Mesh):
        self.config, self.layout, self.device, self.mesh, self.dtype = config, layout, device, mesh, BF16
        self.inventory = {weight.name: weight for weight in weights(config)}
        self.asked: list[str] = []

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None, cut: Cut = UNCUT) -> Tensor:
        own = self._cut(name, tuple(shape), cut)
        if len(own) == 1:
            return (torch.zeros if dtype else torch.ones)(own, dtype=dtype or BF16, device=self.device)
        scale = 1.0 if "embed_tokens" in name else own[1] ** -0.5
        return torch.empty(own, dtype=dtype or BF16, device=self.device).normal_(0.0, scale)

    def linear(
        self,
        modules: Sequence[str],
        out_features: Sequence[int],
        in_features: int,
        cut: Cut,
        activations: object = None,
    ) -> PreparedWeight:
        shapes = [
            self._cut(f"{module}.weight", (out, in_features), cut)
            for module, out in zip(modules, out_features, strict=True)
        ]
        return self._prepare([self._part(self.inventory[f"{modules[0]}.weight"], shape) for shape in shapes])

    def experts(
        self,
        prefix: str,
        projections: Sequence[str],
        experts: Sequence[int],
        total: int,
        sizes: tuple[int, int],
        cut: Cut,
    ) -> PreparedWeight:
        parts = []
        for projection in projections:
            names = [f"{prefix}.{expert}.{projection}.weight" for expert in experts]
            own = {self._cut(name, sizes, cut) for name in names}
            parts.append(self._part(self.inventory[names[0]], (len(names), *own.pop())))
        return self._prepare(parts)

    def _cut(self, name: str, shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
        """The shape of this rank's slice; a name or shape that the model does not have raises."""
        if self.inventory[name].shape != shape:
            raise ValueError(f"{name} is {list(self.inventory[name].shape)}, a layer asks for {list(shape)}")
        self.asked.append(name)
        start, stop = cut.shard.bounds(shape[cut.axis], name)
        own = list(shape)
        own[cut.axis] = stop - start
        if cut.axis == IN and own[IN] % 16:
            raise ValueError(f"{name}: {own[IN]} inputs are no whole NVFP4 blocks")
        return tuple(own)

    def _part(self, weight: Weight, shape: tuple[int, ...]) -> WeightTensors:
        *lead, out, width = shape
        size = width**-0.5
        if not becomes_nvfp4(weight, self.config, self.layout):
            values = torch.empty(shape, dtype=BF16, device=self.device).normal_(0.0, size)
            return WeightTensors(WeightFormat.PLAIN, values)
        packed = torch.empty(*lead, out, width // 2, dtype=torch.uint8, device=self.device).random_()
        scale = torch.empty(*lead, out, width // 16, dtype=torch.uint8, device=self.device).random_(*_SCALES)
        scale_2 = torch.full(lead, size / _E2M1_RMS / 1.2, device=self.device)
        return WeightTensors(WeightFormat.NVFP4, packed, scale.view(torch.float8_e4m3fn), scale_2)

    def _prepare(self, parts: Sequence[WeightTensors], activations: object = None) -> PreparedWeight:
        if self.device.type != "meta":
            return ops.prepare(parts, self.device, BF16)
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
    def values_from_latent(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
        tokens, heads, latent = attended.shape
        _same((latent, kv_b.out_features % heads), (kv_b.in_features, 0))
        return attended.new_empty(tokens, heads, v)


def _same(given: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(given) != tuple(wanted):
        raise ValueError(f"shape {list(given)} where {list(wanted)} is wanted")
