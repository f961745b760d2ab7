"""Mesh: which slice of every sharded axis this rank holds.

Two layouts, as TensorRT-LLM's `tp_size`/`ep_size` define them:
  tp divisible by ep   attention, dense MLP and vocabulary are cut `tp` ways; experts are dealt to `ep` groups, and
                       inside a group each expert is cut tp / ep ways. TP8 EP2: 4-way experts in two groups.
  tp == 1, ep > 1      everything but the experts is whole on every rank; experts are dealt to `ep` ranks.
`Mesh()` is one rank with no process group; layers call its reductions without asking.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts along an axis."""

    index: int
    count: int

    def bounds(self, size: int, what: str) -> tuple[int, int]:
        """[start, stop) of an axis of `size`; ValueError when it does not divide."""
        if size % self.count:
            raise ValueError(f"{what}: {size} cannot be cut into {self.count} equal parts")
        width = size // self.count
        return self.index * width, (self.index + 1) * width


WHOLE = Shard(0, 1)


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `tp`: attention and vocabulary; `moe_tp` and `ep`: experts."""

    rank: int = 0
    tp_size: int = 1
    ep_size: int = 1

    def __post_init__(self):
        if self.tp_size < 1 or self.ep_size < 1:
            raise ValueError(f"tp_size={self.tp_size} and ep_size={self.ep_size} must be at least 1")
        if self.tp_size > 1 and self.tp_size % self.ep_size:
            raise ValueError(f"ep_size={self.ep_size} must divide tp_size={self.tp_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside the {self.world_size} ranks of the mesh")

    @property
    def world_size(self) -> int:
        return max(self.tp_size, self.ep_size)

    @property
    def tp(self) -> Shard:
        return Shard(self.rank % self.tp_size, self.tp_size)

    @property
    def ep(self) -> Shard:
        return Shard(self.rank % self.ep_size, self.ep_size)

    @property
    def moe_tp(self) -> Shard:
        return Shard(self.rank // self.ep_size, self.world_size // self.ep_size)

    def reduce_attention(self, y: Tensor) -> Tensor:
        """Sum of the tp ranks' partial outputs; `y` itself for one rank or without a process group."""
        return y

    def reduce_experts(self, y: Tensor) -> Tensor:
        """Sum of all ranks' partial expert outputs; `y` itself for one rank or without a process group."""
        return y
