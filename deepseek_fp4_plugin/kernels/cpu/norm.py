"""RMSNorm."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.addresses import dense, rows
from deepseek_fp4_plugin.kernels.cpu.elementwise import add
from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels/reference/norm.py; BF16."""
    require_bf16(x, weight)
    n = x.shape[-1]
    flat = x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous().view(-1, n)
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    count = flat.shape[0]
    native.norm(
        rows("x", flat, torch.bfloat16, count, n),
        flat.stride(0),
        count,
        n,
        dense("the norm's weight", weight, torch.bfloat16, n),
        eps,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def add_rms_norm(
    x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/norm.py; BF16."""
    y = add(hidden, x if other is None else add(x, other))
    return y, rms_norm(y, weight, eps)
