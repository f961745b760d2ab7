"""Token ids to rows."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """See kernels/reference/embedding.py; BF16 rows. IndexError for an id outside the vocabulary."""
    require_bf16(weight)
    ids, weight = ids.contiguous(), weight.contiguous()
    y = torch.empty(ids.shape[0], weight.shape[1], dtype=torch.bfloat16)
    native.embedding(ids.data_ptr(), ids.shape[0], weight.data_ptr(), *weight.shape, y.data_ptr())
    return y
