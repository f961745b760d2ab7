"""The choice of backend, made once for each weight when it is prepared. Alone in importing backends.

| device | backend | what it is |
| CPU    | cpu     | native kernels on the checkpoint's bytes, BF16 activations; where the extension was built |
| CPU    | decoded | weights decoded once at load to the compute dtype, then the platform's matrix product |
| CUDA   | decoded | the same |
| any    | reference | checkpoint bytes, decoded in FP32 on every call: the law that the others are tested against |
"""

import functools
import warnings
from types import ModuleType

import torch

from deepseek_fp4_plugin.kernels import cpu, decoded, reference
from deepseek_fp4_plugin.kernels.cpu.recording import Unrecordable as Unrecordable

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "decoded": decoded, "reference": reference}


def default_backend(device: torch.device) -> str:
    """The backend that prepares weights on `device` unless the caller names one."""
    return "cpu" if device.type == "cpu" and _native() else "decoded"


@functools.cache
def _native() -> bool:
    """Whether the CPU extension is there; the first question warns if it is not."""
    if not cpu.available():
        warnings.warn(
            "the native CPU kernels are not built, so weights are decoded to BF16 and run several times slower; "
            "reinstall the package with a C++17 compiler and cmake at hand",
            RuntimeWarning,
            stacklevel=2,
        )
    return cpu.available()


def backend(name: str) -> ModuleType:
    if name == "cpu" and not cpu.available():
        raise ValueError("kernel backend 'cpu' was not built: reinstall the package with a C++17 compiler and cmake")
    try:
        return BACKENDS[name]
    except KeyError:
        raise ValueError(f"unknown kernel backend {name!r}; choose from {', '.join(BACKENDS)}") from None


def attention(device: torch.device) -> ModuleType:
    """The backend whose attention runs on `device`."""
    return cpu if device.type == "cpu" and _native() else decoded


def small(device: torch.device) -> ModuleType:
    """The backend whose operations without a prepared weight run on `device`."""
    return cpu if device.type == "cpu" and _native() else reference


def recorder(device: torch.device) -> cpu.Recorder | None:
    """What records and replays kernels on `device`, if anything does."""
    return cpu.Recorder() if device.type == "cpu" and _native() else None


def has_fp4_tensor_cores(device: torch.device) -> bool:
    """True on NVIDIA GPUs of compute capability 10.0 and above."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
