"""Checkpoints of DeepSeek's architecture with random weights; the same seed gives the same weights in both formats."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter, TensorSpec
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_r1 import CONFIG_JSON
from deepseek_fp4_plugin.models.inventory import Weight, weights
from deepseek_fp4_plugin.numerics import nvfp4

# 268M parameters.
CONFIG = {
    **CONFIG_JSON,
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 768,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
    "num_nextn_predict_layers": 0,
}
QUANTIZATION = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}


def write_checkpoint(folder: Path, config: dict[str, Any], quantized: bool) -> int:
    """BF16, or every linear in NVFP4. Returns the number of parameters."""
    inventory = list(weights(DeepseekV3Config.from_dict(config)))
    specs = [spec for weight in inventory for spec in _specs(weight, quantized)]
    writer = CheckpointWriter(folder, specs, {"kind": "benchmark"}, 10**10)
    generator = torch.Generator().manual_seed(0)
    count = 0
    for weight in inventory:
        value = _random(weight, generator)
        count += value.numel()
        for name, tensor in _tensors(weight, value, quantized):
            writer.write(name, tensor)
    files = {"config.json": json.dumps(config, indent=1)}
    if quantized:
        section = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": QUANTIZATION}
        files["hf_quant_config.json"] = json.dumps(section)
    writer.finish(files)
    return count


def _specs(weight: Weight, quantized: bool) -> list[TensorSpec]:
    shape = tuple(weight.shape)
    if not (quantized and weight.linear):
        dtype = torch.float32 if weight.name.endswith("bias") else torch.bfloat16
        return [TensorSpec(weight.name, dtype, shape)]
    out, width = shape
    return [
        TensorSpec(weight.name, torch.uint8, (out, width // 2)),
        TensorSpec(f"{weight.module}.weight_scale", torch.float8_e4m3fn, (out, width // 16)),
        TensorSpec(f"{weight.module}.weight_scale_2", torch.float32, ()),
    ]


def _tensors(weight: Weight, value: torch.Tensor, quantized: bool) -> Iterator[tuple[str, torch.Tensor]]:
    if not (quantized and weight.linear):
        yield weight.name, value
        return
    packed, scale, scale_2 = nvfp4.quantize(value)
    yield weight.name, packed
    yield f"{weight.module}.weight_scale", scale
    yield f"{weight.module}.weight_scale_2", scale_2


def _random(weight: Weight, generator: torch.Generator) -> torch.Tensor:
    if len(weight.shape) == 1:
        return torch.zeros(weight.shape) if weight.name.endswith("bias") else torch.ones(weight.shape).bfloat16()
    return (torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5).bfloat16()
