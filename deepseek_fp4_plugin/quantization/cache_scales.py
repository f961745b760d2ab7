"""Scales of a cache in FP8, one a layer: what is cached divided by it stays below E4M3's largest value.

Without them a latent is stored as it is, which saturates at 448. A scale here is a power of two, so that it changes no
rounding of what is neither too large nor too small, and leaves room for latents HEADROOM times as large as calibration
saw. There is one latent for keys and values, so that both of a layer's scales are equal. Runtimes read them by these
names; TensorRT-LLM's MLA keeps 1.0 whatever is there.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics.nvfp4 import E4M3_MAX
from deepseek_fp4_plugin.quantization.observer import LayerAmax, cache_module

HEADROOM = 4.0
_NAMES = {"modelopt": ("k_proj.k_scale", "v_proj.v_scale"), "compressed-tensors": ("k_scale", "v_scale")}


def cache_scale_names(format: str) -> Callable[[int], list[str]]:
    """Layer -> the tensors that hold its scale.  format: as in `quantize`."""
    return lambda layer: [f"{_attention(layer)}.{name}" for name in _NAMES[format]]


def cache_scale(seen: LayerAmax, layer: int) -> Tensor:
    """FP32 []; 1 for a layer whose latents were all zero. Raises ValueError where nobody looked at them."""
    module = cache_module(_attention(layer))
    if module not in seen.amax:
        raise ValueError(f"the calibration does not say how large the latents of layer {layer} are; calibrate on text")
    least = HEADROOM * seen.amax[module] / E4M3_MAX
    return torch.tensor(2.0 ** math.ceil(math.log2(least)) if least > 0 else 1.0)


def _attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"
