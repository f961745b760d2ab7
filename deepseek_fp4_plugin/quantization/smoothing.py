"""Smoothing through the norm before an MLP: loud channels made quieter, and the weights that read them louder.

A block of 16 inputs or weights shares one scale, so that a channel far above its neighbours costs them their precision.
The norm's weight is divided by a factor a channel, and the columns of what reads its output (gate and up of every MLP
of the layer, the router) are multiplied by it. Factors are powers of two: what is edited loses no bit, the router's
scores stay what they were, and the model computes the same until its weights are rounded.

The result's MANIFEST lists what was edited. Runtimes need not know of it; whoever compares with the source does.
Source of the idea: SmoothQuant, arXiv 2211.10438.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import read_json

MANIFEST = "smoothing.json"
STRENGTH = 0.25  # of a channel's distance from the median one, in octaves
LARGEST = 8  # octaves that a channel is moved at most
_EXPERT = re.compile(r"\.experts\.\d+\.")
_READER = re.compile(r"(.*\.layers\.\d+)\.mlp\.(gate|(experts\.\d+\.|shared_experts\.)?(gate|up)_proj)")


class Channels:
    """What the channels of a norm's output were, over all rows."""

    def __init__(self, width: int, device: torch.device):
        self._squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._amax = torch.zeros(width, device=device)

    def add(self, rows: Tensor) -> None:
        """rows: [n, width]."""
        self._squares += rows.float().square().sum(0, dtype=torch.float64)
        self._amax = torch.maximum(self._amax, rows.abs().amax(0).float())

    def exponents(self) -> list[int]:
        """Of each channel the power of two by which it is to be divided. A channel that was always zero stays."""
        octaves = self._squares.cpu().log2() / 2
        used = octaves.isfinite()
        if not used.any():
            return [0] * len(octaves)
        distance = STRENGTH * (octaves - octaves[used].median())
        return torch.where(used, distance, 0.0).round().clamp(-LARGEST, LARGEST).int().tolist()

    def smoothed_amax(self) -> float:
        """The largest magnitude of all, once divided."""
        return float((self._amax.cpu() * torch.exp2(-torch.tensor(self.exponents()).float())).amax())


class Smoothing:
    """exponents: norm's module -> the power of two of each channel."""

    def __init__(self, exponents: Mapping[str, list[int]]):
        self.exponents = dict(exponents)

    def edits(self, module: str) -> bool:
        return module in self.exponents or _norm_before(module) in self.exponents

    def applied(self, module: str, values: Tensor) -> Tensor:
        """`values` [..., channels] of a module's weight as they are in the smoothed model; others as they are."""
        if module in self.exponents:
            return values * self._factor(module, -1, values)
        if _norm_before(module) in self.exponents:
            return values * self._factor(_norm_before(module), 1, values)
        return values

    def divided(self, norm: str, x: Tensor) -> Tensor:
        """What comes of a norm, x [n, channels], in the smoothed model."""
        return x * self._factor(norm, -1, x)

    def of_inputs(self, module: str, x: Tensor) -> Tensor:
        """The source's inputs x [n, channels] of a module as the smoothed model's module sees them."""
        norm = _norm_before(module)
        return self.divided(norm, x) if norm in self.exponents else x

    def _factor(self, norm: str, sign: int, like: Tensor) -> Tensor:
        return torch.exp2(sign * torch.tensor(self.exponents[norm], dtype=torch.float32)).to(like.device, like.dtype)

    def manifest(self, modules: Iterable[str]) -> str:
        """The manifest's text.  modules: of the whole checkpoint; all experts' are listed as one pattern."""
        multiplied: dict[str, dict[str, None]] = {norm: {} for norm in self.exponents}
        for module in modules:
            if (norm := _norm_before(module)) in multiplied:
                multiplied[norm][_EXPERT.sub(".experts.*.", module) + ".weight"] = None
        layers = [
            json.dumps({"divided": f"{norm}.weight", "multiplied": list(names), "exponents": self.exponents[norm]})
            for norm, names in multiplied.items()
        ]
        about = (
            "Channel i of `divided` was divided, and column i of every `multiplied` multiplied, by 2 ** exponents[i]."
        )
        return f'{{"about": {json.dumps(about)},\n"layers": [\n' + ",\n".join(layers) + "\n]}\n"


def norm_of(layer: int) -> str:
    """The module of the norm before a layer's MLP."""
    return f"model.layers.{layer}.post_attention_layernorm"


def read_smoothing(folder: Path) -> Smoothing:
    """Of a checkpoint: that of its manifest, or none. Raises CheckpointError where the file is no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        return Smoothing({})
    try:
        layers = read_json(path)["layers"]
        return Smoothing({layer["divided"].removesuffix(".weight"): layer["exponents"] for layer in layers})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not what --smooth writes ({type(error).__name__}: {error})") from None


def _norm_before(module: str) -> str:
    found = _READER.fullmatch(module)
    return f"{found[1]}.post_attention_layernorm" if found else ""
