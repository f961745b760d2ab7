"""How ranks' tensors meet: four collectives, one implementation for every backend of torch.distributed.

All of them are made of one exchange, in which every rank sends every other its part (`all_to_all_single`), and of
sums in FP32 in rank order. So a sum is the same bits on every rank, for every batch that a token may be in, and
whether it went around in one exchange (small tensors: fewest hops) or in two (large ones: fewest bytes). Ring
algorithms promise none of that: the order in which they add depends on where in the tensor a value lies. gloo has no
reduce-scatter for unequal parts, and its all-reduce of a decode step's few rows takes four times as long.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Up to this many bytes an all-reduce sends whole tensors once; above, parts twice.
_ONE_EXCHANGE = 1 << 17


class Group(Protocol):
    """Some ranks, in order. Every rank of the group makes the same calls in the same order.

    sizes: rows of each rank, where they differ; zero is a size. None: all ranks have as many.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in x's shape and dtype; added in FP32, in rank order."""
        ...

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """All ranks' rows, [sum of sizes, ...] of x's [sizes[rank], ...]."""
        ...

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """This rank's rows, [sizes[rank], ...], of the sum of all ranks' x [sum of sizes, ...]."""
        ...

    def sum_and_norm(
        self, x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """hidden plus the sum of all ranks' x, and its RMSNorm, both [T, n], where that is one exchange; else None.
        other: [T, n], added to this rank's x before."""
        ...

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """What x holds on rank `source`; x has the same shape and dtype everywhere."""
        ...


class Separate:
    """A norm behind a sum is a step of its own."""

    def sum_and_norm(
        self, x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        return None


class Alone(Separate):
    """One rank: a collective returns its input."""

    rank, size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        return x

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        return x


ALONE = Alone()


class Unconnected(Separate):
    """Ranks without a process group: layers can be built and loaded, and a collective is refused."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def _refuse(self, *_: object) -> Tensor:
        raise RuntimeError(f"rank {self.rank} of {self.size} has no process group; connect the ranks first")

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._refuse()

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        return self._refuse()

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        return self._refuse()

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        return self._refuse()


class ProcessGroup(Separate):
    """Ranks in processes of their own, through torch.distributed."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.numel() * x.dtype.itemsize <= _ONE_EXCHANGE:
            return _sum(self._to_all(x.reshape(1, -1), [1] * self.size)).view(x.shape)
        flat = x.reshape(-1)
        sizes = [(flat.numel() + r) // self.size for r in range(self.size)]
        return self.all_gather(self.reduce_scatter(flat, sizes), sizes).view(x.shape)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        return self._to_all(x, [x.shape[0]] * self.size if sizes is None else list(sizes))

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        if sizes is None:
            sizes = [x.shape[0] // self.size] * self.size
        own = sizes[self.rank]
        parts = x.new_empty(self.size * own, *x.shape[1:])
        self._exchange(parts, x.contiguous(), [own] * self.size, list(sizes))
        return _sum(parts.view(self.size, own, *x.shape[1:]))

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        here, flat, y = self.rank == source, x.reshape(-1), torch.empty_like(x)
        given = flat.repeat(self.size) if here else flat[:0]
        sizes = [flat.numel() if rank == source else 0 for rank in range(self.size)]
        self._exchange(y.view(-1), given, sizes, [flat.numel() if here else 0] * self.size)
        return y

    def _to_all(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Every rank's rows, sizes[r] of rank r."""
        rows = x.new_empty(sum(sizes), *x.shape[1:])
        copies = x.expand(self.size, *x.shape).flatten(0, 1)  # the exchange takes a part for each rank
        self._exchange(rows, copies.contiguous(), sizes, [x.shape[0]] * self.size)
        return rows

    def _exchange(self, output: Tensor, given: Tensor, output_sizes: list[int], given_sizes: list[int]) -> None:
        """Rank r gets given_sizes[r] rows of `given`, and its own output_sizes[r] rows become part r of `output`."""
        if output.numel() or given.numel():  # else there is nothing on any rank
            dist.all_to_all_single(output, given, output_sizes, given_sizes, group=self.group)


def _sum(parts: Tensor) -> Tensor:
    """The sum over the leading axis, one after the other in FP32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(parts.dtype)


class Counting:
    """Another group's collectives, counted: `bytes[name]` is the payload (all_reduce and broadcast: x; all_gather: the
    result; reduce_scatter: x), `calls[name]` how often."""

    def __init__(self, inner: Group):
        self.inner = inner
        self.rank, self.size = inner.rank, inner.size
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def _count(self, name: str, payload: Tensor) -> None:
        self.calls[name] += 1
        self.bytes[name] += payload.numel() * payload.dtype.itemsize

    def all_reduce(self, x: Tensor) -> Tensor:
        self._count("all_reduce", x)
        return self.inner.all_reduce(x)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        y = self.inner.all_gather(x, sizes)
        self._count("all_gather", y)
        return y

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        self._count("reduce_scatter", x)
        return self.inner.reduce_scatter(x, sizes)

    def sum_and_norm(
        self, x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        both = self.inner.sum_and_norm(x, hidden, weight, eps, other)
        if both is not None:
            self._count("all_reduce", x)
        return both

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        self._count("broadcast", x)
        return self.inner.broadcast(x, source)


def connect(
    rank: int,
    size: int,
    rendezvous: str | dist.Store,
    backend: str = "gloo",
    timeout: timedelta = timedelta(minutes=30),
) -> Group:
    """Meet the other ranks; returns when all have come.

    rendezvous: a store, or an init method such as tcp://host:port, file:///path or env://.  backend: gloo for CPUs,
    nccl for GPUs.  timeout: of the meeting and of every collective.
    One rank needs nobody and gets `ALONE`.
    """
    if size == 1:
        return ALONE
    where = {"init_method": rendezvous} if isinstance(rendezvous, str) else {"store": rendezvous}
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, **where)
    world = dist.group.WORLD
    assert world is not None
    return ProcessGroup(world)
