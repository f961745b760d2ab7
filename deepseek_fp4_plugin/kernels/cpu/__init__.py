"""Native kernels for BF16 activations on a CPU. Weights stay the checkpoint's bytes; see docs/cpu_kernels.md.

`_native` is built from native/ when the package is installed with a C++ compiler at hand; without it `available()` is
False and kernels.select stays with the portable backends. Which instruction set runs is decided by the processor;
`use_path` overrides it in tests.
"""

from deepseek_fp4_plugin.kernels.cpu.argmax import argmax
from deepseek_fp4_plugin.kernels.cpu.attention import (
    absorb,
    absorb_and_store,
    absorbed_attention,
    absorbed_queries,
    latent_entries,
    store_entries,
    store_latents,
    values_from_latent,
)
from deepseek_fp4_plugin.kernels.cpu.convert import convert_weight, weight_amax
from deepseek_fp4_plugin.kernels.cpu.elementwise import add, concat
from deepseek_fp4_plugin.kernels.cpu.embedding import embedding
from deepseek_fp4_plugin.kernels.cpu.extension import NOT_BUILT, available, path, paths, use_path
from deepseek_fp4_plugin.kernels.cpu.limits import refuses
from deepseek_fp4_plugin.kernels.cpu.linear import linear, norm_linear, plain_linear, prepare
from deepseek_fp4_plugin.kernels.cpu.moe import experts_mlp, gated_mlp
from deepseek_fp4_plugin.kernels.cpu.norm import add_rms_norm, rms_norm
from deepseek_fp4_plugin.kernels.cpu.quantize import quantize_activation
from deepseek_fp4_plugin.kernels.cpu.recording import Recorder
from deepseek_fp4_plugin.kernels.cpu.rotary import cos_sin, rotary
from deepseek_fp4_plugin.kernels.cpu.routing import route, router
from deepseek_fp4_plugin.kernels.cpu.step import step_inputs
from deepseek_fp4_plugin.kernels.decoded.attention import expanded_attention
from deepseek_fp4_plugin.kernels.reference import build_ahead
from deepseek_fp4_plugin.kernels.reference.attention import attended_values
from deepseek_fp4_plugin.kernels.reference.linear import linear_pair
from deepseek_fp4_plugin.kernels.reference.routing import local_ids, placed_router, prepare_router

__all__ = [
    "NOT_BUILT",
    "Recorder",
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
    "path",
    "paths",
    "placed_router",
    "plain_linear",
    "prepare",
    "prepare_router",
    "quantize_activation",
    "refuses",
    "rms_norm",
    "rotary",
    "route",
    "router",
    "step_inputs",
    "store_entries",
    "store_latents",
    "use_path",
    "values_from_latent",
    "weight_amax",
]
