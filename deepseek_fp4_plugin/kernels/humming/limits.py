"""What humming-kernels does not serve."""

import functools
from importlib import metadata

import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels.weights import Case

NOT_INSTALLED = "humming-kernels is not installed; install deepseek_fp4_plugin[humming]"


@functools.cache
def available() -> bool:
    """Whether the package is installed."""
    try:
        return bool(metadata.version("humming-kernels"))
    except metadata.PackageNotFoundError:
        return False


def refuses(case: Case) -> str | None:
    """Why a case is not served, or None."""
    if case.device.type != "cuda" or not torch.cuda.is_available():
        return "it is for NVIDIA GPUs"
    if not available():
        return NOT_INSTALLED
    if case.format is not WeightFormat.NVFP4:
        return "it is for NVFP4 weights"
    if torch.cuda.get_device_capability(case.device)[0] < 8:
        return "BF16 activations want compute capability 8.0"
    if case.dtype is not torch.bfloat16 or case.activations != "bf16":
        return "its activations are BF16"
    return None
