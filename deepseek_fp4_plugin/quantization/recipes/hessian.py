"""What a projection's inputs tell about which rounding errors matter: their second moments.

The output error of a weight error E [out, in] over inputs x is the sum of x^T E^T E x, which is trace(E H E^T) with H
the sum of x x^T: the Hessian of the layer's squared error up to a factor. `local-hessian` reads only the 16 x 16 blocks
on its diagonal, one for every column of scale blocks; `gptq` all of it.
"""

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK


def diagonal_blocks(full: Tensor) -> Tensor:
    """[..., in, in] to its [..., in / 16, 16, 16] blocks along the diagonal."""
    tiled = full.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., n, 16, n, 16]
    return tiled.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def output_errors(error: Tensor, rows: Tensor) -> Tensor:
    """Squared change of each row's output by a weight error [out, in]: inputs [n, in] to FP64 [n]."""
    return (rows @ error.T).square().sum(-1, dtype=torch.float64)
