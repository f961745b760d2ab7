"""DeepseekV3ForCausalLM: the main model of DeepSeek-V3 and R1.

Hidden states are [T, hidden] over all requests' tokens; what belongs to which request is in the ForwardBatch.
Source: arXiv 2412.19437; equality with transformers is proven by tests/parity/test_model.py.
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from deepseek_fp4_plugin.checkpoint.quant_config import QuantConfig
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.embedding import LanguageModelHead, VocabEmbedding
from deepseek_fp4_plugin.layers.moe import MoE
from deepseek_fp4_plugin.layers.norm import RMSNorm
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.decoder import DeepseekV3DecoderLayer, RotaryAngles
from deepseek_fp4_plugin.models.loading import Loadable, Progress, load_parts, open_checkpoint
from deepseek_fp4_plugin.models.mtp import DeepseekV3MTP
from deepseek_fp4_plugin.models.random_weights import LoadFormat
from deepseek_fp4_plugin.parallel.mesh import Mesh


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
        layers = cast("list[DeepseekV3DecoderLayer]", list(self.layers))
        norms = [*(layer.input_layernorm for layer in layers), self.norm]
        normed = norms[0](hidden)
        for index, layer in enumerate(layers):
            own = None if cache is None else cache[index]
            hidden, normed = layer.before(norms[index + 1], hidden, normed, cos, sin, batch, own)
        return normed


class DeepseekV3ForCausalLM(nn.Module):
    """The model with its vocabulary head and, where the checkpoint has one, its MTP module (`mtp`, else None)."""

    def __init__(self, config: DeepseekV3Config, mesh: Mesh | None = None):
        super().__init__()
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
        progress: Progress | None = None,
        load_format: LoadFormat = "auto",
    ) -> "DeepseekV3ForCausalLM":
        """Load a folder, a Hugging Face id, or the embedded `r1_nano`; in evaluation mode.

        dtype: of activations and decoded weights; "auto" is BF16.  nvfp4_activations: auto, bf16, fp4, fp8 or int8.
        mesh: this rank's place; only its slices are read.  load_format: dummy makes random weights of the folder's
        config.json and hf_quant_config.json, and reads none.
        Raises CheckpointError for a checkpoint that cannot be used, ValueError for a wrong choice.
        """
        with open_checkpoint(path, dtype, device, nvfp4_activations, mesh, backend, load_format) as checkpoint:
            model = cls(checkpoint.config, mesh)
            load_parts(model.parts(), checkpoint.source, progress)
            model.path = checkpoint.folder
            model.quantization = checkpoint.quantization
        return model.eval()

    def parts(self) -> list[Loadable]:
        """In the order in which they are loaded."""
        parts = [self.model.embed_tokens, *self.model.layers, self.model.norm, self.lm_head]
        return parts if self.mtp is None else [*parts, self.mtp]

    def count_expert_load(self) -> dict[int, Tensor]:
        """Count from now on: by layer (the MTP module's too), int64 [experts] of the tokens that chose each, kept on
        the device. Rows that only fill a recorded step up are counted with the others.
        """
        counts: dict[int, Tensor] = {}
        for part in self.modules():
            if isinstance(part, MoE):
                device = part.gate.weight.bias.device
                part.load_count = torch.zeros(self.config.n_routed_experts, dtype=torch.int64, device=device)
                counts[part.layer] = part.load_count
        return counts

    def forward(self, batch: ForwardBatch, cache: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [T, hidden]."""
        return self.model(batch, cache)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to FP32 [rows, vocab]; only for the rows that will be sampled."""
        return self.lm_head(hidden).float()
