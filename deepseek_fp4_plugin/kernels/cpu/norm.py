"""RMSNorm."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cpu.extension import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels/reference/norm.py; BF16 here, other dtypes there."""
    if x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
        return reference.rms_norm(x, weight, eps)
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
