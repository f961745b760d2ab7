"""Mesh: which slice of every cut axis this rank holds, and with whom it exchanges what.

TensorRT-LLM's arguments and rank order. Of `tensor_parallel_size` ranks in all:
  experts     are dealt to `moe_expert_parallel_size` ranks in runs of neighbours, and each is cut
              `moe_tensor_parallel_size` ways: rank = moe_tp * ep_size + ep. One size given, the other follows; without
              any they are cut, not dealt.
  the rest    attention by heads, dense MLPs and shared experts by their inner width, the vocabulary by rows; or, with
              `enable_attention_dp`, whole on every rank, each of which serves requests of its own.
`Mesh()` is one rank with no process group; layers call its groups without asking.
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, replace

from deepseek_fp4_plugin.parallel.collectives import ALONE, Group, Unconnected
from deepseek_fp4_plugin.parallel.placement import ExpertPlacement


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
    """This rank's place. Raises ValueError for sizes that do not fit together.

    placement: which experts each expert-parallel rank holds; None: equal runs of neighbours, each expert once.
    group: all ranks, in order; None for one rank, or for ranks that only load.
    """

    rank: int = 0
    tensor_parallel_size: int = 1
    moe_expert_parallel_size: int | None = None
    moe_tensor_parallel_size: int | None = None
    enable_attention_dp: bool = False
    placement: ExpertPlacement | None = None
    group: InitVar[Group | None] = None
    world: Group = field(init=False, repr=False, compare=False)

    def __post_init__(self, group: Group | None):
        tp, ep, moe_tp = self.tensor_parallel_size, self.moe_expert_parallel_size, self.moe_tensor_parallel_size
        for name in ("tensor_parallel_size", "moe_expert_parallel_size", "moe_tensor_parallel_size"):
            size = getattr(self, name)
            if size is not None and (size < 1 or tp % size):
                raise ValueError(f"{name}={size} does not divide tensor_parallel_size={tp}")
        ep = ep or (tp // moe_tp if moe_tp else 1)
        moe_tp = moe_tp or tp // ep
        if ep * moe_tp != tp:
            raise ValueError(
                f"moe_expert_parallel_size={ep} times moe_tensor_parallel_size={moe_tp} is not "
                f"tensor_parallel_size={tp}; leave one out"
            )
        if not 0 <= self.rank < tp:
            raise ValueError(f"rank {self.rank} is outside the {tp} ranks of the mesh")
        if self.placement is not None and self.placement.ranks != ep:
            raise ValueError(f"an expert placement for {self.placement.ranks} ranks, and moe_expert_parallel_size={ep}")
        if group is None:
            group = ALONE if tp == 1 else Unconnected(self.rank, tp)
        if (group.rank, group.size) != (self.rank, tp):
            raise ValueError(f"rank {self.rank} of {tp} got the group of rank {group.rank} of {group.size}")
        object.__setattr__(self, "moe_expert_parallel_size", ep)
        object.__setattr__(self, "moe_tensor_parallel_size", moe_tp)
        object.__setattr__(self, "world", group)

    def connected(self, group: Group) -> "Mesh":
        """The same place with its ranks' group."""
        return replace(self, group=group)

    @property
    def tp(self) -> Shard:
        """Attention, dense MLPs, shared experts and the vocabulary."""
        return WHOLE if self.enable_attention_dp else Shard(self.rank, self.tensor_parallel_size)

    @property
    def dp(self) -> Shard:
        """Requests."""
        return Shard(self.rank, self.tensor_parallel_size) if self.enable_attention_dp else WHOLE

    @property
    def ep(self) -> Shard:
        """Which of the routed experts."""
        return Shard(self.rank % self._ep_size, self._ep_size)

    @property
    def moe_tp(self) -> Shard:
        """Which part of each of them."""
        return Shard(self.rank // self._ep_size, self.tensor_parallel_size // self._ep_size)

    def experts(self, layer: int, total: int) -> Sequence[int]:
        """Those of a layer's `total` routed experts that this rank holds, or holds a part of."""
        if self.placement is not None:
            return self.placement.experts(layer, self.ep.index, total)
        return range(*self.ep.bounds(total, f"the experts of layer {layer}"))

    @property
    def ep_ranks(self) -> tuple[int, ...]:
        """The ranks that together hold every routed expert once, each cut as this rank's are."""
        first = self.rank - self.ep.index
        return tuple(range(first, first + self._ep_size))

    @property
    def moe_tp_ranks(self) -> tuple[int, ...]:
        """The ranks that hold parts of the same routed experts."""
        return tuple(range(self.ep.index, self.tensor_parallel_size, self._ep_size))

    @property
    def tp_group(self) -> Group:
        """Those whose partial sums make a block's output: all ranks, or this one alone under attention data
        parallelism."""
        return ALONE if self.enable_attention_dp else self.world

    @property
    def dp_group(self) -> Group:
        """Those who bring tokens to the routed experts: the other way round."""
        return self.world if self.enable_attention_dp else ALONE

    @property
    def _ep_size(self) -> int:
        assert self.moe_expert_parallel_size is not None
        return self.moe_expert_parallel_size
