"""A function's work on a GPU as one CUDA graph."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.recording import Results


class GraphRecorder:
    """Captures functions into graphs that share one memory pool: a replay overwrites what the last one has left."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], Results], Results]:
        """See recording.Recorder. Here the function runs once before it is captured, so that what is made at a first
        call (compiled kernels, libraries' work spaces) is there, and the results hold nothing until the first replay.

        Graphs take turns at all of the pool's memory, results included: recorded from the largest to the smallest, all
        of them together take about what the largest takes.
        """
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            owned = function()
        results = tuple(_unowned(result) for result in owned)
        del owned

        def replay(keep: object = function) -> Results:  # the graph reads tensors that only the function holds
            graph.replay()
            return results

        return replay, results


class _Memory:
    """Memory behind an address, and that nobody owns."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (size,), "typestr": "|u1", "strides": None, "version": 2
        }  # fmt: skip


def _unowned(x: Tensor) -> Tensor:
    """The same memory of the pool, which the graph keeps, so that other graphs may take their turn at it."""
    storage = x.untyped_storage()
    if not x.numel():
        return x
    whole = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes()), device=x.device)
    return whole.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """The end of an old graph during a capture ends that too, and Python's collector chooses its time freely."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
