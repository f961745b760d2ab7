"""The most probable token."""

from torch import Tensor


def argmax(logits: Tensor) -> Tensor:
    """[N, vocab] to int64 [N]; of equal ones the first."""
    return logits.argmax(-1)
