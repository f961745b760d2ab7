"""A layer solved from its own inputs: recipes that weigh errors by what the inputs were.

Projection after projection in the order of the forward: what its inputs were over all samples, the recipe's solution,
what the solution then gives for the next projection. With a sequential recipe that is computed with the quantized
weights, so that each projection sees, and can make up for, what those before it became; else with the source's.

Every fifth token is held out of all second moments, for a recipe to judge by. Routed experts are solved one after the
other, and an expert that saw few tokens is helped by its layer's: second moments of gate's and up's input are drawn to
those of all tokens, of down's to those of what this expert answers to a sample of all tokens. (The inputs of different
experts' downs share no basis, so that a mean over experts would tell little.)
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter
from deepseek_fp4_plugin.kernels import ops, reference
from deepseek_fp4_plugin.kernels.weights import PreparedWeight, WeightTensors
from deepseek_fp4_plugin.layers.linear import Linear
from deepseek_fp4_plugin.layers.mlp import GatedMLP
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.convert import Converter, decoded
from deepseek_fp4_plugin.quantization.plan import Plan, Unit
from deepseek_fp4_plugin.quantization.recipe import (
    HELD_OUT,
    MAX_HELD_OUT,
    InputStatistics,
    Needs,
    ReadiesInputs,
    Recipe,
    block_diagonal,
    shrunk,
)
from deepseek_fp4_plugin.quantization.rows import Rows
from deepseek_fp4_plugin.quantization.smoothing import Smoothing
from deepseek_fp4_plugin.quantization.streaming import Batch, StreamedLayer

SAMPLE = 2048  # tokens of a layer that every expert answers to
ROWS = 2048  # tokens that a projection sees at once
_DECODED = 2**24  # weights
_TENSORS = ("weight", "weight_scale", "weight_scale_2")


class Moments:
    """The sum of x x^T over rows, and the rows held out of it."""

    def __init__(self, in_features: int, needs: Needs, device: torch.device):
        self._full = needs is Needs.HESSIAN
        shape = (in_features, in_features) if self._full else (in_features // 16, 16, 16)
        self._moments = torch.zeros(shape, device=device)
        self._is_mean = False
        self.tokens = 0
        self._held: list[Tensor] = []
        self._width, self._device = in_features, device

    def add(self, rows: Tensor, held_out: Tensor) -> None:
        """rows: [n, in].  held_out: bool [n]."""
        assert not self._is_mean, "rows after the mean was asked for"
        used = rows[~held_out].float()
        self.tokens += used.shape[0]
        if self._full:
            self._moments.addmm_(used.T, used)
        else:
            self._moments += block_diagonal(used)
        left = MAX_HELD_OUT - sum(map(len, self._held))
        if left > 0:
            self._held.append(rows[held_out][:left].float())

    def mean(self) -> Tensor:
        """In the place of the sum: the largest of R1 takes 1.4 GB, and there is no room for both."""
        if not self._is_mean:
            self._moments /= max(self.tokens, 1)
            self._is_mean = True
        return self._moments

    def statistics(self, layer: Tensor | None = None) -> InputStatistics:
        """layer: the mean over its layer's rows, which an expert's is drawn to."""
        hessian = self.mean() if layer is None else shrunk(self.mean(), layer, self.tokens, self._width)
        held = torch.cat(self._held) if self._held else torch.zeros(0, self._width, device=self._device)
        return InputStatistics(self.tokens, hessian, held)


class LayerSolver:
    """Solves and writes the NVFP4 weights of a layer while its samples pass.

    converter: counts what is moved, and keeps the notes.
    spill: keep the tokens' rows in files, of the writer's folder for work.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        writer: CheckpointWriter,
        plan: Plan,
        recipe: Recipe,
        converter: Converter,
        device: torch.device,
        spill: bool,
    ):
        self.reader, self.writer, self.recipe, self.device = reader, writer, recipe, device
        self.converter, self.notes = converter, converter.notes
        self._folder = writer.work if spill else None
        self._smoothing = Smoothing({})
        self._units: Mapping[str, Unit] = {
            conversion.weight.module: unit for unit in plan.units for conversion in unit.conversions if conversion.nvfp4
        }

    def forward(self, tokens: int, streamed: StreamedLayer, batches: Callable[[], Iterator[Batch]]) -> Iterator[Tensor]:
        """All samples' inputs of a layer, batch by batch, to its outputs; on the way its weights are written.

        tokens: of all batches.  batches: begins them anew.
        """
        layer, hidden_size = streamed.layer, streamed.config.hidden_size
        if layer.self_attn.o_proj.modules_named[0] in self._units:
            self._solve_attention_output(streamed, batches())
        residual, inputs = (self._rows(tokens, hidden_size) for _ in range(2))
        sizes = []
        for batch, hidden in batches():
            behind, normed = streamed.attention(batch, hidden)
            residual.append(behind)
            inputs.append(normed)
            sizes.append(len(hidden))
            streamed.look(normed)
        del layer.self_attn  # its weights
        inputs = self._smoothed(streamed, inputs)
        results = [self._experts(streamed, inputs)] if streamed.moe else []
        mlp = streamed.moe.shared_experts if streamed.moe else layer.mlp
        if mlp is not None:
            assert isinstance(mlp, GatedMLP)
            results.append(self._gated(mlp, inputs))
        del inputs
        for start, stop in pairwise([0, *accumulate(sizes)]):
            parts = [rows.read(start, stop).to(torch.bfloat16) for rows in results]
            yield ops.add(residual.read(start, stop), parts[0] if len(parts) == 1 else ops.add(*parts))

    def _smoothed(self, streamed: StreamedLayer, inputs: Rows) -> Rows:
        """The MLP's inputs, and with them the router, as in the smoothed model, if it is to be one."""
        self._smoothing = Smoothing({})
        if streamed.channels is None:
            return inputs
        norm = streamed.layer.post_attention_layernorm.name
        self._smoothing = Smoothing({norm: streamed.channels.exponents()})
        if streamed.moe:
            streamed.moe.gate.load(streamed.source, self._smoothing.applied)
        result = self._rows(inputs.count, inputs.width)
        for start in range(0, inputs.count, ROWS):
            result.append(self._smoothing.divided(norm, inputs.read(start, start + ROWS)))
        return result

    def write_input_scales(self, scales: Mapping[str, Tensor]) -> None:
        """What is known only when a layer is done."""
        for module, scale in scales.items():
            self.writer.write(f"{module}.input_scale", scale)

    def _rows(self, count: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Rows:
        return Rows(count, width, dtype, self.device, self._folder)

    def _moments(self, in_features: int) -> Moments:
        return Moments(in_features, self.recipe.needs, self.device)

    def _solve_attention_output(self, streamed: StreamedLayer, batches: Iterator[Batch]) -> None:
        """Once through attention to see what its output projection sees; then it sees nothing twice."""
        output = streamed.layer.self_attn.o_proj
        moments, observe, first = self._moments(output.in_features), output.observer, 0
        assert observe is not None
        for batch, hidden in batches:
            held_out = _held_out(first + torch.arange(len(hidden), device=self.device))
            first += len(hidden)

            def both(x: Tensor, held_out: Tensor = held_out) -> None:
                observe(x)
                moments.add(x, held_out)

            output.observer = both
            streamed.attention(batch, hidden)
        for part in streamed.layer.self_attn.modules():
            if isinstance(part, Linear):
                part.observer = None
        output.weight = self._solved(output.modules_named, moments.statistics()) or output.weight

    def _gated(self, mlp: GatedMLP, inputs: Rows) -> Rows:
        """The dense MLP or the shared expert."""
        gate_up, down = mlp.gate_up_proj, mlp.down_proj
        self._solve_linear(gate_up, inputs)
        hidden = self._rows(inputs.count, down.in_features)
        for start in range(0, inputs.count, ROWS):
            hidden.append(_gated_rows(inputs.read(start, start + ROWS), gate_up.weight))
        del gate_up.weight
        self._solve_linear(down, hidden)
        results = self._rows(inputs.count, inputs.width)
        for start in range(0, inputs.count, ROWS):
            results.append(product(hidden.read(start, start + ROWS), down.weight))
        return results

    def _solve_linear(self, linear: Linear, inputs: Rows) -> None:
        moments = self._moments(inputs.width)
        assert linear.observer is not None
        for start in range(0, inputs.count, ROWS):
            rows = inputs.read(start, start + ROWS)
            linear.observer(rows)
            moments.add(rows, _held_out(start + torch.arange(len(rows), device=self.device)))
        linear.weight = self._solved(linear.modules_named, moments.statistics()) or linear.weight

    def _experts(self, streamed: StreamedLayer, inputs: Rows) -> Rows:
        """The routed experts' sums, FP32."""
        assert streamed.moe is not None
        name, inner = streamed.moe.experts.name, streamed.config.moe_intermediate_size
        every = torch.arange(inputs.count, device=self.device)
        layer, routes = self._moments(inputs.width), []
        for start in range(0, inputs.count, ROWS):
            rows = inputs.read(start, start + ROWS)
            layer.add(rows, _held_out(every[start : start + ROWS]))
            routes.append(streamed.moe.gate(rows))
        ids, weights = (torch.cat(parts) for parts in zip(*routes, strict=True))
        chosen = reference.by_expert(ids, weights, streamed.config.n_routed_experts)
        mean, sample = layer.mean(), inputs.pick(_sample(every))
        sums = self._rows(inputs.count, inputs.width, torch.float32)
        for expert, (tokens, weight) in enumerate(chosen):
            observe = streamed.observer.of_experts(name, [expert])
            moments, pair = self._moments(inputs.width), ("gate_proj", "up_proj")
            for some in tokens.split(ROWS):
                rows = inputs.pick(some)
                observe("gate_up", 0, rows)
                moments.add(rows, _held_out(some))
            gate_up = self._solved([f"{name}.{expert}.{p}" for p in pair], moments.statistics(mean))
            gate_up = gate_up or streamed.expert(expert, pair)
            hidden = torch.cat([_gated_rows(inputs.pick(some), gate_up) for some in tokens.split(ROWS)])
            moments, answer = self._moments(inner), self._moments(inner)
            observe("down", 0, hidden)
            moments.add(hidden, _held_out(tokens))
            answer.add(_gated_rows(sample, gate_up), torch.zeros(len(sample), dtype=torch.bool, device=self.device))
            down = self._solved([f"{name}.{expert}.down_proj"], moments.statistics(answer.mean()))
            down = down or streamed.expert(expert, ("down_proj",))
            for some, x, w in zip(tokens.split(ROWS), hidden.split(ROWS), weight.split(ROWS), strict=True):
                sums.add(some, product(x, down).float() * w.unsqueeze(-1))
        return sums

    def _solved(self, modules: Sequence[str], inputs: InputStatistics) -> PreparedWeight | None:
        """The weight that the next projection's inputs are made with; None for the source's."""
        unit = self._units[modules[0]]
        names = [f"{module}.{tensor}" for module in modules for tensor in _TENSORS]
        if any(map(self.writer.needs, names)) or any(module not in self.notes.by_module for module in modules):
            ready = self.recipe.ready(inputs) if isinstance(self.recipe, ReadiesInputs) else inputs
            weights = [
                self._smoothing.applied(
                    conversion.weight.module,
                    decoded(self.reader, conversion, self.recipe.weight_dtype, self.device),
                )
                for conversion in unit.conversions
            ]
            solutions = self.recipe.solve(weights, ready)
            with self.converter.elsewhere(unit):
                for module, solution in zip(modules, solutions, strict=True):
                    self.notes.add(module, solution.rounding)
                    for tensor, value in zip(_TENSORS, solution.tensor, strict=True):
                        self.writer.write(f"{module}.{tensor}", value.cpu())
            # A tensor scale as the file gives it back, so that a run that goes on computes with the same.
            scales = [self.writer.read(f"{module}.weight_scale_2") for module in modules]
            tensors = [
                solution.tensor._replace(scale_2=scale.to(self.device))
                for solution, scale in zip(solutions, scales, strict=True)
            ]
        else:
            tensors = [NVFP4Tensor(*(self.writer.read(f"{m}.{tensor}") for tensor in _TENSORS)) for m in modules]
        if not self.recipe.sequential:
            return None
        parts = [WeightTensors(WeightFormat.NVFP4, *tensor) for tensor in tensors]
        return ops.prepare(parts, self.device, torch.bfloat16, backend="reference")


def _held_out(tokens: Tensor) -> Tensor:
    """Which of the tokens, by their numbers, are kept out of all second moments."""
    return tokens % HELD_OUT == HELD_OUT - 1


def _sample(every: Tensor) -> Tensor:
    """About SAMPLE of the tokens that are not held out, or all if there are fewer; evenly spread."""
    return every[~_held_out(every)][:: max(1, len(every) // SAMPLE)]


def _gated_rows(x: Tensor, gate_up: PreparedWeight) -> Tensor:
    gate, up = product(x, gate_up).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def product(x: Tensor, weight: PreparedWeight) -> Tensor:
    """x W^T of a reference weight, of which some rows are decoded at a time."""
    step = max(_DECODED // weight.in_features // 128, 1) * 128
    outputs = []
    for part in weight.data:
        for start in range(0, part.out_features, step):
            rows = slice(start, start + step)
            scale = part.scale
            if part.format is WeightFormat.FP8_BLOCK:
                height = part.fp8_block[0]
                scale = scale[start // height : -(-(start + step) // height)]
            elif scale is not None:
                scale = scale[rows]
            piece = dataclasses.replace(part, weight=part.weight[rows], scale=scale)
            outputs.append(ops.linear(x, dataclasses.replace(weight, data=(piece,))))
    return torch.cat(outputs, -1)
