"""The most probable token."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.addresses import dense
from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16


def argmax(logits: Tensor) -> Tensor:
    """See kernels/reference/argmax.py; BF16."""
    require_bf16(logits)
    logits = logits.contiguous()
    count, n = logits.shape
    if n == 0:
        raise ValueError(f"there is no largest of no logits: {list(logits.shape)}")
    ids = torch.empty(count, dtype=torch.int64)
    native.argmax(dense("logits", logits, torch.bfloat16, count, n), count, n, ids.data_ptr())
    return ids
