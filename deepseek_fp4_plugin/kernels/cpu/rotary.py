"""Rotary position embedding."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16


def cos_sin(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """See kernels/reference/rotary.py; FP32 to a unit in the last place."""
    positions, frequencies = positions.contiguous(), frequencies.contiguous()
    tokens, n = positions.shape[0], frequencies.shape[0]
    cos, sin = torch.empty(tokens, n, dtype=torch.float32), torch.empty(tokens, n, dtype=torch.float32)
    native.angles(positions.data_ptr(), tokens, frequencies.data_ptr(), n, magnitude, cos.data_ptr(), sin.data_ptr())
    return cos, sin


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See kernels/reference/rotary.py; BF16."""
    require_bf16(x)
    x = x if x.stride(2) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    native.rotary(x.data_ptr(), x.stride(0), x.stride(1), *x.shape, cos.data_ptr(), sin.data_ptr(), y.data_ptr())
    return y
