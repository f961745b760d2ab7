"""Observers of a decoder layer: the largest magnitudes that its projections saw, and that its cache would hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.reference.moe import Observe
from deepseek_fp4_plugin.layers.linear import Linear
from deepseek_fp4_plugin.layers.mla import MLA
from deepseek_fp4_plugin.layers.moe import RoutedExperts
from deepseek_fp4_plugin.models.decoder import DeepseekV3DecoderLayer

_EXPERT_INPUTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def cache_module(attention: str) -> str:
    """Under what name is kept what an attention's cache would hold."""
    return f"{attention}.kv_cache"


@dataclass
class LayerAmax:
    """What one decoder layer's projections saw.

    amax: module name -> largest |input|, FP32 as a float.  rows: module name -> input rows seen.
    An expert's modules are in it only if the expert got tokens.
    exponents: norm -> those of smoothing.py, where a run smooths; the amax is then that of smoothed inputs.
    """

    amax: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    exponents: dict[str, list[int]] = field(default_factory=dict)

    def merge(self, other: "LayerAmax") -> "LayerAmax":
        """What both saw together (batches, or ranks): the larger amax, the sum of the rows."""
        names = [*self.amax, *(name for name in other.amax if name not in self.amax)]
        return LayerAmax(
            {name: max(self.amax.get(name, 0.0), other.amax.get(name, 0.0)) for name in names},
            {name: self.rows.get(name, 0) + other.rows.get(name, 0) for name in names},
            self.exponents | other.exponents,
        )

    def to_json(self) -> dict[str, Any]:
        smoothed = {"exponents": self.exponents} if self.exponents else {}
        return {"amax": self.amax, "rows": self.rows, **smoothed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LayerAmax":
        return cls(dict(content["amax"]), dict(content["rows"]), dict(content.get("exponents", {})))


class LayerObserver:
    """Hangs itself on every linear of a layer, attention's and experts' included; read `result()` at the end.

    The running maxima stay on the device, so that observing does not wait for it.
    """

    def __init__(self, layer: DeepseekV3DecoderLayer):
        self._seen: dict[str, tuple[Tensor, int]] = {}
        for part in layer.modules():
            if isinstance(part, Linear):
                part.observer = self._of_linear(part.modules_named)
            elif isinstance(part, RoutedExperts):
                part.observer = self.of_experts(part.name, part.local)
            elif isinstance(part, MLA):
                part.observer = self._of_linear([cache_module(part.name)])

    def result(self) -> LayerAmax:
        """Raises ValueError naming a projection whose input was not finite."""
        found = LayerAmax()
        for name, (amax, rows) in self._seen.items():
            value = float(amax)
            if not value < float("inf"):
                raise ValueError(f"calibration: the input of {name} became NaN or infinite")
            found.amax[name], found.rows[name] = value, rows
        return found

    def _of_linear(self, modules: Sequence[str]):
        return lambda x: self._record(modules, x)

    def of_experts(self, prefix: str, local: Sequence[int]) -> Observe:
        """What sees the inputs of experts `<prefix>.<local[i]>`, for each i that a kernel calls an expert by."""

        def observe(projection: str, expert: int, rows: Tensor) -> None:
            self._record([f"{prefix}.{local[expert]}.{name}" for name in _EXPERT_INPUTS[projection]], rows)

        return observe

    def _record(self, modules: Sequence[str], x: Tensor) -> None:
        if not x.shape[0]:
            return
        amax = x.abs().amax().float()
        for module in modules:
            before, rows = self._seen.get(module, (amax, 0))
            self._seen[module] = torch.maximum(before, amax), rows + x.shape[0]
