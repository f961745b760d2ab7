"""The most probable token."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16


def argmax(logits: Tensor) -> Tensor:
    """See kernels/reference/argmax.py; BF16."""
    require_bf16(logits)
    logits = logits.contiguous()
    ids = torch.empty(logits.shape[0], dtype=torch.int64)
    native.argmax(logits.data_ptr(), *logits.shape, ids.data_ptr())
    return ids
