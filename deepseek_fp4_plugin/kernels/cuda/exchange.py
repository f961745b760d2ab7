"""Exchanges between GPUs of one machine: a launch each, through memory that the others write to."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.launcher import kernel
from deepseek_fp4_plugin.kernels.cuda.peer_memory import PeerMemory

MOST_RANKS = 8  # RANKS in the sources
SMALL = 1 << 20  # bytes of a part that goes through the mailboxes at most
# From here on the launches without mailboxes are faster (benchmarks/collectives.py, two H200).
SMALL_SUM, SMALL_NORM = 20 * 7168 * 2, 32 * 7168 * 2
_PIECE, _PACKETS = 16, 32  # bytes: a thread's data, and what they take in a mailbox
_THREADS, _PLACES = 256, SMALL // _PIECE
_BLOCKS = _PLACES // _THREADS
_LARGE = 16 << 20  # bytes that one launch for large tensors takes
# Of a launch for large tensors: threads of a block, blocks, and about how many pieces a chunk has. Between two ranks
# the fastest of 21 variants (docs/log.md); more ranks have run with the other one alone.
_TWO_RANKS, _MORE_RANKS = (1024, 132, 1160), (512, 264, 1024)
_MOST_BLOCKS = 264
_LARGEST_CHUNK = 1 << 13
LONGEST_ROW = 8 * 8 * _THREADS  # values: a cluster of eight blocks, eight a thread
_MAILBOXES = f"{MOST_RANKS}QP3i"


class Exchange:
    """The ranks' mailboxes, and launches that use them. Every rank of the group makes the same calls in the same order.

    share: takes bytes and returns every rank's, in rank order.
    """

    def __init__(self, device: torch.device, rank: int, ranks: int, share: Callable[[bytes], list[bytes]]):
        if not 2 <= ranks <= MOST_RANKS:
            raise ValueError(f"{ranks} ranks; an exchange on the device takes 2 to {MOST_RANKS}")
        self.device, self.rank, self.ranks = device, rank, ranks
        pieces = _LARGE // _PIECE
        self._slot = pieces if ranks == 2 else pieces // ranks + _LARGEST_CHUNK
        self._chunks = 1 << 14
        sizes = [
            2 * ranks * _PLACES * _PACKETS,
            2 * ranks * self._slot * _PIECE,
            0 if ranks == 2 else 2 * pieces * _PIECE,
            2 * ranks * self._chunks * 4,
        ]
        self._memory = PeerMemory(sum(sizes), device, rank, share)
        rest = [0] * (MOST_RANKS - ranks)
        self._boxes, self._inboxes, self._sums, self._flags = (
            [address + offset for address in self._memory.addresses] + rest
            for offset in list(accumulate(sizes, initial=0))[:4]
        )
        self._counts = torch.zeros(_BLOCKS + _MOST_BLOCKS, dtype=torch.int32, device=device)

    @property
    def _mail(self) -> tuple[int, ...]:
        return (*self._boxes, self._counts.data_ptr(), self.ranks, self.rank, _PLACES)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The ranks' sum of BF16 x, in FP32 in rank order; a multiple of 8 values."""
        x, y = _aligned(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        size = x.numel() * x.dtype.itemsize
        pieces = size // _PIECE
        if size <= SMALL_SUM:
            everything = [pieces] * self.ranks
            self._exchange(x, y, [0] * self.ranks, everything, [0] * self.ranks, everything, True)
            return y
        for start in range(0, size, _LARGE):
            self._large(x.data_ptr() + start, y.data_ptr() + start, min(_LARGE, size - start) // _PIECE)
        return y

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """All ranks' rows; a row is a multiple of 16 bytes, and a rank's rows are at most SMALL."""
        x, y = _aligned(x), x.new_empty(sum(sizes), *x.shape[1:])
        counts = [rows * _row_pieces(x) for rows in sizes]
        mine = [counts[self.rank]] * self.ranks
        self._exchange(x, y, [0] * self.ranks, mine, list(accumulate(counts, initial=0))[:-1], counts, False)
        return y

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """This rank's rows of the ranks' sum of BF16 x; a rank's rows are at most SMALL."""
        x, y = _aligned(x), x.new_empty(sizes[self.rank], *x.shape[1:])
        counts = [rows * _row_pieces(x) for rows in sizes]
        first = list(accumulate(counts, initial=0))[:-1]
        mine = [counts[self.rank]] * self.ranks
        self._exchange(x, y, first, counts, [0] * self.ranks, mine, True)
        return y

    def sum_and_norm(
        self, x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden plus the ranks' sum of x, and its RMSNorm; BF16 rows of at most LONGEST_ROW, SMALL_NORM in all.
        other: what is added to this rank's x before."""
        return sum_and_norm(x, hidden, weight, eps, other, self._mail)

    def _exchange(
        self, x: Tensor, y: Tensor, first: list[int], count: list[int], to: list[int], size: list[int], add: bool
    ) -> None:
        rest = [0] * (MOST_RANKS - self.ranks)
        blocks = -(-max(max(count), max(size), 1) // _THREADS)
        layout = f"{_MAILBOXES}2P{4 * MOST_RANKS + 1}i"
        kernel("exchange.cu", "exchange", layout, (), self.device.index)(
            (blocks, 1, 1),
            _THREADS,
            0,
            *self._mail,
            x.data_ptr(),
            y.data_ptr(),
            *(value for values in (first, count, to, size) for value in values + rest),
            int(add),
        )

    def _large(self, x: int, y: int, pieces: int) -> None:
        threads, blocks, wanted = _TWO_RANKS if self.ranks == 2 else _MORE_RANKS
        chunk = _chunk(pieces, self.ranks, blocks, wanted)
        layout = f"{3 * MOST_RANKS}Q3P7i"
        kernel("exchange_large.cu", "all_reduce", layout, (("THREADS", threads),), self.device.index)(
            (blocks, 1, 1),
            threads,
            0,
            *self._inboxes,
            *self._sums,
            *self._flags,
            x,
            y,
            self._counts.data_ptr() + _BLOCKS * 4,
            self.ranks,
            self.rank,
            pieces,
            chunk,
            self._slot,
            _LARGE // _PIECE,
            self._chunks,
        )


def sum_and_norm(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    eps: float,
    other: Tensor | None = None,
    mail: Sequence[int] = (0,) * (MOST_RANKS + 1) + (1, 0, 0),
) -> tuple[Tensor, Tensor]:
    """See Exchange.sum_and_norm; one rank by itself without `mail`."""
    x, hidden, other = _aligned(x), _aligned(hidden), None if other is None else _aligned(other)
    pieces = x.shape[1] * x.dtype.itemsize // _PIECE
    cluster = -(-pieces // _THREADS)
    threads = -(-pieces // cluster // 32) * 32
    y, normed = torch.empty_like(x), torch.empty_like(x)
    kernel("exchange.cu", "sum_norm", f"{_MAILBOXES}6Pif", (), x.device.index)(
        (cluster * x.shape[0], 1, 1),
        threads,
        0,
        *mail,
        x.data_ptr(),
        0 if other is None else other.data_ptr(),
        hidden.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        normed.data_ptr(),
        pieces,
        eps,
        cluster=cluster,
    )
    return y, normed


def _chunk(pieces: int, ranks: int, blocks: int, wanted: int) -> int:
    """Pieces of a chunk, about as many as wanted: as many chunks for every block, each cut evenly among the ranks."""
    rounds = max(1, round(pieces / (blocks * wanted)))
    step = 8 * ranks
    return -(-pieces // (blocks * rounds * step)) * step


def _aligned(x: Tensor) -> Tensor:
    """In 16-byte pieces, one after the other. What a rank must copy is its own affair."""
    x = x.contiguous()
    return x if x.data_ptr() % _PIECE == 0 else x.clone()


def _row_pieces(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.dtype.itemsize // _PIECE
