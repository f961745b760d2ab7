"""FP8 products of many rows: weights decoded to E4M3, rows rounded to it, and the library's product of both.

Fewer rows are bound by what is read, of which FP8 saves nothing: they are multiplied in BF16, whatever was asked for.
"""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.decode import decode
from deepseek_fp4_plugin.kernels.cuda.launcher import kernel
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

MANY_ROWS = 512  # of a weight
MANY_EXPERT_ROWS = 256  # of each of a rank's experts, on average
_MULTIPLE = 16  # of inputs and outputs, for the library


def serves(rows: float, weight: PreparedWeight, many: int = MANY_ROWS) -> bool:
    """Whether FP8 is wanted, possible, and for so many rows faster."""
    sizes = weight.in_features % _MULTIPLE == weight.out_features % _MULTIPLE == 0
    return weight.activations == "fp8" and rows >= many and sizes


def product(x: Tensor, weight: PreparedWeight, expert: int) -> Tensor:
    """y = x W^T of BF16 rows [rows, in] as the kernels read them, by one expert of a stack: BF16 [rows, out]."""
    numbers, row_scale = round_rows(x)
    scale = torch.empty(1, weight.out_features, dtype=torch.float32, device=x.device)
    values = decode(weight.data, expert, weight.out_features, weight.in_features, scale)
    return torch._scaled_mm(
        numbers, values.T, row_scale.unsqueeze(1), scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def products(numbers: Tensor, row_scale: Tensor, weight: PreparedWeight, ends: Tensor) -> Tensor:
    """Of rows as `round_rows` gives them, those of expert e ending at ends[e], int32 [experts]: BF16 [rows, out]."""
    scale = torch.empty(len(ends), weight.out_features, dtype=torch.float32, device=numbers.device)
    values = decode(weight.data, None, weight.out_features, weight.in_features, scale)
    return torch._scaled_grouped_mm(
        numbers, values.transpose(1, 2), row_scale, scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`numerics.fp8_rows.quantize` of BF16 rows [rows, width] as the kernels read them, width a multiple of 8."""
    numbers = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    kernel("fp8_rows.cu", "round_rows", "3P2i", (), x.device.index)(
        (x.shape[0], 1, 1), 128, 0, x.data_ptr(), numbers.data_ptr(), scale.data_ptr(), x.shape[1], x.stride(0)
    )
    return numbers, scale
