"""y = x W^T on BF16 and FP8 weights: few rows from the checkpoint's bytes at the memory's rate, many by the library.

Large FP8 weights are kept twice: as they are for few rows, which have half the bytes to read, and decoded for the rest.
Stacks of experts would be too large for that; they, small ones and what the kernel cannot read are decoded alone.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import decoded
from deepseek_fp4_plugin.kernels.cuda.launcher import MAX_SHARED, kernel, together
from deepseek_fp4_plugin.kernels.weights import PreparedWeight, WeightTensors

FP8_COLUMNS = 64  # a block's inputs are a multiple of it
_FEW_ROWS, _NARROW_ROWS, _NARROW = 8, 16, 4096  # of so many outputs at most more rows are still few
_LARGE = 256 << 20  # bytes of BF16 up to which the library was measured to be behind
_FP8 = 8 << 20  # weights from which reading half the bytes is worth decoding them
_MULTIPROCESSORS = 132
_REGISTERS = 65536  # of a multiprocessor
_NORMED = 16 << 10  # bytes of rows that every block of a product norms for itself at most


class Fp8Blocks(NamedTuple):
    """weight: E4M3 [out, in].  scale: FP32 [out / rows, in / columns], one a block of that size."""

    weight: Tensor
    scale: Tensor
    rows: int
    columns: int


class Dense(NamedTuple):
    """values: BF16 [(E,) out, in].  row_scale: none; `decoded` asks.  fp8: the same as the checkpoint has it."""

    values: Tensor
    row_scale: None
    fp8: Fp8Blocks | None


def prepare(parts: Sequence[WeightTensors]) -> Dense:
    """One weight for all parts."""
    data = Dense(decoded.prepare(parts, torch.bfloat16, "bf16", None).values, None, fp8_blocks(parts))
    # Products ask for their weights before the kernels ahead of them have ended.
    torch.cuda.current_stream(data.values.device).synchronize()
    return data


def fp8_blocks(parts: Sequence[WeightTensors]) -> Fp8Blocks | None:
    """The parts' blocks, cut to a size that fits all; None where they are not to be kept."""
    first = parts[0]
    if first.format is not WeightFormat.FP8_BLOCK or first.weight.ndim == 3 or first.in_features % 16:
        return None
    if sum(part.weight.numel() for part in parts) < _FP8:
        return None
    rows = math.gcd(*(part.fp8_block[0] for part in parts), *(part.out_features for part in parts[:-1]))
    columns = min(part.fp8_block[1] for part in parts)
    if columns % FP8_COLUMNS:
        return None  # a slice of few columns
    weight = torch.cat([part.weight.view(torch.uint8) for part in parts])
    if bool(((weight & 0x7F) == 0x7F).any()):
        return None  # NaN, which the kernel does not tell from a number
    scale = [
        part.scale.repeat_interleave(part.fp8_block[0] // rows, 0)[: -(-part.out_features // rows)]
        .repeat_interleave(part.fp8_block[1] // columns, 1)[:, : -(-part.in_features // columns)]
        .float()
        for part in parts
    ]
    return Fp8Blocks(weight.view(torch.float8_e4m3fn), torch.cat(scale).contiguous(), rows, columns)


def linear(x: Tensor, weight: PreparedWeight, expert: int | None = None) -> Tensor:
    """x: BF16 [rows, in], each row 16 bytes aligned.  Returns BF16 [rows, out]; `expert` picks one of a stack."""
    data: Dense = weight.data
    if not served(x.shape[0], weight.out_features, weight.in_features, data.fp8 is not None):
        return decoded.linear(x, weight, expert)
    y = torch.empty(x.shape[0], weight.out_features, dtype=torch.bfloat16, device=x.device)
    launch(x, data.fp8 or (data.values if expert is None else data.values[expert]), y)
    return y


def served(rows: int, out: int, width: int, fp8: bool) -> bool:
    """Whether a product of BF16 rows is the kernel's: rows of weights it can read, and few of activations."""
    if width % (16 if fp8 else 8) or (not fp8 and 2 * out * width > _LARGE):
        return False
    return 0 < rows <= (_NARROW_ROWS if out <= _NARROW else _FEW_ROWS)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: PreparedWeight) -> Tensor | None:
    """rms_norm and linear in a launch: x BF16 [rows, in], rows 16 bytes aligned, norm [in]. None without a kernel."""
    data, rows = weight.data, x.shape[0]
    if not isinstance(data, Dense) or x.nbytes > _NORMED or norm.dtype is not x.dtype or norm.data_ptr() % 16:
        return None
    if not served(rows, weight.out_features, weight.in_features, data.fp8 is not None):
        return None
    y = torch.empty(rows, weight.out_features, dtype=torch.bfloat16, device=x.device)
    launch(x, data.fp8 or data.values, y, norm=norm, eps=eps)
    return y


def linear_pair(x: Tensor, first: PreparedWeight, second: PreparedWeight) -> tuple[Tensor, Tensor] | None:
    """Both products of x, BF16 [rows, in], 16 bytes aligned, in a launch; None where it has no kernel."""
    weights = first.data, second.data
    if not all(isinstance(data, Dense) and data.fp8 is None and data.values.ndim == 2 for data in weights):
        return None
    out, other_out = first.out_features, second.out_features
    if x.shape[0] > _FEW_ROWS or not served(x.shape[0], out + other_out, first.in_features, False):
        return None
    y, other = (torch.empty(x.shape[0], n, dtype=torch.bfloat16, device=x.device) for n in (out, other_out))
    sets = -(-out // 16) + -(-other_out // 16)
    cut = geometry(16 * sets, 2 * first.in_features, x.shape[0])
    launch(x, first.data.values, y, cut, other=(second.data.values, other))
    return y, other


class Cut(NamedTuple):
    """columns: of 8 rows.  groups: of 16 outputs a warp has.  warps: of a block, over inputs.  stages: in a warp's
    ring.  cluster: blocks that share inputs.  blocks: clusters of them.  ahead: stages whose activations are under
    way.  pace: stages under way until the kernel before has ended; 0: all."""

    columns: int
    groups: int
    warps: int
    stages: int
    cluster: int
    blocks: int
    ahead: int = 1
    pace: int = 0

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: two sets of sums, and the warps' rings."""
        sums = 2 * 4 * self.warps * 16 * self.groups * (8 * self.columns + 1)
        return sums + 128 + self.warps * self.stages * self.groups * 2048


@functools.cache
def geometry(out: int, row_bytes: int, rows: int, fp8: bool = False) -> Cut:
    """The cut for at most 16 rows by `out` outputs of `row_bytes` bytes: where outputs are many, blocks are small."""
    columns, sets, stages = (1 if rows <= 8 else 2), -(-out // 16), -(-row_bytes // 128)
    large = sets <= (2 * _MULTIPROCESSORS if columns > 1 or not fp8 else _MULTIPROCESSORS - 1)
    if large:
        warps = next((w for w, least in ((16, 32), (8, 16), (4, 8)) if stages >= least), 2)
        ring = 5 if warps == 16 else 3 if stages == 24 else 4  # q_b of TP8: all of its weights are under way
    else:
        warps = 8 if stages >= (48 if fp8 else 32) else 4 if stages >= 12 else 2
        ring = 3 if fp8 or stages >= 48 else 6
    ahead = 1 if columns > 1 or (fp8 and large) else 2 if fp8 else 3 if large and ring == 3 else 4
    cluster = 1
    if 2 * sets <= _MULTIPROCESSORS:  # blocks share inputs, too
        warps = min(warps, 8)
        while cluster < 4 and 4 * warps * cluster <= stages:
            cluster *= 2
    cut = Cut(columns, 1, warps, ring, cluster, 1, ahead)
    resident = min(MAX_SHARED // cut.shared, _REGISTERS // (32 * warps * (104 if fp8 else 88)))
    turns = -(-sets * cluster // (_MULTIPROCESSORS * resident))
    blocks = -(-sets // turns)
    # What fills all multiprocessors' rings at once would keep the kernels before from what they read.
    paced = not fp8 and columns == 1 and ring > 4 and warps >= 8 and blocks >= _MULTIPROCESSORS
    return cut._replace(blocks=blocks, pace=int(paced))


def launch(
    x: Tensor,
    weight: Tensor | Fp8Blocks,
    y: Tensor,
    cut: Cut | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    other: tuple[Tensor, Tensor] | None = None,
) -> None:
    """y = x W^T of 1 to 16 rows.  weight: BF16 [out, in], or FP8 in blocks.  norm: of x, before.
    other: weights BF16 [other out, in] and the result of a second product.
    """
    blocks = weight if isinstance(weight, Fp8Blocks) else None
    data: Tensor = weight.weight if isinstance(weight, Fp8Blocks) else weight
    together(x, data, *(other or ()))
    out, width = data.shape
    cut = cut or geometry(out, width * data.itemsize, x.shape[0], blocks is not None)
    defines = (
        ("ROWS8", cut.columns),
        ("GROUPS", cut.groups),
        ("STAGES", cut.stages),
        ("AHEAD", cut.ahead),
        ("PACE", cut.pace),
        ("FP8", int(blocks is not None)),
        ("NORM", int(norm is not None)),
    )
    kernel("dense_linear.cu", "dense_linear", "4P8if3Pi", defines, x.device.index)(
        (cut.blocks * cut.cluster, 1, 1),
        32 * cut.warps,
        cut.shared + (0 if norm is None else x.shape[0] * (2 * width + 64)),
        data.data_ptr(),
        blocks.scale.data_ptr() if blocks else 0,
        x.data_ptr(),
        y.data_ptr(),
        *x.shape,
        x.stride(0),
        y.stride(0),
        out,
        blocks.rows if blocks else 0,
        blocks.scale.stride(0) if blocks else 0,
        blocks.columns.bit_length() - 1 if blocks else 0,
        eps,
        0 if norm is None else norm.data_ptr(),
        *(tensor.data_ptr() for tensor in other or ()),
        *(() if other else (0, 0)),
        other[0].shape[0] if other else 0,
        cluster=cut.cluster,
    )
