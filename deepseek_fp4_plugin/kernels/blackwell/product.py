"""NVFP4 weights times NVFP4 activations on the FP4 tensor cores, in Triton, which has the instruction.

Imported where it is used: Triton comes with torch's CUDA builds only.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128  # of a block, of one expert
_OUTPUTS, _INPUTS = 128, 128


@triton.jit
def scaled_product(
    x, x_scale, source, expert_of, weight, weight_scale, factor, y, out, width,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """A block of rows by a block of outputs. x: codes [., width / 2], two a byte; x_scale: E4M3 [., width / 16].
    source: int32, of each row the one of x, below 0: none.  expert_of: int32, of each block of rows, below 0: none.
    weight, weight_scale: [experts, out, ...] alike.  factor: FP32 [experts, out].  y: BF16 [rows, out]."""
    block = tl.program_id(0)
    expert = tl.load(expert_of + block).to(tl.int64)
    if expert < 0:
        return
    row = block * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    from_row = tl.load(source + row).to(tl.int64)
    there, wanted = (from_row >= 0)[:, None], output < out
    more = wanted[:, None]
    own = expert * out + output
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, width, INPUTS):
        byte, scale = first // 2 + tl.arange(0, INPUTS // 2), first // 16 + tl.arange(0, INPUTS // 16)
        bytes_in, scales_in = (byte < width // 2)[None, :], (scale < width // 16)[None, :]
        a = tl.load(x + from_row[:, None] * (width // 2) + byte[None, :], there & bytes_in, 0)
        a_scale = tl.load(x_scale + from_row[:, None] * (width // 16) + scale[None, :], there & scales_in, 0.0)
        b = tl.load(weight + own[:, None] * (width // 2) + byte[None, :], more & bytes_in, 0)
        b_scale = tl.load(weight_scale + own[:, None] * (width // 16) + scale[None, :], more & scales_in, 0.0)
        sums = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", sums)
    scaled = sums * tl.load(factor + own, wanted, 0.0)[None, :]
    at = y + row.to(tl.int64)[:, None] * out + output[None, :]
    tl.store(at, scaled.to(tl.bfloat16), there & wanted[None, :])


def product(
    x: Tensor, x_scale: Tensor, source: Tensor, expert_of: Tensor, weight: Tensor, weight_scale: Tensor, factor: Tensor
) -> Tensor:
    """BF16 [source's rows, out]; rows whose source is below 0 are not written. Shapes: see `scaled_product`; source has
    ROWS for each block that expert_of names."""
    out, width = weight.shape[1], 2 * weight.shape[2]
    y = torch.empty(source.shape[0], out, dtype=torch.bfloat16, device=x.device)
    grid = (expert_of.shape[0], triton.cdiv(out, _OUTPUTS))
    # Triton launches on the current device; on a CPU it interprets.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        scaled_product[grid](
            x, x_scale, source, expert_of, weight, weight_scale, factor, y, out, width, ROWS, _OUTPUTS, _INPUTS
        )  # fmt: skip
    return y
