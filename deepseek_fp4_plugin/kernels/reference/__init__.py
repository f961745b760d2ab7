"""Plain torch for every operation, written to be read: keeps the checkpoint's bytes, decodes in FP32 on every call."""

from deepseek_fp4_plugin.kernels.reference.argmax import argmax
from deepseek_fp4_plugin.kernels.reference.attention import (
    absorb,
    absorb_and_store,
    absorbed_attention,
    absorbed_queries,
    attended_values,
    expanded_attention,
    latent_entries,
    store_entries,
    store_latents,
    values_from_latent,
)
from deepseek_fp4_plugin.kernels.reference.convert import convert_weight, weight_amax
from deepseek_fp4_plugin.kernels.reference.elementwise import add, concat
from deepseek_fp4_plugin.kernels.reference.embedding import embedding
from deepseek_fp4_plugin.kernels.reference.linear import (
    build_ahead,
    decoded,
    linear,
    linear_pair,
    norm_linear,
    plain_linear,
    prepare,
)
from deepseek_fp4_plugin.kernels.reference.moe import add_expert, by_expert, experts_mlp, gated_mlp
from deepseek_fp4_plugin.kernels.reference.norm import add_rms_norm, rms_norm
from deepseek_fp4_plugin.kernels.reference.rotary import cos_sin, rotary
from deepseek_fp4_plugin.kernels.reference.routing import local_ids, placed_router, prepare_router, route, router
from deepseek_fp4_plugin.kernels.reference.step import step_inputs

__all__ = [
    "absorb",
    "absorb_and_store",
    "absorbed_attention",
    "absorbed_queries",
    "add",
    "add_expert",
    "add_rms_norm",
    "argmax",
    "attended_values",
    "build_ahead",
    "by_expert",
    "concat",
    "convert_weight",
    "cos_sin",
    "decoded",
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
