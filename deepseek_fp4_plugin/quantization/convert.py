"""Stream a source checkpoint into an NVFP4 one: reading, solving and writing at the same time, a few weights in memory.

The arithmetic is the recipe's. What the report needs of each weight is noted before its shard is closed, so that a
resumed run has it all; what was lost of the notes is found again by rounding those weights once more. Weights that stay
as they are go through in pieces of rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.durable import Journal
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.scales import Grain, all_finite, fp8_grain, in_blocks, read_scale
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter
from deepseek_fp4_plugin.models.inventory import Weight
from deepseek_fp4_plugin.numerics.fp8_block import BLOCK
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.overlap import overlapped
from deepseek_fp4_plugin.quantization.plan import Conversion, Plan, Unit, kept_dtype, result_tensors
from deepseek_fp4_plugin.quantization.recipe import FromSource, Recipe, Rounding, Solution, SourceWeight
from deepseek_fp4_plugin.quantization.smoothing import Smoothing

DEFAULT_BUDGET = 2**29  # bytes under way between reading and writing
NVFP4_BYTES = 9 / 16  # of a weight, with its part of a block's scale
_PIECE = 2**23  # elements of a kept weight read at once: larger ones come from the system anew, page by page
_NOTES = "modules.jsonl"


def convert(
    reader: CheckpointReader,
    writer: CheckpointWriter,
    plan: Plan,
    recipe: Recipe,
    input_scales: Mapping[str, Tensor],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> dict[str, Rounding]:
    """Write every tensor of `plan`, skipping what an earlier run finished; returns module -> Rounding of NVFP4 ones.

    input_scales: module -> FP32 [], for every module that becomes NVFP4.  device: where the arithmetic is done.
    progress: called with units done and in all.
    Raises CheckpointError naming a weight that holds NaN or infinity.
    """
    converter = Converter(reader, writer, plan, recipe, device, progress)
    for _ in writer.parts():
        converter.convert(plan.units, input_scales)
    return converter.end()


class Converter:
    """Writes units of a plan. Arguments as of `convert`.

    budget: bytes of host memory for weights under way; a unit that needs more has it for itself.
    moved: called with bytes read and written, done and in all, of what was missing at the start.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        writer: CheckpointWriter,
        plan: Plan,
        recipe: Recipe,
        device: torch.device,
        progress: Callable[[int, int], None],
        budget: int = DEFAULT_BUDGET,
        moved: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.writer, self.plan, self.progress, self.budget = writer, plan, progress, budget
        self.notes = Notes(writer.work / _NOTES, writer.shared)
        writer.before_close = self.notes.sync
        self.steps = _Steps(reader, writer, recipe, device, self.notes)
        self._done: set[Unit] = set()
        self._told = -1
        self._moved, self._bytes = moved, 0
        self._total = sum(self.steps.moves(piece) for unit in plan.units for piece in self.steps.missing(unit))

    def needs(self, unit: Unit) -> bool:
        """Whether something of `unit` is to be written in the part of the work at hand."""
        return bool(list(self.steps.of(unit)))

    def convert(self, units: Sequence[Unit], input_scales: Mapping[str, Tensor]) -> None:
        """Write what is missing of `units`."""
        steps, todo = self.steps, []
        for unit in units:
            pieces = list(self.steps.of(unit))
            todo += pieces
            if not any(self.steps.missing(unit)):
                self._done.add(unit)
        steps.input_scales = input_scales
        self._tell()
        for piece in overlapped(todo, steps.load, steps.work, steps.store, steps.cost, self.budget):
            self._count(piece)
            if piece.last:
                self._done.add(piece.unit)
                self._tell()

    @contextmanager
    def elsewhere(self, unit: Unit) -> Iterator[None]:
        """While somebody else writes what is missing of `unit`: it counts as well."""
        pieces = list(self.steps.of(unit))
        yield
        for piece in pieces:
            self._count(piece)

    def smooth(self, exponents: Mapping[str, list[int]]) -> None:
        """The exponents of smoothing.py, of layers that are converted from now on."""
        self.steps.smoothing = Smoothing(self.steps.smoothing.exponents | dict(exponents))

    def _count(self, piece: "_Piece") -> None:
        self._bytes += self.steps.moves(piece)
        self._moved(self._bytes, self._total)

    def end(self) -> dict[str, Rounding]:
        """Module -> Rounding of every NVFP4 one, once all is written."""
        steps = self.steps
        self.notes.reload()
        lost = [_Piece(unit, unit.conversions, None, True) for unit in self.plan.units if not steps.finished(unit)]
        for _ in overlapped(lost, steps.load, steps.work, steps.note, steps.cost, self.budget):
            pass  # their tensors are there; what was noted of them is made again
        self.notes.sync()
        if self._told < len(self.plan.units):
            self.progress(len(self.plan.units), len(self.plan.units))
        return self.notes.by_module

    def _tell(self) -> None:
        if len(self._done) > self._told:
            self._told = len(self._done)
            self.progress(self._told, len(self.plan.units))


def decoded(reader: CheckpointReader, conversion: Conversion, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A source weight in `dtype` on `device`. Raises CheckpointError naming it when it holds NaN or infinity."""
    weight = _on(device, source_weight(reader, conversion.weight, conversion.source)).decoded(dtype)
    if not all_finite(weight):
        raise _not_finite(reader, conversion)
    return weight


def source_weight(
    reader: CheckpointReader, weight: Weight, source: WeightFormat, rows: tuple[int, int] | None = None
) -> SourceWeight:
    """What the source stores of a PLAIN or FP8_BLOCK weight.  rows: [start, stop) from a multiple of 128."""
    values = reader.get(weight.name) if rows is None else reader.get_slice(weight.name, 0, *rows)
    if source is not WeightFormat.FP8_BLOCK:
        return SourceWeight(values, None)
    name = f"{weight.module}.weight_scale_inv"
    scale, grain = None, fp8_grain(reader.info(name).shape, weight.shape)
    if rows is not None and grain is Grain.BLOCK:
        scale = reader.get_slice(name, 0, rows[0] // BLOCK, -(-rows[1] // BLOCK))
    elif rows is not None and grain is Grain.ROW:
        scale = reader.get_slice(name, 0, *rows)
    return SourceWeight(values, *in_blocks(read_scale(reader, name, scale), tuple(values.shape)))


class _Piece(NamedTuple):
    """A job: all of a unit, or of a kept weight some rows.  last: with it the unit is done."""

    unit: Unit
    conversions: tuple[Conversion, ...]
    rows: tuple[int, int] | None
    last: bool


class _Steps:
    """What is done to a piece, and what it costs."""

    def __init__(
        self,
        reader: CheckpointReader,
        writer: CheckpointWriter,
        recipe: Recipe,
        device: torch.device,
        notes: "Notes",
    ):
        self.reader, self.writer, self.recipe, self.device, self.notes = reader, writer, recipe, device, notes
        self.input_scales: Mapping[str, Tensor] = {}
        self.smoothing = Smoothing({})

    def of(self, unit: Unit) -> Iterator[_Piece]:
        """The pieces of `unit` that are not done yet, in the part of the work at hand."""
        return self._pieces(unit, self.writer.needs)

    def missing(self, unit: Unit) -> Iterator[_Piece]:
        """The pieces that are not done yet by anybody."""
        return self._pieces(unit, self.writer.lacks)

    def _pieces(self, unit: Unit, needs: Callable[[str], bool]) -> Iterator[_Piece]:
        if unit.conversions[0].nvfp4:
            names = [spec.name for c in unit.conversions for spec in result_tensors(c, torch.bfloat16)]
            if any(map(needs, names)) or not (self.writer.shared or self.finished(unit)):
                yield _Piece(unit, unit.conversions, None, True)
            return
        needed = [c for c in unit.conversions if needs(c.weight.name)]
        for conversion in needed:
            shape = conversion.weight.shape
            count = shape[0] if len(shape) > 1 else 1
            step = max(_PIECE // max(shape[-1], 1) // BLOCK, 1) * BLOCK
            for start in range(0, count, step):
                last = start + step >= count
                rows = (start, min(start + step, count)) if step < count else None
                yield _Piece(unit, (conversion,), rows, last and conversion is needed[-1])

    def finished(self, unit: Unit) -> bool:
        """Whether the notes have all modules of an NVFP4 unit."""
        return all(not c.nvfp4 or c.weight.module in self.notes.by_module for c in unit.conversions)

    def cost(self, piece: _Piece) -> int:
        """Bytes of memory for the source and the result together."""
        return self._bytes(piece, 1)

    def moves(self, piece: _Piece) -> int:
        """Bytes read and written."""
        return self._bytes(piece, NVFP4_BYTES)

    def _bytes(self, piece: _Piece, nvfp4: float) -> int:
        """nvfp4: of a weight that becomes it."""
        total = 0.0
        for conversion in piece.conversions:
            shape = conversion.weight.shape
            source = self.reader.info(conversion.weight.name).dtype
            if conversion.nvfp4:
                total += shape[0] * shape[1] * (source.itemsize + nvfp4)
            else:
                start, stop = piece.rows or (0, shape[0])
                size = (stop - start) * math.prod(shape[1:])
                total += size * (source.itemsize + kept_dtype(conversion, source).itemsize)
        return int(total)

    def load(self, piece: _Piece) -> list[SourceWeight]:
        return [source_weight(self.reader, c.weight, c.source, piece.rows) for c in piece.conversions]

    def work(self, piece: _Piece, loaded: Sequence[SourceWeight]) -> Sequence[Solution | Tensor]:
        weights = [
            self._smoothed(conversion, _on(self.device, weight))
            for conversion, weight in zip(piece.conversions, loaded, strict=True)
        ]
        if not piece.conversions[0].nvfp4:
            (conversion,), (weight,) = piece.conversions, weights
            values = weight.decoded(kept_dtype(conversion, self.reader.info(conversion.weight.name).dtype))
            if not all_finite(values):
                raise _not_finite(self.reader, conversion)
            return [values.cpu()]
        solutions = None
        if isinstance(self.recipe, FromSource):
            solutions = self.recipe.solve_source(weights)
        if solutions is None:
            decoded_weights = [weight.decoded(self.recipe.weight_dtype) for weight in weights]
            for conversion, value in zip(piece.conversions, decoded_weights, strict=True):
                if not all_finite(value):
                    raise _not_finite(self.reader, conversion)
            solutions = self.recipe.solve(decoded_weights, None)
        return [solution._replace(tensor=_to_cpu(solution.tensor)) for solution in solutions]

    def _smoothed(self, conversion: Conversion, weight: SourceWeight) -> SourceWeight:
        """What is edited as a plain weight, in the recipe's dtype where it becomes NVFP4."""
        module = conversion.weight.module
        if not self.smoothing.edits(module):
            return weight
        kept = kept_dtype(conversion, self.reader.info(conversion.weight.name).dtype)
        values = weight.decoded(self.recipe.weight_dtype if conversion.nvfp4 else kept)
        return SourceWeight(self.smoothing.applied(module, values), None)

    def store(self, piece: _Piece, results: Sequence[Solution | Tensor]) -> None:
        self.note(piece, results)
        for conversion, result in zip(piece.conversions, results, strict=True):
            module = conversion.weight.module
            if isinstance(result, Tensor):
                self.writer.write(conversion.weight.name, result, piece.rows[0] if piece.rows else 0)
            else:
                self.writer.write(f"{module}.weight", result.tensor.packed)
                self.writer.write(f"{module}.weight_scale", result.tensor.scale)
                self.writer.write(f"{module}.weight_scale_2", result.tensor.scale_2)
                self.writer.write(f"{module}.input_scale", self.input_scales[module])

    def note(self, piece: _Piece, results: Sequence[Solution | Tensor]) -> None:
        for conversion, result in zip(piece.conversions, results, strict=True):
            if isinstance(result, Solution):
                self.notes.add(conversion.weight.module, result.rounding)


def _on(device: torch.device, weight: SourceWeight) -> SourceWeight:
    scale_inv = None if weight.scale_inv is None else weight.scale_inv.to(device)
    return SourceWeight(weight.weight.to(device), scale_inv, weight.block)


def _to_cpu(tensor: NVFP4Tensor) -> NVFP4Tensor:
    return NVFP4Tensor(*(part.cpu() for part in tensor))


def _not_finite(reader: CheckpointReader, conversion: Conversion) -> CheckpointError:
    name = conversion.weight.name
    return CheckpointError(
        f"{name} in {reader.folder} holds NaN or infinity, which no NVFP4 checkpoint can keep; "
        f"download {reader.info(name).shard} again"
    )


class Notes:
    """Rounding by module, a line each, appended as they come."""

    def __init__(self, path: Path, shared: bool):
        self._journal = Journal(path, shared, not shared)
        self.by_module: dict[str, Rounding] = {}
        self._take()

    def add(self, module: str, rounding: Rounding) -> None:
        if self.by_module.get(module) != rounding:
            self.by_module[module] = rounding
            self._journal.append([module, *rounding])

    def sync(self) -> None:
        self._journal.sync()

    def reload(self) -> None:
        """Take in what other processes noted."""
        self._journal.reload()
        self._take()

    def _take(self) -> None:
        self.by_module |= {module: Rounding(*numbers) for module, *numbers in self._journal.lines}
