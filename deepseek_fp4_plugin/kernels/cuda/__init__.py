"""Kernels for NVIDIA GPUs of compute capability 9.0 and 10.0; see docs/cuda_kernels.md.

CUDA C++ in `source/`, compiled by NVRTC at first use. What it has no kernel for yet comes from `decoded` and
`reference`, by name, below.
"""

from deepseek_fp4_plugin.kernels.cuda.argmax import argmax
from deepseek_fp4_plugin.kernels.cuda.attention import (
    absorb,
    absorb_and_store,
    absorbed_attention,
    absorbed_queries,
    attended_values,
    store_entries,
    values_from_latent,
)
from deepseek_fp4_plugin.kernels.cuda.launcher import available
from deepseek_fp4_plugin.kernels.cuda.limits import NOT_INSTALLED, refuses
from deepseek_fp4_plugin.kernels.cuda.linear import build_ahead, linear, linear_pair, norm_linear, prepare
from deepseek_fp4_plugin.kernels.cuda.moe import experts_mlp, gated_mlp
from deepseek_fp4_plugin.kernels.cuda.norm import add, add_rms_norm, latent_entries, rms_norm, store_latents
from deepseek_fp4_plugin.kernels.cuda.rotary import cos_sin, rotary
from deepseek_fp4_plugin.kernels.cuda.routing import local_ids, placed_router, prepare_router, route, router
from deepseek_fp4_plugin.kernels.cuda.step import step_inputs
from deepseek_fp4_plugin.kernels.decoded import expanded_attention
from deepseek_fp4_plugin.kernels.reference import (
    concat,
    convert_weight,
    embedding,
    plain_linear,
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
