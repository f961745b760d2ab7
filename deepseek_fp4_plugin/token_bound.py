"""How many tokens a text has at the least, without tokenizing it: to refuse what cannot fit while it costs nothing.

Every byte value has a weight, one over the length of the longest token that holds it. A token of n bytes then weighs
at most n times 1/n, so a text's weight, the sum over its bytes, is never above its number of tokens. A sum over 256
counts is that, whatever the text's length; and because the longest tokens are rows of blanks and dashes, letters weigh
as much as the longest words have them.
"""

from collections.abc import Iterable

import numpy as np


class TokenBound:
    """tokens: the bytes of every token of a vocabulary whose tokens' bytes, joined, are the text's."""

    def __init__(self, tokens: Iterable[bytes]):
        held: dict[int, set[int]] = {}  # by the tokens of each length
        for token in tokens:
            held.setdefault(len(token), set()).update(token)
        longest = np.zeros(256)
        for length in sorted(held):
            longest[list(held[length])] = length
        # A byte that no token has is left out by the tokenizer and weighs nothing.
        self.weights = np.divide(1.0, longest, out=np.zeros(256), where=longest > 0)

    def fewest(self, text: bytes) -> int:
        """A number of tokens that no tokenization of `text` (UTF-8) is below."""
        total, piece = 0.0, 1 << 20  # counted by pieces, so that other threads get their turn
        for begin in range(0, len(text), piece):
            counts = np.bincount(np.frombuffer(text, np.uint8, min(piece, len(text) - begin), begin), minlength=256)
            total += float(counts @ self.weights)
        return int(np.ceil(total * (1 - 1e-9)))  # the sum is rounded
