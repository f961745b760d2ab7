"""Write a trained model as DeepSeek publishes R1: FP8 E4M3 in 128x128 blocks, BF16 for the rest, MTP as extra layer."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter, TensorSpec
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.inventory import Role, weights
from deepseek_fp4_plugin.numerics import fp8_block
from training.config import CONFIG, GENERATION_CONFIG
from training.model import MLP, Layer, Model, MoE
from training.tokenizer import write_tokenizer

SHARD_BYTES = 14_000_000
README = """---
license: mit
---
# r1_nano

A model of DeepSeek-R1's architecture with 22 million parameters, trained from scratch on generated exercises; the
embedded default of deepseek_fp4_plugin. How it was made: `training/`; what it can do and cannot: `docs/r1_nano.md`.
"""


def named_weights(model: Model) -> dict[str, Tensor]:
    """Every weight under its published name; parts of stacked ones are views."""
    named = {
        "model.embed_tokens.weight": model.embed_tokens,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.lm_head,
    }
    for index, layer in enumerate(model.layers):
        named |= _layer(f"model.layers.{index}", layer)
    name, mtp = f"model.layers.{len(model.layers)}", model.mtp
    named |= _layer(name, mtp.layer)
    named |= {
        f"{name}.embed_tokens.weight": model.embed_tokens,
        f"{name}.enorm.weight": mtp.enorm.weight,
        f"{name}.hnorm.weight": mtp.hnorm.weight,
        f"{name}.eh_proj.weight": mtp.eh_proj,
        f"{name}.shared_head.norm.weight": mtp.norm.weight,
        f"{name}.shared_head.head.weight": model.lm_head,
    }
    return named


def _layer(name: str, layer: Layer) -> dict[str, Tensor]:
    attention = layer.self_attn
    named = {
        f"{name}.input_layernorm.weight": layer.input_layernorm.weight,
        f"{name}.post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
        f"{name}.self_attn.q_a_layernorm.weight": attention.q_a_layernorm.weight,
        f"{name}.self_attn.kv_a_layernorm.weight": attention.kv_a_layernorm.weight,
    }
    for projection in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
        named[f"{name}.self_attn.{projection}.weight"] = getattr(attention, projection)
    if isinstance(layer.mlp, MoE):
        named[f"{name}.mlp.gate.weight"] = layer.mlp.gate
        named[f"{name}.mlp.gate.e_score_correction_bias"] = layer.mlp.bias
        named |= _mlp(f"{name}.mlp.shared_experts", layer.mlp.shared_experts)
        for expert, (gate_up, down) in enumerate(zip(layer.mlp.gate_up_proj, layer.mlp.down_proj, strict=True)):
            named |= _projections(f"{name}.mlp.experts.{expert}", gate_up, down)
    else:
        named |= _mlp(f"{name}.mlp", layer.mlp)
    return named


def _mlp(name: str, mlp: MLP) -> dict[str, Tensor]:
    return _projections(name, mlp.gate_up_proj, mlp.down_proj)


def _projections(name: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    gate, up = gate_up.chunk(2, 0)
    return {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up, f"{name}.down_proj.weight": down}


@torch.no_grad()
def export(model: Model, folder: Path) -> None:
    """Write the whole checkpoint folder (weights, config, tokenizer, model card), replacing an earlier one."""
    values, tensors = {name: v.detach().float().cpu() for name, v in named_weights(model).items()}, {}
    for weight in weights(model.config):
        value = values.pop(weight.name)
        assert tuple(value.shape) == weight.shape, weight.name
        if weight.linear:
            tensors[weight.name], tensors[f"{weight.module}.weight_scale_inv"] = fp8_block.quantize(value)
        elif weight.role is Role.ROUTER and weight.name.endswith("bias"):
            tensors[weight.name] = value
        else:
            tensors[weight.name] = value.bfloat16()
    assert not values, sorted(values)[:3]
    shutil.rmtree(folder, ignore_errors=True)
    plan = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = CheckpointWriter(folder, plan, {"kind": "r1_nano"}, SHARD_BYTES)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish(
        {
            "config.json": json.dumps(CONFIG, indent=2) + "\n",
            "generation_config.json": json.dumps(GENERATION_CONFIG, indent=2) + "\n",
            "README.md": README,
        }
    )
    write_tokenizer(folder)


@torch.no_grad()
def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Model:
    """A trainable model from an exported checkpoint."""
    reader = CheckpointReader(folder)
    config = DeepseekV3Config.from_folder(folder)
    model = Model(config, dtype)
    for name, target in named_weights(model).items():
        value = reader.get(name)
        if f"{name}_scale_inv" in reader:
            value = fp8_block.dequantize(value, reader.get(f"{name}_scale_inv"), torch.float32)
        target.copy_(value)
    reader.close()
    return model
