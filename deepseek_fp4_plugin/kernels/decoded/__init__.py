"""Weights decoded once at load, then the platform's own matrix product.

The portable fast path: any device torch runs on. NVFP4 values times their block scales have at most 6 significand
bits, so they are exact in BF16; the tensor scale multiplies the result. It costs 3.6 times NVFP4's bytes in memory.
"""

from deepseek_fp4_plugin.kernels.decoded.attention import (
    absorb,
    absorbed_attention,
    expanded_attention,
    values_from_latent,
)
from deepseek_fp4_plugin.kernels.decoded.linear import linear, prepare
from deepseek_fp4_plugin.kernels.reference.moe import experts_mlp, gated_mlp

__all__ = [
    "absorb",
    "absorbed_attention",
    "expanded_attention",
    "experts_mlp",
    "gated_mlp",
    "linear",
    "prepare",
    "values_from_latent",
]
