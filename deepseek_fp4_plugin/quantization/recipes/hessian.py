"""What a projection's inputs tell about which rounding errors matter: their second moments.

The output error of a weight error E [out, in] over inputs x is the sum of x^T E^T E x, which is trace(E H E^T) with H
the sum of x x^T: the Hessian of the layer's squared error up to a factor. `local-hessian` reads only the 16 x 16 blocks
on its diagonal, one for every column of scale blocks; `gptq` all of it.
"""

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK

DAMPING = 0.05  # of the mean diagonal, added to the diagonal
_TILE = 1024  # columns that a factorization in place takes at once


def diagonal_blocks(full: Tensor) -> Tensor:
    """[..., in, in] to its [..., in / 16, 16, 16] blocks along the diagonal."""
    tiled = full.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., n, 16, n, 16]
    return tiled.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def output_errors(error: Tensor, rows: Tensor) -> Tensor:
    """Squared change of each row's output by a weight error [out, in]: inputs [n, in] to FP64 [n]."""
    return (rows @ error.T).square().sum(-1, dtype=torch.float64)


def permute(hessian: Tensor, columns: Tensor) -> None:
    """Rows and columns of [experts, cols, cols] in the order of `columns` [experts, cols], in place.

    The largest of R1 takes 1.4 GB: there is no room for a second one.
    """
    for matrix, order in zip(hessian, columns, strict=True):
        for some in matrix.split(_TILE):
            some.copy_(some[:, order])
        for columns_at in range(0, matrix.shape[1], _TILE):
            some = matrix[:, columns_at : columns_at + _TILE]
            some.copy_(some[order])


def factor(hessian: Tensor) -> None:
    """[experts, cols, cols] becomes U, upper triangular, with U^T U the inverse of the damped Hessian, in place.

    Inputs that were never anything but zero get the mean diagonal, so that their weights are rounded as they stand.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    diagonal += torch.where(diagonal > 0, DAMPING * mean, mean)
    starts = range(0, hessian.shape[-1], _TILE)
    tiles = [slice(start, min(start + _TILE, hessian.shape[-1])) for start in starts]
    _upper_root(hessian, tiles)
    _inverse(hessian, tiles)


def _upper_root(a: Tensor, tiles: list[slice]) -> None:
    """R, upper triangular, with R R^T what the upper half of `a` says, in its place; zeros below."""
    for turn in reversed(range(len(tiles))):
        own, before = tiles[turn], slice(0, tiles[turn].start)
        root = torch.linalg.cholesky(a[:, own, own].flip((-2, -1))).flip((-2, -1))
        a[:, own, own] = root
        a[:, own, before] = 0
        a[:, before, own] = torch.linalg.solve_triangular(root, a[:, before, own].mT, upper=True).mT
        for other in tiles[:turn]:
            rows = slice(0, other.stop)
            a[:, rows, other] -= a[:, rows, own] @ a[:, other, own].mT


def _inverse(r: Tensor, tiles: list[slice]) -> None:
    """The inverse of an upper triangular matrix, in its place."""
    for turn, own in enumerate(tiles):
        identity = torch.eye(own.stop - own.start, device=r.device).expand(r.shape[0], -1, -1)
        corner = torch.linalg.solve_triangular(r[:, own, own], identity, upper=True)
        r[:, own, own] = corner
        for above in tiles[:turn]:  # what stands right of `above` is inverted already; rows below are still R's
            between = slice(above.start, own.start)
            r[:, above, own] = -(r[:, above, between] @ r[:, between, own]) @ corner
