"""What the MTP layer is given while it is calibrated: the samples' last hidden states, joined with their next tokens.

As when it drafts (models/mtp.py), with the text's own next token where the engine has a sampled one. A sample's last
token has no next one and is left out. Drafts after the first, whose hidden state is the module's own, are not imitated:
`hnorm` gives them the same size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.norm import RMSNorm
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.mtp import DeepseekV3MTP
from deepseek_fp4_plugin.parallel.mesh import Mesh


class MtpInput:
    """embed: token ids int64 [T] to their embeddings BF16 [T, hidden], of the main model."""

    def __init__(self, config: DeepseekV3Config, source: WeightSource, embed: Callable[[Tensor], Tensor]):
        self.embed, self.mtp = embed, DeepseekV3MTP(config, Mesh())
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps)
        for part in (self.norm, self.mtp.enorm, self.mtp.hnorm, self.mtp.eh_proj):
            part.load(source)

    def __call__(self, batch: ForwardBatch, hidden: Tensor) -> tuple[ForwardBatch, Tensor]:
        """batch, hidden [T, hidden]: of whole samples, behind the main model's last layer. Returns the layer's."""
        chunks = [chunk for chunk in batch.chunks if chunk.stop - chunk.start > 1]
        samples = [batch.input_ids[chunk.start : chunk.stop].tolist() for chunk in chunks]
        rows = [torch.arange(chunk.start, chunk.stop - 1) for chunk in chunks]
        kept = (torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)).to(hidden.device)
        embedded = self.mtp.enorm(self.embed(batch.input_ids[kept + 1]))
        joined = ops.concat(embedded, self.mtp.hnorm(self.norm(hidden[kept])))
        return ForwardBatch.from_sequences([s[:-1] for s in samples], hidden.device), self.mtp.eh_proj(joined)
