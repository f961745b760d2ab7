"""Weights decoded once at load, then the platform's own matrix product.

The portable fast path: any device torch runs on. NVFP4 values times their block scales have at most 6 significand
bits, so they are exact in BF16; the tensor scale multiplies the result. It costs 3.6 times NVFP4's bytes in memory.
"""

from deepseek_fp4_plugin.kernels.decoded.attention import (
    absorb,
    absorb_and_store,
    absorbed_attention,
    absorbed_queries,
    expanded_attention,
    values_from_latent,
)
from deepseek_fp4_plugin.kernels.decoded.linear import linear, norm_linear, prepare
from deepseek_fp4_plugin.kernels.decoded.moe import experts_mlp
from deepseek_fp4_plugin.kernels.reference import (
    add,
    add_rms_norm,
    argmax,
    attended_values,
    build_ahead,
    concat,
    convert_weight,
    cos_sin,
    embedding,
    gated_mlp,
    latent_entries,
    linear_pair,
    local_ids,
    placed_router,
    plain_linear,
    prepare_router,
    rms_norm,
    rotary,
    route,
    router,
    step_inputs,
    store_entries,
    store_latents,
    weight_amax,
)

__all__ = [
    "absorb",
    "absorb_and_store",
    "absorbed_attention",
    "absorbed_queries",
    "add",
    "add_rms_norm",
    "argmax",
    "attended_values",
    "build_ahead",
    "concat",
    "convert_weight",
    "cos_sin",
    "embedding",
    "expanded_attention",
    "experts_mlp",
    "gated_mlp",
    "latent_entries",
    "linear",
    "linear_pair",
    "local_ids",
    "norm_linear",
    "placed_router",
    "plain_linear",
    "prepare",
    "prepare_router",
    "rms_norm",
    "rotary",
    "route",
    "router",
    "step_inputs",
    "store_entries",
    "store_latents",
    "values_from_latent",
    "weight_amax",
]
