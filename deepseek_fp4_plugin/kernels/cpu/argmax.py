"""The most probable token."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cpu.extension import native


def argmax(logits: Tensor) -> Tensor:
    """See kernels/reference/argmax.py; dense BF16 here, others there."""
    if logits.dtype is not torch.bfloat16 or not logits.is_contiguous():
        return reference.argmax(logits)
    ids = torch.empty(logits.shape[0], dtype=torch.int64)
    native.argmax(logits.data_ptr(), *logits.shape, ids.data_ptr())
    return ids
