"""Every weight of a model from its config alone: names, shapes and what each is for.

The quantizer's recipe, `inspect`, the planner and test checkpoints all read this one list.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from deepseek_fp4_plugin.models.config import DeepseekV3Config


class Role(StrEnum):
    """What a weight is for."""

    ATTENTION = "attention"
    DENSE_MLP = "dense MLP"
    ROUTED_EXPERT = "routed experts"
    SHARED_EXPERT = "shared experts"
    ROUTER = "router"
    NORM = "norms"
    EMBEDDING = "embedding"
    HEAD = "head"
    MTP_PROJECTION = "MTP projection"


class Weight(NamedTuple):
    """One weight. name: full tensor name.  layer: None outside the decoder layers.  linear: may be quantized."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None
    linear: bool

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")


def weights(config: DeepseekV3Config) -> Iterator[Weight]:
    """All weights in reading order: embedding, layers, norm, head, MTP layer."""
    c = config
    yield Weight("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), Role.EMBEDDING, None, False)
    for layer in range(c.num_hidden_layers):
        yield from layer_weights(c, layer)
    yield Weight("model.norm.weight", (c.hidden_size,), Role.NORM, None, False)
    yield Weight("lm_head.weight", (c.vocab_size, c.hidden_size), Role.HEAD, None, False)
    if c.num_nextn_predict_layers:
        yield from layer_weights(c, c.num_hidden_layers)


def layer_weights(config: DeepseekV3Config, layer: int) -> Iterator[Weight]:
    """The weights of one decoder layer; index `num_hidden_layers` is the MTP layer."""
    c, name = config, f"model.layers.{layer}"
    is_mtp = layer >= c.num_hidden_layers
    if is_mtp:
        yield Weight(f"{name}.embed_tokens.weight", (c.vocab_size, c.hidden_size), Role.EMBEDDING, layer, False)
        yield Weight(f"{name}.enorm.weight", (c.hidden_size,), Role.NORM, layer, False)
        yield Weight(f"{name}.hnorm.weight", (c.hidden_size,), Role.NORM, layer, False)
        yield Weight(f"{name}.eh_proj.weight", (c.hidden_size, 2 * c.hidden_size), Role.MTP_PROJECTION, layer, False)
    yield Weight(f"{name}.input_layernorm.weight", (c.hidden_size,), Role.NORM, layer, False)
    yield from _attention(c, layer)
    yield Weight(f"{name}.post_attention_layernorm.weight", (c.hidden_size,), Role.NORM, layer, False)
    if is_mtp or c.is_moe_layer(layer):
        yield Weight(f"{name}.mlp.gate.weight", (c.n_routed_experts, c.hidden_size), Role.ROUTER, layer, False)
        yield Weight(f"{name}.mlp.gate.e_score_correction_bias", (c.n_routed_experts,), Role.ROUTER, layer, False)
        for expert in range(c.n_routed_experts):
            prefix = f"{name}.mlp.experts.{expert}"
            yield from _gated_mlp(prefix, c.hidden_size, c.moe_intermediate_size, Role.ROUTED_EXPERT, layer)
        if c.n_shared_experts:
            inner = c.moe_intermediate_size * c.n_shared_experts
            yield from _gated_mlp(f"{name}.mlp.shared_experts", c.hidden_size, inner, Role.SHARED_EXPERT, layer)
    else:
        yield from _gated_mlp(f"{name}.mlp", c.hidden_size, c.intermediate_size, Role.DENSE_MLP, layer)
    if is_mtp:
        yield Weight(f"{name}.shared_head.norm.weight", (c.hidden_size,), Role.NORM, layer, False)
        yield Weight(f"{name}.shared_head.head.weight", (c.vocab_size, c.hidden_size), Role.HEAD, layer, False)


def _gated_mlp(prefix: str, hidden: int, inner: int, role: Role, layer: int) -> Iterator[Weight]:
    yield Weight(f"{prefix}.gate_proj.weight", (inner, hidden), role, layer, True)
    yield Weight(f"{prefix}.up_proj.weight", (inner, hidden), role, layer, True)
    yield Weight(f"{prefix}.down_proj.weight", (hidden, inner), role, layer, True)


def _attention(c: DeepseekV3Config, layer: int) -> Iterator[Weight]:
    name, heads = f"model.layers.{layer}.self_attn", c.num_attention_heads

    def linear(projection: str, out_features: int, in_features: int) -> Weight:
        return Weight(f"{name}.{projection}.weight", (out_features, in_features), Role.ATTENTION, layer, True)

    if c.q_lora_rank is None:
        yield linear("q_proj", heads * c.qk_head_dim, c.hidden_size)
    else:
        yield linear("q_a_proj", c.q_lora_rank, c.hidden_size)
        yield Weight(f"{name}.q_a_layernorm.weight", (c.q_lora_rank,), Role.NORM, layer, False)
        yield linear("q_b_proj", heads * c.qk_head_dim, c.q_lora_rank)
    yield linear("kv_a_proj_with_mqa", c.latent_dim, c.hidden_size)
    yield Weight(f"{name}.kv_a_layernorm.weight", (c.kv_lora_rank,), Role.NORM, layer, False)
    yield linear("kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield linear("o_proj", c.hidden_size, heads * c.v_head_dim)
