"""What the config files tell other runtimes of each module, against its tensors.

Here a weight's own tensors decide, so none of this stops anything here. Others build their layers from the lists before
they look at a tensor.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek_fp4_plugin.checkpoint.findings import Fault, Finding, note, warning
from deepseek_fp4_plugin.checkpoint.quant_config import QuantConfig
from deepseek_fp4_plugin.checkpoint.shards import TensorInfo, by_module
from deepseek_fp4_plugin.checkpoint.weight_rules import PLAIN_DTYPES
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.inventory import weights


def declared_findings(
    folder: Path, tensors: Mapping[str, TensorInfo], config: DeepseekV3Config, quantization: QuantConfig
) -> list[Finding]:
    """Of linears: lists that name quantized ones or omit plain ones, kv_b_proj in NVFP4, input scales some have."""
    groups = by_module(tensors)
    four_bit, plain = [], []
    for weight in weights(config):
        group = groups.get(weight.module, {})
        if not weight.linear or "weight" not in group:
            continue
        if group["weight"].dtype == torch.uint8 and "weight_scale_2" in group:
            four_bit.append(weight.module)
        # Runtimes have rules of their own for the MTP layer, and published lists differ on whether they name it.
        elif group["weight"].dtype in PLAIN_DTYPES and (weight.layer or 0) < config.num_hidden_layers:
            plain.append(weight.module)
    if not four_bit:
        return []
    findings = _algorithm(folder, quantization, len(four_bit)) or _lists(folder, quantization, four_bit, plain)
    latent = [module for module in four_bit if module.endswith(".kv_b_proj")]
    if latent:
        sentence = f"{latent[0]} in {folder} is NVFP4; runtimes fold it into the attention and want it in BF16"
        findings.append(note(latent[0], sentence, len(latent), fault=Fault.LATENT_QUANTIZED))
    without = [module for module in four_bit if "input_scale" not in groups[module]]
    if without and len(without) < len(four_bit):
        sentence = f"{without[0]} in {folder} has no input_scale, and other NVFP4 weights here have one"
        sentence += "; FP4 activations cannot be computed with it"
        findings.append(warning(without[0], sentence, len(without), fault=Fault.NO_INPUT_SCALE))
    return findings


def _algorithm(folder: Path, quantization: QuantConfig, count: int) -> list[Finding]:
    algorithm = quantization.quant_algo
    if algorithm and algorithm.upper() in ("NVFP4", "MODELOPT", "MODELOPT_FP4", "NVFP4_AWQ"):
        return []
    said = f"say {algorithm}" if algorithm else "do not say so"
    sentence = f"{count:,} weights in {folder} are NVFP4, and its config files {said}"
    return [note("quant_algo", f"{sentence}; here each weight's own tensors decide", fault=Fault.QUANT_FILES)]


def _lists(folder: Path, quantization: QuantConfig, four_bit: list[str], plain: list[str]) -> list[Finding]:
    findings = []
    wrong = [module for module in four_bit if quantization.excludes(module)]
    if wrong:
        sentence = f"{wrong[0]} in {folder} is NVFP4, and the list of unquantized modules names it"
        findings.append(note(wrong[0], sentence, len(wrong), fault=Fault.LISTS))
    omitted = [module for module in plain if not quantization.excludes(module)]
    if omitted:
        sentence = f"{omitted[0]} in {folder} is not quantized, and the list of unquantized modules omits it"
        findings.append(note(omitted[0], sentence, len(omitted), fault=Fault.LISTS))
    return findings


def absent_code(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Files that `auto_map` names and the folder lacks: who trusts a checkpoint's code cannot open it without them."""
    named = config.get("auto_map")
    entries = list(named.values()) if isinstance(named, dict) else []
    classes = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    # `owner/name--file.Class` is read from that repository of the hub.
    files = {f"{name.partition('.')[0]}.py" for name in classes if isinstance(name, str) and "--" not in name}
    return sorted(file for file in files if not (folder / file).is_file())
