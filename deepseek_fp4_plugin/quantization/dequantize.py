"""A quantized checkpoint back to BF16, or to FP8 in 128 x 128 blocks as DeepSeek publishes: what other tools ask for.

Nothing comes back that quantizing lost: an NVFP4 weight's values are the ones that every runtime computes with, rounded
once to BF16 or FP8.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin import __version__
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.hub import is_small_file, resolve
from deepseek_fp4_plugin.checkpoint.quant_config import HF_QUANT_CONFIG, WeightFormat, detect_format
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader, read_json
from deepseek_fp4_plugin.checkpoint.scales import read_scale
from deepseek_fp4_plugin.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, TensorSpec
from deepseek_fp4_plugin.models.config import with_mtp_layers
from deepseek_fp4_plugin.models.examination import examine, may_be_absent
from deepseek_fp4_plugin.models.inventory import Weight, weights
from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.convert import source_weight
from deepseek_fp4_plugin.quantization.overlap import overlapped

TARGETS = ("bf16", "fp8")
_PIECE = 2**24  # elements at once
_BUDGET = 2**29
_FP8_SECTION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [fp8_block.BLOCK, fp8_block.BLOCK],
    "activation_scheme": "dynamic",
}


class _Piece(NamedTuple):
    """Rows [start, stop) of a weight; of one without rows, all of it."""

    weight: Weight
    source: WeightFormat
    start: int
    stop: int


def dequantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "bf16",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Write the NVFP4 or FP8 checkpoint `source` with plain weights; returns bytes of its tensors before and after.

    to: "bf16", or "fp8" for linears in FP8 blocks.  progress: called with pieces done and in all.
    An interrupted run is continued by the same call. Raises ValueError for another `to`, CheckpointError for a
    checkpoint that cannot be used or written.
    """
    if to not in TARGETS:
        raise ValueError(f"cannot dequantize to {to!r}; choose from {', '.join(TARGETS)}")
    folder = resolve(source)
    config, reader = examine(folder).usable(result="the result")
    found = [w for w in weights(config) if w.name in reader or not may_be_absent(w, config)]
    formats = {
        w.name: detect_format(reader, w.module) if w.name.endswith(".weight") else WeightFormat.PLAIN for w in found
    }
    if set(formats.values()) == {WeightFormat.PLAIN} and to == "bf16":
        raise CheckpointError(f"{folder} is not quantized; there is nothing to dequantize")
    specs = [spec for weight in found for spec in _specs(reader, weight, formats[weight.name], to)]
    job = {"version": __version__, "source": str(folder.resolve()), "dequantize": to}
    writer = CheckpointWriter(destination, specs, job, max_shard_bytes)
    try:
        if writer.finished is None:
            pieces = [piece for weight in found for piece in _pieces(writer, weight, formats[weight.name])]
            tell = progress or (lambda done, total: None)
            steps = overlapped(
                pieces,
                lambda piece: _values(reader, piece),
                lambda piece, values: _result(reader, piece, values, to),
                lambda piece, tensors: _write(writer, piece, tensors),
                _cost,
                _BUDGET,
            )
            for done, _ in enumerate(steps, 1):
                tell(done, len(pieces))
        writer.finish(_files(folder, config, to))
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror or error}"
        raise CheckpointError(f"{what}; run again to continue from {writer.folder}") from None
    finally:
        writer.close()
        reader.close()
    return sum(info.nbytes for info in reader.tensors.values()), sum(spec.nbytes for spec in specs)


def _format(reader: CheckpointReader, weight: Weight) -> WeightFormat:
    return detect_format(reader, weight.module) if weight.name.endswith(".weight") else WeightFormat.PLAIN


def _specs(reader: CheckpointReader, weight: Weight, source: WeightFormat, to: str) -> Iterator[TensorSpec]:
    shape = tuple(weight.shape)
    if weight.linear and to == "fp8":
        blocks = tuple(-(-size // fp8_block.BLOCK) for size in shape)
        yield TensorSpec(weight.name, torch.float8_e4m3fn, shape)
        yield TensorSpec(f"{weight.module}.weight_scale_inv", torch.float32, blocks)
    elif weight.linear or source is not WeightFormat.PLAIN:
        yield TensorSpec(weight.name, torch.bfloat16, shape)
    else:
        yield TensorSpec(weight.name, reader.info(weight.name).dtype, shape)


def _pieces(writer: CheckpointWriter, weight: Weight, source: WeightFormat) -> Iterator[_Piece]:
    scale = f"{weight.module}.weight_scale_inv"
    if not writer.needs(weight.name) and not (writer.plans(scale) and writer.needs(scale)):
        return
    rows = weight.shape[0] if len(weight.shape) > 1 else 1
    step = max(_PIECE // weight.shape[-1] // fp8_block.BLOCK, 1) * fp8_block.BLOCK
    for start in range(0, rows, step):
        yield _Piece(weight, source, start, min(start + step, rows))


def _cost(piece: _Piece) -> int:
    return 8 * (piece.stop - piece.start) * piece.weight.shape[-1]


def _values(reader: CheckpointReader, piece: _Piece) -> Tensor:
    """FP32 of a quantized weight's rows, else the source's."""
    name, module = piece.weight.name, piece.weight.module
    if len(piece.weight.shape) == 1:
        return reader.get(name)
    raw = reader.get_slice(name, 0, piece.start, piece.stop)
    if piece.source is WeightFormat.NVFP4:
        scale = reader.get_slice(f"{module}.weight_scale", 0, piece.start, piece.stop)
        return nvfp4.dequantize(NVFP4Tensor(raw, scale, read_scale(reader, f"{module}.weight_scale_2")))
    if piece.source is WeightFormat.FP8_BLOCK:
        return source_weight(reader, piece.weight, piece.source, (piece.start, piece.stop)).decoded(torch.float32)
    return raw


def _result(reader: CheckpointReader, piece: _Piece, values: Tensor, to: str) -> tuple[Tensor, ...]:
    if not torch.isfinite(values).all():
        raise CheckpointError(
            f"{piece.weight.name} in {reader.folder} holds NaN or infinity; "
            f"download {reader.info(piece.weight.name).shard} again"
        )
    if piece.weight.linear and to == "fp8":
        return fp8_block.quantize(values)
    if piece.weight.linear or piece.source is not WeightFormat.PLAIN:
        return (values.to(torch.bfloat16),)
    return (values,)


def _write(writer: CheckpointWriter, piece: _Piece, tensors: tuple[Tensor, ...]) -> None:
    writer.write(piece.weight.name, tensors[0], piece.start)
    if len(tensors) > 1:
        writer.write(f"{piece.weight.module}.weight_scale_inv", tensors[1], piece.start // fp8_block.BLOCK)


def _files(folder: Path, config: Any, to: str) -> dict[str, str | bytes]:
    """The small files, without what says that the weights are quantized."""
    left_out = ("config.json", HF_QUANT_CONFIG, "README.md")
    files: dict[str, str | bytes] = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and is_small_file(path.name) and not path.name.endswith(".index.json")
        if path.name not in left_out and not path.name.startswith((".", "quantization_report"))
    }
    content = {k: v for k, v in read_json(folder / "config.json").items() if k != "quantization_config"}
    content = with_mtp_layers(content, config.num_nextn_predict_layers)
    if to == "fp8":
        content["quantization_config"] = _FP8_SECTION
    files["config.json"] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return files
