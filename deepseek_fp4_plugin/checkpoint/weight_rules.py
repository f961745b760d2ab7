"""What the tensors of one module may be: names, dtypes and shapes of each format, from headers alone.

Formats of other programs are recognised and named, so that nobody looks for a tensor that was never lost.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from deepseek_fp4_plugin.checkpoint.quant_config import SUFFIXES, WeightFormat
from deepseek_fp4_plugin.checkpoint.scales import (
    SCALE_DTYPES,
    dtype_name,
    fp8_grain,
    is_tensor_scale,
    wrong_scale_dtype,
)
from deepseek_fp4_plugin.checkpoint.shards import TensorInfo
from deepseek_fp4_plugin.numerics.scale_layout import tiled_size

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILED = "tiled weight_scale"  # kind of a problem
_FP8_BLOCK = 128
_NVFP4_BLOCK = 16
_SCALES = ("weight_scale_inv", "weight_scale", "weight_scale_2", "input_scale")
_READ_HERE = (
    "this program reads BF16, FP8 (weight, and weight_scale_inv by 128 x 128 blocks or weight_scale), and NVFP4 of "
    "ModelOpt and compressed-tensors"
)


class Problem(NamedTuple):
    """kind: equal for problems that are one.  suffix: of the tensor it is about.  text: what follows the name."""

    kind: str
    suffix: str
    text: str


class Verdict(NamedTuple):
    """format: None when the module cannot be read.  leftover: suffixes of scales that an older weight left behind."""

    format: WeightFormat | None
    problems: tuple[Problem, ...] = ()
    leftover: tuple[str, ...] = ()


Group = Mapping[str, TensorInfo]  # last part of the name -> tensor, of one module


def judge(group: Group, shape: tuple[int, ...]) -> Verdict:
    """The format of a module whose unquantized weight would have `shape`, and all that is wrong with its tensors."""
    if "weight" not in group:
        return Verdict(None, (_absent(group),))
    dtype = group["weight"].dtype
    if dtype in PLAIN_DTYPES:
        return _plain(group, shape)
    if dtype == torch.float8_e4m3fn:
        return _fp8(group, shape)
    if dtype == torch.uint8:
        return _four_bit(group, shape)
    return Verdict(None, (Problem(f"dtype {dtype}", "weight", _unknown_dtype(group, dtype)),))


def read_of(group: Group, verdict: Verdict) -> set[str]:
    """The suffixes that are read, or that the verdict has told of."""
    if verdict.format is None:
        return set(group)
    if verdict.format is WeightFormat.PLAIN:
        return {"weight", *_SCALES} & group.keys()
    return set(SUFFIXES[verdict.format]) & group.keys()


def _absent(group: Group) -> Problem:
    names = ", ".join(sorted(group))
    if "weight_packed" in group:
        return Problem("packed", "weight_packed", f"is a packed weight of compressed-tensors ({names}); {_READ_HERE}")
    if "qweight" in group:
        return Problem("GPTQ", "qweight", f"is a weight of GPTQ or AWQ ({names}); {_READ_HERE}")
    if group.keys() - {*_SCALES, "bias"}:
        return Problem("other names", "weight", f"is missing; of its module there is {names}, and {_READ_HERE}")
    return Problem("missing", "weight", "")  # who knows the folder says it


def _plain(group: Group, shape: tuple[int, ...]) -> Verdict:
    weight = group["weight"]
    scales = [suffix for suffix in _SCALES if suffix in group]
    leftover = tuple(s for s in scales if not group[s].indexed and group[s].shard != weight.shard)
    problems = _shape(group, "weight", shape)
    for suffix in scales:
        if suffix not in leftover:
            text = f"is a scale, but the weight beside it is {dtype_name(weight.dtype)} and has none"
            text += "; one of the two belongs to another checkpoint: remove it, or download both again"
            problems += (Problem("scale of a plain weight", suffix, text),)
    return Verdict(WeightFormat.PLAIN, problems, leftover)


def _fp8(group: Group, shape: tuple[int, ...]) -> Verdict:
    if "weight_scale_inv" in group:
        blocks = tuple(-(-size // _FP8_BLOCK) for size in shape)
        problems = _shape(group, "weight", shape) or _block_shape(group, shape, blocks)
        return Verdict(WeightFormat.FP8_BLOCK, problems + _dtype(group, "weight_scale_inv"))
    return Verdict(None, (_scale_missing(group, "weight_scale_inv"),))


def _block_shape(group: Group, shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[Problem, ...]:
    found, stored_as = group["weight_scale_inv"].shape, group["weight_scale_inv"].stored_as
    if found == blocks or (stored_as and fp8_grain(found, shape)):
        return ()
    if stored_as:
        text = f"({stored_as}) has shape {list(found)}, which is neither one scale for the tensor, nor one for each of "
        text += f"its {shape[0]} rows, nor one for each 128 x 128 block, {list(blocks)}"
        return (Problem("scale shape", "weight_scale_inv", text),)
    text = f"has shape {list(found)}, but config.json implies {list(blocks)}: one scale for each 128 x 128 block"
    if len(found) == 2 and len(shape) == 2:
        for size in (16, 32, 64, 256, 512):
            if found == tuple(-(-length // size) for length in shape):
                text += f"; blocks of {size} x {size}, which it fits, are not read here"
                break
    return (Problem("scale shape", "weight_scale_inv", text),)


def _four_bit(group: Group, shape: tuple[int, ...]) -> Verdict:
    if "weight_scale_inv" in group:
        text = "is uint8 beside weight_scale_inv; FP8 weights must have dtype F8_E4M3, so convert the checkpoint again"
        return Verdict(None, (Problem("FP8 as bytes", "weight", text),))
    scale = group.get("weight_scale")
    if "weight_scale_2" not in group and scale is not None and scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        text = f"is 4-bit with one exponent a block (MXFP4), which is not NVFP4; {_READ_HERE}"
        return Verdict(None, (Problem("MXFP4", "weight", text),))
    for suffix in SUFFIXES[WeightFormat.NVFP4]:
        # Weight-only NVFP4 checkpoints have no input_scale; running them with FP4 activations is refused later.
        if suffix != "input_scale" and suffix not in group:
            return Verdict(None, (_scale_missing(group, suffix),))
    problems: tuple[Problem, ...] = ()
    if len(shape) == 2 and shape[1] % _NVFP4_BLOCK == 0:
        problems += _shape(group, "weight", (shape[0], shape[1] // 2))
        problems += _scale_order(group, (shape[0], shape[1] // _NVFP4_BLOCK))
    else:
        problems += (Problem("NVFP4 width", "weight", f"is NVFP4, which cannot hold shape {list(shape)}"),)
    for suffix in ("weight_scale_2", "input_scale"):
        if suffix in group and not is_tensor_scale(group[suffix].shape):
            text = f"has shape {list(group[suffix].shape)}, but one scale for a tensor has shape [] or [1]"
            problems += (Problem("scale shape", suffix, text),)
    for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
        problems += _dtype(group, suffix)
    return Verdict(WeightFormat.NVFP4, problems)


def _scale_order(group: Group, shape: tuple[int, int]) -> tuple[Problem, ...]:
    """Whether block scales have their shape, or as many numbers as in the tensor cores' order of 128 x 4."""
    tiled = tiled_size(*shape)
    problems = _shape(group, "weight_scale", shape)
    if (
        problems
        and group["weight_scale"].dtype == torch.float8_e4m3fn
        and math.prod(group["weight_scale"].shape) == tiled
    ):
        text = f"{problems[0].text}; so many there are in the tensor cores' 128 x 4 order, which no checkpoint keeps"
        return (Problem(TILED, "weight_scale", text),)
    return problems


def _scale_missing(group: Group, suffix: str) -> Problem:
    text = f"is {group['weight'].dtype} but {{module}}.{suffix} is missing; without its scale the weight means nothing"
    others = sorted(name for name in group if re.search("scale|zero|absmax|quant", name) and name not in _SCALES)
    text += f" ({', '.join(others)} is not known here)" if others else ""
    return Problem(f"no {suffix}", "weight", f"{text}, so download or convert the checkpoint again")


def _unknown_dtype(group: Group, dtype: torch.dtype) -> str:
    beside = ", ".join(sorted(name for name in group if name != "weight"))
    known = f" (beside it: {beside})" if beside else ""
    return f"has dtype {dtype_name(dtype)}{known}, which no format here uses; {_READ_HERE}"


def _shape(group: Group, suffix: str, expected: tuple[int, ...]) -> tuple[Problem, ...]:
    found = group[suffix].shape
    if found == expected:
        return ()
    text = f"has shape {list(found)}, but config.json implies {list(expected)}"
    return (Problem(f"shape of {suffix}", suffix, text),)


def _dtype(group: Group, suffix: str) -> tuple[Problem, ...]:
    if suffix not in group or group[suffix].dtype in SCALE_DTYPES[suffix]:
        return ()
    text = wrong_scale_dtype(suffix, group[suffix].dtype)
    return (Problem(f"dtype of {suffix} {group[suffix].dtype}", suffix, text),)
