"""WeightSource: hands each layer its weights from a checkpoint, this rank's slice only, in the device's layout.

A layer names its tensors (Hugging Face names) and says along which axis it is cut; everything about files, formats,
slices and devices is here.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat, detect_format
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.scales import Grain, all_finite, fp8_grain, in_blocks, read_scale
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.weights import Activations, OptionalTensor, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.numerics import fp8_block
from deepseek_fp4_plugin.parallel.mesh import WHOLE, Mesh, Shard

OUT, IN = 0, 1
_FP8_BLOCK = 128
_NVFP4_BLOCK = 16


class Cut(NamedTuple):
    """A slice of a weight: `shard` of the parts along axis OUT or IN."""

    axis: int
    shard: Shard


UNCUT = Cut(OUT, WHOLE)


class WeightSource:
    """Reads one rank's weights. `activations` applies to NVFP4 weights; `backend` None lets `kernels.select` choose."""

    def __init__(
        self,
        reader: CheckpointReader,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        mesh: Mesh | None = None,
        activations: Activations = "bf16",
        backend: str | None = None,
    ):
        self.reader = reader
        self.device = torch.device(device)
        self.dtype = dtype
        self.mesh = mesh or Mesh()
        self.activations: Activations = activations
        self.backend = backend
        self.not_finite: list[str] = []  # scales read with NaN or infinity in them

    def close(self) -> None:
        """Close the checkpoint's files."""
        self.reader.close()

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None, cut: Cut = UNCUT) -> Tensor:
        """A tensor that is used unquantized, checked against the whole `shape`, cut, on the device, in `dtype` or the
        model's. One that is stored as FP8 blocks is decoded.
        """
        if self.reader.info(name).dtype == torch.float8_e4m3fn:
            parts = self._fp8_parts(name.removesuffix(".weight"), tuple(shape), cut)
            decoded = fp8_block.dequantize(parts.weight, parts.scale, torch.float32, parts.fp8_block)
            return decoded.to(self.device, dtype or self.dtype)
        return self._read(name, tuple(shape), cut).to(self.device, dtype or self.dtype)

    def linear(
        self,
        modules: Sequence[str],
        out_features: Sequence[int],
        in_features: int,
        cut: Cut,
        activations: Activations | None = None,
    ) -> PreparedWeight:
        """A linear, or several of the same input fused along their outputs; sizes are those of the whole weights.

        activations: None takes the source's choice.
        """
        parts = [self._parts(module, out, in_features, cut) for module, out in zip(modules, out_features, strict=True)]
        return self._prepare(parts, activations)

    def experts(
        self,
        prefix: str,
        projections: Sequence[str],
        experts: Sequence[int],
        total: int,
        sizes: tuple[int, int],
        cut: Cut,
    ) -> PreparedWeight:
        """Stacked experts: `<prefix>.<expert>.<projection>` for each of `experts`, fused over `projections`.

        sizes: whole (out, in) of each projection.  total: all experts of the layer; the activation scale is the
        largest over all of them, also those of other ranks, as run-time kernels use one per layer.
        """
        stacks = []
        for projection in projections:
            modules = [f"{prefix}.{expert}.{projection}" for expert in range(total)]
            weight_format = detect_format(self.reader, modules[experts[0]])
            if any(detect_format(self.reader, modules[expert]) is not weight_format for expert in experts):
                raise CheckpointError(f"{prefix}.*.{projection}: experts of one layer differ in weight format")
            slots = (self._parts(modules[expert], *sizes, cut, input_scale=False) for expert in experts)
            stacks.append(_stack(slots, len(experts), self._largest_input_scale(modules, weight_format)))
        return self._prepare(stacks)

    def cache_scale(self, attention: str) -> float:
        """What the values of a layer's FP8 cache are to be multiplied by, 1.0 where the checkpoint does not say.

        attention: the module's name. ModelOpt's and llm-compressor's names are read; a value scale beside it is equal,
        since there is one latent. Raises CheckpointError for a scale that is not one number above zero.
        """
        for name in (f"{attention}.k_proj.k_scale", f"{attention}.k_scale"):
            if name in self.reader:
                scale = self.reader.get(name).float()
                if scale.numel() != 1 or not 0 < float(scale) < float("inf"):
                    raise CheckpointError(f"{name} in {self.reader.folder} is not one number above zero")
                return float(scale)
        return 1.0

    def _prepare(self, parts: Sequence[WeightTensors], activations: Activations | None = None) -> PreparedWeight:
        return ops.prepare(parts, self.device, self.dtype, activations or self.activations, self.backend)

    def _parts(
        self, module: str, out_features: int, in_features: int, cut: Cut, input_scale: bool = True
    ) -> WeightTensors:
        weight_format = detect_format(self.reader, module)
        if weight_format is WeightFormat.PLAIN:
            weight = self._read(f"{module}.weight", (out_features, in_features), cut)
            return WeightTensors(weight_format, weight.to(self.dtype))
        if weight_format is WeightFormat.NVFP4:
            if (in_features // (cut.shard.count if cut.axis == IN else 1)) % _NVFP4_BLOCK:
                raise ValueError(
                    f"{module}: {in_features} inputs cut {cut.shard.count} ways do not leave whole NVFP4 blocks of 16"
                )
            return WeightTensors(
                weight_format,
                self._read(f"{module}.weight", (out_features, in_features // 2), cut),
                self._scale(f"{module}.weight_scale", (out_features, in_features // _NVFP4_BLOCK), cut),
                self._scale(f"{module}.weight_scale_2"),
                self._input_scale(module) if input_scale else None,
            )
        return self._fp8_parts(module, (out_features, in_features), cut)

    def _fp8_parts(self, module: str, shape: tuple[int, ...], cut: Cut) -> WeightTensors:
        weight = self._read(f"{module}.weight", shape, cut)
        scale_shape = tuple(-(-size // _FP8_BLOCK) for size in shape)
        scale_name = f"{module}.weight_scale_inv"
        stored = self.reader.info(scale_name).shape
        if fp8_grain(stored, shape) in (Grain.TENSOR, Grain.ROW):
            # One for the tensor is every slice's; those of rows are cut where the rows are.
            by_rows = cut if cut.axis == OUT and fp8_grain(stored, shape) is Grain.ROW else UNCUT
            scale, block = in_blocks(self._scale(scale_name, stored, by_rows), tuple(weight.shape))
            return WeightTensors(WeightFormat.FP8_BLOCK, weight, scale, fp8_block=block)
        if cut.shard.count == 1:
            return WeightTensors(WeightFormat.FP8_BLOCK, weight, self._scale(scale_name, scale_shape))
        start, stop = cut.shard.bounds(shape[cut.axis], module)
        # A slice may begin or end inside a block: describe it with the largest block size that divides its bounds.
        fine = next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if start % size == 0 and (stop - start) % size == 0)
        first = start // _FP8_BLOCK
        scale = self._scale(scale_name, scale_shape, cut, (first, -(-stop // _FP8_BLOCK)))
        scale = scale.repeat_interleave(_FP8_BLOCK // fine, cut.axis).narrow(
            cut.axis, (start - first * _FP8_BLOCK) // fine, (stop - start) // fine
        )
        block = (fine, _FP8_BLOCK) if cut.axis == OUT else (_FP8_BLOCK, fine)
        return WeightTensors(WeightFormat.FP8_BLOCK, weight, scale.contiguous(), fp8_block=block)

    def _input_scale(self, module: str) -> Tensor | None:
        name = f"{module}.input_scale"
        return self._scale(name) if name in self.reader else None

    def _largest_input_scale(self, modules: Sequence[str], weight_format: WeightFormat) -> Tensor | None:
        if weight_format is not WeightFormat.NVFP4:
            return None
        scales = [self._input_scale(module) for module in modules]
        present = [scale for scale in scales if scale is not None]
        return torch.stack(present).amax() if len(present) == len(modules) else None

    def _scale(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        cut: Cut = UNCUT,
        bounds: tuple[int, int] | None = None,
    ) -> Tensor:
        """shape: of a scale that is not one for the whole tensor.  cut, bounds: see _read."""
        scale = read_scale(self.reader, name, None if shape is None else self._read(name, shape, cut, bounds))
        if not all_finite(scale):
            self.not_finite.append(name)
        return scale

    def _read(self, name: str, shape: tuple[int, ...], cut: Cut, bounds: tuple[int, int] | None = None) -> Tensor:
        """A tensor of the whole `shape`, or its slice; bounds: of the slice, where `cut` does not give them."""
        info = self.reader.info(name)
        if info.shape != shape:
            raise CheckpointError(
                f"{name} in {self.reader.folder} has shape {list(info.shape)}; config.json implies {list(shape)}"
            )
        if cut.shard.count == 1:
            return self.reader.get(name)
        start, stop = bounds or cut.shard.bounds(shape[cut.axis], name)
        return self.reader.get_slice(name, cut.axis, start, stop)


def _stack(slots: Iterator[WeightTensors], count: int, input_scale: Tensor | None) -> WeightTensors:
    """Put expert e's tensors into slot e of stacked ones, one expert at a time: two copies of a stack would not fit."""
    first = next(slots)

    def room(tensor: OptionalTensor) -> OptionalTensor:
        return None if tensor is None else tensor.new_empty(count, *tensor.shape)

    stacked = room(first.weight), room(first.scale), room(first.scale_2)
    for index, slot in enumerate(itertools.chain([first], slots)):
        for into, tensor in zip(stacked, (slot.weight, slot.scale, slot.scale_2), strict=True):
            if into is not None:
                into[index] = tensor
    return WeightTensors(first.format, *stacked, input_scale, first.fp8_block)
