"""Collectives as layers call them: nothing for one rank, and a recording of kernels is cut around each."""

from collections.abc import Sequence

from torch import Tensor

from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.recording import cut
from deepseek_fp4_plugin.layers.norm import RMSNorm
from deepseek_fp4_plugin.parallel.collectives import Group


def all_reduce(group: Group, x: Tensor) -> Tensor:
    """The sum of all ranks' x."""
    return x if group.size == 1 else cut(lambda y: (group.all_reduce(y),), x)[0]


def sum_and_norm(
    group: Group, x: Tensor, hidden: Tensor, norm: RMSNorm, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """hidden plus the sum of all ranks' x, and the norm of that.  other: what is added to this rank's x before."""
    if group.size == 1:
        return ops.add_rms_norm(x, hidden, norm.weight, norm.eps, other)
    both = group.sum_and_norm(x, hidden, norm.weight, norm.eps, other)
    if both is not None:
        return both
    own = x if other is None else ops.add(x, other)
    return ops.add_rms_norm(all_reduce(group, own), hidden, norm.weight, norm.eps)


def all_gather(group: Group, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """All ranks' rows."""
    return x if group.size == 1 else cut(lambda y: (group.all_gather(y, sizes),), x)[0]


def reduce_scatter(group: Group, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's rows of the sum of all ranks' x."""
    return x if group.size == 1 else cut(lambda y: (group.reduce_scatter(y, sizes),), x)[0]
