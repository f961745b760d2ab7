"""Memory of one GPU that the processes of other GPUs of the same machine can write to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepseek_fp4_plugin.kernels.cuda.launcher import checked, driver


def reaches(device: torch.device, others: Sequence[int]) -> bool:
    """Whether `device` may write to the memory of the machine's other GPUs."""
    return all(other == device.index or torch.cuda.can_device_access_peer(device.index, other) for other in others)


class PeerMemory:
    """`size` bytes of zeros here, and the same of every other rank, mapped into this process.

    exchange: takes bytes and returns every rank's, in rank order; all ranks call it together.
    addresses: by rank; this rank's own is its memory itself.
    Raises RuntimeError where the driver refuses to share or to map memory.
    """

    def __init__(self, size: int, device: torch.device, rank: int, exchange: Callable[[bytes], list[bytes]]):
        self._mapped: list[Any] = []
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context of this device the current one
            self._own = checked(driver.cuMemAlloc(size))
            checked(driver.cuMemsetD8(self._own, 0, size))
            torch.cuda.synchronize(device)
            handles = exchange(bytes(checked(driver.cuIpcGetMemHandle(self._own)).reserved))
            self.addresses = [int(self._own) if r == rank else self._map(handles[r]) for r in range(len(handles))]

    def _map(self, handle: bytes) -> int:
        wanted = driver.CUipcMemHandle()
        wanted.reserved = handle
        flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
        self._mapped.append(checked(driver.cuIpcOpenMemHandle(wanted, flags)))
        return int(self._mapped[-1])
