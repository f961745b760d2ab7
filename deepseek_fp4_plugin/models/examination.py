"""Everything that can be said of a checkpoint from its config files and headers, before a weight is read.

One list of findings that does not stop at the first. The loader and the quantizer refuse at its errors and say its
warnings, `inspect` shows it whole. What values must be (no NaN in a scale) is checked where they are read.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.findings import Fault, Finding, Severity, error, note, refuse, warning
from deepseek_fp4_plugin.checkpoint.quant_config import (
    QuantConfig,
    WeightFormat,
    block_size_findings,
    read_quantization,
)
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader, read_json
from deepseek_fp4_plugin.checkpoint.scales import dtype_name
from deepseek_fp4_plugin.checkpoint.shards import Shards, TensorInfo, by_module, scan
from deepseek_fp4_plugin.checkpoint.weight_rules import PLAIN_DTYPES, TILED, Problem, judge, read_of
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.config_reading import MTP_FIELDS
from deepseek_fp4_plugin.models.inventory import Role, Weight, weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examination:
    """config: without the MTP layer where the checkpoint has none; None when config.json cannot be used."""

    folder: Path
    config: DeepseekV3Config | None
    quantization: QuantConfig
    shards: Shards
    findings: tuple[Finding, ...]

    def usable(self, result: str = "") -> tuple[DeepseekV3Config, CheckpointReader]:
        """Says the warnings and returns what is needed to read the weights; raises CheckpointError at an error.

        result: of who writes a checkpoint from this one, what to call it; tensors that nothing reads are said then.
        """
        refuse(self.findings)
        for finding in self.findings:
            if finding.unused and result:
                logger.warning("%s, and %s is without", finding, result)
            elif finding.severity is Severity.WARNING:
                logger.warning("%s", finding)
        assert self.config is not None
        return self.config, CheckpointReader(self.folder, self.shards)


def examine(folder: Path) -> Examination:
    """Look at a whole checkpoint. Raises nothing: what is wrong is in the findings, errors first."""
    findings: list[Finding] = []
    config, quantization, raw = None, QuantConfig(), {}
    shards = scan(folder)
    if folder.is_dir():
        try:
            raw = read_json(folder / "config.json")
        except CheckpointError as problem:
            findings.append(error("config.json", str(problem)))
        else:
            config, findings = DeepseekV3Config.examine(raw, f"{folder}/config.json")
            quantization, more = read_quantization(folder, raw)
            findings += more
    findings += shards.findings
    if config is not None and shards.tensors:
        whole = not any(finding.severity is Severity.ERROR for finding in shards.findings)
        config, more = examine_weights(folder, shards.tensors, config, raw, whole)
        findings += more
    findings.sort(key=lambda finding: list(Severity).index(finding.severity))
    return Examination(folder, config, quantization, shards, tuple(findings))


def examine_weights(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    config: DeepseekV3Config,
    raw: Mapping[str, Any],
    whole: bool = True,
) -> tuple[DeepseekV3Config, list[Finding]]:
    """Every tensor against the config; returns the config with the MTP layer only if it is there.

    raw: the parsed config.json.  whole: false when shards are missing, whose tensors are then not named one by one.
    """
    groups, found = by_module(tensors), _Problems(folder)
    config, findings, used = _mtp_layers(folder, tensors, config, raw, whole)
    formats: dict[str, WeightFormat | None] = {}
    for weight in weights(config):
        module, _, suffix = weight.name.rpartition(".")
        group = groups.get(module, {})
        if not group and (not whole or may_be_absent(weight, config)):
            continue
        if suffix != "weight":
            used.add(weight.name)
            found.add_plain(weight, group.get(suffix))
            continue
        verdict = judge(group, weight.shape)
        formats[module] = verdict.format
        for problem in verdict.problems or _unreadable_here(weight, verdict.format):
            found.add(module, problem)
        for name in verdict.leftover:
            found.add_leftover(f"{module}.{name}")
        used.update(f"{module}.{name}" for name in read_of(group, verdict))
    findings += found.findings()
    if WeightFormat.FP8_BLOCK in formats.values():
        findings += block_size_findings(raw, f"{folder}/config.json")
    findings += _unplaced(folder, [name for name in tensors if name not in used], formats)
    return config, findings


def _fault_of(problem: Problem) -> Fault | None:
    if problem.kind == "missing":
        return Fault.MISSING_TENSOR
    if problem.kind in ("no weight_scale", "no weight_scale_2"):
        return Fault.NO_SCALE
    if problem.kind == TILED:
        return Fault.TILED_SCALES
    if problem.kind in ("scale shape", "shape of weight_scale"):
        return Fault.SCALE_SIZE
    return None


def _unreadable_here(weight: Weight, weight_format: WeightFormat | None) -> tuple[Problem, ...]:
    """Formats that are read for linears only."""
    whole_only = weight.role in (Role.EMBEDDING, Role.HEAD, Role.NORM, Role.ROUTER)
    if whole_only and (
        weight_format is WeightFormat.NVFP4 or (weight_format is WeightFormat.FP8_BLOCK and len(weight.shape) != 2)
    ):
        text = f"is {weight_format}, which this program reads for linear layers only; take a checkpoint with it in BF16"
        return (Problem(f"{weight_format} {weight.role}", "weight", text),)
    return ()


def may_be_absent(weight: Weight, config: DeepseekV3Config) -> bool:
    """The MTP layer's copies of embedding and head equal the main model's, and some exporters leave them out."""
    return weight.layer == config.num_hidden_layers and weight.role in (Role.EMBEDDING, Role.HEAD)


class _Problems:
    """Problems of single tensors, equal ones together: of 40,000 experts with one fault the first is named."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.of_kind: dict[str, Finding] = {}

    def add(self, module: str, problem: Problem) -> None:
        name = f"{module}.{problem.suffix}"
        if problem.text:
            sentence = f"{name} in {self.folder} {problem.text.replace('{module}', module)}"
        else:
            sentence = f"{self.folder} has no tensor {name}; the checkpoint is incomplete, download it again"
        self._count(problem.kind, error(name, sentence, fault=_fault_of(problem)))

    def add_plain(self, weight: Weight, info: TensorInfo | None) -> None:
        """Of a tensor that is never quantized, such as the router's bias."""
        module, _, suffix = weight.name.rpartition(".")
        if info is None:
            self.add(module, Problem("missing", suffix, ""))
        elif info.dtype not in PLAIN_DTYPES:
            text = f"has dtype {dtype_name(info.dtype)}, expected a floating one without scales"
            self.add(module, Problem(f"plain dtype {info.dtype}", suffix, text))
        elif info.shape != weight.shape:
            text = f"has shape {list(info.shape)}, but config.json implies {list(weight.shape)}"
            self.add(module, Problem(f"shape of {suffix}", suffix, text))

    def add_leftover(self, name: str) -> None:
        sentence = (
            f"{name} in {self.folder} is not named by the index and belongs to a weight that the index takes from"
        )
        self._count("leftover", warning(name, f"{sentence} another shard, without scales; it is not used", 1, True))

    def findings(self) -> list[Finding]:
        return list(self.of_kind.values())

    def _count(self, kind: str, finding: Finding) -> None:
        first = self.of_kind.get(kind)
        self.of_kind[kind] = finding if first is None else replace(first, count=first.count + 1)


def _mtp_layers(
    folder: Path, tensors: Mapping[str, TensorInfo], config: DeepseekV3Config, raw: Mapping[str, Any], whole: bool
) -> tuple[DeepseekV3Config, list[Finding], set[str]]:
    """The config with the MTP layer that can be used, what does not agree, and the tensors that this accounts for."""
    where, field = f"{folder}/config.json", MTP_FIELDS[0]
    last, declared = config.num_hidden_layers, config.num_nextn_predict_layers
    given = any(name in raw for name in MTP_FIELDS)
    layers = _by_layer(tensors)
    mtp = sorted(layer for layer in layers if f"model.layers.{layer}.eh_proj.weight" in tensors)
    if mtp and mtp[0] != last:
        sentence = f"{where}: num_hidden_layers is {last}, but the first MTP layer (the one with eh_proj) is"
        advice = f"set num_hidden_layers to {mtp[0]} and {field} to 1"
        finding = error("num_hidden_layers", f"{sentence} model.layers.{mtp[0]}; {advice}")
        return config, [finding], {name for layer in mtp for name in layers[layer]}
    if declared and last not in layers:
        sentence = f"{where} counts {declared} MTP layer{'s' if declared > 1 else ''} ({field}), but no tensor of"
        sentence += f" model.layers.{last} is here; the checkpoint is used without"
        finding = warning(field, sentence, fault=Fault.MTP_ABSENT)
        return replace(config, num_nextn_predict_layers=0), [finding] if given and whole else [], set()
    if declared > 1:
        sentence = f"{where}: {field} is {declared}, and this program computes one MTP layer"
        finding = error(field, f"{sentence}; set it to 1 to use the first alone, or to 0 to go without")
        return config, [finding], {name for layer in layers if layer > last for name in layers[layer]}
    findings = []
    if not given and last in mtp:
        sentence = f"{where} does not say {field}; model.layers.{last} is taken as the MTP layer that it looks like"
        findings.append(warning(field, sentence, fault=Fault.MTP_UNCOUNTED))
    unread = {layer: layers[layer] for layer in sorted({*mtp, *({last} & layers.keys())}) if layer >= last + declared}
    if unread:
        findings.append(_unread_mtp(folder, unread, declared))
    return config, findings, {name for names in unread.values() for name in names}


def _by_layer(tensors: Iterable[str]) -> dict[int, list[str]]:
    layers: dict[int, list[str]] = {}
    for name in tensors:
        if match := re.match(r"model\.layers\.(\d+)\.", name):
            layers.setdefault(int(match[1]), []).append(name)
    return layers


def _unread_mtp(folder: Path, unread: Mapping[int, list[str]], declared: int) -> Finding:
    names = " and ".join(f"model.layers.{layer}" for layer in unread)
    kind = "an MTP layer" if len(unread) == 1 else "MTP layers"
    sentence = f"the {sum(map(len, unread.values()))} tensors of {names} in {folder}, {kind}, are not used"
    advice = "one is computed here" if declared else "set it to 1 to keep the layer"
    finding = f"{sentence}: config.json counts {declared} ({MTP_FIELDS[0]}); {advice}"
    fault = None if declared else Fault.MTP_UNCOUNTED
    return warning(f"model.layers.{min(unread)}", finding, unused=True, fault=fault)


_CACHE_SCALE = "a scale of the K/V cache"


def _unplaced(folder: Path, unread: Sequence[str], formats: Mapping[str, WeightFormat | None]) -> list[Finding]:
    """What the tensors are that belong to no weight: known ones that nothing needs, or those of another model."""
    kinds: dict[str, list[str]] = {}
    for name in unread:
        kinds.setdefault(_kind_of(name, formats), []).append(name)
    findings = []
    for kind, names in kinds.items():
        if kind:
            ending = "is used with a cache in FP8 alone" if kind is _CACHE_SCALE else "is not used"
            sentence = f"{names[0]} in {folder} is {kind} and {ending}"
            findings.append(note(names[0], sentence, len(names), unused=True))
        else:
            sentence = f"{folder} has {len(names)} tensors this model has no place for, first {names[0]}; "
            sentence += "does config.json belong to these weights?"
            findings.append(error(names[0], sentence, fault=Fault.OTHER_MODEL))
    return findings


def _kind_of(name: str, formats: Mapping[str, WeightFormat | None]) -> str:
    """In words, for a tensor that a checkpoint of this architecture may have; else empty."""
    module, _, suffix = name.rpartition(".")
    if name.endswith("rotary_emb.inv_freq"):
        return "a buffer of rotary frequencies (computed from config.json here)"
    if suffix in ("k_scale", "v_scale", "kv_scale"):
        return _CACHE_SCALE
    if suffix == "input_scale" and formats.get(module) is WeightFormat.FP8_BLOCK:
        return "an activation scale of FP8 (activations are not rounded to FP8 here)"
    return ""
