"""Rotary position embedding on adjacent pairs, and its angles."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, together


def cos_sin(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """See kernels/reference/rotary.py; a launch for both."""
    if positions.dtype is not torch.int64 or frequencies.dtype is not torch.float32:
        return reference.cos_sin(positions, frequencies, magnitude)
    together(positions, frequencies)
    positions, frequencies = positions.contiguous(), frequencies.contiguous()
    tokens, pairs = positions.shape[0], frequencies.shape[0]
    cos, sin = torch.empty(2, tokens, pairs, dtype=torch.float32, device=positions.device)
    kernel("small.cu", "cos_sin", "4P2if", (), positions.device.index)(
        (-(-tokens * pairs // 128), 1, 1),
        128,
        0,
        positions.data_ptr(),
        frequencies.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        pairs,
        magnitude,
    )
    return cos, sin


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
