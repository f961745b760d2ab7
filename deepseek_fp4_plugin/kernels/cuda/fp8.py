"""FP8 products of many rows by a dense weight: decoded to E4M3, rows rounded to it, the library's product of both.

Fewer rows and small weights, where this is slower (docs/cuda_kernels.md), are multiplied in BF16, whatever was asked
for. Routed experts have experts_wgmma.py.
"""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.decode import decode
from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, together
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

MANY_ROWS, LARGE = 512, 2048  # rows, and inputs and outputs, from which it is ahead
_MULTIPLE = 16  # of inputs and outputs, for the library


def serves(rows: int, weight: PreparedWeight) -> bool:
    """Whether FP8 is wanted, possible, and faster."""
    sizes = weight.in_features, weight.out_features
    fits = all(size >= LARGE and size % _MULTIPLE == 0 for size in sizes)
    return weight.activations == "fp8" and rows >= MANY_ROWS and fits


def product(x: Tensor, weight: PreparedWeight, expert: int) -> Tensor:
    """y = x W^T of BF16 rows [rows, in] as the kernels read them, by one expert of a stack: BF16 [rows, out]."""
    together(x, weight.data.data)
    numbers, row_scale = round_rows(x)
    scale = torch.empty(1, weight.out_features, dtype=torch.float32, device=x.device)
    values = decode(weight.data, expert, weight.out_features, weight.in_features, scale)
    return torch._scaled_mm(
        numbers, values.T, row_scale.unsqueeze(1), scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`numerics.fp8_rows.quantize` of BF16 rows [rows, width] as the kernels read them, width a multiple of 8."""
    numbers = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    kernel("fp8_rows.cu", "round_rows", "3P2i", (), x.device.index)(
        (x.shape[0], 1, 1), 128, 0, x.data_ptr(), numbers.data_ptr(), scale.data_ptr(), x.shape[1], x.stride(0)
    )
    return numbers, scale
