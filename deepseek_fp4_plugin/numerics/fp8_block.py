"""FP8 weights in blocks of 128 x 128, as DeepSeek publishes V3 and R1: `weight` E4M3 and `weight_scale_inv` FP32.

value = float(weight) * weight_scale_inv[row // 128, col // 128]
"""

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0


def expand_scale(scale_inv: Tensor, rows: int, cols: int, block: tuple[int, int] = (BLOCK, BLOCK)) -> Tensor:
    """One scale for every element: FP32 [..., ceil(rows/block), ceil(cols/block)] to [..., rows, cols]."""
    return scale_inv.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :cols]


def dequantize(
    weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16, block: tuple[int, int] = (BLOCK, BLOCK)
) -> Tensor:
    """weight: E4M3 [..., rows, cols].  scale_inv: FP32, one a block.  The product is FP32, rounded once to `dtype`.

    Raises ValueError when the scales do not have one entry a block.
    """
    rows, cols = weight.shape[-2:]
    expected = (*weight.shape[:-2], -(-rows // block[0]), -(-cols // block[1]))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"weight_scale_inv has shape {list(scale_inv.shape)}, but a weight of shape {list(weight.shape)} "
            f"in blocks of {block[0]} x {block[1]} needs {list(expected)}"
        )
    if rows % block[0] or cols % block[1]:
        return (weight.float() * expand_scale(scale_inv, rows, cols, block)).to(dtype)
    values = weight.to(torch.float32, copy=True)  # the same product in place: half of the memory
    blocks = values.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    blocks *= scale_inv.unsqueeze(-1).unsqueeze(-3)
    return values.to(dtype)


def quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse, with scale = block amax / 448: w [rows, cols] to E4M3 [rows, cols] and FP32 scales.

    An all-zero block gets scale 1.0. Used to write FP8 checkpoints (tests, training), never by the NVFP4 path.
    """
    rows, cols = w.shape
    padded = torch.nn.functional.pad(w.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    amax = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).abs().amax((1, 3))
    scale_inv = torch.where(amax == 0, 1.0, amax / E4M3_MAX)
    quotient = (w.float() / expand_scale(scale_inv, rows, cols)).clamp(-E4M3_MAX, E4M3_MAX)
    return quotient.to(torch.float8_e4m3fn), scale_inv
