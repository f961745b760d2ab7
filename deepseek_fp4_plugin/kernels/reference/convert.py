"""A source's weight to NVFP4 with largest-magnitude scales, through BF16 as ModelOpt goes."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor

_CHUNK = 2**22  # elements at once: temporaries of 16 MB each


def weight_amax(weight: Tensor, scale_inv: Tensor | None, block: tuple[int, int]) -> Tensor:
    """FP32 [], the largest |value| in BF16; NaN where one is NaN or infinite."""
    largest = [_of(chunk.abs().amax().float()) for _, chunk in _chunks(weight, scale_inv, block)]
    return torch.stack(largest).amax()


def convert_weight(
    weight: Tensor, scale_inv: Tensor | None, block: tuple[int, int], scale_2: Tensor
) -> tuple[NVFP4Tensor, float, float]:
    """`nvfp4.quantize` of the BF16 values under `scale_2`, and the energies of these and of the error."""
    packed, scales, signal, noise = [], [], 0.0, 0.0
    for _, chunk in _chunks(weight, scale_inv, block):
        piece = nvfp4.quantize(chunk, scale_2)
        packed.append(piece.packed)
        scales.append(piece.scale)
        signal += float(chunk.float().square().sum(dtype=torch.float64))
        noise += float((nvfp4.dequantize(piece) - chunk.float()).square().sum(dtype=torch.float64))
    return NVFP4Tensor(torch.cat(packed), torch.cat(scales), scale_2), signal, noise


def _of(amax: Tensor) -> Tensor:
    return torch.where(torch.isfinite(amax), amax, torch.nan)


def _chunks(weight: Tensor, scale_inv: Tensor | None, block: tuple[int, int]):
    """Row ranges, whole rows of blocks each, and their values in BF16."""
    rows, cols = weight.shape
    step = max(_CHUNK // cols // block[0], 1) * block[0]
    for start in range(0, rows, step):
        values = weight[start : start + step]
        if scale_inv is None:
            yield start, values.bfloat16()
        else:
            scales = scale_inv[start // block[0] : -(-min(start + step, rows) // block[0])]
            yield start, fp8_block.dequantize(values, scales, torch.bfloat16, block)
