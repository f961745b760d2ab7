"""The choice of backend, made once for each weight when it is prepared. Alone in importing backends.

| device | backend | what it is |
| CPU    | decoded | weights decoded once at load to the compute dtype, then the platform's matrix product |
| CUDA   | decoded | the same |
| any    | reference | checkpoint bytes, decoded in FP32 on every call: the law that the others are tested against |
"""

from types import ModuleType

import torch

from deepseek_fp4_plugin.kernels import decoded, reference

BACKENDS: dict[str, ModuleType] = {"decoded": decoded, "reference": reference}


def default_backend(device: torch.device) -> str:
    """The backend that prepares weights on `device` unless the caller names one."""
    return "decoded"


def backend(name: str) -> ModuleType:
    try:
        return BACKENDS[name]
    except KeyError:
        raise ValueError(f"unknown kernel backend {name!r}; choose from {', '.join(BACKENDS)}") from None


def attention(device: torch.device) -> ModuleType:
    """The backend whose attention runs on `device`."""
    return decoded


def has_fp4_tensor_cores(device: torch.device) -> bool:
    """True on NVIDIA GPUs of compute capability 10.0 and above."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
