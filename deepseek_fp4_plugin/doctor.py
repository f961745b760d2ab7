"""What this machine is, which packages are here, and which kernels were chosen for it: the facts of a bug report."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = (
    "deepseek_fp4_plugin", "torch", "numpy", "safetensors", "tokenizers", "jinja2", "pydantic", "huggingface_hub",
)  # fmt: skip
_OPTIONAL = ("triton", "transformers", "datasets", "pyarrow", "fastapi", "uvicorn", "llguidance", "nvidia-modelopt")
# Extensions that CPU kernels of 4-bit weights use, weakest first.
_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile")


def examine() -> dict[str, dict[str, Any]]:
    """Section -> name -> value, every value a plain JSON one."""
    return {"machine": _machine(), "packages": _packages(), "kernels": _kernels()}


def _machine() -> dict[str, Any]:
    import torch

    memory = psutil.virtual_memory()
    flags = _cpu_info("flags", "Features").split()
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "cpu": _cpu_info("model name") or platform.processor() or "unknown",
        "cpu extensions": " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "none of interest",
        "cpu capability seen by torch": torch.backends.cpu.get_cpu_capability(),
        "cores": f"{_usable_cores()} of {os.cpu_count()} usable, {torch.get_num_threads()} torch threads",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
        "disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free",
    }
    if not torch.cuda.is_available():
        facts["gpu"] = "none that torch can use" + ("" if torch.version.cuda else " (torch was built without CUDA)")
        return facts
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"gpu {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}"
    facts["cuda of torch"] = torch.version.cuda
    return facts


def _packages() -> dict[str, str]:
    required = {name: _version(name) or "MISSING; install deepseek_fp4_plugin again" for name in _PACKAGES}
    return required | {f"{name} (optional)": _version(name) or "not installed" for name in _OPTIONAL}


def _kernels() -> dict[str, str]:
    import torch

    from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
    from deepseek_fp4_plugin.kernels import select
    from deepseek_fp4_plugin.kernels.weights import Activations, Case

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    facts = {}
    for device in devices:
        fp4 = select.has_fp4_tensor_cores(device)
        for weight in WeightFormat:
            activations: Activations = "fp4" if fp4 and weight is WeightFormat.NVFP4 else "bf16"
            case = Case(device, torch.bfloat16, weight, activations)
            facts[f"{weight.name} weights on {device}"] = select.explain(case)
        facts[f"attention, norms, routing on {device}"] = select.explain(Case(device, torch.bfloat16))
        fp8 = select.refusal("cuda", Case(device, torch.bfloat16, WeightFormat.NVFP4, "fp8")) is None
        other = "; int8 can be asked for" if device.type == "cpu" else "; fp8 can be asked for" if fp8 else ""
        facts[f"nvfp4_activations=auto on {device}"] = "fp4" if fp4 else f"bf16 (no FP4 tensor cores{other})"
    return facts


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_info(*names: str) -> str:
    """The first line of /proc/cpuinfo with one of these names; empty elsewhere than on Linux."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
