"""The 128 x 4 tiled order of block scales that Blackwell's block-scaled matrix instructions read.

Checkpoints store scales row-major. In memory for the tensor cores the matrix [rows, k] is padded with zeros to
multiples of (128, 4), cut into tiles of 128 x 4, and each tile stored as 32 x 4 x 4: row r and column c of a tile
are at (r % 32) * 16 + (r // 32) * 4 + c. Source: cuBLAS documentation, "1D block scaling factors layout".
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS, COLS = 128, 4


def to_tiled(scale: Tensor) -> Tensor:
    """[rows, k] of any 1-byte dtype to a flat tensor of padded_rows * padded_k elements in tiled order."""
    raw = scale.view(dtype=torch.uint8)
    raw = pad(raw, (0, -raw.shape[1] % COLS, 0, -raw.shape[0] % ROWS))
    tiles = raw.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, COLS))  # [row tiles, 4, 32, k tiles, 4]
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scale.dtype)


def from_tiled(tiled: Tensor, rows: int, k: int) -> Tensor:
    """The inverse of `to_tiled`, without the padding: [rows, k]."""
    row_tiles, k_tiles = -(-rows // ROWS), -(-k // COLS)
    tiles = tiled.view(dtype=torch.uint8).reshape(row_tiles, k_tiles, 32, 4, COLS)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles * ROWS, k_tiles * COLS)
    return padded[:rows, :k].contiguous().view(tiled.dtype)


def tiled_size(rows: int, k: int) -> int:
    """How many scales the tiled order has, its padding included."""
    return -(-rows // ROWS) * ROWS * -(-k // COLS) * COLS
