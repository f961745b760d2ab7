"""y = x W^T. NVFP4 tiles, by rows: decoded in registers for mma or wgmma, or decoded once for the library's product.

Products are exact in BF16 and summed in FP32; the tensor scale multiplies the sum, which is rounded once. Weights of
other formats are `dense`'s.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels.cuda import cuts, dense, fp8, matvec, wgmma
from deepseek_fp4_plugin.kernels.cuda.decode import decode
from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, together
from deepseek_fp4_plugin.kernels.cuda.norm import rms_norm
from deepseek_fp4_plugin.kernels.cuda.tiles import SLAB_BYTES, VALUE_SCALE, Tiles, pack
from deepseek_fp4_plugin.kernels.weights import Activations, OptionalTensor, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.numerics import nvfp4

MANY_ROWS = 128  # above, where nothing is cut for the matrix unit, weights are decoded for the library's product
_BLOCKS = 100  # fewer do not fill the multiprocessors
_RESIDENT = 264  # blocks that run at once: where there would be more, each takes several turns


def prepare(
    parts: Sequence[WeightTensors], dtype: torch.dtype, activations: Activations, input_scale: OptionalTensor
) -> Tiles | dense.Dense:
    """NVFP4 tiles; the input scale of FP4 activations goes into their row scales. Other formats as `dense` has them."""
    if parts[0].format is not WeightFormat.NVFP4:
        return dense.prepare(parts)
    tiles = pack(parts)
    if activations == "fp4":
        factor = float(input_scale)
        scales = tuple(tuple(scale * factor for scale in expert) for expert in tiles.scales)
        tiles = tiles._replace(row_scale=tiles.row_scale * input_scale, scales=scales)
    # Products ask for their weights before the kernels ahead of them have ended.
    torch.cuda.current_stream(tiles.data.device).synchronize()
    return tiles


def build_ahead(weights: Sequence[PreparedWeight], most_rows: int) -> None:
    """See kernels/ops.py: the products on Hopper's matrix unit, which are many kernels."""
    dense_tiles = [w.data for w in weights if isinstance(w.data, Tiles) and len(w.data.data) == 1]
    kinds = {(tiles.data.device.index, tiles.groups, tiles.slabs, bool(tiles.half)) for tiles in dense_tiles}
    wgmma.build(
        (cut, gated, device)
        for device, groups, slabs, gated in kinds
        for cut in cuts.up_to(device, groups, slabs, most_rows)
    )


def linear(x: Tensor, weight: PreparedWeight, expert: int | None = None) -> Tensor:
    """x: BF16 [rows, in].  Returns BF16 [rows, out]; `expert` picks one of a stack."""
    x = rounded_input(x, weight)
    if weight.format is not WeightFormat.NVFP4:
        return dense.linear(x, weight, expert)
    return _product(x, weight, expert or 0)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: PreparedWeight) -> Tensor:
    """See kernels/reference/linear.py; a launch for both where rows are few."""
    if x.dtype is torch.bfloat16 and weight.format is not WeightFormat.NVFP4:
        y = dense.norm_linear(rounded_input(x, weight), norm, eps, weight)
        if y is not None:
            return y
    return linear(rms_norm(x, norm, eps), weight)


def linear_pair(x: Tensor, first: PreparedWeight, second: PreparedWeight) -> tuple[Tensor, Tensor] | None:
    """See kernels/ops.py."""
    nvfp4 = WeightFormat.NVFP4 in (first.format, second.format)
    return None if nvfp4 else dense.linear_pair(rounded_input(x, first), first, second)


def gated(x: Tensor, weight: PreparedWeight) -> Tensor:
    """silu(gate x) * up x of fused gate and up in tiles, BF16 [rows, in] to [rows, out / 2]."""
    x, tiles = rounded_input(x, weight), weight.data
    few, cut = _cuts(x, tiles)
    if fp8.serves(x.shape[0], weight) or (not few and not cut and x.shape[0] > MANY_ROWS):
        gate, up = _product(x, weight, 0).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    h = torch.empty(x.shape[0], tiles.half, dtype=torch.bfloat16, device=x.device)
    if few:
        matvec.launch(x, tiles, 0, h, weight.out_features, True, few)
    elif cut:
        wgmma.launch(x, tiles, 0, h, weight.out_features, True, cut)
    else:
        launch(x, tiles, 0, h, weight.out_features, True)
    return h


def _product(x: Tensor, weight: PreparedWeight, expert: int) -> Tensor:
    """Of rows as `rounded_input` makes them, on tiles."""
    tiles: Tiles = weight.data
    if fp8.serves(x.shape[0], weight):
        return fp8.product(x, weight, expert)
    y = torch.empty(x.shape[0], weight.out_features, dtype=torch.bfloat16, device=x.device)
    few, cut = _cuts(x, tiles)
    if few:
        matvec.launch(x, tiles, expert, y, weight.out_features, False, few)
    elif cut:
        wgmma.launch(x, tiles, expert, y, weight.out_features, False, cut)
    elif x.shape[0] > MANY_ROWS:
        return _many_rows(x, weight, expert, y)
    else:
        launch(x, tiles, expert, y, weight.out_features, False)
    return y


def _cuts(x: Tensor, tiles: Tiles) -> tuple[matvec.Cut | None, cuts.Cut | None]:
    """The cut of the kernel for so many rows; both None where it is another one's."""
    rows = x.shape[0]
    return matvec.choose(tiles.groups, tiles.slabs, rows), cuts.choose(x.device.index, tiles.groups, tiles.slabs, rows)


def rounded_input(x: Tensor, weight: PreparedWeight) -> Tensor:
    """Rows that the kernels can read; with FP4 activations their NVFP4 values, `input_scale` left to the tiles."""
    if x.dtype is not torch.bfloat16:
        raise ValueError(f"the CUDA kernels multiply BF16 activations, not {x.dtype}")
    if weight.activations == "fp4":
        packed, scale = nvfp4.quantize_activation(x, weight.input_scale)
        return nvfp4.block_values(packed, scale, torch.bfloat16)
    return (
        x
        if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


class Geometry(NamedTuple):
    """How a product is cut. columns: of 8 rows a warp multiplies at a time.  groups: of 16 outputs a warp has.
    warps_m, warps_k: warps over outputs and inputs.  cluster: blocks that share inputs.  blocks: clusters of them."""

    columns: int
    groups: int
    warps_m: int
    warps_k: int
    cluster: int
    blocks: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: two sets of sums and scales, and the warps' rings."""
        outputs = self.warps_m * self.groups * 16
        sums = 2 * 4 * outputs * (self.warps_k * (8 * self.columns + 1) + 1)
        stages = 6 if self.groups == 1 else 4
        return sums + 128 + self.warps_m * self.warps_k * stages * self.groups * SLAB_BYTES


@functools.cache
def geometry(groups: int, slabs: int, rows: int) -> Geometry:
    """The cut for `rows` rows by `groups` groups of outputs and `slabs` of inputs."""
    columns = next(c for c in (1, 2, 4, 8) if rows <= 8 * c or c == 8)
    each, warps_m, warps_k = 2, 1, 8
    if columns == 1 and slabs > 16 and groups <= _RESIDENT:
        each = 1
    elif columns == 4 and groups > _RESIDENT:
        each, warps_m, warps_k = 1, 2, 4
    elif columns == 8 and groups > _RESIDENT:
        warps_k = 4
    if slabs < 4:  # few inputs: warps share outputs instead
        each, warps_m, warps_k = 1, 4, min(slabs, 2)
    sets = -(-groups // (each * warps_m))
    cluster = 1
    while cluster < 8 and cluster * 4 <= slabs and sets * cluster < _BLOCKS:
        cluster *= 2
    warps_k = min(warps_k, -(-slabs // cluster))
    turns = -(-sets * cluster // _RESIDENT)
    return Geometry(columns, each, warps_m, warps_k, cluster, -(-sets // turns))


def launch(
    x: Tensor,
    tiles: Tiles,
    expert: int,
    y: Tensor,
    out: int,
    gated: bool,
) -> None:
    """Few rows: y = x W^T of one expert."""
    together(x, tiles.data)
    rows, width = x.shape
    if rows == 0:
        return
    cut = geometry(tiles.groups, tiles.slabs, rows)
    defines = (("ROWS8", cut.columns), ("GROUPS", cut.groups), ("GATED", int(gated)))
    kernel("nvfp4_linear.cu", "nvfp4_linear", "4P10i", defines, x.device.index)(
        (cut.blocks * cut.cluster, 1, 1),
        32 * cut.warps_m * cut.warps_k,
        cut.shared,
        tiles.data[expert].data_ptr(),
        tiles.row_scale[expert].data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
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
        cluster=cut.cluster,
    )


def _many_rows(x: Tensor, weight: PreparedWeight, expert: int, y: Tensor) -> Tensor:
    tiles: Tiles = weight.data
    values = decode(tiles, expert, weight.out_features, weight.in_features)
    scales = tiles.scales[expert]
    if len(set(scales)) == 1:
        return torch.addmm(y, x, values.T, beta=0, alpha=scales[0] * VALUE_SCALE)
    parts = values.split(weight.out_features // len(scales))
    products = [torch.mm(x, part.T, out_dtype=torch.float32) for part in parts]
    return torch.cat([(p * (s * VALUE_SCALE)).bfloat16() for p, s in zip(products, scales, strict=True)], 1)
