"""`gptq`: rounding and block scales chosen together, each column's error handed on to the columns still to come.

GPTQ rounds column after column and moves the rest of the row so that the output changes least, which the inputs' second
moments H tell. Usually it finds the blocks' scales already there. Here each block of 16 columns is rounded under every
scale of a window, error handed on within the block each time, and the scale of smallest loss is kept: scales see the
weights that GPTQ made, and GPTQ rounds under scales that suit it. Blocks are taken by falling energy of their inputs,
so that the costly ones have all others to lean on; columns stay in their blocks, and the format does not change.

With H = R R^T, R upper triangular, GPTQ's matrix is U = R^-1. Source: Frantar et al., arXiv 2210.17323.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.scales import all_finite
from deepseek_fp4_plugin.numerics import e2m1, nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK, NVFP4Tensor
from deepseek_fp4_plugin.quantization.recipe import InputStatistics, Needs, Solution
from deepseek_fp4_plugin.quantization.recipes import local_hessian
from deepseek_fp4_plugin.quantization.recipes.hessian import diagonal_blocks, factor, output_errors, permute
from deepseek_fp4_plugin.quantization.recipes.scale_search import (
    MAX_CODE,
    MIN_CODE,
    chunk,
    encoded,
    max_codes,
    roomy_input_scale,
    rows_at_once,
    search,
    shared_scale,
    solutions,
    step_of,
)

OFFSETS = range(-2, 8)
MARGIN = 2.0  # standard errors of its gain that gptq must win by
SPREAD = 0.2  # of a row's gain, in parts of the error: the median over r1_nano's experts (docs/quantization.md)
_GROUP = 8  # blocks whose errors reach the columns behind them in one product


class Order(NamedTuple):
    """columns: int64 [experts, cols], as they are taken.  factor: FP32 [experts, cols, cols], U in that order."""

    columns: Tensor
    factor: Tensor


class Ready(NamedTuple):
    """blocks: FP32 [cols / 16, 16, 16], for `local-hessian`.  held_out: FP32 [n, cols].  order: None where n is 0."""

    blocks: Tensor
    held_out: Tensor
    order: Order | None


class Gptq:
    """Taken where it clearly beats `local-hessian` on input rows that neither saw; elsewhere that is taken."""

    name = "gptq"
    summary = "rounding and scales of smallest output error together, where held-out inputs confirm it"
    needs = Needs.HESSIAN
    sequential = True
    weight_dtype = torch.float32

    def solve(self, weights: Sequence[Tensor], inputs: InputStatistics | Ready | None) -> list[Solution]:
        assert inputs is not None
        if isinstance(inputs, InputStatistics):
            inputs = self.ready(replace(inputs, hessian=inputs.hessian.clone()))
        return _solved(weights, shared_scale(weights), inputs)

    def ready(self, inputs: InputStatistics) -> Ready:
        """What solving reads of the inputs, the same for every weight. Uses up `inputs.hessian`."""
        blocks = diagonal_blocks(inputs.hessian).clone()
        if not inputs.held_out.shape[0]:  # without a row to judge by, the bolder way has nothing to show
            return Ready(blocks, inputs.held_out, None)
        return Ready(blocks, inputs.held_out, _leant_on(inputs.hessian.unsqueeze(0)))

    def input_scale(self, amax: Tensor) -> Tensor:
        return roomy_input_scale(amax)


def confirmed(weight: Tensor, safe: NVFP4Tensor, bold: NVFP4Tensor, rows: Tensor) -> bool:
    """Whether the rows [n, in] say beyond their own chance that `bold` has the smaller output error.

    Its mean gain must exceed MARGIN standard errors. SPREAD stands in for one more row's deviation: a single row has
    none of its own, and a few that happen to agree have one that is too small.  n: above zero.
    """
    n = rows.shape[0]
    before, after = (_output_errors(weight, tensor, rows) for tensor in (safe, bold))
    gain = before - after
    mean = gain.mean()
    variance = ((gain - mean).square().sum() + (SPREAD * before.mean()).square()) / n
    return bool(mean > MARGIN * (variance / n).sqrt())


def _output_errors(weight: Tensor, quantized: NVFP4Tensor, rows: Tensor) -> Tensor:
    """Of each row, FP64 [n], over some of the outputs at a time."""
    height = _height(weight)
    total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, len(weight), height):
        some = slice(start, start + height)
        piece = NVFP4Tensor(quantized.packed[some], quantized.scale[some], quantized.scale_2)
        total += output_errors(nvfp4.dequantize(piece) - weight[some], rows)
    return total


def _solved(weights: Sequence[Tensor], scale_2: Tensor, inputs: Ready) -> list[Solution]:
    """Both ways for some rows at a time, which do not depend on each other; for all of a weight's the better way."""
    safe, bold = local_hessian.LocalHessian.name, Gptq.name
    names = (safe,) if inputs.order is None else (safe, bold)
    # Made before the first row is solved: what stays must not lie between temporaries, or memory ends up in shreds.
    ways = [{name: _room(weight, scale_2) for name in names} for weight in weights]
    for pieces in _pieces(weights):
        rows = torch.cat([weights[index][some] for index, some in pieces])
        found = {safe: search(rows, scale_2, local_hessian.OFFSETS, inputs.blocks)}
        if inputs.order is not None:
            found[bold] = _quantized(rows, scale_2, inputs.order)
        for name, whole in found.items():
            start = 0
            for index, some in pieces:
                stop = start + some.stop - some.start
                ways[index][name].packed[some] = whole.packed[start:stop]
                ways[index][name].scale[some] = whole.scale[start:stop]
                start = stop
    results = []
    for weight, way in zip(weights, ways, strict=True):
        won = bold in way and confirmed(weight, way[safe], way[bold], inputs.held_out)
        name = bold if won else safe
        results += solutions([weight], way[name], [name])
    return results


def _room(weight: Tensor, scale_2: Tensor) -> NVFP4Tensor:
    """For a result."""
    rows, cols = weight.shape
    packed = torch.empty(rows, cols // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, cols // BLOCK, dtype=torch.float8_e4m3fn, device=weight.device)
    return NVFP4Tensor(packed, scale, scale_2)


def _height(weight: Tensor) -> int:
    """Rows of a weight that fit into memory several times."""
    return max(1, rows_at_once(weight.device) // weight.shape[1])


def _pieces(weights: Sequence[Tensor]) -> Iterator[list[tuple[int, slice]]]:
    """All rows, in portions that fit into memory several times: each (index of the weight, some of its rows)."""
    portion: list[tuple[int, slice]] = []
    height = _height(weights[0])
    taken = 0
    for index, weight in enumerate(weights):
        for start in range(0, len(weight), height):
            some = slice(start, min(start + height, len(weight)))
            if portion and taken + some.stop - some.start > height:
                yield portion
                portion, taken = [], 0
            portion.append((index, some))
            taken += some.stop - some.start
    yield portion


def quantize(w: Tensor, scale_2: Tensor, hessian: Tensor, offsets: Sequence[int] = OFFSETS) -> NVFP4Tensor:
    """NVFP4 of `w` with a small output error on inputs of the given second moments.

    w: FP32 [rows, cols] or [experts, rows, cols], finite.  scale_2: FP32 [] or [experts].
    hessian: FP32 [(experts,) cols, cols], mean of x x^T.  Raises ValueError when it holds NaN or infinity.
    """
    experts = w.shape[0] if w.ndim == 3 else 1
    return _quantized(w, scale_2, _leant_on(hessian.reshape(experts, *hessian.shape[-2:]).clone()), offsets)


def _leant_on(hessian: Tensor) -> Order:
    """The order of columns and the factor in it, FP32 [experts, cols, cols] in the place of `hessian`."""
    if not all_finite(hessian):
        raise ValueError("the second moments of the inputs hold NaN or infinity")
    columns = _order(hessian)
    permute(hessian, columns)
    factor(hessian)
    return Order(columns, hessian)


def _quantized(w: Tensor, scale_2: Tensor, order: Order, offsets: Sequence[int] = OFFSETS) -> NVFP4Tensor:
    """`quantize` in a known order."""
    stacked = w if w.ndim == 3 else w.unsqueeze(0)
    columns = order.columns
    work = stacked.gather(-1, columns.unsqueeze(1).expand_as(stacked))
    rounded, code = _round(work, scale_2.expand(len(stacked)), order.factor, offsets)
    back = columns.argsort(-1)
    rounded = rounded.gather(-1, back.unsqueeze(1).expand_as(rounded))
    block_back = back[:, ::BLOCK] // BLOCK
    code = code.gather(-1, block_back.unsqueeze(1).expand_as(code)).to(torch.uint8)
    return encoded(rounded.reshape(w.shape), code.reshape(*w.shape[:-1], -1), scale_2)


def _order(hessian: Tensor) -> Tensor:
    """Column indices [experts, cols], whole blocks by falling energy of their inputs."""
    energy = hessian.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, BLOCK)).sum(-1)
    blocks = energy.argsort(dim=-1, descending=True, stable=True)
    return (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=hessian.device)).flatten(-2)


def _round(work: Tensor, scale_2: Tensor, factor: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rounded weights FP32 [experts, rows, cols] and scale codes int32 [experts, rows, blocks]; `work` is used up."""
    experts, rows, cols = work.shape
    codes = torch.empty(experts, rows, cols // BLOCK, dtype=torch.int32, device=work.device)
    for start in range(0, cols, _GROUP * BLOCK):
        stop = min(cols, start + _GROUP * BLOCK)
        errors = torch.zeros(experts, rows, stop - start, device=work.device)
        for first in range(start, stop, BLOCK):
            last = first + BLOCK
            panel = work[..., first:last]
            corner = factor[:, first:last, first:last]
            code, rounded, error = _round_block(panel, scale_2, corner, offsets)
            codes[..., first // BLOCK] = code
            errors[..., first - start : last - start] = error
            work[..., first:last] = rounded
            if last < stop:
                work[..., last:stop] -= error @ factor[:, first:last, last:stop]
        if stop < cols:
            work[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return work, codes


def _round_block(
    panel: Tensor, scale_2: Tensor, corner: Tensor, offsets: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A block of 16 columns under the best of its scales: codes [experts, rows], weights and errors [..., 16]."""
    base = max_codes(panel, scale_2.unsqueeze(-1))
    tried = torch.tensor(offsets, device=panel.device).unsqueeze(-1)
    code = (base.unsqueeze(-2) + tried).clamp_(MIN_CODE, MAX_CODE)  # [experts, scales, rows]
    rows = panel.shape[1]
    height = max(1, chunk(panel.device) // (panel.shape[0] * len(offsets) * BLOCK))
    best = []
    for row in range(0, rows, height):
        some = code[..., row : row + height]
        _, loss = _hand_on(panel[:, row : row + height], step_of(some, scale_2[:, None, None]), corner)
        best.append(some.gather(-2, loss.argmin(-2, keepdim=True)).squeeze(-2))
    chosen = torch.cat(best, -1)
    step = step_of(chosen, scale_2.unsqueeze(-1))
    error, _ = _hand_on(panel, step.unsqueeze(1), corner)
    error = error.squeeze(2).movedim(0, -1)
    # What the columns had become, less what rounding took, is a grid value up to FP32 noise: rounding removes that.
    rounded = e2m1.round_to_values((panel - error @ corner.triu()) / step.unsqueeze(-1)) * step.unsqueeze(-1)
    return chosen, rounded, error


def _hand_on(panel: Tensor, step: Tensor, corner: Tensor) -> tuple[Tensor, Tensor]:
    """Round a block column by column.

    panel: [experts, rows, 16].  step: [experts, scales, rows].  corner: [experts, 16, 16], the block's part of U.
    Returns errors [16, experts, scales, rows], each divided by U's diagonal, and their loss [experts, scales, rows].
    """
    columns = panel.movedim(-1, 0).unsqueeze(2)
    rest = columns.expand(BLOCK, *step.shape).contiguous()
    loss = torch.zeros_like(step)
    for i in range(BLOCK):
        at = rest[i]
        at.sub_(e2m1.round_to_values(at / step).mul_(step)).div_(corner[:, i, i, None, None])
        loss.addcmul_(at, at)
        if i + 1 < BLOCK:
            rest[i + 1 :].addcmul_(at, corner[:, i, i + 1 :].T[:, :, None, None], value=-1)
    return rest, loss
