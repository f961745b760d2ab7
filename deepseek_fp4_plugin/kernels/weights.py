"""What goes into a kernel's weight preparation, and the opaque thing that comes out."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat

Activations = Literal["bf16", "fp4"]
OptionalTensor = Any  # a Tensor; None where the weight's format has none, which `format` says


@dataclass(frozen=True)
class WeightTensors:
    """One projection as the checkpoint stores it, possibly a slice, possibly stacked over experts (leading axis E).

    weight: [(E,) out, in] PLAIN or FP8_BLOCK, uint8 [(E,) out, in / 2] NVFP4.
    scale: FP8_BLOCK weight_scale_inv [(E,) out / block, in / block]; NVFP4 weight_scale E4M3 [(E,) out, in / 16].
    scale_2: NVFP4 weight_scale_2, FP32 [] or [E].  input_scale: FP32 [] or None (weight-only checkpoints).
    fp8_block: rows and columns of a scale block; smaller than 128 when a slice cuts through blocks.
    """

    format: WeightFormat
    weight: Tensor
    scale: OptionalTensor = None
    scale_2: OptionalTensor = None
    input_scale: OptionalTensor = None
    fp8_block: tuple[int, int] = (128, 128)

    @property
    def out_features(self) -> int:
        return self.weight.shape[-2]

    @property
    def in_features(self) -> int:
        return self.weight.shape[-1] * (2 if self.format is WeightFormat.NVFP4 else 1)


@dataclass(frozen=True)
class PreparedWeight:
    """A weight in the layout of the backend that will multiply by it; `data` is that backend's own.

    dtype: the activations' dtype.  activations: "fp4" rounds the input to NVFP4 with `input_scale` before multiplying.
    """

    backend: ModuleType
    format: WeightFormat
    out_features: int
    in_features: int
    dtype: torch.dtype
    activations: Activations
    input_scale: OptionalTensor
    data: Any
