"""Which weight format each module has, as files say it: hf_quant_config.json, config.json, and the tensors themselves.

What the file holds decides first: a BF16 weight without scales is unquantized whatever a list says (published NVFP4
checkpoints differ on whether their lists name the unquantized MTP layer). The lists are written for other runtimes and
read for the cache dtype.
"""

import fnmatch
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from deepseek_fp4_plugin.checkpoint.compressed_tensors import PACK_QUANTIZED
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.findings import Fault, Finding, error, note, refuse, warning
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader, read_json

HF_QUANT_CONFIG = "hf_quant_config.json"


class WeightFormat(StrEnum):
    """How a linear's weight is stored; each format's tensors are `<module>.<suffix>`."""

    PLAIN = "plain"  # weight: BF16 or FP32
    FP8_BLOCK = "fp8_block"  # weight: E4M3, weight_scale_inv: FP32, 128 x 128 blocks
    NVFP4 = "nvfp4"  # weight: packed uint8, weight_scale: E4M3, weight_scale_2 and input_scale: FP32 scalars


SUFFIXES = {
    WeightFormat.PLAIN: ("weight",),
    WeightFormat.FP8_BLOCK: ("weight", "weight_scale_inv"),
    WeightFormat.NVFP4: ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}


def detect_format(reader: CheckpointReader, module: str) -> WeightFormat:
    """The format of `module` from its tensors. Raises CheckpointError naming a scale that is missing."""
    info = reader.info(f"{module}.weight")
    if info.dtype == torch.uint8:
        weight_format = WeightFormat.NVFP4
    elif info.dtype == torch.float8_e4m3fn:
        weight_format = WeightFormat.FP8_BLOCK
    elif info.dtype in (torch.bfloat16, torch.float32, torch.float16):
        return WeightFormat.PLAIN
    else:
        raise CheckpointError(f"{module}.weight in {reader.folder} has dtype {info.dtype}, which no format here uses")
    for suffix in SUFFIXES[weight_format]:
        # Weight-only NVFP4 checkpoints have no input_scale; running them with FP4 activations is refused later.
        if suffix != "input_scale" and f"{module}.{suffix}" not in reader:
            raise CheckpointError(
                f"{module}.weight in {reader.folder} is {info.dtype} but {module}.{suffix} is missing; "
                "without its scale the weight means nothing, so download or convert the checkpoint again"
            )
    return weight_format


_WILD = set("*?[")
_COMPRESSED = {PACK_QUANTIZED: "NVFP4", "float-quantized": "fp8"}  # what compressed-tensors calls its formats


@dataclass(frozen=True)
class QuantConfig:
    """What the quantization files of a checkpoint say."""

    quant_algo: str | None = None  # "NVFP4", "fp8" or None
    kv_cache_quant_algo: str | None = None  # "FP8" or None
    exclude_modules: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path, config: dict[str, Any]) -> "QuantConfig":
        """From hf_quant_config.json if there, else from `config` (the parsed config.json); CheckpointError if wrong."""
        result, findings = read_quantization(Path(folder), config)
        refuse(findings)
        return result

    def excludes(self, module: str) -> bool:
        """True when a pattern names the module or an ancestor: exact, case-sensitive wildcard, or `re:` pattern."""
        parts = module.split(".")
        names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        if not self._exact.isdisjoint(names):
            return True
        return any(pattern.fullmatch(name) for pattern in self._patterns for name in names)

    @functools.cached_property
    def _exact(self) -> frozenset[str]:
        return frozenset(name for name in self.exclude_modules if not name.startswith("re:") and not _WILD & set(name))

    @functools.cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        """The wildcards as one pattern: R1 has 62 and 45 thousand modules. Those of `re:` stay by themselves."""
        own = [re.compile(pattern[3:]) for pattern in self.exclude_modules if pattern.startswith("re:")]
        wild = [p for p in self.exclude_modules if not p.startswith("re:") and _WILD & set(p)]
        return [*own, re.compile("|".join(map(fnmatch.translate, wild)))] if wild else own


def read_quantization(folder: Path, config: dict[str, Any]) -> tuple[QuantConfig, list[Finding]]:
    """What the two files say, and where they are wrong or disagree; hf_quant_config.json goes before config.json."""
    findings: list[Finding] = []
    section = _read_section(config, folder / "config.json", findings)
    path = folder / HF_QUANT_CONFIG
    if not path.exists():
        return section, findings
    try:
        content = read_json(path)
    except CheckpointError as problem:
        return section, [*findings, error(HF_QUANT_CONFIG, str(problem))]
    own = _read_own_file(content, path, findings)
    if own.kv_cache_quant_algo not in (None, "FP8"):
        sentence = f"{path}: kv_cache_quant_algo is {own.kv_cache_quant_algo}, which is not offered here"
        findings.append(warning("kv_cache_quant_algo", f"{sentence}; the cache is kept in the model's dtype"))
    if config.get("quantization_config"):
        findings += _disagreements(own, section, folder)
    return own, findings


def _read_own_file(content: dict[str, Any], path: Path, findings: list[Finding]) -> QuantConfig:
    take = _Section(content.get("quantization"), "quantization", path, findings, may_be_absent=False)
    algorithm, size = take.text("quant_algo"), take.content.get("group_size", 16)
    if algorithm == "NVFP4" and size != 16:
        sentence = f"{path}: quantization.group_size is {json.dumps(size)[:60]}, and NVFP4 has blocks of 16"
        findings.append(warning("group_size", f"{sentence}; it is not used", fault=Fault.QUANT_FILES))
    return QuantConfig(algorithm, take.text("kv_cache_quant_algo"), take.names("exclude_modules"))


def _read_section(config: dict[str, Any], path: Path, findings: list[Finding]) -> QuantConfig:
    field = "quantization_config"
    take = _Section(config.get(field), field, path, findings)
    cache = _Section(take.content.get("kv_cache_scheme"), f"{field}.kv_cache_scheme", path, findings).content
    is_fp8 = cache.get("num_bits") == 8 and cache.get("type") == "float"
    if cache and not is_fp8:
        sentence = f"{path}: {field}.kv_cache_scheme asks for a cache that is not FP8; it is kept in the model's dtype"
        findings.append(warning(f"{field}.kv_cache_scheme", sentence))
    algo = take.text("quant_algo") or _COMPRESSED.get(take.text("format") or "") or take.text("quant_method")
    return QuantConfig(algo, "FP8" if is_fp8 else None, take.names("ignore") or take.names("exclude_modules"))


class _Section:
    """An object of a quantization file; a field of another type becomes a finding and counts as absent."""

    def __init__(self, content: Any, field: str, path: Path, findings: list[Finding], may_be_absent: bool = True):
        self.field, self.path, self.findings = field, path, findings
        if not isinstance(content, dict) and not (content is None and may_be_absent):
            self._wrong(field, content, "an object")
        self.content: dict[str, Any] = content if isinstance(content, dict) else {}

    def text(self, name: str) -> str | None:
        value = self.content.get(name)
        if not isinstance(value, str | None):
            self._wrong(f"{self.field}.{name}", value, "a name or null")
            return None
        return value

    def names(self, name: str) -> tuple[str, ...]:
        value = self.content.get(name) or []
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            self._wrong(f"{self.field}.{name}", value, "a list of module names")
            return ()
        for pattern in value:
            if pattern.startswith("re:") and not _compiles(pattern[3:]):
                self._wrong(f"{self.field}.{name}", pattern, "a pattern that can be compiled behind re:")
                return ()
        return tuple(value)

    def _wrong(self, field: str, value: Any, expected: str) -> None:
        sentence = f"{self.path}: {field} is {json.dumps(value)[:60]}, expected {expected}"
        self.findings.append(error(field, f"{sentence}; take the file from the original checkpoint"))


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _disagreements(own: QuantConfig, section: QuantConfig, folder: Path) -> list[Finding]:
    found = []
    algorithms = {name.lower() for name in (own.quant_algo, section.quant_algo) if name and name != "modelopt"}
    if len(algorithms) > 1:  # "modelopt" is config.json's name for the program where it does not name the format
        sentence = f"{HF_QUANT_CONFIG} says {own.quant_algo} and config.json {section.quant_algo}"
        sentence += "; each weight's own tensors decide"
        found.append(warning("quant_algo", f"{folder}: {sentence}", fault=Fault.QUANT_FILES))
    if own.kv_cache_quant_algo != section.kv_cache_quant_algo:
        sentence = f"{HF_QUANT_CONFIG} asks for a cache in {own.kv_cache_quant_algo or 'the dtype of the model'}"
        sentence += f" and config.json for {section.kv_cache_quant_algo or 'the dtype of the model'}"
        sentence += f"; {HF_QUANT_CONFIG} is followed"
        found.append(warning("kv_cache_quant_algo", f"{folder}: {sentence}", fault=Fault.QUANT_FILES))
    if set(own.exclude_modules) != set(section.exclude_modules):
        sentence = "the lists of unquantized modules in its two files differ; each weight's own tensors decide"
        found.append(note("exclude_modules", f"{folder}: {sentence}", fault=Fault.QUANT_FILES))
    return found


def block_size_findings(config: Mapping[str, Any], where: str) -> list[Finding]:
    """Whether `weight_block_size` is what FP8 tensors with `weight_scale_inv` are read with: 128 x 128."""
    section = config.get("quantization_config")
    if (
        not isinstance(section, dict)
        or "weight_block_size" not in section
        or section["weight_block_size"] == [128, 128]
    ):
        return []
    field = "quantization_config.weight_block_size"
    sentence = (
        f"{where}: {field} is {json.dumps(section['weight_block_size'])[:60]}, but the FP8 weights are read in blocks"
    )
    return [error(field, f"{sentence} of [128, 128]; take a checkpoint with those, or correct the field")]


# The ModelOpt release whose bits are written (docs/format.md). TensorRT-LLM and vLLM look for this producer's name
# before they read the rest, so it names the format; README.md of the checkpoint names the program.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def nvfp4_quant_config(exclude_modules: Sequence[str], kv_cache: str | None) -> dict[str, Any]:
    """The content of hf_quant_config.json for an NVFP4 checkpoint, as ModelOpt writes it.

    kv_cache: "FP8" or None.
    """
    return {
        "producer": dict(PRODUCER),
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": kv_cache,
            "group_size": 16,
            "exclude_modules": sorted(exclude_modules),
        },
    }


def nvfp4_config_section(quant_config: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` section of config.json that newer ModelOpt exports carry beside the file above."""
    quantization = quant_config["quantization"]
    four_bit = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": quantization["group_size"]}
    section = {
        "config_groups": {
            "group_0": {"input_activations": dict(four_bit), "weights": dict(four_bit), "targets": ["Linear"]}
        },
        "ignore": quantization["exclude_modules"],
        "quant_algo": "NVFP4",
        "producer": quant_config["producer"],
        "quant_method": "modelopt",
    }
    if quantization["kv_cache_quant_algo"] == "FP8":
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return section
