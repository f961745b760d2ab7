"""Rotary position embedding."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.addresses import dense, rows
from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16


def cos_sin(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """See kernels/reference/rotary.py; FP32 to a unit in the last place."""
    positions, frequencies = positions.contiguous(), frequencies.contiguous()
    tokens, n = positions.shape[0], frequencies.shape[0]
    cos, sin = torch.empty(tokens, n, dtype=torch.float32), torch.empty(tokens, n, dtype=torch.float32)
    native.angles(
        dense("positions", positions, torch.int64, tokens),
        tokens,
        dense("frequencies", frequencies, torch.float32, n),
        n,
        magnitude,
        cos.data_ptr(),
        sin.data_ptr(),
    )
    return cos, sin


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See kernels/reference/rotary.py; BF16."""
    require_bf16(x)
    x = x if x.stride(2) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, heads, d = x.shape
    if d % 2:
        raise ValueError(f"rotary turns pairs of values; a head has {d}")
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    native.rotary(
        rows("x", x, torch.bfloat16, tokens, heads, d),
        x.stride(0),
        x.stride(1),
        tokens,
        heads,
        d,
        dense("cos", cos, torch.float32, tokens, d // 2),
        dense("sin", sin, torch.float32, tokens, d // 2),
        y.data_ptr(),
    )
    return y
