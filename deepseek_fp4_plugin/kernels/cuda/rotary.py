"""Rotary position embedding on adjacent pairs."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, together


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See kernels/reference/rotary.py; BF16 here, other dtypes there."""
    if x.dtype is not torch.bfloat16 or x.stride(2) != 1:
        return reference.rotary(x, cos, sin)
    together(x, cos, sin)
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    tokens, heads, d = x.shape
    kernel("small.cu", "rotary", "4P5i", (), x.device.index)(
        (-(-tokens * heads * d // 512), 1, 1),
        256,
        0,
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        tokens,
        heads,
        d,
        x.stride(0),
        x.stride(1),
    )
    return y
