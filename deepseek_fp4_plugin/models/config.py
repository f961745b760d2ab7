"""DeepseekV3Config: the fields of config.json under their own names, checked; derived sizes as properties."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.checkpoint.findings import Finding, Severity, refuse
from deepseek_fp4_plugin.checkpoint.reader import read_json
from deepseek_fp4_plugin.models.config_reading import MTP_FIELDS, read


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension. Source: arXiv 2309.00071 for the method, transformers 5.23 for what each field does.

    mscale, mscale_all_dim: 0 stands for a field that is not given.  attention_factor: of cosines and sines; None
    computes it.  truncate: whether the ramp between kept and divided frequencies has whole pairs as its ends.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


@dataclass(frozen=True)
class DeepseekV3Config:
    """config.json's fields; defaults are those of a config without the feature, not of an absent field (see `read`)."""

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
    rope_interleave: bool = True
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 0

    @classmethod
    def from_folder(cls, folder: str | Path) -> "DeepseekV3Config":
        return cls.from_dict(read_json(Path(folder) / "config.json"), where=f"{folder}/config.json")

    @classmethod
    def from_dict(cls, config: dict[str, Any], where: str = "config.json") -> "DeepseekV3Config":
        """From a parsed config.json, in DeepSeek's original form or the newer `rope_parameters` form.

        Raises CheckpointError for another architecture, a missing field, a value that is none, or a variant this
        program does not compute.
        """
        result, findings = cls.examine(config, where)
        refuse(findings)
        assert result is not None
        return result

    @classmethod
    def examine(
        cls, config: dict[str, Any], where: str = "config.json"
    ) -> tuple["DeepseekV3Config | None", list[Finding]]:
        """The same with everything that was found; None when there are errors among it."""
        reading = read(config, where)
        if any(finding.severity is Severity.ERROR for finding in reading.findings):
            return None, reading.findings
        yarn = reading.values.pop("rope_scaling")
        return cls(**reading.values, rope_scaling=YarnScaling(**yarn) if yarn else None), reading.findings

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

    def is_moe_layer(self, layer: int) -> bool:
        """True for layers with routed experts; the MTP layer is always one."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention magnitude: 1 + 0.1 * mscale * ln(factor) for factors above 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def with_mtp_layers(config: dict[str, Any], count: int) -> dict[str, Any]:
    """config.json of a checkpoint that has `count` MTP layers, whatever the given one says; else unchanged."""
    names = [name for name in MTP_FIELDS if name in config]
    if not names and count:
        names = [MTP_FIELDS[0]]
    return {**config, **{name: count for name in names if config.get(name) != count}}
