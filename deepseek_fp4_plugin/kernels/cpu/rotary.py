"""Rotary position embedding."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cpu.extension import native


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See kernels/reference/rotary.py; BF16 here, other dtypes there."""
    if x.dtype is not torch.bfloat16:
        return reference.rotary(x, cos, sin)
    x = x if x.stride(2) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    native.rotary(x.data_ptr(), x.stride(0), x.stride(1), *x.shape, cos.data_ptr(), sin.data_ptr(), y.data_ptr())
    return y
