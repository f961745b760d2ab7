"""y = x W^T on NVFP4 tiles: few rows decoded in registers, many rows decoded once and multiplied by the library.

Products are exact in BF16 and summed in FP32; the tensor scale multiplies the sum, which is rounded once.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED, Kernel, kernel
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB, SLAB_BYTES, VALUE_SCALE, Tiles, pack
from deepseek_fp4_plugin.kernels.weights import Activations, OptionalTensor, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.numerics import nvfp4

MANY_ROWS = 64  # above, decoding once and the library's product are ahead
_BLOCKS = 100  # fewer do not fill the multiprocessors
_MAX_WEIGHTS = 130 << 10  # bytes a block asks for at once


def prepare(
    parts: Sequence[WeightTensors], dtype: torch.dtype, activations: Activations, input_scale: OptionalTensor
) -> Tiles:
    """NVFP4 tiles; the input scale of FP4 activations goes into their row scales."""
    tiles = pack(parts)
    if activations == "fp4":
        factor = float(input_scale)
        scales = tuple(tuple(scale * factor for scale in expert) for expert in tiles.scales)
        tiles = tiles._replace(row_scale=tiles.row_scale * input_scale, scales=scales)
    # Products ask for their weights before the kernels ahead of them have ended.
    torch.cuda.current_stream(tiles.data.device).synchronize()
    return tiles


def linear(x: Tensor, weight: PreparedWeight, expert: int | None = None) -> Tensor:
    """x: BF16 [rows, in].  Returns BF16 [rows, out]; `expert` picks one of a stack."""
    x = rounded_input(x, weight)
    y = torch.empty(x.shape[0], weight.out_features, dtype=torch.bfloat16, device=x.device)
    if x.shape[0] > MANY_ROWS:
        return _many_rows(x, weight, expert or 0, y)
    _few_rows(x, weight, expert or 0, y, gated=False)
    return y


def gated(x: Tensor, weight: PreparedWeight) -> Tensor:
    """silu(gate x) * up x of fused gate and up, BF16 [rows, in] to [rows, out / 2], at most MANY_ROWS rows."""
    x = rounded_input(x, weight)
    h = torch.empty(x.shape[0], weight.data.half, dtype=torch.bfloat16, device=x.device)
    _few_rows(x, weight, 0, h, gated=True)
    return h


def rounded_input(x: Tensor, weight: PreparedWeight) -> Tensor:
    """Rows that the kernels can read; with FP4 activations their NVFP4 values, `input_scale` left to the tiles."""
    if x.dtype is not torch.bfloat16:
        raise ValueError(f"the CUDA kernels multiply BF16 activations, not {x.dtype}")
    if weight.activations == "fp4":
        packed, scale = nvfp4.quantize_activation(x, weight.input_scale)
        return nvfp4.block_values(packed, scale, torch.bfloat16)
    return x if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.contiguous().clone()


class Geometry(NamedTuple):
    """How a product is cut. columns: of 8 rows a warp multiplies at a time.  groups: of 16 outputs a warp has.
    warps_m, warps_k: warps over outputs and over inputs.  cluster: blocks that share inputs."""

    columns: int
    groups: int
    warps_m: int
    warps_k: int
    cluster: int

    def shared(self, slabs: int) -> int:
        """Bytes of shared memory of a block."""
        block_groups = self.warps_m * self.groups
        sums = self.warps_k * block_groups * 16 * (8 * self.columns + 1) * 4
        return -(-sums // 128) * 128 + block_groups * -(-slabs // self.cluster) * SLAB_BYTES


@functools.cache
def geometry(groups: int, slabs: int, rows: int, experts: int = 1) -> Geometry:
    """The cut for `rows` rows by `groups` groups of outputs and `slabs` of inputs, times so many experts at once."""
    columns = next(c for c in (1, 2, 4, 8) if rows <= 8 * c or c == 8)
    each, warps_m = (2 if slabs <= 16 else 1, 1) if columns == 1 else (2, 2)
    cluster = 1
    while cluster < 8 and cluster * 4 <= slabs:
        blocks = -(-groups // (each * warps_m)) * experts * cluster
        if blocks >= _BLOCKS and each * warps_m * -(-slabs // cluster) * SLAB_BYTES <= _MAX_WEIGHTS:
            break
        cluster *= 2
    warps_k = max(1, min(8 if columns <= 2 else 4, -(-slabs // cluster)))
    cut = Geometry(columns, each, warps_m, warps_k, cluster)
    while cut.shared(slabs) > MAX_SHARED and cut.warps_m > 1:
        cut = cut._replace(warps_m=cut.warps_m // 2)
    if cut.shared(slabs) > MAX_SHARED:
        raise ValueError(f"no kernel for NVFP4 weights of {slabs * SLAB} inputs")
    return cut


def linear_kernel(cut: Geometry, gated: bool, experts: bool, device: int) -> Kernel:
    defines = (("ROWS8", cut.columns), ("GROUPS", cut.groups), ("GATED", int(gated)), ("EXPERTS", int(experts)))
    return kernel("nvfp4_linear.cu", "nvfp4_linear", "5P12i", defines, device)


def launch(
    x: Tensor,
    tiles: Tiles,
    expert: int,
    y: Tensor,
    out: int,
    gated: bool,
    ids: Tensor | None = None,
    cut: Geometry | None = None,
) -> None:
    """Few rows: y = x W^T of one expert, or with ids int64 [tokens, k] of each choice's expert, a row of y each."""
    rows, width = x.shape
    if rows == 0:
        return
    choices = 0 if ids is None else ids.numel()
    cut = cut or geometry(tiles.groups, tiles.slabs, rows if ids is None else 1, max(1, choices))
    data, row_scale = tiles.data, tiles.row_scale
    if ids is None:
        data, row_scale = data[expert], row_scale[expert]
    grid = (-(-tiles.groups // (cut.groups * cut.warps_m)) * cut.cluster, max(1, choices), 1)
    linear_kernel(cut, gated, ids is not None, x.device.index)(
        grid,
        32 * cut.warps_m * cut.warps_k,
        cut.shared(tiles.slabs),
        data.data_ptr(),
        row_scale.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        0 if ids is None else ids.data_ptr(),
        rows,
        width,
        x.stride(0),
        y.stride(0),
        tiles.groups,
        tiles.slabs,
        cut.warps_m,
        cut.warps_k,
        out,
        tiles.half,
        choices,
        1 if ids is None else ids.shape[1],
        cluster=cut.cluster,
    )


def _few_rows(x: Tensor, weight: PreparedWeight, expert: int, y: Tensor, gated: bool) -> None:
    launch(x, weight.data, expert, y, weight.out_features, gated)


def _many_rows(x: Tensor, weight: PreparedWeight, expert: int, y: Tensor) -> Tensor:
    tiles: Tiles = weight.data
    values = decode(tiles, expert, weight.out_features, weight.in_features)
    scales = tiles.scales[expert]
    if len(set(scales)) == 1:
        return torch.addmm(y, x, values.T, beta=0, alpha=scales[0] * VALUE_SCALE)
    parts = values.split(weight.out_features // len(scales))
    products = [torch.mm(x, part.T, out_dtype=torch.float32) for part in parts]
    return torch.cat([(p * (s * VALUE_SCALE)).bfloat16() for p, s in zip(products, scales, strict=True)], 1)


def decode(tiles: Tiles, expert: int, out: int, width: int) -> Tensor:
    """BF16 [out, width]: the weights without the tensor scale, divided by VALUE_SCALE; exact."""
    values = torch.empty(out, width, dtype=torch.bfloat16, device=tiles.data.device)
    blocks = -(-tiles.groups * tiles.slabs // 8)
    kernel("nvfp4_decode.cu", "nvfp4_decode", "2P5i", (), values.device.index)(
        (blocks, 1, 1),
        256,
        0,
        tiles.data[expert].data_ptr(),
        values.data_ptr(),
        tiles.groups,
        tiles.slabs,
        out,
        width,
        tiles.half,
    )
    return values
