"""One decoder layer, and the rotary angles that all of them share."""

from torch import Tensor, nn

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.exchange import all_reduce, sum_and_norm
from deepseek_fp4_plugin.layers.mla import MLA
from deepseek_fp4_plugin.layers.mlp import GatedMLP
from deepseek_fp4_plugin.layers.moe import MoE
from deepseek_fp4_plugin.layers.norm import RMSNorm
from deepseek_fp4_plugin.layers.rotary import inverse_frequencies
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.parallel.mesh import Mesh


class DeepseekV3DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and a residual.

    Both leave partial sums over the tensor-parallel ranks, and here is the one place where they are summed: once a
    block, before the residual.
    """

    def __init__(self, index: int, config: DeepseekV3Config, mesh: Mesh):
        super().__init__()
        self.mesh = mesh
        name = f"model.layers.{index}"
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(f"{name}.self_attn", config, mesh)
        self.post_attention_layernorm = RMSNorm(
            f"{name}.post_attention_layernorm", config.hidden_size, config.rms_norm_eps
        )
        self.mlp: MoE | GatedMLP
        if index >= config.num_hidden_layers or config.is_moe_layer(index):  # the MTP layer always has experts
            self.mlp = MoE(f"{name}.mlp", index, config, mesh)
        else:
            self.mlp = GatedMLP(f"{name}.mlp", config.hidden_size, config.intermediate_size, mesh)

    def load(self, source: WeightSource) -> None:
        for part in self.children():
            part.load(source)  # type: ignore[operator]

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: Tensor | None) -> Tensor:
        """The layer by itself. hidden: [T, hidden], and so is the result."""
        hidden, normed = self._attend(hidden, self.input_layernorm(hidden), cos, sin, batch, cache)
        return ops.add(hidden, self.feed_forward(normed, batch))

    def before(
        self,
        norm: RMSNorm,
        hidden: Tensor,
        normed: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        cache: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The layer in front of another's `norm`, so that a sum, its residual and the norm behind it are one step.

        hidden, and this layer's norm of it: [T, hidden].  Returns the same of the next.
        """
        hidden, normed = self._attend(hidden, normed, cos, sin, batch, cache)
        partial, other = self._parts(normed, batch)
        return sum_and_norm(self.mesh.tp_group, partial, hidden, norm, other)

    def _attend(
        self, hidden: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        partial = self.self_attn(normed, cos, sin, batch, cache)
        return sum_and_norm(self.mesh.tp_group, partial, hidden, self.post_attention_layernorm)

    def _parts(self, normed: Tensor, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """The MLP's or the experts' output, or two of which it is the sum."""
        mlp = self.mlp
        return mlp.parts(normed, batch.dp_tokens) if isinstance(mlp, MoE) else (mlp(normed), None)

    def attention(self, normed: Tensor, cos: Tensor, sin: Tensor, batch: ForwardBatch, cache: Tensor | None) -> Tensor:
        """The attention block's whole output."""
        return all_reduce(self.mesh.tp_group, self.self_attn(normed, cos, sin, batch, cache))

    def feed_forward(self, normed: Tensor, batch: ForwardBatch) -> Tensor:
        """The MLP's or the experts' whole output."""
        partial, other = self._parts(normed, batch)
        return all_reduce(self.mesh.tp_group, partial if other is None else ops.add(partial, other))


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
