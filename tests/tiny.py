"""A seeded DeepSeek-V3 of a few MB, written as a real FP8 (or BF16) checkpoint: 1 dense + 2 MoE layers + MTP."""

import json
from pathlib import Path
from typing import Any

import torch

from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter, TensorSpec
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.inventory import Role, Weight, weights
from deepseek_fp4_plugin.numerics import fp8_block

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "max_position_embeddings": 2560,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

FP8_SECTION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """CONFIG with changes; a value of None is kept (q_lora_rank: null is a real setting)."""
    return {**CONFIG, **changes}


def write_checkpoint(
    folder: Path, config: dict[str, Any] | None = None, *, fp8: bool = True, seed: int = 0, max_shard_bytes: int = 10**6
) -> Path:
    """Random weights under `folder`, every linear in FP8 blocks when `fp8`. Returns the folder."""
    config = dict(config or CONFIG)
    plan, tensors = [], {}
    generator = torch.Generator().manual_seed(seed)
    for weight in weights(DeepseekV3Config.from_dict(config)):
        value = _random(weight, generator)
        if weight.role in (Role.EMBEDDING, Role.HEAD) and weight.layer is not None:  # the MTP layer's duplicates
            original = "model.embed_tokens.weight" if weight.role is Role.EMBEDDING else "lm_head.weight"
            tensors[weight.name] = tensors[original].clone()
        elif fp8 and weight.linear:
            tensors[weight.name], tensors[f"{weight.module}.weight_scale_inv"] = fp8_block.quantize(value)
        elif weight.name.endswith("e_score_correction_bias"):
            tensors[weight.name] = value
        else:
            tensors[weight.name] = value.bfloat16()
    plan = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = CheckpointWriter(folder, plan, {"kind": "test"}, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    if fp8:
        config["quantization_config"] = FP8_SECTION
    writer.finish({"config.json": json.dumps(config, indent=2)})
    return folder


def _random(weight: Weight, generator: torch.Generator) -> torch.Tensor:
    value = torch.randn(weight.shape, generator=generator)
    if weight.role is Role.NORM:
        return 1 + 0.1 * value
    if weight.name.endswith("e_score_correction_bias"):
        return 0.1 * value
    if weight.role is Role.EMBEDDING:
        return value
    return value * (1.5 / weight.shape[-1] ** 0.5)
