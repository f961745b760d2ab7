"""The byte ledger: what one step reads and computes, from the config alone.

A step of T tokens reads every weight it uses once, its requests' cache once, and writes one entry a token and layer.
Activations are not counted: they are a hundredth of it and stay in caches. Sums are one rank's; collectives are left
out. Every roofline is the larger of bytes over bandwidth and flops over arithmetic, line by line.
"""

import functools
from collections.abc import Callable, Iterable
from math import prod
from typing import NamedTuple

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.inventory import Role, Weight, layer_weights, weights
from deepseek_fp4_plugin.parallel.mesh import Mesh

FormatOf = Callable[[Weight], WeightFormat]

CACHE = "cache"
# Modules that the tensor-parallel ranks share; the experts are dealt separately, all others are whole on every rank.
CUT_MODULES = frozenset(
    [
        "gate_proj",
        "up_proj",
        "down_proj",
        "q_proj",
        "q_b_proj",
        "kv_b_proj",
        "o_proj",
        "lm_head",
        "head",
        "embed_tokens",
    ]
)
_FP8_BLOCK, _NVFP4_BLOCK = 128, 16


class Line(NamedTuple):
    """One class of modules on one rank. bytes: read and written.  flops: two for each product."""

    role: str
    bytes: float
    flops: float


class Step(NamedTuple):
    """One forward of the main model on one rank.

    requests: of this rank.  tokens: new ones of each.  context: of each, the new ones included.  cache_bytes: of one
    cached value.  expert_tokens: tokens of all ranks that share experts; None where all ranks have the same ones.
    """

    requests: int = 1
    tokens: int = 1
    context: int = 1024
    cache_bytes: int = 2
    expert_tokens: int | None = None

    @property
    def rows(self) -> int:
        return self.requests * self.tokens


def stored_bytes(weight: Weight, weight_format: WeightFormat) -> int:
    """Bytes of a weight as a checkpoint holds it, values and scales."""
    return _stored(weight.shape, weight_format, weight.name.endswith("e_score_correction_bias"))[0]


def stored_elements(weight: Weight, weight_format: WeightFormat) -> int:
    """Its tensors' elements as the hub counts them: a byte of two values is one, and scales are some too."""
    return _stored(weight.shape, weight_format, weight.name.endswith("e_score_correction_bias"))[1]


@functools.cache
def _stored(shape: tuple[int, ...], weight_format: WeightFormat, wide: bool) -> tuple[int, int]:
    """Bytes and elements.  wide: FP32 where unquantized weights are BF16."""
    count = prod(shape)
    if weight_format is WeightFormat.NVFP4:  # two values a byte, a scale for each block, two numbers
        packed, scales = count // 2, count // _NVFP4_BLOCK
        return packed + scales + 2 * 4, packed + scales + 2
    if weight_format is WeightFormat.FP8_BLOCK:
        scales = prod(-(-size // _FP8_BLOCK) for size in shape)
        return count + 4 * scales, count + scales
    return count * (4 if wide else 2), count


class Kind(NamedTuple):
    """Weights that are alike in everything that is counted. weight: the first of `number`.  mtp: of the MTP layer."""

    weight: Weight
    format: WeightFormat
    number: int
    mtp: bool


@functools.lru_cache(maxsize=16)
def kinds(config: DeepseekV3Config, format_of: FormatOf) -> tuple[Kind, ...]:
    """Every weight of the model, in few entries: R1 has 45,000 weights and about forty kinds."""
    return _kinds(config, format_of, weights(config))


def _kinds(config: DeepseekV3Config, format_of: FormatOf, found: Iterable[Weight]) -> tuple[Kind, ...]:
    alike: dict[tuple[object, ...], Kind] = {}
    for weight in found:
        mtp = weight.layer is not None and weight.layer >= config.num_hidden_layers
        form, name = format_of(weight), weight.name.rpartition(".")[2]
        key = (weight.role, weight.shape, weight.module.rpartition(".")[2], name, form, mtp, weight.layer is None)
        first = alike.get(key)
        alike[key] = Kind(weight, form, 1, mtp) if first is None else first._replace(number=first.number + 1)
    return tuple(alike.values())


def checkpoint_size(config: DeepseekV3Config, format_of: FormatOf) -> tuple[int, int]:
    """Bytes and elements of a whole checkpoint, the MTP layer included where the config has one."""
    found = kinds(config, format_of)
    return (
        sum(kind.number * stored_bytes(kind.weight, kind.format) for kind in found),
        sum(kind.number * stored_elements(kind.weight, kind.format) for kind in found),
    )


def rank_bytes(config: DeepseekV3Config, format_of: FormatOf, mesh: Mesh | None = None) -> dict[Role, float]:
    """Bytes of the weights that one rank holds, the MTP layer's included where the config has one."""
    held: dict[Role, float] = {}
    for weight, form, count, _ in kinds(config, format_of):
        share = count * _share(weight, mesh or Mesh())
        held[weight.role] = held.get(weight.role, 0.0) + share * stored_bytes(weight, form)
    return held


def decode_step(
    config: DeepseekV3Config, format_of: FormatOf, step: Step | None = None, mesh: Mesh | None = None
) -> list[Line]:
    """What one rank reads and computes for `step`, a line for each class of modules, the MTP layer not included.

    Routed experts are those that are expected to be hit when every token chooses independently and evenly.
    """
    main = [kind for kind in kinds(config, format_of) if not kind.mtp]
    return _lines(config, main, config.num_hidden_layers, step or Step(), mesh or Mesh())


def draft_step(
    config: DeepseekV3Config, format_of: FormatOf, step: Step | None = None, mesh: Mesh | None = None
) -> list[Line]:
    """The same of one pass of the MTP layer, which drafts one token: its layer, and the main model's head."""
    ends = (Role.EMBEDDING, Role.HEAD)
    own = _kinds(config, format_of, layer_weights(config, config.num_hidden_layers))
    read = [kind for kind in own if kind.weight.role not in ends]
    read += [kind for kind in kinds(config, format_of) if not kind.mtp and kind.weight.role in ends]
    return _lines(config, read, 1, step or Step(), mesh or Mesh())


def _lines(config: DeepseekV3Config, read: Iterable[Kind], layers: int, step: Step, mesh: Mesh) -> list[Line]:
    totals: dict[str, tuple[float, float]] = {}

    def add(role: str, size: float, flops: float) -> None:
        before = totals.get(role, (0.0, 0.0))
        totals[role] = (before[0] + size, before[1] + flops)

    hit = expected_share(config, step.expert_tokens or step.rows)
    for weight, form, count, _ in read:
        share, size = count * _share(weight, mesh), stored_bytes(weight, form)
        products = 2.0 * prod(weight.shape) * step.rows if len(weight.shape) == 2 else 0.0
        if weight.role is Role.ROUTED_EXPERT:
            tokens = (step.expert_tokens or step.rows) * config.num_experts_per_tok / config.n_routed_experts
            add(weight.role, share * hit * size, share * 2.0 * prod(weight.shape) * tokens)
        elif weight.role is Role.EMBEDDING:
            add(weight.role, count * 2.0 * config.hidden_size * step.rows, 0.0)
        else:
            add(weight.role, share * size, share * products)
    heads = config.num_attention_heads / mesh.tp.count
    scores = 2.0 * heads * step.rows * step.context * (config.latent_dim + config.kv_lora_rank)
    entries = step.requests * step.context + step.rows
    add(CACHE, float(layers * config.latent_dim * step.cache_bytes * entries), layers * scores)
    return [Line(role, *total) for role, total in totals.items()]


def expected_share(config: DeepseekV3Config, tokens: int) -> float:
    """The share of a layer's experts that at least one of `tokens` tokens is expected to choose."""
    return 1.0 - (1.0 - config.num_experts_per_tok / config.n_routed_experts) ** tokens


def seconds(lines: list[Line], bandwidth: float, rate: float) -> float:
    """The least time of a step: bandwidth in bytes a second, rate in flops a second."""
    return sum(max(line.bytes / bandwidth, line.flops / rate) for line in lines)


def _share(weight: Weight, mesh: Mesh) -> float:
    """The part of a weight that one rank holds, on average over ranks."""
    name = weight.module.rpartition(".")[2]
    if weight.role is Role.ROUTED_EXPERT:
        return 1.0 / mesh.tensor_parallel_size
    return 1.0 / mesh.tp.count if name in CUT_MODULES else 1.0
