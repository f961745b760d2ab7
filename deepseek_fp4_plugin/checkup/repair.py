"""Write a mended copy of a checkpoint: weight by weight, resumable, the checkpoint itself untouched.

Every tensor is planned from headers first, as the quantizer does. A module that cannot be mended out of itself is made
anew from the source: rounded to NVFP4 under its partner's tensor scale, or decoded to BF16.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin import __version__
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.findings import Fault, Severity
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.checkpoint.shards import by_module
from deepseek_fp4_plugin.checkpoint.weight_rules import PLAIN_DTYPES, TILED, Group, judge
from deepseek_fp4_plugin.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, TensorSpec, refuse_taken
from deepseek_fp4_plugin.checkup import order
from deepseek_fp4_plugin.checkup.consequences import Mending, mending
from deepseek_fp4_plugin.checkup.diagnosis import Diagnosis, every_tensor
from deepseek_fp4_plugin.checkup.repaired_files import repaired_files
from deepseek_fp4_plugin.checkup.samples import Rows, source_rows
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.examination import may_be_absent
from deepseek_fp4_plugin.models.inventory import Role, Weight
from deepseek_fp4_plugin.numerics import nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.plan import Conversion, becomes_nvfp4, paired_weights, result_tensors
from deepseek_fp4_plugin.quantization.recipes.max import quantize_weight
from deepseek_fp4_plugin.quantization.smoothing import read_smoothing

_UNUSABLE = (Fault.BLOCK_SCALE, Fault.TENSOR_SCALE, Fault.OTHER_VALUES, Fault.NOT_FINITE, Fault.ROUNDING)


class Mend(NamedTuple):
    """What becomes of one weight. format: in the result.  anew: from the source.  dtype: of a plain one."""

    weight: Weight
    format: WeightFormat
    anew: bool
    dtype: torch.dtype = torch.bfloat16


def refuse_unmendable(diagnosis: Diagnosis) -> None:
    """Raises CheckpointError naming the first finding that `repair` cannot mend, before anything is written."""
    for finding in diagnosis.findings:
        can = mending(finding.fault)
        if finding.fault is None and finding.severity is not Severity.ERROR:
            continue
        if can is Mending.NO:
            raise CheckpointError(f"this cannot be mended: {finding}")
        if can is Mending.SOURCE and diagnosis.source is None:
            raise CheckpointError(
                f"this can be mended only out of the checkpoint that it was made from (--source): {finding}"
            )
    if diagnosis.examination.config is None:
        raise CheckpointError(f"{diagnosis.folder} has no config.json to go by; take it from the original")
    tensors = diagnosis.examination.shards.tensors
    other = next((n for n, i in tensors.items() if i.stored_as == "weight_scale"), None)
    if other is not None:
        module = other.rpartition(".")[0]
        raise CheckpointError(f"{module} in {diagnosis.folder} is FP8 with weight_scale, which is read but not written")


def repair(
    diagnosis: Diagnosis,
    destination: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write the mended checkpoint to `destination`, which must be absent or empty; the same call goes on after a stop.

    diagnosis: of all values.  Raises CheckpointError for what cannot be mended or written.
    """
    refuse_taken(destination)
    refuse_unmendable(diagnosis)
    mender = _Mender(diagnosis)
    units = list(mender.units())
    specs = [spec for unit in units for mend in unit for spec in mender.specs(mend)]
    writer = CheckpointWriter(destination, specs, mender.job(), max_shard_bytes)
    try:
        if writer.finished is None:
            with torch.inference_mode():
                for done, unit in enumerate(units):
                    progress(done, len(units))
                    if any(writer.needs(spec.name) for mend in unit for spec in mender.specs(mend)):
                        for name, tensor in mender.tensors(unit):
                            writer.write(name, tensor)
            progress(len(units), len(units))
            formats = {mend.weight.module: mend.format for unit in units for mend in unit if mend.weight.linear}
            files = repaired_files(diagnosis, mender.config, formats)
        else:
            files = {}
        writer.finish(files)
    finally:
        writer.close()
        mender.reader.close()


class _Mender:
    def __init__(self, diagnosis: Diagnosis):
        self.diagnosis, self.source = diagnosis, diagnosis.source
        self.reader = every_tensor(diagnosis.examination)
        self.smoothing = read_smoothing(diagnosis.folder)
        self.groups = by_module(self.reader.tensors)
        self.config = self._config()
        quantized = [weight for group in self.groups.values() if (weight := group.get("weight"))]
        self.four_bit = any(info.dtype == torch.uint8 for info in quantized)
        v2 = any(m.endswith(".o_proj") and _is_four_bit(g) for m, g in self.groups.items())
        self.layout = "v2" if v2 else "v1"
        self.nibbles = diagnosis.modules(Fault.NIBBLES)
        self.tiled = diagnosis.modules(Fault.TILED_SCALES)
        self.reciprocal = diagnosis.modules(Fault.RECIPROCAL)
        self.unusable = {module for fault in _UNUSABLE for module in diagnosis.modules(fault)}
        self.copies = diagnosis.modules(Fault.MTP_COPIES)
        self.input_scales = self._input_scales()

    def job(self) -> dict[str, object]:
        shards = sorted(self.diagnosis.folder.glob("*.safetensors"))
        status = {path.name: path.stat() for path in shards}
        return {
            "version": __version__,
            "mends": str(self.diagnosis.folder.resolve()),
            "shards": {shard: [found.st_size, found.st_mtime_ns] for shard, found in status.items()},
            "source": str(self.source.folder.resolve()) if self.source else None,
        }

    def _config(self) -> DeepseekV3Config:
        """With the MTP layer where there is one to be had."""
        config = self.diagnosis.examination.config
        assert config is not None
        name = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
        held = name in self.reader or (self.source is not None and name in self.source)
        return replace(config, num_nextn_predict_layers=int(held))

    # ------------------------------------------------------------ what becomes of each weight

    def units(self) -> Iterator[list[Mend]]:
        """Weights in reading order, gate and up together."""
        for pair in paired_weights(self.config):
            mends = [mend for weight in pair if (mend := self._mend(weight)) is not None]
            if mends:
                yield mends

    def _mend(self, weight: Weight) -> Mend | None:
        module, _, suffix = weight.name.rpartition(".")
        group = self.groups.get(module, {})
        if suffix != "weight":
            present = suffix in group and weight.name not in self.unusable
            return Mend(weight, WeightFormat.PLAIN, not present, group[suffix].dtype if present else torch.float32)
        if "weight" not in group:
            if may_be_absent(weight, self.config) and not self._mtp_anew(weight):
                return None
            return Mend(weight, self._format_of_missing(weight), True)
        dtype = group["weight"].dtype
        if dtype == torch.float8_e4m3fn:
            return Mend(weight, WeightFormat.FP8_BLOCK, False)
        if dtype in PLAIN_DTYPES:
            return Mend(weight, WeightFormat.PLAIN, module in self.unusable, dtype)
        plain = module.endswith(".kv_b_proj") or not weight.linear
        whole = all(problem.kind == TILED for problem in judge(group, weight.shape).problems)
        anew = module in self.unusable or not whole or (plain and self.source is not None)
        return Mend(weight, WeightFormat.PLAIN if plain else WeightFormat.NVFP4, anew)

    def _mtp_anew(self, weight: Weight) -> bool:
        """Whether the whole MTP layer comes from the source, which has this weight."""
        layer = f"model.layers.{weight.layer}.eh_proj.weight"
        return layer not in self.reader and self.source is not None and weight.name in self.source

    def _format_of_missing(self, weight: Weight) -> WeightFormat:
        if self.four_bit and becomes_nvfp4(weight, self.config, self.layout):
            return WeightFormat.NVFP4
        return WeightFormat.PLAIN

    def specs(self, mend: Mend) -> list[TensorSpec]:
        weight = mend.weight
        if mend.format is WeightFormat.NVFP4:
            specs = result_tensors(Conversion(weight, WeightFormat.PLAIN, True), torch.bfloat16)
            return [s for s in specs if self.input_scales or not s.name.endswith(".input_scale")]
        if mend.format is WeightFormat.FP8_BLOCK:
            names = (weight.name, f"{weight.module}.weight_scale_inv")
            return [TensorSpec(name, self.reader.info(name).dtype, self.reader.info(name).shape) for name in names]
        return [TensorSpec(weight.name, mend.dtype, weight.shape)]

    # ------------------------------------------------------------ values

    def tensors(self, unit: list[Mend]) -> Iterator[tuple[str, Tensor]]:
        four_bit = [mend for mend in unit if mend.format is WeightFormat.NVFP4]
        for mend in unit:
            if mend not in four_bit:
                for spec in self.specs(mend):
                    yield spec.name, self._plain(mend, spec)
        if not four_bit:
            return
        stored = {mend.weight.module: self._stored(mend.weight) for mend in four_bit if not mend.anew}
        stored = _shared_scale(stored)
        scale_2 = next((tensor.scale_2 for tensor in stored.values()), None)
        originals = {m.weight.module: self._original(m.weight) for m in four_bit if m.anew}
        if scale_2 is None:
            scale_2 = nvfp4.tensor_scale(torch.stack([w.abs().amax() for w in originals.values()]).amax())
        for module, original in originals.items():
            stored[module] = quantize_weight(original, scale_2)[0]
        for mend in four_bit:
            module, tensor = mend.weight.module, stored[mend.weight.module]
            yield f"{module}.weight", tensor.packed
            yield f"{module}.weight_scale", tensor.scale
            yield f"{module}.weight_scale_2", tensor.scale_2
            if self.input_scales:
                yield f"{module}.input_scale", self._input_scale(module)

    def _stored(self, weight: Weight) -> NVFP4Tensor:
        """The weight as the file has it, in the right order."""
        module, rows, blocks = weight.module, weight.shape[0], weight.shape[1] // nvfp4.BLOCK
        packed, scale = self.reader.get(f"{module}.weight"), self.reader.get(f"{module}.weight_scale")
        if module in self.tiled or scale.shape != (rows, blocks):
            scale = order.untiled(scale, rows, blocks)
        if module in self.nibbles:
            packed = order.swap_nibbles(packed)
        scale_2 = self.reader.get(f"{module}.weight_scale_2").float().reshape(())
        return NVFP4Tensor(packed, scale, _of_reciprocal(scale_2) if module in self.reciprocal else scale_2)

    def _plain(self, mend: Mend, spec: TensorSpec) -> Tensor:
        weight = mend.weight
        if weight.module in self.copies:
            return self.reader.get("model.embed_tokens.weight" if weight.role is Role.EMBEDDING else "lm_head.weight")
        if mend.anew:
            return self._original(weight).to(spec.dtype)
        if _is_four_bit(self.groups.get(weight.module, {})) and spec.name == weight.name:
            return nvfp4.dequantize(self._stored(weight), spec.dtype)
        return self.reader.get(spec.name)

    def _original(self, weight: Weight) -> Tensor:
        """The source's weight, BF16 (a bias as it is). Raises CheckpointError where there is none."""
        if self.source is None or weight.name not in self.source:
            where = f"{self.source.folder} has none" if self.source else "no --source was given"
            raise CheckpointError(f"{weight.name} in {self.diagnosis.folder} must be made anew, and {where}")
        if not weight.name.endswith(".weight"):
            return self.source.get(weight.name)
        if self.source.info(weight.name).shape != weight.shape:
            raise CheckpointError(f"{weight.name} in {self.source.folder} has another shape; it is not the source")
        if len(weight.shape) == 1:
            original = self.source.get(weight.name)
        else:
            original = source_rows(self.source, weight.module, Rows(0, weight.shape[0]))
        return self.smoothing.applied(weight.module, original)

    def _input_scale(self, module: str) -> Tensor:
        """The module's own if it is one; else the largest of its peers, or of its like in other layers.

        A scale that is too large by some powers of two loses nothing, one that is too small saturates.
        """
        name = f"{module}.input_scale"
        if name in self.reader and module not in self.diagnosis.modules(Fault.INPUT_SCALE):
            return self.reader.get(name).float().reshape(())
        peers = _peers(module)
        known = [scale for other, scale in self.input_scales.items() if other == peers]
        known = known or [s for other, s in self.input_scales.items() if other.split(".")[-1] == peers.split(".")[-1]]
        return torch.stack(known or list(self.input_scales.values())).amax()

    def _input_scales(self) -> dict[str, Tensor]:
        """Projection of a layer -> the largest of its valid input scales. Empty for weight-only checkpoints."""
        bad, found = self.diagnosis.modules(Fault.INPUT_SCALE), dict[str, Tensor]()
        for module, group in self.groups.items():
            if _is_four_bit(group) and "input_scale" in group and module not in bad:
                scale = self.reader.get(f"{module}.input_scale").float().reshape(())
                found[_peers(module)] = torch.maximum(found.get(_peers(module), scale), scale)
        return found


def _of_reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, to the last bit where it is that of a BF16 magnitude, as a largest weight is."""
    near = nvfp4.tensor_scale((1 / scale * nvfp4.AMAX_TO_SCALE).bfloat16())
    return near if torch.allclose(near, 1 / scale, rtol=1e-6, atol=0) else 1 / scale


def _is_four_bit(group: Group) -> bool:
    return "weight" in group and group["weight"].dtype == torch.uint8


def _peers(module: str) -> str:
    """A name for the modules of a layer that see one kind of input: gate and up of all experts, and their downs."""
    parts = module.split(".")
    if "experts" in parts:
        parts[parts.index("experts") + 1] = "*"
    if parts[-1] == "up_proj":
        parts[-1] = "gate_proj"
    return ".".join(parts)


def _shared_scale(stored: dict[str, NVFP4Tensor]) -> dict[str, NVFP4Tensor]:
    """Gate and up under the larger of their tensor scales; exact where the two differ by a power of two."""
    if len(stored) < 2:
        return stored
    largest = torch.stack([tensor.scale_2 for tensor in stored.values()]).amax()
    return {module: _rescaled(tensor, largest) for module, tensor in stored.items()}


def _rescaled(tensor: NVFP4Tensor, scale_2: Tensor) -> NVFP4Tensor:
    if torch.equal(tensor.scale_2, scale_2):
        return tensor
    values = nvfp4.dequantize(tensor).unflatten(-1, (-1, nvfp4.BLOCK))
    scale = (tensor.scale.float() * (tensor.scale_2 / scale_2)).clamp(nvfp4.E4M3_MIN, nvfp4.E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn)
    return NVFP4Tensor(nvfp4.encode_blocks(values, scale, scale_2), scale, scale_2)
