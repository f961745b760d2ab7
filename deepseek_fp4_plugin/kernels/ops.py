"""The kernel contract: what layers may ask for. Each function's plain-torch twin is in `kernels/reference`.

Weights are prepared once (`prepare`) and multiplied by the backend that prepared them; the row count only picks a
variant inside that backend. Everything is typed, shapes are in the docstrings, and an unsupported input raises.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import reference, select
from deepseek_fp4_plugin.kernels.reference.moe import Observe
from deepseek_fp4_plugin.kernels.spans import Spans
from deepseek_fp4_plugin.kernels.weights import (
    Activations,
    Backend,
    Case,
    PreparedRouter,
    PreparedWeight,
    WeightTensors,
)
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor

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


def prepare(
    parts: Sequence[WeightTensors],
    device: torch.device,
    dtype: torch.dtype,
    activations: Activations = "bf16",
    backend: str | None = None,
) -> PreparedWeight:
    """Give a weight the layout of the backend that will multiply by it.

    parts: projections of one format with the same input, fused along their rows in this order (gate and up); each may
    be stacked over experts.  dtype: of the activations.  activations: "fp4" rounds inputs of NVFP4 weights at run time
    with the largest `input_scale` of the parts, "int8" as numerics/int8.py; other formats ignore both.
    Raises ValueError when formats or widths differ, or "fp4" is asked for and a part has no positive input_scale.
    """
    if len({(part.format, part.in_features, part.weight.shape[:-2], part.fp8_block) for part in parts}) != 1:
        raise ValueError("fused projections must share format, size of scale blocks, input width and number of experts")
    nvfp4 = parts[0].format is WeightFormat.NVFP4
    input_scale = None
    if nvfp4 and activations == "fp4":
        scales = [part.input_scale for part in parts]
        if any(scale is None or not bool(scale > 0) for scale in scales):
            raise ValueError("FP4 activations need a positive input_scale for every quantized linear")
        input_scale = torch.stack([scale.float() for scale in scales]).amax().to(device)
    moved = [_to(part, device) for part in parts]
    if not nvfp4:
        activations = "bf16"
    columns = min(part.fp8_block[1] for part in parts)
    case = Case(device, dtype, parts[0].format, activations, columns)
    entry = select.named(backend) if backend else select.choose(case)
    return PreparedWeight(
        backend=entry.backend,
        format=parts[0].format,
        out_features=sum(part.out_features for part in parts),
        in_features=parts[0].in_features,
        dtype=dtype,
        activations=activations,
        input_scale=input_scale,
        data=entry.backend.prepare(moved, dtype, activations, input_scale),
        scale_columns=columns,
    )


def build_ahead(weights: Sequence[PreparedWeight], most_rows: int) -> None:
    """Make now what `linear` and `gated_mlp` of up to so many rows would make at a first call: compiled kernels."""
    by_backend: dict[Backend, list[PreparedWeight]] = {}
    for weight in weights:
        by_backend.setdefault(weight.backend, []).append(weight)
    for backend, theirs in by_backend.items():
        backend.build_ahead(theirs, most_rows)


def linear(x: Tensor, weight: PreparedWeight) -> Tensor:
    """x: [rows, in] in the weight's dtype, any number of rows.  Returns [rows, out]."""
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"input of width {x.shape[-1]} for a weight of width {weight.in_features}")
    return weight.backend.linear(x, weight)


def linear_pair(x: Tensor, first: PreparedWeight, second: PreparedWeight) -> tuple[Tensor, Tensor] | None:
    """`linear` of x [rows, in] by two weights at once: [rows, out] of each. None where one by one is as good."""
    if not x.shape[-1] == first.in_features == second.in_features:
        raise ValueError(f"input of width {x.shape[-1]} for weights of {first.in_features} and {second.in_features}")
    return first.backend.linear_pair(x, first, second) if first.backend is second.backend else None


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: PreparedWeight) -> Tensor:
    """`linear` of the `rms_norm` of x [rows, in] by norm [in].  Returns [rows, out]."""
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"input of width {x.shape[-1]} for a weight of width {weight.in_features}")
    return weight.backend.norm_linear(x, norm, eps, weight)


def experts_mlp(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: PreparedWeight,
    down: PreparedWeight,
    observe: Observe | None = None,
) -> Tensor:
    """Sum over each token's experts of weight * down(silu(gate x) * up x).

    x: [T, hidden].  expert_ids: int [T, k], -1 for an expert of another rank.  expert_weights: FP32 [T, k].
    observe: see kernels/reference/moe.py; for calibration.  Returns [T, hidden].
    """
    if observe or down.backend is not gate_up.backend:
        return reference.experts_mlp(x, expert_ids, expert_weights, gate_up, down, observe)
    return gate_up.backend.experts_mlp(x, expert_ids, expert_weights, gate_up, down)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., n].  weight: [n].  Returns x's shape and dtype; statistics FP32."""
    return select.kernels(x.device, x.dtype).rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x, hidden: [T, n].  weight: [n].  other: [T, n], added to x before.

    Returns hidden + x and its norm, each as `add` and `rms_norm` give it.
    """
    return select.kernels(x.device, x.dtype).add_rms_norm(x, hidden, weight, eps, other)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, both [T, n]: the residual connections."""
    return select.kernels(x.device, x.dtype).add(x, y)


def concat(x: Tensor, y: Tensor) -> Tensor:
    """[T, n] and [T, m] to [T, n + m]."""
    return select.kernels(x.device, x.dtype).concat(x, y)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [vocab, n] for ids int64 [T]: [T, n]. IndexError for an id outside the vocabulary."""
    return select.kernels(weight.device, weight.dtype).embedding(ids, weight)


def argmax(logits: Tensor) -> Tensor:
    """[N, vocab] to int64 [N]; of equal ones the first."""
    return select.kernels(logits.device, logits.dtype).argmax(logits)


def step_inputs(
    slots: Tensor, starts: Tensor, tokens: Tensor, tables: Tensor, num_blocks: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a step computes in which the requests of these slots decode, each with all its drafts.

    slots: int64 [R].  Of every slot: starts int64 [S], the first position; tokens int64 [S, W], the newest one and the
    drafts; tables int64 [S, B], cache blocks of block_size tokens, of which the first num_blocks are looked at.
    Returns int64 token ids, positions and cache slots [R * W], block tables [R, num_blocks], context lengths [R].
    """
    return select.kernels(slots.device).step_inputs(slots, starts, tokens, tables, num_blocks, block_size)


def cos_sin(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """FP32 cosines and sines [T, dim / 2] of positions int64 [T] times frequencies FP32 [dim / 2], times magnitude."""
    return select.kernels(positions.device).cos_sin(positions, frequencies, magnitude)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs.  x: [T, heads, d].  cos, sin: FP32 [T, d / 2].  Returns [T, heads, d] in x's dtype."""
    return select.kernels(x.device, x.dtype).rotary(x, cos, sin)


def prepare_router(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> PreparedRouter:
    """Give a router the layout of the backend that will choose by it.

    weight: FP32 [experts, hidden].  bias: FP32 [experts], for the choice only.  dtype: of the activations.
    """
    backend = select.kernels(weight.device, dtype)
    return PreparedRouter(backend, backend.prepare_router(weight), bias)


def router(
    x: Tensor, weight: PreparedRouter, k: int, n_group: int, topk_group: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Choose k experts of each token: `route` of x [T, hidden] by the router's weight, products and sums in FP32."""
    return weight.backend.router(x, weight.data, weight.bias, k, n_group, topk_group, normalize, scaling)


def placed_router(
    x: Tensor,
    weight: PreparedRouter,
    slots: Tensor,
    k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`router`, and the `local_ids` of what it chose: ids, weights, places. None where one by one is as good."""
    choice = k, n_group, topk_group, normalize, scaling
    return weight.backend.placed_router(x, weight.data, weight.bias, slots, *choice)


def route(
    logits: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """Choose k experts of each token: logits FP32 [T, experts] to ids int64 [T, k] and weights FP32 [T, k].

    bias: FP32 [experts], for the choice only. Within each token the experts come in any order.
    """
    return select.kernels(logits.device).route(logits, bias, k, n_group, topk_group, normalize, scaling)


def local_ids(ids: Tensor, slots: Tensor) -> Tensor:
    """slots[ids]: int64 [T, k], where this rank holds each chosen expert.  slots: int64 [experts], below 0: nowhere."""
    return select.kernels(ids.device).local_ids(ids, slots)


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x: [rows, in] by an unquantized weight [out, in], in the weight's dtype (FP32 for the router): [rows, out]."""
    return select.kernels(x.device, x.dtype).plain_linear(x, weight)


def weight_amax(weight: Tensor, scale_inv: Tensor | None, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of a source's weight in BF16: FP32 [], NaN where a value is NaN or infinite.

    weight: [rows, cols], E4M3 with scale_inv FP32, one a block of `block` rows and columns; any other dtype with None.
    """
    return select.kernels(weight.device).weight_amax(weight, scale_inv, block)


def convert_weight(
    weight: Tensor, scale_inv: Tensor | None, block: tuple[int, int], scale_2: Tensor
) -> tuple[NVFP4Tensor, float, float]:
    """`numerics.nvfp4.quantize` of a source's weight in BF16: weight, scale_inv and block as in `weight_amax`, finite.

    scale_2: FP32 [].  Returns the tensor, the sum of the BF16 values' squares, and that of their errors' squares.
    """
    return select.kernels(weight.device).convert_weight(weight, scale_inv, block, scale_2)


def absorb(q_nope: Tensor, kv_b: PreparedWeight) -> Tensor:
    """Queries into latent space: [T, heads, nope] times each head's first `nope` rows of kv_b, [T, heads, latent].

    kv_b: [heads * (nope + v), latent], prepared for BF16 activations.
    """
    return kv_b.backend.absorb(q_nope, kv_b)


def absorbed_queries(
    q_nope: Tensor, q_rope: Tensor, kv_b: PreparedWeight, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`absorb` of q_nope and `rotary` of q_rope [T, heads, rope]: what `absorbed_attention` takes."""
    return kv_b.backend.absorbed_queries(q_nope, q_rope, kv_b, cos, sin)


def absorb_and_store(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_b: PreparedWeight,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`absorbed_queries`, and `store_latents` of kv [T, latent + rope] by norm [latent]."""
    return kv_b.backend.absorb_and_store(q_nope, q_rope, kv_b, cos, sin, cache, slots, kv, norm, eps)


def values_from_latent(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
    """Attended latents [T, heads, latent] to values [T, heads, v], by each head's last `v` rows of kv_b."""
    return kv_b.backend.values_from_latent(attended, kv_b, v)


def attended_values(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query: int,
    max_context: int,
    scale: float,
    kv_b: PreparedWeight,
    v: int,
) -> Tensor | None:
    """`values_from_latent` of the `absorbed_attention`: [T, heads, v]. None where one by one is as good."""
    backend = select.kernels(q_latent.device, q_latent.dtype)
    if kv_b.backend is not backend:
        return None
    return backend.attended_values(
        q_latent, q_rope, cache, block_tables, query_start, context_lens, max_query, max_context, scale, kv_b, v
    )


def latent_entries(kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """What the cache holds for each token: the normed latent and the rotated key, [T, latent + rope].

    kv: [T, latent + rope], kv_a_proj's output.  weight: [latent], the norm's.  cos, sin: FP32 [T, rope / 2].
    """
    return select.kernels(kv.device, kv.dtype).latent_entries(kv, weight, eps, cos, sin)


def store_entries(cache: Tensor, slots: Tensor, entries: Tensor) -> None:
    """Write entries [T, width] at their slots int64 [T] of cache [blocks, block_size, width]; FP8 saturates at 448."""
    select.kernels(entries.device, entries.dtype).store_entries(cache, slots, entries)


def store_latents(
    cache: Tensor, slots: Tensor, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """`store_entries` of the `latent_entries`, which are returned: [T, latent + rope]."""
    return select.kernels(kv.device, kv.dtype).store_latents(cache, slots, kv, weight, eps, cos, sin)


def gated_mlp(x: Tensor, gate_up: PreparedWeight, down: PreparedWeight) -> Tensor:
    """down(silu(gate x) * up x): x [rows, hidden] to [rows, hidden]."""
    if down.backend is not gate_up.backend:
        return reference.gated_mlp(x, gate_up, down)
    return gate_up.backend.gated_mlp(x, gate_up, down)


def expanded_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: Spans) -> Tensor:
    """Causal attention of each request's newest tokens over its whole context, T and S tokens in all.

    q: [T, heads, d].  k: [S, heads, d].  v: [S, heads, dv].  Returns [T, heads, dv].
    """
    return select.kernels(q.device, q.dtype).expanded_attention(q, k, v, scale, spans)


def absorbed_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query: int,
    max_context: int,
    scale: float,
) -> Tensor:
    """Attention of each request's few newest tokens over the paged latent cache.

    q_latent: [T, heads, latent], q_rope: [T, heads, rope].  cache: [blocks, block_size, latent + rope] BF16, FP32 or
    E4M3, the newest tokens' entries already in it; anything may lie in slots past a request's context.
    block_tables: int64 [R, B].  query_start: int64 [R + 1].  context_lens: int64 [R], newest tokens included.
    max_query, max_context: host bounds of both.  Returns [T, heads, latent].
    """
    kernels = select.kernels(q_latent.device, q_latent.dtype)
    return kernels.absorbed_attention(
        q_latent, q_rope, cache, block_tables, query_start, context_lens, max_query, max_context, scale
    )


def _to(part: WeightTensors, device: torch.device) -> WeightTensors:
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return WeightTensors(
        part.format, part.weight.to(device), move(part.scale), move(part.scale_2), part.input_scale, part.fp8_block
    )
