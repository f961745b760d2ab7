"""A source's weight to NVFP4 with largest-magnitude scales: kernels/reference/convert.py, bit for bit."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cpu.addresses import dense
from deepseek_fp4_plugin.kernels.cpu.extension import native
from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK, NVFP4Tensor


def weight_amax(weight: Tensor, scale_inv: Tensor | None, block: tuple[int, int]) -> Tensor:
    if not _serves(weight, scale_inv, block):
        return reference.weight_amax(weight, scale_inv, block)
    amax = torch.empty(weight.shape[0])
    weight = weight if scale_inv is not None else weight.bfloat16()
    native.weight_amax(*_source(weight, scale_inv, block), amax.data_ptr(), torch.get_num_threads())
    return amax.amax()


def convert_weight(
    weight: Tensor, scale_inv: Tensor | None, block: tuple[int, int], scale_2: Tensor
) -> tuple[NVFP4Tensor, float, float]:
    if not _serves(weight, scale_inv, block):
        return reference.convert_weight(weight, scale_inv, block, scale_2)
    rows, cols = weight.shape
    weight = weight if scale_inv is not None else weight.bfloat16()
    packed = torch.empty(rows, cols // 2, dtype=torch.uint8)
    scale = torch.empty(rows, cols // BLOCK, dtype=torch.float8_e4m3fn)
    energies = torch.empty(rows, 2, dtype=torch.float64)
    native.convert(
        *_source(weight, scale_inv, block),
        float(scale_2),
        packed.data_ptr(),
        scale.data_ptr(),
        energies.data_ptr(),
        torch.get_num_threads(),
    )
    signal, noise = energies.sum(0).tolist()
    return NVFP4Tensor(packed, scale, scale_2), signal, noise


def _serves(weight: Tensor, scale_inv: Tensor | None, block: tuple[int, int]) -> bool:
    """Whether a 16-block of NVFP4 lies in one FP8 block."""
    return weight.numel() > 0 and weight.shape[1] % BLOCK == 0 and (scale_inv is None or block[1] % BLOCK == 0)


def _source(weight: Tensor, scale_inv: Tensor | None, block: tuple[int, int]) -> tuple[int, ...]:
    rows, cols = weight.shape
    if scale_inv is None:
        return dense("weight", weight, torch.bfloat16, rows, cols), 0, rows, cols, *block
    blocks = -(-rows // block[0]), -(-cols // block[1])
    values = dense("weight", weight, torch.float8_e4m3fn, rows, cols)
    return values, dense("weight_scale_inv", scale_inv, torch.float32, *blocks), rows, cols, *block
