"""Run-time NVFP4 rounding of activations."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.addresses import rows
from deepseek_fp4_plugin.kernels.cpu.extension import native


def quantize_activation(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """See numerics/nvfp4.py; bit-equal for BF16 x [rows, cols]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    count, cols = x.shape
    if x.dtype is not torch.bfloat16 or cols % 16:
        raise ValueError(f"expected BF16 rows of a multiple of 16 values, got {x.dtype} {list(x.shape)}")
    packed = torch.empty(count, cols // 2, dtype=torch.uint8)
    scale = torch.empty(count, cols // 16, dtype=torch.uint8)
    native.quantize(
        rows("x", x, torch.bfloat16, count, cols),
        x.stride(0),
        count,
        cols,
        float(input_scale),
        packed.data_ptr(),
        scale.data_ptr(),
        torch.get_num_threads(),
    )
    return packed, scale.view(torch.float8_e4m3fn)
