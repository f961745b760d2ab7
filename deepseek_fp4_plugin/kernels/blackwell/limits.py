"""What the FP4 tensor cores do not serve."""

import functools
import importlib.util

import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels.weights import Case

NOT_INSTALLED = "Triton is not installed; torch's CUDA builds for Linux bring it"


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def refuses(case: Case) -> str | None:
    """Why a case is not served, or None."""
    if case.device.type != "cuda" or not torch.cuda.is_available():
        return "it is for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(case.device)
    if capability[0] != 10:
        return f"it is for compute capability 10.0, not {capability[0]}.{capability[1]}"
    if not available():
        return NOT_INSTALLED
    if case.format is not WeightFormat.NVFP4 or case.activations != "fp4" or case.dtype is not torch.bfloat16:
        return "it is for NVFP4 weights and FP4 activations of a BF16 model"
    return None
