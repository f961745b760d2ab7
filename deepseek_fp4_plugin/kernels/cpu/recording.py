"""A step's kernel calls, recorded once and made again without Python: what CUDA graphs are on a GPU.

While a function is recorded its kernels run as always and their arguments are kept. Everything between the kernels must
be views and empty tensors: whatever else torch is asked to compute would be missing from the replay, so it is refused.
"""

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from deepseek_fp4_plugin.kernels.cpu.extension import native
from deepseek_fp4_plugin.kernels.recording import Results, Unrecordable


class Recorder:
    """Records functions, all in the same memory: a replay overwrites what the replay before has left."""

    def __init__(self) -> None:
        self._memory = _Memory()

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], Results], Results]:
        """See kernels.recording.Recorder; the function is called once."""
        with _Refusing(self._memory) as recording:
            try:
                results = function()
            finally:
                native.Recording.stop()

        def replay() -> Results:
            for part in recording.parts:
                part()
            return results

        return replay, results


class _Refusing(TorchDispatchMode):
    """parts: what a replay calls, recorded kernels and the work between them in turn."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, 1.5 s, to keep it away from a function it never sees

    def __init__(self, memory: "_Memory"):
        super().__init__()
        self.memory = memory
        self.parts: list[Callable[[], object]] = []

    def __enter__(self) -> "_Refusing":
        super().__enter__()
        self._start()
        return self

    def _start(self) -> None:
        recording = native.Recording()
        self.parts.append(recording.replay)
        recording.start()

    def cut(self, work: Callable[..., Results], *tensors: Tensor) -> Results:
        """See kernels.recording.cut."""
        native.Recording.stop()
        with _disable_current_modes():
            values = work(*tensors)
            results = tuple(self.memory.tensor(value.shape, value.dtype).copy_(value) for value in values)
            inputs, outputs = [_unowned(tensor) for tensor in tensors], [_unowned(result) for result in results]

        def again() -> None:
            values = work(*inputs)
            if values:
                torch._foreach_copy_(outputs, values)  # all in one call

        self.parts.append(again)
        self._start()
        return results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and kwargs.get("device") in (None, torch.device("cpu")):
            return self.memory.tensor(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        returns = func._schema.returns
        if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            result = func(*args, **kwargs)
            # reshape() and its like may view or copy, and a new constant looks like a view of one.
            if func is not torch.ops.aten.lift_fresh.default and _storages(result) <= _storages(args):
                return result
        raise Unrecordable(f"{func} computes outside the kernels")


def _storages(values: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, Tensor) and x.numel()}


def _unowned(x: Tensor) -> Tensor:
    """The same memory, which a recording knows by its address alone, so that other layers may take their turn at it."""
    storage = x.untyped_storage()
    if not x.numel():
        return x
    whole = np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))
    return torch.from_numpy(whole).view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


class _Memory:
    """Blocks of powers of two; one is free again once no tensor uses it, so layers take turns at the same ones."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._blocks: list[np.ndarray] = []  # all of them: recordings hold addresses only

    def tensor(self, shape: Any, dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = 1 << max(6, (count * dtype.itemsize - 1).bit_length())
        free = self._free.setdefault(size, [])
        if not free:
            block = np.zeros(size + 64, np.uint8)
            self._blocks.append(block)
            free.append(block[-block.ctypes.data % 64 :][:size])
        block = free.pop()
        used = block[:]  # lives as long as the storage of the tensor
        weakref.finalize(used, free.append, block).atexit = False
        return torch.from_numpy(used)[: count * dtype.itemsize].view(dtype).view(tuple(shape))
