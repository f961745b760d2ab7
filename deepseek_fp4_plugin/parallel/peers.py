"""Ranks on the GPUs of one machine: BF16 and small exchanges go straight into the others' memory, others through NCCL.

What goes where depends on shapes and types alone, which are the same on every rank. Sums are `ProcessGroup`'s to the
last bit.
"""

import logging
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_fp4_plugin.kernels import cuda
from deepseek_fp4_plugin.kernels.cuda.exchange import LONGEST_ROW, MOST_RANKS, SMALL, SMALL_NORM, Exchange
from deepseek_fp4_plugin.kernels.cuda.peer_memory import reaches
from deepseek_fp4_plugin.parallel.collectives import ProcessGroup

logger = logging.getLogger(__name__)


class PeerGroup(ProcessGroup):
    """A process group whose ranks' GPUs write to one another's memory."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        super().__init__(group)
        self.exchange = Exchange(device, self.rank, self.size, lambda own: _share(self.group, own))
        dist.barrier(group, device_ids=[device.index])  # every mailbox is there before anybody writes

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype is torch.bfloat16 and x.numel() and x.numel() % 8 == 0:
            return self.exchange.all_reduce(x)
        return super().all_reduce(x)

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        sizes = [x.shape[0]] * self.size if sizes is None else list(sizes)
        if self._small(x, sizes):
            return self.exchange.all_gather(x, sizes)
        return super().all_gather(x, sizes)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        sizes = [x.shape[0] // self.size] * self.size if sizes is None else list(sizes)
        if x.dtype is torch.bfloat16 and self._small(x, sizes):
            return self.exchange.reduce_scatter(x, sizes)
        return super().reduce_scatter(x, sizes)

    def sum_and_norm(
        self, x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        rows = [x, hidden] if other is None else [x, hidden, other]
        fits = weight.dtype is torch.bfloat16 and x.shape[1] <= LONGEST_ROW
        fits = fits and all(row.dtype is torch.bfloat16 and row.shape == x.shape for row in rows)
        if fits and x.shape[1] % 8 == 0 and 0 < x.numel() * 2 <= SMALL_NORM:
            return self.exchange.sum_and_norm(x, hidden, weight, eps, other)
        return None

    def _small(self, x: Tensor, sizes: Sequence[int]) -> bool:
        row = x.dtype.itemsize * math.prod(x.shape[1:])
        return row % 16 == 0 and 0 < max(sizes) * row <= SMALL


def join(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """The group with direct exchanges where every rank's GPU can have them, else the group itself, and one line why.

    All ranks call it together, and all get the same.
    """
    try:
        refusal = None if cuda.available() else cuda.NOT_INSTALLED
        refusal = refusal or _obstacle(group, device)
    except RuntimeError as error:
        refusal = str(error)
    refusals = [None] * group.size
    dist.all_gather_object(refusals, refusal, group=group.group)
    told = next((f"rank {rank}: {why}" for rank, why in enumerate(refusals) if why), None)
    if told is None:
        return PeerGroup(group.group, device)
    if group.rank == 0:
        logger.warning("the ranks exchange through NCCL alone (%s)", told)
    return group


def _obstacle(group: ProcessGroup, device: torch.device) -> str | None:
    homes: list[tuple[str, int]] = [("", 0)] * group.size
    dist.all_gather_object(homes, (_machine(), device.index), group=group.group)
    if group.size > MOST_RANKS:
        return f"{group.size} ranks, and direct exchanges are for at most {MOST_RANKS}"
    if len({machine for machine, _ in homes}) > 1:
        return "the ranks are on several machines"
    if not reaches(device, [index for _, index in homes]):
        return f"GPU {device.index} cannot write to every other rank's memory"
    return None


def _machine() -> str:
    """What processes that can share GPU memory have in common."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _share(group: dist.ProcessGroup, own: bytes) -> list[bytes]:
    everyone: list[bytes] = [b""] * group.size()
    dist.all_gather_object(everyone, own, group=group)
    return everyone
