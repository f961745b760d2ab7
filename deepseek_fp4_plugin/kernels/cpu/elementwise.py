"""What is left between the products; so that a step can be recorded."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.addresses import dense
from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16


def add(x: Tensor, y: Tensor) -> Tensor:
    """See kernels/reference/elementwise.py; BF16, of one shape."""
    require_bf16(x, y)
    if x.shape != y.shape:
        raise ValueError(f"cannot add {list(x.shape)} and {list(y.shape)}")
    x, y = x.contiguous(), y.contiguous()
    total = torch.empty(x.shape, dtype=torch.bfloat16)
    x_address, y_address = (dense("a summand", each, torch.bfloat16, *x.shape) for each in (x, y))
    native.add(x_address, y_address, x.numel(), total.data_ptr())
    return total


def concat(x: Tensor, y: Tensor) -> Tensor:
    """See kernels/reference/elementwise.py; BF16."""
    require_bf16(x, y)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"cannot put {list(x.shape)} and {list(y.shape)} side by side")
    x, y = x.contiguous(), y.contiguous()
    rows, n, m = x.shape[0], x.shape[1], y.shape[1]
    out = torch.empty(rows, n + m, dtype=torch.bfloat16)
    x_address, y_address = dense("x", x, torch.bfloat16, rows, n), dense("y", y, torch.bfloat16, rows, m)
    native.concat(x_address, n, y_address, m, rows, out.data_ptr())
    return out
