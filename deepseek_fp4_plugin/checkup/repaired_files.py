"""The small files of a repaired checkpoint: the old ones, mended where a finding tells of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.checkpoint.findings import Fault
from deepseek_fp4_plugin.checkpoint.hub import is_small_file
from deepseek_fp4_plugin.checkpoint.json_files import read_json
from deepseek_fp4_plugin.checkpoint.quant_config import (
    HF_QUANT_CONFIG,
    QuantConfig,
    WeightFormat,
    nvfp4_config_section,
    nvfp4_quant_config,
)
from deepseek_fp4_plugin.checkup.diagnosis import Diagnosis
from deepseek_fp4_plugin.checkup.text_files import declared_id, token_ids
from deepseek_fp4_plugin.models.config import DeepseekV3Config, with_mtp_layers
from deepseek_fp4_plugin.quantization.plan import LAYOUTS, excluded_modules

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_REWRITES_LISTS = {Fault.LISTS, Fault.QUANT_FILES, Fault.LATENT_QUANTIZED, Fault.MTP_DROPPED}


def repaired_files(
    diagnosis: Diagnosis, config: DeepseekV3Config, formats: Mapping[str, WeightFormat]
) -> dict[str, str | bytes]:
    """Name -> content.  config: of the result.  formats: module -> format in the result, of every linear."""
    faults = {finding.fault for finding in diagnosis.findings}
    files = _small_files(diagnosis.folder)
    if diagnosis.source and faults & {Fault.NO_TOKENIZER, Fault.CHAT_TEMPLATE, Fault.VOCABULARY}:
        original = _small_files(diagnosis.source.folder)
        files |= {name: original[name] for name in _TOKENIZER if name in original}
    if Fault.TRUNCATION in faults:
        tokenizer = json.loads(files["tokenizer.json"])
        files["tokenizer.json"] = _json({**tokenizer, "truncation": None, "padding": None})
    raw = with_mtp_layers(read_json(diagnosis.folder / "config.json"), config.num_nextn_predict_layers)
    if Fault.AUTO_MAP in faults:
        raw.pop("auto_map", None)
    if Fault.SPECIAL_TOKENS in faults:
        raw = _special_tokens(files, raw)
    if faults & _REWRITES_LISTS and WeightFormat.NVFP4 in formats.values():
        excluded = _excluded(config, formats)
        quantization = nvfp4_quant_config(excluded, diagnosis.examination.quantization.kv_cache_quant_algo)
        files[HF_QUANT_CONFIG] = _json(quantization)
        raw["quantization_config"] = nvfp4_config_section(quantization)
    files["config.json"] = _json(raw)
    return files


def _small_files(folder: Path) -> dict[str, str | bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and is_small_file(path.name) and not path.name.endswith(".index.json")
    }


def _special_tokens(files: dict[str, str | bytes], raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with the tokenizer's ids, and generation_config.json too."""
    ids = token_ids(json.loads(files["tokenizer.json"]))
    beside = json.loads(files.get("tokenizer_config.json", "{}"))
    right = {f"{name}_id": declared_id(ids, beside, name) for name in ("bos_token", "eos_token")}
    right = {name: number for name, number in right.items() if number is not None}
    if "generation_config.json" in files:
        generation = json.loads(files["generation_config.json"])
        files["generation_config.json"] = _json(_corrected(generation, right))
    return _corrected(raw, right)


def _corrected(content: dict[str, Any], right: Mapping[str, int | None]) -> dict[str, Any]:
    """A list that holds the right id is kept."""

    def wrong(name: str, number: int | None) -> bool:
        value = content.get(name)
        return value is not None and (number not in value if isinstance(value, list) else value != number)

    return {**content, **{name: number for name, number in right.items() if wrong(name, number)}}


def _excluded(config: DeepseekV3Config, formats: Mapping[str, WeightFormat]) -> list[str]:
    """A layout's own list where it says what the tensors are, else every plain linear by name."""
    plain = {module for module, form in formats.items() if form is not WeightFormat.NVFP4}
    for layout in LAYOUTS:
        names = excluded_modules(config, layout)
        listed = QuantConfig(exclude_modules=tuple(names))
        if all(listed.excludes(module) == (module in plain) for module in formats):
            return names
    return sorted({"lm_head", *plain})


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
