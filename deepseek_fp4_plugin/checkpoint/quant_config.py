"""Which weight format each module has, as files say it: hf_quant_config.json, config.json, and the tensors themselves.

What the file holds decides first: a BF16 weight without scales is unquantized whatever a list says (published NVFP4
checkpoints differ on whether their lists name the unquantized MTP layer). The lists are written for other runtimes and
read for the cache dtype.
"""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
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


@dataclass(frozen=True)
class QuantConfig:
    """What the quantization files of a checkpoint say."""

    quant_algo: str | None = None  # "NVFP4", "fp8" or None
    kv_cache_quant_algo: str | None = None  # "FP8" or None
    exclude_modules: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | Path, config: dict[str, Any]) -> "QuantConfig":
        """From hf_quant_config.json if there, else from `config` (the parsed config.json)."""
        path = Path(folder) / HF_QUANT_CONFIG
        if path.exists():
            section = read_json(path).get("quantization", {})
            return cls(
                section.get("quant_algo"),
                section.get("kv_cache_quant_algo"),
                tuple(section.get("exclude_modules") or ()),
            )
        section = config.get("quantization_config") or {}
        cache = section.get("kv_cache_scheme") or {}
        return cls(
            section.get("quant_algo") or section.get("quant_method"),
            "FP8" if cache.get("num_bits") == 8 and cache.get("type") == "float" else None,
            tuple(section.get("ignore") or section.get("exclude_modules") or ()),
        )

    def excludes(self, module: str) -> bool:
        """True when a pattern names the module or an ancestor: exact, case-sensitive wildcard, or `re:` pattern."""
        parts = module.split(".")
        names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        for pattern in self.exclude_modules:
            if pattern.startswith("re:"):
                if any(re.fullmatch(pattern[3:], name) for name in names):
                    return True
            elif any(fnmatch.fnmatchcase(name, pattern) for name in names):
                return True
        return False


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
