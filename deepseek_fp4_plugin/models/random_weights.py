"""Random weights of a model's exact shapes, made where they are used: for measuring what no disk here holds.

A whole weight is the same on every rank. A slice is drawn from the weight's name and the slice's place, so another
mapping has other weights. Outputs are about as large as inputs, and block scales stay between 0.5 and 2, so that values
stay finite through any number of layers.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.weights import Activations, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.layers.weight_source import IN, UNCUT, Cut, WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.inventory import Weight, weights
from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK
from deepseek_fp4_plugin.parallel.mesh import Mesh

LoadFormat = Literal["auto", "dummy"]
_E2M1_RMS = 2.93  # of a random code's value
_SCALES = 48, 64  # random bytes of block scales, 0.5 to 2: about 1.2
_INPUT_SCALE = 10 / (6 * 448)  # for activations of up to 10


class RandomWeights(WeightSource):
    """Hands layers random weights. is_nvfp4: which linears are NVFP4; everything else is unquantized."""

    def __init__(
        self,
        config: DeepseekV3Config,
        is_nvfp4: Callable[[Weight], bool],
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        mesh: Mesh | None = None,
        activations: Activations = "bf16",
        backend: str | None = None,
    ):
        self.device, self.dtype, self.mesh = device, dtype, mesh or Mesh()
        self.activations, self.backend = activations, backend
        self.is_nvfp4, self.not_finite = is_nvfp4, []
        self.inventory = {weight.name: weight for weight in weights(config)}
        self.asked: list[str] = []

    def close(self) -> None:
        pass  # no file is open

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None, cut: Cut = UNCUT) -> Tensor:
        own = self._cut(name, tuple(shape), cut)
        if len(own) == 1:
            return (torch.zeros if dtype else torch.ones)(own, dtype=dtype or self.dtype, device=self.device)
        # What a layer wants in FP32, its router, is BF16 in published checkpoints as everything else.
        values = self._normal(name, own, 1.0 if "embed_tokens" in name else own[1] ** -0.5, self.dtype, cut)
        return values if dtype is None else values.to(dtype)

    def cache_scale(self, attention: str) -> float:
        return 1.0

    def linear(
        self,
        modules: Sequence[str],
        out_features: Sequence[int],
        in_features: int,
        cut: Cut,
        activations: Activations | None = None,
    ) -> PreparedWeight:
        names = [f"{module}.weight" for module in modules]
        shapes = [self._cut(name, (out, in_features), cut) for name, out in zip(names, out_features, strict=True)]
        return self._prepare([self._part(*part, cut) for part in zip(names, shapes, strict=True)], activations)

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
            (own,) = {self._cut(name, sizes, cut) for name in names}
            parts.append(self._part(names[0], (len(names), *own), cut))
        return self._prepare(parts)

    def _cut(self, name: str, shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
        """The shape of this rank's slice; a name or shape that the model does not have raises."""
        if self.inventory[name].shape != shape:
            raise ValueError(f"{name} is {list(self.inventory[name].shape)}, a layer asks for {list(shape)}")
        self.asked.append(name)
        start, stop = cut.shard.bounds(shape[cut.axis], name)
        own = list(shape)
        own[cut.axis] = stop - start
        if cut.axis == IN and own[IN] % BLOCK:
            raise ValueError(f"{name}: {own[IN]} inputs are no whole NVFP4 blocks")
        return tuple(own)

    def _part(self, name: str, shape: tuple[int, ...], cut: Cut) -> WeightTensors:
        *lead, out, width = shape
        size = width**-0.5
        if not self.is_nvfp4(self.inventory[name]):
            return WeightTensors(WeightFormat.PLAIN, self._normal(name, shape, size, self.dtype, cut))
        draws = self._draws(name, cut)
        packed = torch.empty(*lead, out, width // 2, dtype=torch.uint8, device=self.device)
        packed.view(torch.int64).random_(-(2**63), None, generator=draws)  # eight bytes a number
        scale = torch.empty(*lead, out, width // BLOCK, dtype=torch.uint8, device=self.device)
        scale.random_(*_SCALES, generator=draws)
        scale_2 = torch.full(lead, size / _E2M1_RMS / 1.2, device=self.device)
        input_scale = torch.tensor(_INPUT_SCALE, device=self.device)
        return WeightTensors(WeightFormat.NVFP4, packed, scale.view(torch.float8_e4m3fn), scale_2, input_scale)

    def _normal(self, name: str, shape: tuple[int, ...], size: float, dtype: torch.dtype, cut: Cut) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=self.device)
        return values.normal_(0.0, size, generator=self._draws(name, cut))

    def _draws(self, name: str, cut: Cut) -> torch.Generator | None:
        """Of this slice of this weight, on whatever rank; None where there are no values to draw."""
        if self.device.type == "meta":
            return None
        return torch.Generator(self.device).manual_seed(zlib.crc32(f"{name} {cut.shard.index}".encode()))

    def _prepare(self, parts: Sequence[WeightTensors], activations: Activations | None = None) -> PreparedWeight:
        return ops.prepare(parts, self.device, self.dtype, activations or self.activations, self.backend)
