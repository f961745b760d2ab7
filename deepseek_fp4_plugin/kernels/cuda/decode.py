"""NVFP4 tiles to the values of whole rows, for the library's products."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels.cuda.launcher import kernel
from deepseek_fp4_plugin.kernels.cuda.tiles import Tiles

_SLABS = 4096  # more go several to a warp, fewer would leave multiprocessors idle then


def decode(tiles: Tiles, expert: int | None, out: int, width: int, scale: Tensor | None = None) -> Tensor:
    """BF16 [out, width], or of all experts [experts, out, width]: the weights without the tensor scale, divided by
    VALUE_SCALE; exact. With `scale`, FP32 [experts, out], E4M3: rounded, divided by what is written there."""
    experts = slice(None) if expert is None else slice(expert, expert + 1)
    data, row_scale = tiles.data[experts], tiles.row_scale[experts]
    dtype = torch.bfloat16 if scale is None else torch.float8_e4m3fn
    values = torch.empty(data.shape[0], out, width, dtype=dtype, device=data.device)
    slabs = tiles.groups * tiles.slabs
    turns = 4 if slabs * data.shape[0] > _SLABS else 1
    blocks = -(-slabs // (8 * turns))
    defines = ("TURNS", turns), ("FP8", int(scale is not None))
    kernel("nvfp4_decode.cu", "nvfp4_decode", "4P5i", defines, values.device.index)(
        (blocks, data.shape[0], 1),
        256,
        0,
        data.data_ptr(),
        values.data_ptr(),
        row_scale.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        tiles.groups,
        tiles.slabs,
        out,
        width,
        tiles.half,
    )
    return values if expert is None else values[0]
