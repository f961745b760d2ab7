"""DeepseekV3Config: the fields of config.json under their own names, checked; derived sizes as properties."""

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import read_json

_ARCHITECTURE = "DeepseekV3ForCausalLM"
_LATER_VERSIONS = ("v32", "v3_2", "v4")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension. Source: the V3 config's rope_scaling; arXiv 2309.00071 for the method."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class DeepseekV3Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] = 1

    @classmethod
    def from_folder(cls, folder: str | Path) -> "DeepseekV3Config":
        return cls.from_dict(read_json(Path(folder) / "config.json"), where=f"{folder}/config.json")

    @classmethod
    def from_dict(cls, config: dict[str, Any], where: str = "config.json") -> "DeepseekV3Config":
        """From a parsed config.json, in DeepSeek's original form or the newer `rope_parameters` form.

        Raises CheckpointError for another architecture, a missing field, or a variant this program does not compute.
        """
        _check_architecture(config, where)
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        rope = config.get("rope_parameters") or {}
        values["rope_theta"] = float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
        values["rope_scaling"] = _yarn(config.get("rope_scaling") or rope, where)
        if config.get("num_mtp_layers") is not None:  # the newer name of num_nextn_predict_layers
            values.setdefault("num_nextn_predict_layers", config["num_mtp_layers"])
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise CheckpointError(f"{where} lacks {', '.join(missing)}")
        result = cls(**values)
        result._check_sizes(where)
        return result

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the compressed key/value and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        scale = self.qk_head_dim**-0.5
        yarn = self.rope_scaling
        if yarn and yarn.mscale_all_dim:
            scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
        return scale

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def is_moe_layer(self, layer: int) -> bool:
        """True for layers with routed experts; the MTP layer is always one."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def _check_sizes(self, where: str) -> None:
        if self.n_routed_experts % self.n_group:
            raise CheckpointError(f"{where}: {self.n_routed_experts} experts cannot form n_group={self.n_group} groups")
        if not 1 <= self.topk_group <= self.n_group:
            raise CheckpointError(f"{where}: topk_group={self.topk_group} must lie in 1..n_group={self.n_group}")
        if self.num_experts_per_tok > self.topk_group * (self.n_routed_experts // self.n_group):
            raise CheckpointError(f"{where}: num_experts_per_tok={self.num_experts_per_tok} exceeds the kept experts")
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise CheckpointError(f"{where}: a group needs at least two experts, its score is the sum of its best two")
        if self.qk_rope_head_dim % 2:
            raise CheckpointError(f"{where}: qk_rope_head_dim={self.qk_rope_head_dim} must be even")


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention magnitude: 1 + 0.1 * mscale * ln(factor) for factors above 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _check_architecture(config: dict[str, Any], where: str) -> None:
    architectures = config.get("architectures") or []
    model_type = str(config.get("model_type", ""))
    names = " ".join([*architectures, model_type]).lower()
    if any(version in names for version in _LATER_VERSIONS) or "index_topk" in config:
        raise CheckpointError(
            f"{where} describes {(architectures or [model_type])[0]}: DeepSeek V3.2 and V4 have sparse attention, "
            "which this program does not compute; V3, V3-0324, V3.1, R1 and R1-0528 work"
        )
    if _ARCHITECTURE not in architectures and model_type != "deepseek_v3":
        found = architectures or [model_type or "nothing"]
        raise CheckpointError(f"{where} names architecture {', '.join(found)}; only {_ARCHITECTURE} is supported")
    for field, expected in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("hidden_act", "silu")):
        if config.get(field, expected) != expected:
            raise CheckpointError(f"{where}: {field}={config[field]!r} is not supported, expected {expected!r}")
    if config.get("attention_bias") or config.get("tie_word_embeddings"):
        raise CheckpointError(f"{where}: attention_bias and tie_word_embeddings are not supported")


def _yarn(section: dict[str, Any], where: str) -> YarnScaling | None:
    kind = section.get("type") or section.get("rope_type")
    if not section or kind in (None, "default"):
        return None
    if kind != "yarn":
        raise CheckpointError(f"{where}: rope scaling of type {kind!r} is not supported, only yarn")
    known = {f.name for f in fields(YarnScaling)}
    return YarnScaling(**{key: value for key, value in section.items() if key in known and value is not None})
