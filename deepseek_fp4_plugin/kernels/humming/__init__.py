"""NVFP4 weights on any NVIDIA GPU of compute capability 8.0 and more, by the humming-kernels package where installed.

Where this project has kernels of its own they come first. What has no NVFP4 weight is `decoded`'s and `reference`'s.
"""

from deepseek_fp4_plugin.kernels.decoded import absorbed_attention, expanded_attention
from deepseek_fp4_plugin.kernels.humming.limits import NOT_INSTALLED, available, refuses
from deepseek_fp4_plugin.kernels.humming.linear import linear, norm_linear, prepare
from deepseek_fp4_plugin.kernels.humming.moe import experts_mlp
from deepseek_fp4_plugin.kernels.humming.per_head import (
    absorb,
    absorb_and_store,
    absorbed_queries,
    values_from_latent,
)
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
    "NOT_INSTALLED",
    "absorb",
    "absorb_and_store",
    "absorbed_attention",
    "absorbed_queries",
    "add",
    "add_rms_norm",
    "argmax",
    "attended_values",
    "available",
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
    "refuses",
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
