"""Token ids to rows."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cpu.extension import native


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """See kernels/reference/embedding.py; dense BF16 here, others there. IndexError for an id outside it."""
    if (
        weight.dtype is not torch.bfloat16
        or not weight.is_contiguous()
        or ids.dtype is not torch.int64
        or ids.ndim != 1
    ):
        return reference.embedding(ids, weight)
    ids = ids.contiguous()
    y = torch.empty(ids.shape[0], weight.shape[1], dtype=torch.bfloat16)
    native.embedding(ids.data_ptr(), ids.shape[0], weight.data_ptr(), *weight.shape, y.data_ptr())
    return y
