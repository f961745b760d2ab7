"""Blocks of the paged latent cache: who holds which, and which hold a prefix worth finding again.

A block is 32 tokens (`block_size`) of every layer's latents. A full block is known by a hash of everything its content
depends on: the salt, all tokens before it, its own tokens, and, with an MTP module, the one token behind it (the MTP
latent of a position depends on the next token). A freed block keeps its content and its name until it is handed out
again, least recently used first; so a hit costs nothing and free blocks are the prefix cache.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


class BlockManager:
    """num_blocks: blocks in the cache.  lookahead: tokens behind a block that its content depends on (MTP: 1)."""

    def __init__(self, num_blocks: int, block_size: int, enable_reuse: bool = True, lookahead: int = 0):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_reuse, self.lookahead = enable_reuse, lookahead
        self._references = array("i", bytes(4 * num_blocks))
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks of unknown content, or None when there are not as many."""
        free = self._free
        if len(free) < count:
            return None
        taken = []
        for _ in range(count):
            block, _ = free.popitem(last=False)
            name = self._hash_of.pop(block, None)
            if name is not None:
                del self._by_hash[name]
            self._references[block] = 1
            taken.append(block)
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each. Later blocks of a prefix are handed out again before earlier ones."""
        references = self._references
        for block in reversed(blocks):
            references[block] -= 1
            assert references[block] >= 0, f"block {block} was freed twice"
            if not references[block]:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)  # nothing to find in it: use it first

    def first_hash(self, salt: str | None) -> bytes:
        """What the first block's hash continues from."""
        return blake2b((salt or "").encode(), digest_size=16).digest()

    def next_hash(self, previous: bytes, tokens: Sequence[int], block: int) -> bytes:
        """Name of block `block` of a request whose tokens are `tokens`; needs `lookahead` tokens behind the block."""
        start = block * self.block_size
        content = array("q", tokens[start : start + self.block_size + self.lookahead])
        return blake2b(previous + content.tobytes(), digest_size=16).digest()

    def find_prefix(self, tokens: Sequence[int], salt: str | None) -> tuple[list[int], list[bytes]]:
        """Blocks whose content is the longest known prefix of `tokens`, now referenced by the caller, and their hashes.

        At least one token is left to compute, because only a computed token has logits.
        """
        blocks: list[int] = []
        hashes: list[bytes] = []
        if not self.enable_reuse:
            return blocks, hashes
        name = self.first_hash(salt)
        for index in range((len(tokens) - 1) // self.block_size):
            name = self.next_hash(name, tokens, index)
            block = self._by_hash.get(name)
            if block is None:
                break
            blocks.append(block)
            hashes.append(name)
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1
        return blocks, hashes

    def register(self, block: int, name: bytes) -> None:
        """Say that `block` now holds what `name` stands for. The first block with a name keeps it."""
        if name not in self._by_hash and block not in self._hash_of:
            self._by_hash[name] = block
            self._hash_of[block] = name

    def forget(self, blocks: Sequence[int]) -> None:
        """Let nobody find these blocks again: what they hold is not to be trusted."""
        for block in blocks:
            name = self._hash_of.pop(block, None)
            if name is not None:
                del self._by_hash[name]

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Assert that exactly the blocks in `held` are referenced, as often as they occur there. For tests."""
        count = array("i", bytes(4 * self.num_blocks))
        for blocks in held:
            for block in blocks:
                count[block] += 1
        assert count == self._references, "reference counts differ from the blocks that requests hold"
        assert len(self._free) == sum(not n for n in count), "the free list differs from the unreferenced blocks"
        assert {b: h for h, b in self._by_hash.items()} == self._hash_of, "block names differ in the two directions"
