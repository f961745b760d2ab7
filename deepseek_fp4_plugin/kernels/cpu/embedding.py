"""Token ids to rows."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cpu.addresses import dense
from deepseek_fp4_plugin.kernels.cpu.extension import native, require_bf16


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """See kernels/reference/embedding.py; BF16 rows. IndexError for an id outside the vocabulary."""
    require_bf16(weight)
    ids, weight = ids.contiguous(), weight.contiguous()
    count, (vocab, n) = ids.shape[0], weight.shape
    y = torch.empty(count, n, dtype=torch.bfloat16)
    native.embedding(
        dense("ids", ids, torch.int64, count),
        count,
        dense("the embedding", weight, torch.bfloat16, vocab, n),
        vocab,
        n,
        y.data_ptr(),
    )
    return y
