"""What the native kernels do not serve."""

import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels.cpu.extension import NOT_BUILT, available
from deepseek_fp4_plugin.kernels.weights import Case

_ALIGNED_COLUMNS = 64  # FP8 scale blocks must be whole multiples of this many columns


def refuses(case: Case) -> str | None:
    """Why a case is not served, or None."""
    if case.device.type != "cpu":
        return "it is for CPUs"
    if not available():
        return NOT_BUILT
    if case.dtype not in (None, torch.bfloat16):
        return "its activations are BF16"
    if case.activations == "fp8":
        return "it has no FP8 activations"
    if case.format is WeightFormat.FP8_BLOCK and case.scale_columns % _ALIGNED_COLUMNS:
        return f"FP8 scale blocks must be multiples of {_ALIGNED_COLUMNS} columns"
    return None
