"""Stream a source checkpoint into an NVFP4 one: one weight, or one gate and up pair, in memory at a time.

The arithmetic is the recipe's. What the report needs of each weight is noted before its shard is closed, so that a
resumed run has it all; what was lost of the notes is found again by rounding those weights once more.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.durable import Journal
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.scales import in_blocks, read_scale
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter
from deepseek_fp4_plugin.numerics import fp8_block
from deepseek_fp4_plugin.quantization.plan import Conversion, Plan, Unit, kept_dtype, result_tensors
from deepseek_fp4_plugin.quantization.recipe import Recipe, Rounding

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
    Raises CheckpointError naming a weight that holds NaN or infinity.
    """
    notes = _Notes(writer.work / _NOTES)
    writer.before_close = notes.sync
    for done, unit in enumerate(plan.units):
        progress(done, len(plan.units))
        if unit.conversions[0].nvfp4:
            _convert_nvfp4(reader, writer, unit, recipe, input_scales, device, notes)
        else:
            for conversion in unit.conversions:
                if writer.needs(conversion.weight.name):
                    dtype = kept_dtype(conversion, reader.info(conversion.weight.name).dtype)
                    writer.write(conversion.weight.name, decoded(reader, conversion, dtype, device))
    progress(len(plan.units), len(plan.units))
    return notes.by_module


def decoded(reader: CheckpointReader, conversion: Conversion, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A source weight in `dtype` on `device`. Raises CheckpointError naming it when it holds NaN or infinity."""
    weight = reader.get(conversion.weight.name).to(device)
    if conversion.source is WeightFormat.FP8_BLOCK:
        scale_inv = read_scale(reader, f"{conversion.weight.module}.weight_scale_inv")
        scale_inv, block = in_blocks(scale_inv, tuple(weight.shape))
        weight = fp8_block.dequantize(weight, scale_inv.to(device), dtype, block)
    else:
        weight = weight.to(dtype)
    if not torch.isfinite(weight).all():
        raise CheckpointError(
            f"{conversion.weight.name} in {reader.folder} holds NaN or infinity, which no NVFP4 checkpoint can keep; "
            f"download {reader.info(conversion.weight.name).shard} again"
        )
    return weight


def _convert_nvfp4(
    reader: CheckpointReader,
    writer: CheckpointWriter,
    unit: Unit,
    recipe: Recipe,
    input_scales: Mapping[str, Tensor],
    device: torch.device,
    notes: "_Notes",
) -> None:
    names = [spec.name for conversion in unit.conversions for spec in result_tensors(conversion, torch.bfloat16)]
    noted = all(conversion.weight.module in notes.by_module for conversion in unit.conversions)
    if noted and not any(map(writer.needs, names)):
        return
    weights = [decoded(reader, conversion, recipe.weight_dtype, device) for conversion in unit.conversions]
    for conversion, solution in zip(unit.conversions, recipe.solve(weights, None), strict=True):
        module, quantized = conversion.weight.module, solution.tensor
        notes.add(module, solution.rounding)
        writer.write(f"{module}.weight", quantized.packed)
        writer.write(f"{module}.weight_scale", quantized.scale)
        writer.write(f"{module}.weight_scale_2", quantized.scale_2)
        writer.write(f"{module}.input_scale", input_scales[module])


class _Notes:
    """Rounding by module, a line each, appended as they come."""

    def __init__(self, path: Path):
        self._journal = Journal(path)
        self.by_module = {module: Rounding(*numbers) for module, *numbers in self._journal.lines}

    def add(self, module: str, rounding: Rounding) -> None:
        if self.by_module.get(module) != rounding:
            self.by_module[module] = rounding
            self._journal.append([module, *rounding])

    def sync(self) -> None:
        self._journal.sync()
