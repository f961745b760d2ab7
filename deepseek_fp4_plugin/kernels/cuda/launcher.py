"""Kernels of the compiled sources, launched on torch's current stream.

Every kernel takes one structure by value, its parameters. Launches are programmatically dependent: a kernel may begin
before the one ahead of it has ended, reads nothing of what that one writes before `griddepcontrol.wait`, and may read
weights, which no kernel writes.
"""

import ctypes
import functools
import struct
import threading
from typing import Any

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda import compiler

driver: Any
try:
    from cuda.bindings import driver  # type: ignore[no-redef]
except ImportError:
    driver = None

_CARVEOUT = 100  # of 100 parts of a multiprocessor's cache: shared memory
_BLOCK_SHARED = 227 << 10  # bytes of shared memory that a block can have
MAX_SHARED = _BLOCK_SHARED - 4096  # of them for what a launch asks for, beside what kernels declare


def available() -> bool:
    """Whether NVIDIA's bindings of the driver and of NVRTC are installed."""
    return driver is not None and compiler.available()


def architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def together(*tensors: Tensor) -> None:
    """Kernels take addresses: raises ValueError for tensors that are not all on one GPU."""
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1 or not tensors[0].is_cuda:
        raise ValueError(f"a CUDA kernel's tensors must be on one GPU, these are on {', '.join(sorted(devices))}")


class Kernel:
    """One compiled function.  layout: its parameter structure in `struct`'s letters (P pointer, i int, f float)."""

    def __init__(self, function: Any, layout: str, shared: int):
        self._function, self._shared = function, shared
        self._lock = threading.Lock()  # ranks may be threads of one process
        self._struct = struct.Struct(layout)
        self._configurations: dict[tuple, Any] = {}
        self._buffer = ctypes.create_string_buffer(self._struct.size + 8)  # structures end aligned
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._buffer))

    def __call__(self, grid: tuple[int, int, int], threads: int, shared: int, *values: float, cluster: int = 1) -> None:
        """Launch.  shared: bytes of dynamic shared memory.  cluster: blocks in one, along the grid's first axis."""
        if 0 in grid:
            return
        key = (grid, threads, shared, cluster)
        configuration = self._configurations.get(key)
        if configuration is None:
            configuration = self._configurations[key] = _configuration(*key)
            if shared > self._shared:
                raise ValueError(f"{shared} bytes of shared memory, the kernel was loaded for {self._shared}")
        with self._lock:
            configuration.hStream = torch.cuda.current_stream().cuda_stream
            self._struct.pack_into(self._buffer, 0, *values)
            checked(driver.cuLaunchKernelEx(configuration, self._function, ctypes.addressof(self._parameters), 0))


@functools.cache
def kernel(file: str, name: str, layout: str, defines: tuple[tuple[str, int], ...], device: int) -> Kernel:
    """Function `name` of source/`file`, compiled with `defines`, on `device`."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes torch's context of this device the current one
        module = checked(driver.cuModuleLoadData(compiler.cubin(file, defines, architecture(device))))
        function = checked(driver.cuModuleGetFunction(module, name.encode()))
        attributes = driver.CUfunction_attribute
        declared = checked(driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function))
        dynamic = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        shared = _BLOCK_SHARED - declared
        checked(driver.cuFuncSetAttribute(function, dynamic, shared))
        # A multiprocessor is divided into cache and shared memory anew only when it is idle: where kernels wanted
        # other parts of it, blocks of the next one could not come and fetch weights.
        carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        checked(driver.cuFuncSetAttribute(function, carveout, _CARVEOUT))
    return Kernel(function, layout, shared)


def _configuration(grid: tuple[int, int, int], threads: int, shared: int, cluster: int) -> Any:
    configuration = driver.CUlaunchConfig()
    configuration.gridDimX, configuration.gridDimY, configuration.gridDimZ = grid
    configuration.blockDimX, configuration.blockDimY, configuration.blockDimZ = threads, 1, 1
    configuration.sharedMemBytes = shared
    identifiers = driver.CUlaunchAttributeID
    dependent = driver.CUlaunchAttribute()
    dependent.id = identifiers.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    dependent.value.programmaticStreamSerializationAllowed = 1
    attributes = [dependent]
    if cluster > 1:
        size = driver.CUlaunchAttribute()
        size.id = identifiers.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size.value.clusterDim.x, size.value.clusterDim.y, size.value.clusterDim.z = cluster, 1, 1
        attributes.append(size)
    configuration.attrs = attributes
    configuration.numAttrs = len(attributes)
    return configuration


def checked(result: tuple) -> Any:
    """What a call of the driver returns. Raises RuntimeError with the driver's name of an error."""
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {result[0].name}")
    return result[1] if len(result) > 1 else None
