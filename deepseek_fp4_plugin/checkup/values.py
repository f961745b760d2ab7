"""What the values of a checkpoint say: scales that are none, pairs that differ, orders, and the source's own weights.

Every single number is read (tensor scales, norms, biases), of every matrix some rows; see samples.py for how many.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.findings import Fault, Finding, error, note, warning
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.scales import all_finite
from deepseek_fp4_plugin.checkpoint.shards import by_module
from deepseek_fp4_plugin.checkpoint.weight_rules import PLAIN_DTYPES, judge
from deepseek_fp4_plugin.checkup import order
from deepseek_fp4_plugin.checkup.samples import Rows, Sampler, source_rows
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.inventory import Role, Weight, weights
from deepseek_fp4_plugin.numerics.nvfp4 import AMAX_TO_SCALE, NVFP4Tensor
from deepseek_fp4_plugin.numerics.scale_layout import tiled_size
from deepseek_fp4_plugin.quantization.smoothing import Smoothing, read_smoothing

_ABSURD = 1e4  # no weight of a language model is as large; a reciprocal scale makes it so
_COMPARED = 8  # rows of a matrix that are compared with the source at most
_ORDER_SHARE, _ORDER_TENSORS = 0.4, 64  # of the budget, and matrices, that the order of scales is judged by


@dataclass
class Values:
    """What was found. modules: fault -> all modules that have it.  judged: modules compared with the source.

    smoothing: by which the source's weights are to be compared.
    """

    folder: Path
    modules: dict[Fault, list[str]] = field(default_factory=dict)
    first: dict[Fault, tuple[str, str]] = field(default_factory=dict)  # subject, sentence
    codes: order.Codes = field(default_factory=order.Codes)
    judged: int = 0
    spent: int = 0
    smoothing: Smoothing = field(default_factory=lambda: Smoothing({}))

    def add(self, fault: Fault, module: str, suffix: str, text: str) -> None:
        name = f"{module}.{suffix}" if suffix else module
        self.modules.setdefault(fault, []).append(module)
        self.first.setdefault(fault, (name, f"{name} in {self.folder} {text}"))

    def findings(self) -> list[Finding]:
        found = []
        for fault, modules in self.modules.items():
            make = _SEVERITY.get(fault, error)
            found.append(make(*self.first[fault], len(set(modules)), fault=fault))
        return found


_SEVERITY = {
    Fault.PAIR_SCALES: warning,
    Fault.INPUT_SCALE: warning,
    Fault.MTP_COPIES: warning,
    Fault.ROUNDING: warning,
    Fault.MTP_DROPPED: note,
}


def examine_values(
    reader: CheckpointReader, config: DeepseekV3Config, source: CheckpointReader | None = None, everything: bool = False
) -> Values:
    """Look at values within the budget. The headers must be in order where a module is to be looked at."""
    found, sampler = Values(reader.folder), Sampler(reader, everything)
    if source is not None:
        found.smoothing = read_smoothing(reader.folder)
    kinds = dict(_readable(reader, config))
    scales = _numbers(found, sampler, kinds)
    _pairs(found, scales)
    _plain_numbers(found, sampler, kinds)
    if source is None:
        _order_of_scales(found, sampler, kinds)
    _copies(found, sampler, config)
    _rows(found, sampler, kinds, scales, source)
    if source is not None:
        _mtp_of_source(found, reader, source, config)
        # Where scales hardly differ, their order hardly shows: a file is in one order.
        wide, tiled = _without_padding(kinds), found.modules.get(Fault.TILED_SCALES, [])
        if 2 * len(tiled) > len(wide):
            found.modules[Fault.TILED_SCALES] = wide
    if found.codes.wrong:
        name, c = found.first.get(Fault.ROUNDING, ("", ""))[0] or str(reader.folder), found.codes
        text = f"{c.differing:,} of {c.total:,} codes in {reader.folder} that were compared with the source are rounded"
        found.modules[Fault.ROUNDING] = [m for m, f in kinds.items() if f[1] is WeightFormat.NVFP4]
        found.first[Fault.ROUNDING] = (name, f"{text} {c.wrong}")
    found.spent = sampler.spent
    return found


def _readable(reader: CheckpointReader, config: DeepseekV3Config) -> Iterator[tuple[str, tuple[Weight, WeightFormat]]]:
    """Modules whose tensors are what the config makes them."""
    groups = by_module(reader.tensors)
    for weight in weights(config):
        module, _, suffix = weight.name.rpartition(".")
        group = groups.get(module, {})
        if suffix != "weight":
            if suffix in group and group[suffix].dtype in PLAIN_DTYPES:
                yield weight.name, (weight, WeightFormat.PLAIN)
        elif group:
            verdict = judge(group, weight.shape)
            if verdict.format is not None and not verdict.problems:
                yield module, (weight, verdict.format)


_Kinds = Mapping[str, tuple[Weight, WeightFormat]]


def _numbers(found: Values, sampler: Sampler, kinds: _Kinds) -> dict[str, Tensor]:
    """Check every tensor scale and input scale; returns module -> FP32 [] of the tensor scales, right or not."""
    names = [
        f"{module}.{suffix}"
        for module, (_, form) in kinds.items()
        if form is WeightFormat.NVFP4
        for suffix in ("weight_scale_2", "input_scale")
        if f"{module}.{suffix}" in sampler.reader
    ]
    scales = {}
    for name in sorted(names, key=lambda n: (sampler.reader.info(n).shard, sampler.reader.info(n).offset)):
        module, _, suffix = name.rpartition(".")
        scale = sampler.whole(name).float().reshape(())
        value = float(scale)
        if suffix == "weight_scale_2":
            scales[module] = scale
        if suffix == "input_scale" and not 0 < value < math.inf:
            found.add(Fault.INPUT_SCALE, module, suffix, f"is {value:g}, which no activation scale can be")
        elif suffix == "weight_scale_2" and not 0 <= value < math.inf:
            found.add(Fault.TENSOR_SCALE, module, suffix, f"is {value:g}, which no scale can be")
        elif suffix == "weight_scale_2" and value * AMAX_TO_SCALE > _ABSURD:
            text = f"is {value:g}, so weights would reach {value * AMAX_TO_SCALE:.3g}; it looks like the reciprocal"
            found.add(Fault.RECIPROCAL, module, suffix, text)
    return scales


def _pairs(found: Values, scales: Mapping[str, Tensor]) -> None:
    broken = {*found.modules.get(Fault.TENSOR_SCALE, ()), *found.modules.get(Fault.RECIPROCAL, ())}
    for gate, scale in scales.items():
        up = gate.removesuffix(".gate_proj") + ".up_proj"
        if not gate.endswith(".gate_proj") or up not in scales or gate in broken or up in broken:
            continue
        if not torch.equal(scale, scales[up]):
            text = f"is {float(scales[up]):g} and that of gate_proj {float(scale):g}; fused kernels use one for both"
            found.add(Fault.PAIR_SCALES, up, "weight_scale_2", text)


def _plain_numbers(found: Values, sampler: Sampler, kinds: _Kinds) -> None:
    """Norms and the router's bias, whole."""
    for module, (weight, form) in kinds.items():
        if form is not WeightFormat.PLAIN or len(weight.shape) != 1 or not sampler.affords(4 * weight.shape[0]):
            continue
        if not bool(torch.isfinite(sampler.whole(weight.name)).all()):
            suffix = "" if module == weight.name else "weight"
            found.add(Fault.NOT_FINITE, module, suffix, "holds NaN or infinity")


def _order_of_scales(found: Values, sampler: Sampler, kinds: _Kinds) -> None:
    """Whole matrices of block scales, the largest first: has their order anything to do with the weights'?"""
    info = sampler.reader.info
    # In short rows both orders look much alike.
    wide = [module for module in _without_padding(kinds) if kinds[module][0].shape[1] >= 16 * 16]
    wide.sort(key=lambda module: -info(f"{module}.weight_scale").nbytes)
    allowed, matrices = sampler.left * _ORDER_SHARE, []
    for module in _spread(wide, _ORDER_TENSORS):
        size = info(f"{module}.weight_scale").nbytes
        if size <= allowed:
            allowed -= size
            matrices.append(sampler.whole(f"{module}.weight_scale"))
    if order.looks_tiled(matrices):
        for module in _without_padding(kinds):
            found.add(Fault.TILED_SCALES, module, "weight_scale", "is in the tensor cores' 128 x 4 order, not in rows")


def _without_padding(kinds: _Kinds) -> list[str]:
    """Modules whose scales have one size in rows and in the tensor cores' order."""
    return [
        module
        for module, (weight, form) in kinds.items()
        if form is WeightFormat.NVFP4
        and tiled_size(weight.shape[0], weight.shape[1] // 16) == weight.shape[0] * (weight.shape[1] // 16)
    ]


def _spread(items: list[str], count: int) -> list[str]:
    """At most `count` of them, evenly."""
    step = max(1, len(items) // count)
    return items[::step][:count]


def _copies(found: Values, sampler: Sampler, config: DeepseekV3Config) -> None:
    """The MTP layer's own embedding and head must equal the main model's: some runtimes read one, some the other."""
    if not config.num_nextn_predict_layers:
        return
    prefix = f"model.layers.{config.num_hidden_layers}"
    for copy, main in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        names = f"{prefix}.{copy}.weight", f"{main}.weight"
        if not all(name in sampler.reader for name in names):
            continue
        infos = [sampler.reader.info(name) for name in names]
        if infos[0].dtype != infos[1].dtype or infos[0].shape != infos[1].shape:
            continue
        row_bytes = infos[0].nbytes // infos[0].shape[0]
        rows = sampler.place(names[1], infos[0].shape[0], row_bytes, 4 * row_bytes)
        if rows is None or not sampler.affords(2 * row_bytes * (rows.stop - rows.start)):
            continue
        ours, theirs = (sampler.rows(name, rows).view(torch.uint8) for name in names)
        if not torch.equal(ours, theirs):
            found.add(Fault.MTP_COPIES, f"{prefix}.{copy}", "weight", f"differs from {main}.weight")


def _rows(
    found: Values, sampler: Sampler, kinds: _Kinds, scales: Mapping[str, Tensor], source: CheckpointReader | None
) -> None:
    """Some rows of every matrix. Where not even one row of each can be had, of as many as can."""
    matrices = [(module, *kind) for module, kind in kinds.items() if len(kind[0].shape) == 2]
    costs = [_row_bytes(sampler, module, weight, form) for module, weight, form in matrices]
    step = 1 if sampler.everything else max(1, math.ceil(sum(costs) / max(sampler.left, 1)))
    chosen = list(zip(matrices, costs, strict=True))[::step]
    for index, ((module, weight, form), cost) in enumerate(chosen):
        allowed = sampler.left // (len(chosen) - index)
        rows = sampler.place(module, weight.shape[0], cost, allowed)
        if rows is None:
            continue
        if form is WeightFormat.NVFP4:
            stored = NVFP4Tensor(
                sampler.rows(f"{module}.weight", rows), sampler.rows(f"{module}.weight_scale", rows), scales[module]
            )
            if _block_scales(found, module, stored) and source is not None:
                _against_source(found, sampler, source, weight, rows, stored)
        elif form is WeightFormat.FP8_BLOCK:
            _fp8_scales(found, sampler, module)
            if not all_finite(sampler.rows(f"{module}.weight", rows)):
                found.add(Fault.NOT_FINITE, module, "weight", "holds NaN")
        else:
            values = sampler.rows(f"{module}.weight", rows)
            if not bool(torch.isfinite(values).all()):
                found.add(Fault.NOT_FINITE, module, "weight", "holds NaN or infinity")
            elif source is not None and f"{module}.weight" in source:
                _plain_against_source(found, source, weight, rows, values)


def _row_bytes(sampler: Sampler, module: str, weight: Weight, form: WeightFormat) -> int:
    if form is WeightFormat.NVFP4:
        return weight.shape[1] // 2 + weight.shape[1] // 16
    if form is WeightFormat.FP8_BLOCK:
        return weight.shape[1] + sampler.reader.info(f"{module}.weight_scale_inv").nbytes
    return weight.shape[1] * sampler.reader.info(f"{module}.weight").dtype.itemsize


def _block_scales(found: Values, module: str, stored: NVFP4Tensor) -> bool:
    """Whether the scales of these rows are scales; a zero with codes behind it loses a block."""
    raw = stored.scale.view(torch.uint8)
    if bool((raw & 0x7F == 0x7F).any()) or bool((raw > 0x80).any()):
        found.add(Fault.BLOCK_SCALE, module, "weight_scale", "holds NaN or a negative number, which no scale can be")
        return False
    used = (stored.packed & 0x77 != 0).unflatten(-1, (-1, 8)).any(-1)
    if bool(((raw & 0x7F == 0) & used).any()):
        found.add(Fault.BLOCK_SCALE, module, "weight_scale", "holds zeros for blocks that are not zero")
        return False
    value = float(stored.scale_2)
    if value == 0 and bool(used.any()):
        found.add(Fault.TENSOR_SCALE, module, "weight_scale_2", "is 0, and the weight is not")
    return 0 < value < math.inf


def _fp8_scales(found: Values, sampler: Sampler, module: str) -> None:
    scale = sampler.whole(f"{module}.weight_scale_inv")
    scale = scale.view(torch.float8_e8m0fnu).float() if scale.dtype.itemsize == 1 else scale.float()
    if not all_finite(scale) or bool((scale < 0).any()):
        found.add(Fault.BLOCK_SCALE, module, "weight_scale_inv", "holds NaN, infinity or a negative number")


def _against_source(
    found: Values, sampler: Sampler, source: CheckpointReader, weight: Weight, rows: Rows, stored: NVFP4Tensor
) -> None:
    module = weight.module
    if f"{module}.weight" not in source:
        return
    rows = Rows(rows.start, min(rows.stop, rows.start + _COMPARED))
    stored = stored._replace(packed=stored.packed[:_COMPARED], scale=stored.scale[:_COMPARED])
    original = found.smoothing.applied(module, source_rows(source, module, rows))
    if original.shape != (rows.stop - rows.start, weight.shape[1]):
        return
    found.judged += 1
    fault = None
    if bool(original.any()) and order.sqnr(original, stored) < order.SURE_DB:
        fault = order.explain(original, stored, _tiled_rows(sampler, weight, rows))
    if fault is None:
        codes = order.compare_codes(original, stored)
        if codes.differing:
            found.first.setdefault(Fault.ROUNDING, (f"{module}.weight", ""))
        found.codes = found.codes.plus(codes)
    elif module not in found.modules.get(fault, ()):
        suffix, text = _EXPLAINED[fault]
        found.add(fault, module, suffix, text)


_EXPLAINED = {
    Fault.NIBBLES: ("weight", "has its two values a byte in the wrong order: the first belongs in the low nibble"),
    Fault.RECIPROCAL: ("weight_scale_2", "is the reciprocal of the tensor scale"),
    Fault.TILED_SCALES: ("weight_scale", "is in the tensor cores' 128 x 4 order, not in rows"),
    Fault.OTHER_VALUES: ("weight", "does not hold the source's weight"),
}


def _tiled_rows(sampler: Sampler, weight: Weight, rows: Rows) -> Tensor | None:
    """The scales of these rows if the file is in the tensor cores' order."""
    height, blocks = weight.shape[0], weight.shape[1] // 16
    first, last = order.tile_of(rows.start, height)
    if tiled_size(height, blocks) != height * blocks:
        return None
    last = -(-rows.stop // 128) * 128
    tile = sampler.rows(f"{weight.module}.weight_scale", Rows(first, last))
    return order.untiled(tile, last - first, blocks)[rows.start - first : rows.stop - first]


def _plain_against_source(found: Values, source: CheckpointReader, weight: Weight, rows: Rows, values: Tensor) -> None:
    if weight.role not in (Role.ATTENTION, Role.DENSE_MLP, Role.ROUTED_EXPERT, Role.SHARED_EXPERT):
        return
    found.judged += 1
    rows = Rows(rows.start, min(rows.stop, rows.start + _COMPARED))
    original = found.smoothing.applied(weight.module, source_rows(source, weight.module, rows))
    if not torch.equal(original, values[:_COMPARED].bfloat16()):
        found.add(Fault.OTHER_VALUES, weight.module, "weight", "does not hold the source's weight")


def _mtp_of_source(found: Values, reader: CheckpointReader, source: CheckpointReader, config: DeepseekV3Config) -> None:
    name = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
    if name in source and name not in reader:
        text = f"is in {source.folder} and not here: the MTP layer was dropped, and nothing can be drafted"
        found.add(Fault.MTP_DROPPED, name.removesuffix(".weight"), "", text)
