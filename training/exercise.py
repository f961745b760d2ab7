"""What a family's generator returns."""

from typing import NamedTuple


class Exercise(NamedTuple):
    """key: the operands in a canonical form; exercises of equal key belong to one split."""

    key: str
    prompt: str
    reasoning: str
    answer: str
