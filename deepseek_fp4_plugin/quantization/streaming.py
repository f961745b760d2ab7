"""One decoder layer's forward with its routed experts in groups: memory holds a group, not the layer.

The arithmetic and the order of every sum are the layer's own in the reference backend, whatever the group: an expert
sees the rows of one batch at a time, and a token's experts are summed in FP32 in order of their numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import ops, reference
from deepseek_fp4_plugin.kernels.reference.moe import Observe
from deepseek_fp4_plugin.kernels.weights import PreparedWeight
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.moe import MoE
from deepseek_fp4_plugin.layers.weight_source import UNCUT, WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.decoder import DeepseekV3DecoderLayer, RotaryAngles
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization.observer import LayerObserver


class StreamedLayer:
    """Layer `index` of the source, observed.  group: routed experts in memory at once."""

    def __init__(self, index: int, config: DeepseekV3Config, source: WeightSource, rotary: RotaryAngles, group: int):
        self.config, self.source, self.rotary, self.group = config, source, rotary, group
        self.layer = DeepseekV3DecoderLayer(index, config, Mesh())
        self.observer = LayerObserver(self.layer)
        self.moe = self.layer.mlp if isinstance(self.layer.mlp, MoE) else None
        for part in self.layer.children():
            if part is not self.moe:
                part.load(source)  # type: ignore[operator]
        if self.moe:
            self.moe.gate.load(source)
            if self.moe.shared_experts:
                self.moe.shared_experts.load(source)

    def forward(self, span: Sequence[tuple[ForwardBatch, Tensor]]) -> list[Tensor]:
        """Each batch's input [T, hidden] to its output; the experts are read once for all of `span`."""
        halves = [self.attention(batch, hidden) for batch, hidden in span]
        if self.moe is None:
            return [
                ops.add(hidden, self.layer.feed_forward(normed, batch))
                for (hidden, normed), (batch, _) in zip(halves, span, strict=True)
            ]
        routes = [self.moe.gate(normed) for _, normed in halves]
        shared = [self.moe.shared_experts(normed) if self.moe.shared_experts else None for _, normed in halves]
        sums = [torch.zeros(normed.shape, dtype=torch.float32, device=normed.device) for _, normed in halves]
        for first in range(0, self.config.n_routed_experts, self.group):
            gate_up, down, observe = self._experts(first)
            for y, (_, normed), (ids, weights) in zip(sums, halves, routes, strict=True):
                inside = (ids >= first) & (ids < first + self.group)
                local = torch.where(inside, ids - first, -1)
                reference.add_experts(y, normed, local, weights, gate_up, down, observe)
            del gate_up, down  # before the next group is read
        outputs = []
        for (hidden, normed), y, other in zip(halves, sums, shared, strict=True):
            routed = y.to(normed.dtype)
            outputs.append(ops.add(hidden, routed if other is None else ops.add(routed, other)))
        return outputs

    def attention(self, batch: ForwardBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream behind attention, and what the MLP sees of it."""
        layer = self.layer
        cos, sin = self.rotary(batch.positions)
        hidden = ops.add(hidden, layer.attention(layer.input_layernorm(hidden), cos, sin, batch, None))
        return hidden, layer.post_attention_layernorm(hidden)

    def _experts(self, first: int) -> tuple[PreparedWeight, PreparedWeight, Observe]:
        """Gate and up, down, and the observer of the group that begins with expert `first`."""
        assert self.moe is not None
        name, total = self.moe.experts.name, self.config.n_routed_experts
        hidden, inner = self.config.hidden_size, self.config.moe_intermediate_size
        local = range(first, min(first + self.group, total))
        gate_up = self.source.experts(name, ("gate_proj", "up_proj"), local, total, (inner, hidden), UNCUT)
        down = self.source.experts(name, ("down_proj",), local, total, (hidden, inner), UNCUT)
        return gate_up, down, self.observer.of_experts(name, local)

    def expert(self, expert: int, projections: Sequence[str]) -> PreparedWeight:
        """One routed expert's projections, fused."""
        assert self.moe is not None
        modules = [f"{self.moe.experts.name}.{expert}.{projection}" for projection in projections]
        hidden, inner = self.config.hidden_size, self.config.moe_intermediate_size
        out, width = (hidden, inner) if projections == ("down_proj",) else (inner, hidden)
        return self.source.linear(modules, [out] * len(modules), width, UNCUT)
