"""Many rows times NVFP4 tiles on Hopper's matrix unit: the launch."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda import compiler
from deepseek_fp4_plugin.kernels.cuda.cuts import EVEN, Cut
from deepseek_fp4_plugin.kernels.cuda.launcher import architecture, kernel, multiprocessors, together
from deepseek_fp4_plugin.kernels.cuda.tiles import Tiles

_SECOND_CACHE = 50 << 20  # bytes
_COMPILERS = 8  # at once, of each rank
_SOURCE = "nvfp4_wgmma.cu"
_ARRANGE_THREADS, _ARRANGE_ROWS = 256, 32  # of a block, as in the source
_ARRANGE, _MULTIPLY = (_SOURCE, "arrange", "3P5i"), (_SOURCE, "nvfp4_wgmma", "6P8i")


def build(products: Iterable[tuple[Cut, bool, int]]) -> None:
    """Compile, several at a time, and load what such products need: a cut, whether it is gated, the GPU."""
    each = sorted({(_defines(cut, gated), device) for cut, gated, device in products})
    with ThreadPoolExecutor(_COMPILERS) as threads:
        list(threads.map(lambda one: compiler.cubin(_SOURCE, one[0], architecture(one[1])), each))
    for defines, device in each:
        kernel(*_ARRANGE, defines, device), kernel(*_MULTIPLY, defines, device)


def _defines(cut: Cut, gated: bool) -> tuple[tuple[str, int], ...]:
    return (
        ("ROWS", cut.rows),
        ("OUTS", cut.outs),
        ("WARPS", cut.warps),
        ("STAGES", cut.stages),
        ("MIN_BLOCKS", cut.resident),
        ("GATED", int(gated)),
        ("EVEN", int(cut.cluster == EVEN)),
    )


def launch(x: Tensor, tiles: Tiles, expert: int, y: Tensor, out: int, gated: bool, cut: Cut) -> None:
    """y = x W^T of one expert's tiles; gated: silu(gate x) * up x."""
    together(x, tiles.data)
    rows, width = x.shape
    assert cut.cluster <= tiles.slabs, "blocks of a cluster without slabs would not meet the others"
    defines = _defines(cut, gated)
    row_blocks, out_blocks = -(-rows // cut.rows), -(-tiles.groups // (cut.warps * cut.outs))
    arranged = torch.empty(row_blocks * cut.rows * tiles.slabs * 256, dtype=torch.uint8, device=x.device)
    grid, parts, ready = (out_blocks * cut.cluster, row_blocks, 1), None, None
    if cut.cluster == EVEN:
        blocks = multiprocessors(x.device.index)
        grid = blocks, 1, 1
        parts = torch.empty(blocks * cut.rows * cut.outputs, dtype=torch.float32, device=x.device)
        ready = torch.empty(blocks, dtype=torch.int32, device=x.device)
    kernel(*_ARRANGE, defines, x.device.index)(
        (tiles.slabs, -(-row_blocks * cut.rows // _ARRANGE_ROWS), 1),
        _ARRANGE_THREADS,
        0,
        x.data_ptr(),
        arranged.data_ptr(),
        0 if ready is None else ready.data_ptr(),
        rows,
        width,
        x.stride(0),
        tiles.slabs,
        grid[0],
    )
    kernel(*_MULTIPLY, defines, x.device.index)(
        grid,
        32 * cut.warps + 128,
        cut.shared,
        tiles.data[expert].data_ptr(),
        tiles.row_scale[expert].data_ptr(),
        arranged.data_ptr(),
        y.data_ptr(),
        0 if parts is None else parts.data_ptr(),
        0 if ready is None else ready.data_ptr(),
        rows,
        y.stride(0),
        tiles.groups,
        tiles.slabs,
        row_blocks,
        out,
        tiles.half,
        8 if tiles.data[expert].numel() > _SECOND_CACHE else 1,
        cluster=max(1, cut.cluster),
    )
