"""Token ids to rows."""

from torch import Tensor


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids: int64 [T].  weight: [vocab, n].  Returns [T, n]."""
    return weight[ids]
