"""The one table of the quantizer: which modules become NVFP4, which stay, and which share a scale.

| | v1 | v2 |
| dense MLP, routed experts, shared experts of the main model | NVFP4 | NVFP4 |
| attention: o_proj | BF16 | NVFP4 |
| attention: the other projections | BF16 | BF16 |
| router, norms, embedding, head | as they are (FP8 ones BF16) | the same |
| the MTP layer | the same, or on request as the layers of the main model | the same |

v1 is the layout of nvidia/DeepSeek-R1-0528-FP4, v2 that of its successor. gate_proj and up_proj share `weight_scale_2`
because run-time kernels fuse them and use one. See docs/quantization.md.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.findings import refuse
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat, detect_format
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader, read_json
from deepseek_fp4_plugin.checkpoint.writer import TensorSpec
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.examination import examine_weights, may_be_absent
from deepseek_fp4_plugin.models.inventory import Role, Weight, weights
from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK

_MLP = (Role.DENSE_MLP, Role.ROUTED_EXPERT, Role.SHARED_EXPERT)
# Layout -> the projections that become NVFP4, by role; an empty tuple stands for all of the role's.
LAYOUTS: dict[str, dict[Role, tuple[str, ...]]] = {
    "v1": {role: () for role in _MLP},
    "v2": {role: () for role in _MLP} | {Role.ATTENTION: ("o_proj",)},
}


class Conversion(NamedTuple):
    """What happens to one weight of the source.

    source: its format there.  nvfp4: becomes NVFP4; else a linear or an FP8 weight is stored BF16, others as they are.
    """

    weight: Weight
    source: WeightFormat
    nvfp4: bool

    @property
    def source_names(self) -> tuple[str, ...]:
        if self.source is WeightFormat.FP8_BLOCK:
            return self.weight.name, f"{self.weight.module}.weight_scale_inv"
        return (self.weight.name,)


class Unit(NamedTuple):
    """Weights that are converted together: gate and up, which share a tensor scale, or a single one."""

    conversions: tuple[Conversion, ...]

    @property
    def layer(self) -> int | None:
        return self.conversions[0].weight.layer


class Plan(NamedTuple):
    """Everything that will be written, before any value is read.

    units: in reading order.  tensors: of the result, in the same order.  exclude_modules: for the config files.
    cache_scales: layers and the names of their caches' scales, which come last.
    """

    units: tuple[Unit, ...]
    tensors: tuple[TensorSpec, ...]
    exclude_modules: tuple[str, ...]
    cache_scales: tuple[tuple[int, str], ...] = ()


def becomes_nvfp4(weight: Weight, config: DeepseekV3Config, layout: str, mtp: bool = False) -> bool:
    """True when `layout` (a key of LAYOUTS) stores this weight as NVFP4; one of the MTP layer only with `mtp`."""
    if not weight.linear or weight.layer is None or (weight.layer >= config.num_hidden_layers and not mtp):
        return False
    projections = LAYOUTS[layout].get(weight.role)
    return projections is not None and (not projections or weight.module.rpartition(".")[2] in projections)


def layout_format(config: DeepseekV3Config, layout: str, mtp: bool = False) -> Callable[[Weight], WeightFormat]:
    """Each weight's format in a checkpoint of this layout: v1, v2, `fp8` as DeepSeek publishes it, or `bf16`.

    mtp: its MTP layer is quantized as the others are.
    """
    if layout in ("fp8", "bf16"):
        linear = WeightFormat.FP8_BLOCK if layout == "fp8" else WeightFormat.PLAIN
        return lambda weight: linear if weight.linear else WeightFormat.PLAIN
    return lambda weight: WeightFormat.NVFP4 if becomes_nvfp4(weight, config, layout, mtp) else WeightFormat.PLAIN


def excluded_modules(config: DeepseekV3Config, layout: str, mtp: bool = False) -> list[str]:
    """`exclude_modules` of hf_quant_config.json: wildcards in v1, exact names in v2, the MTP layer by name in both.

    mtp: the MTP layer is quantized as the others are; then only its projection and its copy of the head are named.
    """
    excluded = ["lm_head"]
    mtp = mtp and config.num_nextn_predict_layers > 0
    for layer in range(config.num_hidden_layers + mtp):
        name = f"model.layers.{layer}.self_attn"
        if layout == "v1":
            excluded.append(f"{name}*")
        else:
            queries = ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
            excluded += [f"{name}.{projection}" for projection in (*queries, "kv_a_proj_with_mqa", "kv_b_proj")]
    if mtp:
        excluded += [f"model.layers.{config.num_hidden_layers}.{name}" for name in ("eh_proj", "shared_head.head")]
    elif config.num_nextn_predict_layers:
        excluded.append(f"model.layers.{config.num_hidden_layers}*")
    return sorted(excluded)


def make_plan(
    reader: CheckpointReader,
    config: DeepseekV3Config,
    layout: str,
    names: Mapping[str, str] | None = None,
    mtp: bool = False,
    cache_scales: Callable[[int], Sequence[str]] = lambda layer: (),
) -> Plan:
    """Check every tensor of the source against the config, from headers alone, and lay out the result.

    names: last parts of the names in the result's files, of an NVFP4 weight's tensors; None: as they are here.
    mtp: quantize the MTP layer too.  cache_scales: layer -> the names of its cache's scales.
    Raises CheckpointError naming a tensor that is missing, has another shape, lacks its scale, is quantized to NVFP4
    already, has a width NVFP4 cannot hold, or has no place in the model; ValueError for an unknown layout.
    """
    if mtp and not config.num_nextn_predict_layers:
        raise ValueError(f"{reader.folder} has no MTP layer to quantize; leave --mtp out")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; choose from {', '.join(LAYOUTS)}")
    refuse(examine_weights(reader.folder, reader.tensors, config, read_json(reader.folder / "config.json"))[1])
    units: list[Unit] = []
    specs: list[TensorSpec] = []
    for group in paired_weights(config):
        conversions = []
        for weight in group:
            if weight.name not in reader and may_be_absent(weight, config):
                continue
            conversion = _conversion(reader, weight, becomes_nvfp4(weight, config, layout, mtp))
            tensors = result_tensors(conversion, reader.info(weight.name).dtype)
            specs += _renamed(tensors, names) if names and conversion.nvfp4 else tensors
            conversions.append(conversion)
        if conversions:
            units.append(Unit(tuple(conversions)))
    layers = range(config.num_hidden_layers + mtp)
    scales = [(layer, name) for layer in layers for name in cache_scales(layer)]
    specs += [TensorSpec(name, torch.float32, ()) for _, name in scales]
    return Plan(tuple(units), tuple(specs), tuple(excluded_modules(config, layout, mtp)), tuple(scales))


def result_tensors(conversion: Conversion, source_dtype: torch.dtype) -> list[TensorSpec]:
    """The tensors a weight becomes."""
    weight = conversion.weight
    if not conversion.nvfp4:
        return [TensorSpec(weight.name, kept_dtype(conversion, source_dtype), weight.shape)]
    rows, cols = weight.shape
    return [
        TensorSpec(weight.name, torch.uint8, (rows, cols // 2)),
        TensorSpec(f"{weight.module}.weight_scale", torch.float8_e4m3fn, (rows, cols // BLOCK)),
        TensorSpec(f"{weight.module}.weight_scale_2", torch.float32, ()),
        TensorSpec(f"{weight.module}.input_scale", torch.float32, ()),
    ]


def _renamed(tensors: Iterable[TensorSpec], names: Mapping[str, str]) -> Iterator[TensorSpec]:
    for spec in tensors:
        suffix = spec.name.rpartition(".")[2]
        yield spec if names[suffix] == suffix else spec._replace(stored_as=names[suffix])


def kept_dtype(conversion: Conversion, source_dtype: torch.dtype) -> torch.dtype:
    """The dtype of a weight that is not quantized: BF16 for linears and FP8 ones, else the source's."""
    if conversion.weight.linear or conversion.source is WeightFormat.FP8_BLOCK:
        return torch.bfloat16
    return source_dtype


def paired_weights(config: DeepseekV3Config) -> Iterator[list[Weight]]:
    """Weights in reading order, each gate_proj together with its up_proj."""
    waiting = None
    for weight in weights(config):
        if weight.module.endswith(".gate_proj"):
            waiting = weight
        elif waiting is not None:
            yield [waiting, weight]
            waiting = None
        else:
            yield [weight]


def _by_whom(reader: CheckpointReader, weight: Weight) -> str:
    stored_as = reader.info(weight.name).stored_as
    return f" (compressed-tensors' {stored_as})" if stored_as else ""


def _conversion(reader: CheckpointReader, weight: Weight, nvfp4: bool) -> Conversion:
    source = detect_format(reader, weight.module) if weight.name.endswith(".weight") else WeightFormat.PLAIN
    if source is WeightFormat.NVFP4:
        raise CheckpointError(
            f"{weight.name} in {reader.folder} is NVFP4 already{_by_whom(reader, weight)}; quantize the FP8 or BF16 "
            "original instead"
        )
    if nvfp4 and weight.shape[1] % BLOCK:
        raise CheckpointError(
            f"{weight.name} in {reader.folder} has {weight.shape[1]} inputs, which NVFP4 cannot hold: "
            f"its blocks are {BLOCK} wide"
        )
    return Conversion(weight, source, nvfp4)
