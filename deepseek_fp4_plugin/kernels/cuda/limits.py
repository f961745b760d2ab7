"""What the CUDA kernels do not serve."""

import torch

from deepseek_fp4_plugin.kernels.cuda.launcher import available
from deepseek_fp4_plugin.kernels.weights import Case

NOT_INSTALLED = "NVIDIA's driver bindings or run-time compiler are not installed; install deepseek_fp4_plugin[cuda]"
_CAPABILITIES = (9, 10)  # bulk copies, clusters, and 227 KB of shared memory a block


def refuses(case: Case) -> str | None:
    """Why a case is not served, or None."""
    if case.device.type != "cuda" or not torch.cuda.is_available():
        return "it is for NVIDIA GPUs"
    if not available():
        return NOT_INSTALLED
    capability = torch.cuda.get_device_capability(case.device)
    if capability[0] not in _CAPABILITIES:
        return f"it is for compute capabilities 9.0 and 10.0, not {capability[0]}.{capability[1]}"
    if case.dtype not in (None, torch.bfloat16):
        return "its activations are BF16"
    if case.activations == "int8":
        return "it has no activations of 8-bit integers"
    if case.activations == "fp8" and capability[0] != 9:
        return "its FP8 products are for compute capability 9.0"
    return None
