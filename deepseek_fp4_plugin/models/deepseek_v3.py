"""DeepseekV3ForCausalLM: the main model of DeepSeek-V3 and R1.

Hidden states are [T, hidden] over all requests' tokens; what belongs to which request is in the ForwardBatch.
Source: arXiv 2412.19437; equality with transformers is proven by tests/parity/test_model.py.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from deepseek_fp4_plugin.checkpoint.quant_config import QuantConfig
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.weights import Activations
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.embedding import LanguageModelHead, VocabEmbedding
from deepseek_fp4_plugin.layers.mla import MLA
from deepseek_fp4_plugin.layers.mlp import GatedMLP
from deepseek_fp4_plugin.layers.moe import MoE
from deepseek_fp4_plugin.layers.norm import RMSNorm
from deepseek_fp4_plugin.layers.rotary import inverse_frequencies
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.parallel.mesh import Mesh


class DeepseekV3DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and a residual."""

    def __init__(self, index: int, config: DeepseekV3Config, mesh: Mesh):
        super().__init__()
        name = f"model.layers.{index}"
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(f"{name}.self_attn", config, mesh)
        self.post_attention_layernorm = RMSNorm(
            f"{name}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps
        )
        self.mlp: MoE | GatedMLP
        if index >= config.num_hidden_layers or config.is_moe_layer(index):  # the MTP layer always has experts
            self.mlp = MoE(f"{name}.mlp", config, mesh)
        else:
            self.mlp = GatedMLP(f"{name}.mlp", config.hidden_size, config.intermediate_size, mesh)

    def load(self, source: WeightSource) -> None:
        for part in self.children():
            part.load(source)  # type: ignore[operator]

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: Tensor | None) -> Tensor:
        hidden = ops.add(hidden, self.self_attn(self.input_layernorm(hidden), cos, sin, batch, cache))
        return ops.add(hidden, self.mlp(self.post_attention_layernorm(hidden)))


class DeepseekV3Model(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: DeepseekV3Config, mesh: Mesh):
        super().__init__()
        self.config = config
        self.embed_tokens = VocabEmbedding("model.embed_tokens", config.vocab_size, config.hidden_size, mesh)
        self.layers = nn.ModuleList(DeepseekV3DecoderLayer(i, config, mesh) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryAngles(config)

    def forward(self, batch: ForwardBatch, cache: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [T, hidden].  cache: [layers, blocks, block_size, latent + rope]."""
        hidden = self.embed_tokens(batch.input_ids)
        cos, sin = self.rotary(batch.positions)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, cos, sin, batch, None if cache is None else cache[index])
        return self.norm(hidden)


class RotaryAngles(nn.Module):
    """Cosines and sines for positions, with the config's YaRN."""

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        yarn = config.rope_scaling
        self.frequencies = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, yarn)
        self.magnitude = yarn.magnitude if yarn else 1.0

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        return ops.cos_sin(positions, self.frequencies, self.magnitude)


class DeepseekV3ForCausalLM(nn.Module):
    """The model with its vocabulary head and, where the checkpoint has one, its MTP module (`mtp`, else None)."""

    def __init__(self, config: DeepseekV3Config, mesh: Mesh | None = None):
        super().__init__()
        from deepseek_fp4_plugin.models.mtp import DeepseekV3MTP  # mtp.py builds on this file's decoder layer

        self.config = config
        self.mesh = mesh or Mesh()
        self.path: Path | None = None  # where the weights came from; LLM finds the tokenizer there
        self.quantization = QuantConfig()  # what that checkpoint says of itself
        self.model = DeepseekV3Model(config, self.mesh)
        self.lm_head = LanguageModelHead("lm_head", config.vocab_size, config.hidden_size, self.mesh)
        self.mtp = DeepseekV3MTP(config, self.mesh) if config.num_nextn_predict_layers else None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
        nvfp4_activations: str = "auto",
        mesh: Mesh | None = None,
        backend: str | None = None,
    ) -> "DeepseekV3ForCausalLM":
        """Load a folder, a Hugging Face id, or the embedded `r1_nano`. See models/loading.py."""
        from deepseek_fp4_plugin.models.loading import load_model

        return load_model(path, dtype, device, nvfp4_activations, mesh, backend)

    def forward(self, batch: ForwardBatch, cache: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [T, hidden]."""
        return self.model(batch, cache)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to FP32 [rows, vocab]; only for the rows that will be sampled."""
        return self.lm_head(hidden).float()


def resolve_activations(choice: str, fp4_tensor_cores: bool) -> Activations:
    """`auto` is fp4 where FP4 tensor cores exist and bf16 elsewhere. Raises ValueError for anything else."""
    if choice == "auto":
        return "fp4" if fp4_tensor_cores else "bf16"
    if choice == "bf16":
        return "bf16"
    if choice == "fp4":
        return "fp4"
    raise ValueError(f"nvfp4_activations={choice!r} is not one of auto, bf16, fp4")
