"""RMSNorm."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels/reference/norm.py; BF16."""
    require_bf16(x, weight)
    n = x.shape[-1]
    rows = x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous().view(-1, n)
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    count = rows.shape[0]
    native.norm(
        rows.data_ptr(),
        rows.stride(0),
        count,
        n,
        weight.data_ptr(),
        eps,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
