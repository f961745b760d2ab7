"""A layer solved from its own inputs: recipes that weigh errors by what the inputs were.

Projection after projection in the order of the forward: what its inputs were over all samples, the recipe's solution,
what the solution then gives for the next projection. With a sequential recipe that is computed with the quantized
weights, so that each projection sees, and can make up for, what those before it became; else with the source's.

Every fifth token is held out of all second moments, for a recipe to judge by. Routed experts are solved one after the
other, and an expert that saw few tokens is helped by its layer's: second moments of gate's and up's input are drawn to
those of all tokens, of down's to those of what this expert answers to a sample of all tokens. (The inputs of different
experts' downs share no basis, so that a mean over experts would tell little.)
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.weights import PreparedWeight, WeightTensors
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.linear import Linear
from deepseek_fp4_plugin.layers.mlp import GatedMLP
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.convert import Notes, decoded
from deepseek_fp4_plugin.quantization.plan import Plan, Unit
from deepseek_fp4_plugin.quantization.recipe import (
    HELD_OUT,
    MAX_HELD_OUT,
    InputStatistics,
    Needs,
    Recipe,
    block_diagonal,
    shrunk,
)
from deepseek_fp4_plugin.quantization.streaming import StreamedLayer

SAMPLE = 2048  # tokens of a layer that every expert answers to
_TENSORS = ("weight", "weight_scale", "weight_scale_2")


class Moments:
    """The sum of x x^T over rows, and the rows held out of it."""

    def __init__(self, in_features: int, needs: Needs, device: torch.device):
        self._full = needs is Needs.HESSIAN
        shape = (in_features, in_features) if self._full else (in_features // 16, 16, 16)
        self.total = torch.zeros(shape, device=device)
        self.tokens = 0
        self._held: list[Tensor] = []
        self._width, self._device = in_features, device

    def add(self, rows: Tensor, held_out: Tensor) -> None:
        """rows: [n, in].  held_out: bool [n]."""
        used = rows[~held_out].float()
        self.tokens += used.shape[0]
        self.total += used.T @ used if self._full else block_diagonal(used)
        left = MAX_HELD_OUT - sum(map(len, self._held))
        if left > 0:
            self._held.append(rows[held_out][:left].float())

    def mean(self) -> Tensor:
        return self.total / max(self.tokens, 1)

    def statistics(self, layer: Tensor | None = None) -> InputStatistics:
        """layer: the mean over its layer's rows, which an expert's is drawn to."""
        hessian = self.mean() if layer is None else shrunk(self.mean(), layer, self.tokens, self._width)
        held = torch.cat(self._held) if self._held else torch.zeros(0, self._width, device=self._device)
        return InputStatistics(self.tokens, hessian, held)


class _Rows(NamedTuple):
    """An expert's part of one batch.  tokens: indices in the batch.  weights: FP32, of its output."""

    batch: int
    tokens: Tensor
    weights: Tensor


class LayerSolver:
    """Solves and writes the NVFP4 weights of a layer while its samples pass."""

    def __init__(self, reader: CheckpointReader, writer: CheckpointWriter, plan: Plan, recipe: Recipe, notes: Notes):
        self.reader, self.writer, self.recipe, self.notes = reader, writer, recipe, notes
        self._units: Mapping[str, Unit] = {
            conversion.weight.module: unit for unit in plan.units for conversion in unit.conversions if conversion.nvfp4
        }

    def forward(self, streamed: StreamedLayer, span: Sequence[tuple[ForwardBatch, Tensor]]) -> list[Tensor]:
        """All samples' inputs of a layer, batch by batch, to its outputs; on the way its weights are written."""
        device = span[0][1].device
        first = 0
        held = []
        for batch, _ in span:
            count = batch.input_ids.shape[0]
            held.append(torch.arange(first, first + count, device=device) % HELD_OUT == HELD_OUT - 1)
            first += count
        layer = streamed.layer
        output = layer.self_attn.o_proj
        if output.modules_named[0] in self._units:
            self._solve_attention_output(streamed, output, span, held)
        halves = [streamed.attention(batch, hidden) for batch, hidden in span]
        inputs = [normed for _, normed in halves]
        if streamed.moe is None:
            assert isinstance(layer.mlp, GatedMLP)
            results = self._gated(layer.mlp, inputs, held)
        else:
            results = self._experts(streamed, inputs, held)
            if streamed.moe.shared_experts:
                shared = self._gated(streamed.moe.shared_experts, inputs, held)
                results = [ops.add(routed, other) for routed, other in zip(results, shared, strict=True)]
        return [ops.add(hidden, result) for (hidden, _), result in zip(halves, results, strict=True)]

    def write_input_scales(self, scales: Mapping[str, Tensor]) -> None:
        """What is known only when a layer is done."""
        for module, scale in scales.items():
            self.writer.write(f"{module}.input_scale", scale)

    def _solve_attention_output(
        self,
        streamed: StreamedLayer,
        output: Linear,
        span: Sequence[tuple[ForwardBatch, Tensor]],
        held: Sequence[Tensor],
    ) -> None:
        """Once through attention to see what its output projection sees; then it sees nothing twice."""
        moments = Moments(output.in_features, self.recipe.needs, held[0].device)
        observe = output.observer
        assert observe is not None
        for (batch, hidden), mask in zip(span, held, strict=True):

            def both(x: Tensor, mask: Tensor = mask) -> None:
                observe(x)
                moments.add(x, mask)

            output.observer = both
            streamed.attention(batch, hidden)
        for part in streamed.layer.self_attn.modules():
            if isinstance(part, Linear):
                part.observer = None
        output.weight = self._solved(output.modules_named, moments.statistics()) or output.weight

    def _gated(self, mlp: GatedMLP, inputs: Sequence[Tensor], held: Sequence[Tensor]) -> list[Tensor]:
        """The dense MLP or the shared expert."""
        results = list(inputs)
        for linear in (mlp.gate_up_proj, mlp.down_proj):
            if linear is mlp.down_proj:
                halves = [result.chunk(2, -1) for result in results]
                results = [torch.nn.functional.silu(gate) * up for gate, up in halves]
            moments = Moments(linear.in_features, self.recipe.needs, inputs[0].device)
            assert linear.observer is not None
            for rows, mask in zip(results, held, strict=True):
                linear.observer(rows)
                moments.add(rows, mask)
            weight = self._solved(linear.modules_named, moments.statistics()) or linear.weight
            results = [ops.linear(rows, weight) for rows in results]
        return results

    def _experts(self, streamed: StreamedLayer, inputs: Sequence[Tensor], held: Sequence[Tensor]) -> list[Tensor]:
        assert streamed.moe is not None
        device, needs = inputs[0].device, self.recipe.needs
        name, count = streamed.moe.experts.name, streamed.config.n_routed_experts
        chosen = [streamed.moe.gate(normed) for normed in inputs]
        layer = Moments(inputs[0].shape[1], needs, device)
        for normed, mask in zip(inputs, held, strict=True):
            layer.add(normed, mask)
        mean, sample = layer.mean(), _sample(inputs, held)
        sums = [torch.zeros(normed.shape, dtype=torch.float32, device=device) for normed in inputs]
        for expert in range(count):
            rows = _rows_of(expert, chosen)
            observe = streamed.observer.of_experts(name, [expert])
            moments = Moments(inputs[0].shape[1], needs, device)
            for part in rows:
                observe("gate_up", 0, inputs[part.batch][part.tokens])
                moments.add(inputs[part.batch][part.tokens], held[part.batch][part.tokens])
            pair = ("gate_proj", "up_proj")
            gate_up = self._solved([f"{name}.{expert}.{p}" for p in pair], moments.statistics(mean))
            gate_up = gate_up or streamed.expert(expert, pair)
            hidden = [_gated_rows(inputs[part.batch][part.tokens], gate_up) for part in rows]
            moments = Moments(streamed.config.moe_intermediate_size, needs, device)
            for part, x in zip(rows, hidden, strict=True):
                observe("down", 0, x)
                moments.add(x, held[part.batch][part.tokens])
            answer = Moments(streamed.config.moe_intermediate_size, needs, device)
            answer.add(_gated_rows(sample, gate_up), torch.zeros(len(sample), dtype=torch.bool, device=device))
            down = self._solved([f"{name}.{expert}.down_proj"], moments.statistics(answer.mean()))
            down = down or streamed.expert(expert, ("down_proj",))
            for part, x in zip(rows, hidden, strict=True):
                result = ops.linear(x, down).float() * part.weights.unsqueeze(-1)
                sums[part.batch].index_add_(0, part.tokens, result)
        return [total.to(torch.bfloat16) for total in sums]

    def _solved(self, modules: Sequence[str], inputs: InputStatistics) -> PreparedWeight | None:
        """The weight that the next projection's inputs are made with; None for the source's."""
        unit = self._units[modules[0]]
        names = [f"{module}.{tensor}" for module in modules for tensor in _TENSORS]
        if any(map(self.writer.needs, names)) or any(module not in self.notes.by_module for module in modules):
            weights = [
                decoded(self.reader, conversion, self.recipe.weight_dtype, inputs.hessian.device)
                for conversion in unit.conversions
            ]
            solutions = self.recipe.solve(weights, inputs)
            for module, solution in zip(modules, solutions, strict=True):
                self.notes.add(module, solution.rounding)
                for tensor, value in zip(_TENSORS, solution.tensor, strict=True):
                    self.writer.write(f"{module}.{tensor}", value)
            # A tensor scale as the file gives it back, so that a run that goes on computes with the same.
            scales = [self.writer.read(f"{module}.weight_scale_2") for module in modules]
            tensors = [
                solution.tensor._replace(scale_2=scale.to(inputs.hessian.device))
                for solution, scale in zip(solutions, scales, strict=True)
            ]
        else:
            tensors = [NVFP4Tensor(*(self.writer.read(f"{m}.{tensor}") for tensor in _TENSORS)) for m in modules]
        if not self.recipe.sequential:
            return None
        parts = [WeightTensors(WeightFormat.NVFP4, *tensor) for tensor in tensors]
        return ops.prepare(parts, inputs.hessian.device, torch.bfloat16, backend="reference")


def _sample(inputs: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
    """About SAMPLE of the rows that are not held out, or all if there are fewer; evenly spread over the batches."""
    step = max(1, sum(map(len, inputs)) // SAMPLE)
    return torch.cat([rows[~mask][::step] for rows, mask in zip(inputs, held, strict=True)])


def _gated_rows(x: Tensor, gate_up: PreparedWeight) -> Tensor:
    gate, up = ops.linear(x, gate_up).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _rows_of(expert: int, chosen: Sequence[tuple[Tensor, Tensor]]) -> list[_Rows]:
    """The tokens that chose `expert`, batch by batch, where there are any."""
    found = []
    for batch, (ids, weights) in enumerate(chosen):
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        if tokens.shape[0]:
            found.append(_Rows(batch, tokens, weights[tokens, places]))
    return found
