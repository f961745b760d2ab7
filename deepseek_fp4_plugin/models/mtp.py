"""DeepseekV3MTP: the multi-token-prediction module, layer `num_hidden_layers` of the checkpoint.

    x_t = eh_proj([enorm(E(token_{t+1})), hnorm(h_t)])      embedding half first; h_t is the target's hidden state AFTER
    m_t = shared_head.norm(decoder_layer(x_t))               its final norm, or this module's own m_t when it recurs
    logits for token_{t+2} = lm_head(m_t)

The checkpoint's copies of the embedding and the head equal the main model's, which are used. Source: arXiv
2412.19437 section 2.2, and DeepSeek's README_WEIGHTS.
"""

from torch import Tensor, nn

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.linear import Linear
from deepseek_fp4_plugin.layers.norm import RMSNorm
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.decoder import DeepseekV3DecoderLayer
from deepseek_fp4_plugin.parallel.mesh import Mesh


class DeepseekV3MTP(nn.Module):
    def __init__(self, config: DeepseekV3Config, mesh: Mesh):
        super().__init__()
        self.index = config.num_hidden_layers
        name, size, eps = f"model.layers.{self.index}", config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(f"{name}.enorm", size, eps)
        self.hnorm = RMSNorm(f"{name}.hnorm", size, eps)
        self.eh_proj = Linear([f"{name}.eh_proj"], 2 * size, [size])
        self.layer = DeepseekV3DecoderLayer(self.index, config, mesh)
        self.norm = RMSNorm(f"{name}.shared_head.norm", size, eps)

    def load(self, source: WeightSource) -> None:
        for part in self.children():
            part.load(source)  # type: ignore[operator]

    def forward(
        self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: Tensor | None
    ) -> Tensor:
        """embedded: [T, hidden], of each position's next token.  hidden: [T, hidden], see above.

        batch: positions of `hidden`'s tokens (not shifted).  cache: the MTP layer's.  Returns m, [T, hidden].
        """
        x = self.eh_proj(ops.concat(self.enorm(embedded), self.hnorm(hidden)))
        return self.norm(self.layer(x, cos, sin, batch, cache))
