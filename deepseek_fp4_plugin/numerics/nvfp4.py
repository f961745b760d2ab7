"""NVFP4: E2M1 values in blocks of 16 with one E4M3 scale a block and one FP32 scale a tensor.

    value = e2m1 * float(block_scale) * tensor_scale        tensor_scale = amax / (6 * 448)

The order of every operation follows nvidia-modelopt 0.47.0 bit for bit (docs/format.md lists the steps and the places
where other versions and run-time kernels differ), with one exception: an all-zero tensor gets block scales of 1.0
and dequantizes to zero, where 0.47.0 writes NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics import e2m1

BLOCK = 16
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # smallest subnormal
AMAX_TO_SCALE = e2m1.MAX * E4M3_MAX  # 2688


class NVFP4Tensor(NamedTuple):
    """packed: uint8 [..., cols / 2].  scale: E4M3 [..., cols / 16], row-major.  scale_2: FP32 [] or [leading]."""

    packed: Tensor
    scale: Tensor
    scale_2: Tensor


def tensor_scale(amax: Tensor) -> Tensor:
    """`weight_scale_2` or `input_scale` of a tensor whose largest magnitude is `amax`: FP32, one division by 2688."""
    amax = amax.float()
    # On CUDA torch divides by a number by multiplying with its reciprocal, which is not the same to the last bit.
    return amax / torch.full_like(amax, AMAX_TO_SCALE)


def quantize(w: Tensor, scale_2: Tensor | None = None) -> NVFP4Tensor:
    """Round `w` to NVFP4.

    w: [..., cols] BF16, FP16 or FP32, cols a multiple of 16.
    scale_2: FP32 [], or [n] for one scale for each index of the first axis (stacked experts); default: from max |w|.
    Raises ValueError for a wrong width, NaN or infinity.
    """
    if w.shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 needs a last axis that is a multiple of {BLOCK}, got shape {list(w.shape)}")
    if not torch.isfinite(w).all():
        raise ValueError("NVFP4 cannot hold NaN or infinity, and the tensor has some")
    if scale_2 is None:
        scale_2 = tensor_scale(w.abs().amax() if w.numel() else torch.zeros(()))
    blocks = w.unflatten(-1, (-1, BLOCK))
    scale = block_scales(blocks.abs().amax(-1), _broadcast(scale_2, w.ndim))
    return NVFP4Tensor(encode_blocks(blocks, scale, scale_2), scale, scale_2)


def block_scales(block_amax: Tensor, scale_2: Tensor) -> Tensor:
    """E4M3 scales for blocks of the given largest magnitudes.

    block_amax: [..., blocks], any floating dtype.  scale_2: FP32, broadcastable.  Returns E4M3 [..., blocks].
    A zero block gets 1.0; the others are clamped to [2^-9, 448], so no scale byte is zero or NaN.
    """
    scale = block_amax.float() / (e2m1.MAX * scale_2.to(block_amax.device))  # see tensor_scale
    scale = torch.where((scale == 0) | (block_amax == 0), 1.0, scale)
    return scale.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_blocks(blocks: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """E2M1 codes of `blocks` under given scales, packed.

    blocks: [..., n, 16].  scale: E4M3 [..., n].  scale_2 as in `quantize`.  Returns uint8 [..., n * 8].
    """
    step = scale.float() * _broadcast(scale_2, scale.ndim).to(scale.device)  # this product first, then one division
    step = torch.where(step == 0, torch.inf, step)  # zero only in an all-zero tensor, whose quotients are then zero
    return e2m1.pack(e2m1.encode(blocks.float() / step.unsqueeze(-1)).flatten(-2))


def dequantize(q: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., cols] in `dtype`: code value times (block scale times tensor scale), in FP32, rounded once at the end."""
    step = q.scale.float() * _broadcast(q.scale_2, q.scale.ndim)
    values = e2m1.decode(e2m1.unpack(q.packed)).unflatten(-1, (-1, BLOCK))
    return (values * step.unsqueeze(-1)).flatten(-2).to(dtype)


def block_values(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Code value times block scale, no tensor scale: [..., cols], exact in BF16 (at most 6 significand bits)."""
    values = e2m1.decode(e2m1.unpack(packed)).unflatten(-1, (-1, BLOCK))
    return (values * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def quantize_activation(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Run-time NVFP4 rounding of activations: fixed tensor scale, block scales from the data.

    x: [rows, cols] BF16 or FP32, cols a multiple of 16.  input_scale: FP32 [], calibrated amax / 2688, above zero.
    Returns packed uint8 [rows, cols / 2] and scales E4M3 [rows, cols / 16].
    The formulas are those of the precise (not fast-math) run-time kernel, with IEEE division; unlike `quantize` a zero
    block keeps scale byte 0. Source: docs/format.md, "Run-time activations".
    """
    blocks = x.unflatten(-1, (-1, BLOCK)).float()
    global_factor = 1.0 / input_scale.float()
    scale = blocks.abs().amax(-1) * (global_factor * (1.0 / 6.0))
    scale = scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    out_scale = (1.0 / (scale.float() * (1.0 / global_factor))).clamp(max=torch.finfo(torch.float32).max)
    return e2m1.pack(e2m1.encode(blocks * out_scale.unsqueeze(-1)).flatten(-2)), scale


def _broadcast(scale_2: Tensor, ndim: int) -> Tensor:
    """Reshape a [] or [n] tensor scale so that it multiplies an `ndim`-dimensional tensor along its first axis."""
    return scale_2 if scale_2.ndim == 0 else scale_2.reshape(-1, *([1] * (ndim - 1)))
