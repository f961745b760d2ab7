"""One decoder layer's forward with its routed experts in groups: memory holds a group, not the layer.

Batches go through attention one by one, and through the experts in blocks of several: an expert is decoded once for all
tokens that wait for it, and computes the rows of a block at a time. The arithmetic and the order of every sum are those
of the layer in the reference backend, whatever the group: a token's experts are summed in FP32 by their numbers.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import ops, reference
from deepseek_fp4_plugin.kernels.weights import PreparedWeight
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.moe import MoE
from deepseek_fp4_plugin.layers.weight_source import UNCUT, WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.decoder import DeepseekV3DecoderLayer, RotaryAngles
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization.memory import EXPERT_ROWS
from deepseek_fp4_plugin.quantization.observer import LayerAmax, LayerObserver
from deepseek_fp4_plugin.quantization.smoothing import Channels, Smoothing

Batch = tuple[ForwardBatch, Tensor]  # with its input, [T, hidden]


class _Waiting(NamedTuple):
    """A block between attention and the end of its experts.

    residual, normed: [T, hidden].  shared: the shared expert's part, or None.  routed: FP32, the experts' sum so far.
    chosen: of each expert the tokens and their weights.
    """

    residual: Tensor
    normed: Tensor
    shared: Tensor | None
    routed: Tensor
    chosen: list[tuple[Tensor, Tensor]]


class StreamedLayer:
    """Layer `index` of the source, observed.

    group: routed experts read at once.  keep: a group stays in memory for later calls.
    smooth: look at the channels before the MLP too.
    """

    def __init__(
        self,
        index: int,
        config: DeepseekV3Config,
        source: WeightSource,
        rotary: RotaryAngles,
        group: int,
        keep: bool = False,
        smooth: bool = False,
    ):
        self.config, self.source, self.rotary, self.group, self.keep = config, source, rotary, group, keep
        self.layer = DeepseekV3DecoderLayer(index, config, Mesh())
        self.observer = LayerObserver(self.layer)
        self.moe = self.layer.mlp if isinstance(self.layer.mlp, MoE) else None
        self.channels = Channels(config.hidden_size, source.device) if smooth else None
        self._kept: dict[int, tuple[PreparedWeight, PreparedWeight]] = {}
        for part in self.layer.children():
            if part is not self.moe:
                part.load(source)  # type: ignore[operator]
        if self.moe:
            self.moe.gate.load(source)
            if self.moe.shared_experts:
                self.moe.shared_experts.load(source)

    def forward(self, blocks: Sequence[Sequence[Batch]]) -> list[Tensor]:
        """Each batch's input to its output; the experts are read once for all blocks."""
        if self.moe is None:
            return [self._dense(batch, hidden) for block in blocks for batch, hidden in block]
        waiting = [self._routed(block) for block in blocks]
        for expert, gate_up, down in self._experts():
            observe = self.observer.of_experts(self.moe.experts.name, [expert])
            for block in waiting:
                for tokens, weights in zip(*(part.split(EXPERT_ROWS) for part in block.chosen[expert]), strict=True):
                    if len(tokens):
                        reference.add_expert(
                            block.routed, block.normed, tokens, weights, gate_up, down, observe=observe
                        )
        outputs: list[Tensor] = []
        for batches, block in zip(blocks, waiting, strict=True):
            routed = block.routed.to(block.normed.dtype)
            mlp = routed if block.shared is None else ops.add(routed, block.shared)
            outputs += ops.add(block.residual, mlp).split([len(hidden) for _, hidden in batches])
        return outputs

    def _dense(self, batch: ForwardBatch, hidden: Tensor) -> Tensor:
        hidden, normed = self.attention(batch, hidden)
        self.look(normed)
        return ops.add(hidden, self.layer.feed_forward(normed, batch))

    def _routed(self, block: Sequence[Batch]) -> _Waiting:
        """A block up to its experts, without them."""
        assert self.moe is not None
        residual, normed = (torch.cat(parts) for parts in zip(*(self.attention(*one) for one in block), strict=True))
        self.look(normed)
        ids, weights = self.moe.gate(normed)
        chosen = reference.by_expert(ids, weights, self.config.n_routed_experts)
        shared = self.moe.shared_experts(normed) if self.moe.shared_experts else None
        return _Waiting(residual, normed, shared, torch.zeros_like(normed, dtype=torch.float32), chosen)

    def attention(self, batch: ForwardBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream behind attention, and what the MLP sees of it."""
        layer = self.layer
        cos, sin = self.rotary(batch.positions)
        hidden = ops.add(hidden, layer.attention(layer.input_layernorm(hidden), cos, sin, batch, None))
        return hidden, layer.post_attention_layernorm(hidden)

    def look(self, normed: Tensor) -> None:
        """At rows that the MLP sees, each once."""
        if self.channels is not None:
            self.channels.add(normed)

    def seen(self) -> LayerAmax:
        """What the layer's projections saw; of what is smoothed, the smoothed inputs."""
        found = self.observer.result()
        if self.channels is None:
            return found
        norm = self.layer.post_attention_layernorm.name
        smoothing = Smoothing({norm: self.channels.exponents()})
        amax = self.channels.smoothed_amax()
        smoothed = {module: amax for module in found.amax if smoothing.edits(module)}
        return LayerAmax(found.amax | smoothed, found.rows, smoothing.exponents)

    def _experts(self) -> Iterator[tuple[int, PreparedWeight, PreparedWeight]]:
        """Every routed expert with its gate and up, and its down, decoded."""
        total = self.config.n_routed_experts
        for first in range(0, total, self.group):
            local = range(first, min(first + self.group, total))
            gate_up, down = self._kept.get(first) or self._read(local)
            if self.keep:
                self._kept[first] = gate_up, down
            for slot, expert in enumerate(local):
                yield expert, reference.decoded(gate_up, slot), reference.decoded(down, slot)
            del gate_up, down  # before the next group is read

    def _read(self, local: range) -> tuple[PreparedWeight, PreparedWeight]:
        """A group's gate and up, and down, as stored."""
        assert self.moe is not None
        name, total = self.moe.experts.name, self.config.n_routed_experts
        hidden, inner = self.config.hidden_size, self.config.moe_intermediate_size
        gate_up = self.source.experts(name, ("gate_proj", "up_proj"), local, total, (inner, hidden), UNCUT)
        return gate_up, self.source.experts(name, ("down_proj",), local, total, (hidden, inner), UNCUT)

    def expert(self, expert: int, projections: Sequence[str]) -> PreparedWeight:
        """One routed expert's projections, fused."""
        assert self.moe is not None
        modules = [f"{self.moe.experts.name}.{expert}.{projection}" for projection in projections]
        hidden, inner = self.config.hidden_size, self.config.moe_intermediate_size
        out, width = (hidden, inner) if projections == ("down_proj",) else (inner, hidden)
        return self.source.linear(modules, [out] * len(modules), width, UNCUT)
