"""What the numbers of a scale mean, by its name and dtype: read as FP32, or refused by name.

A scale in one byte is an exponent (E8M0 of the OCP microscaling formats, DeepSeek's `ue8m0`): value 2^(byte - 127), and
byte 255 is NaN, whether the file calls the dtype F8_E8M0 or U8. Taken as a plain number it would be wrong by any power
of ten and still give fluent text.
"""

import math
from enum import StrEnum

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader

_REAL = (torch.float32, torch.bfloat16, torch.float16)
_EXPONENT = (torch.float8_e8m0fnu, torch.uint8)
_FP8_BLOCK = 128
# Last part of a scale's name -> the dtypes that it may have.
SCALE_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "weight_scale_inv": _REAL + _EXPONENT,
    "weight_scale": (torch.float8_e4m3fn,),  # of NVFP4
    "weight_scale_2": _REAL,
    "input_scale": _REAL,
}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_scale(reader: CheckpointReader, name: str, raw: Tensor | None = None) -> Tensor:
    """A scale's values: FP32, but NVFP4's `weight_scale` as the E4M3 it is.

    raw: of a caller that has read it (a part of it) already.  A tensor scale may be stored with shape [] or [1] and
    comes back as [].
    Raises CheckpointError for a dtype without a meaning here and for a negative number, which no quantizer writes. NaN
    and infinity come through: who writes a checkpoint refuses them, who runs one says so.
    """
    info, suffix = reader.info(name), name.rpartition(".")[2]
    if info.dtype not in SCALE_DTYPES[suffix]:
        raise CheckpointError(f"{name} in {reader.folder} {wrong_scale_dtype(suffix, info.dtype)}")
    scale = reader.get(name) if raw is None else raw
    if info.dtype in _EXPONENT:
        scale = scale.view(torch.float8_e8m0fnu)
    if suffix != "weight_scale":
        scale = scale.float()
    if suffix in ("weight_scale_2", "input_scale") and scale.numel() == 1:
        scale = scale.reshape(())
    if _has_negative(scale):
        raise CheckpointError(
            f"{name} in {reader.folder} holds a negative number, which no scale can be; download {info.shard} again"
        )
    return scale


class Grain(StrEnum):
    """What one scale of an FP8 weight stands for."""

    TENSOR = "tensor"
    ROW = "row"
    BLOCK = "block"  # of 128 x 128


def fp8_grain(scale: tuple[int, ...], weight: tuple[int, ...]) -> Grain | None:
    """From the two shapes; None where they do not fit."""
    if scale == tuple(-(-size // _FP8_BLOCK) for size in weight):
        return Grain.BLOCK
    if is_tensor_scale(scale):
        return Grain.TENSOR
    if scale in ((weight[0],), (weight[0], 1)):
        return Grain.ROW
    return None


def in_blocks(scale: Tensor, weight: tuple[int, ...]) -> tuple[Tensor, tuple[int, int]]:
    """An FP8 weight's scales as those of blocks, FP32 [ceil(out / block), ceil(in / block)], and the block's size.

    scale: as read_scale gives it.  weight: the weight's shape.  Raises ValueError where the two do not fit.
    """
    grain, (rows, columns) = fp8_grain(tuple(scale.shape), weight), (-(-size // _FP8_BLOCK) for size in weight)
    if grain is Grain.BLOCK:
        return scale, (_FP8_BLOCK, _FP8_BLOCK)
    if grain is Grain.TENSOR:
        return scale.reshape(1, 1).repeat(rows, columns), (_FP8_BLOCK, _FP8_BLOCK)
    if grain is Grain.ROW:
        return scale.reshape(-1, 1).repeat(1, columns), (1, _FP8_BLOCK)
    raise ValueError(f"scales of shape {list(scale.shape)} do not fit an FP8 weight of shape {list(weight)}")


def all_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity, in one pass and without a copy."""
    if tensor.dtype == torch.float8_e4m3fn:  # its NaN is all ones behind the sign, and it has no infinity
        return not bool((tensor.view(torch.uint8) & 0x7F == 0x7F).any())
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN comes through
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _has_negative(scale: Tensor) -> bool:
    if scale.dtype == torch.float8_e4m3fn:
        raw = scale.view(torch.uint8)
        return bool(((raw > 0x80) & (raw < 0xFF)).any())  # 0x80 is -0, 0xFF NaN
    return bool((scale < 0).any())


def wrong_scale_dtype(suffix: str, dtype: torch.dtype) -> str:
    allowed = [dtype_name(known) for known in SCALE_DTYPES[suffix]]
    return f"has dtype {dtype_name(dtype)}, which is no {suffix}: it must be {' or '.join(allowed)}"


def is_tensor_scale(shape: tuple[int, ...]) -> bool:
    """True for the shapes that one scale for a whole tensor is stored with: [], [1]."""
    return math.prod(shape) == 1
