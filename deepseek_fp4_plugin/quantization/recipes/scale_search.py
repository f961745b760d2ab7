"""Search of block scales: of the E4M3 codes around the one that `max` writes, which makes a block's error smallest?

E4M3 has eight codes an octave. A code below max's clips the block's largest value, one above rounds it to 4 instead of
6 or leaves it finer company. The best code lies a few steps away, so that a window of ten finds what all 126 find
(docs/quantization.md has the measured difference). The window always holds max's own code, and that is tried first: no
block ends worse than under `max`, and a block for which nothing is better keeps its bytes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics import e2m1, nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import BLOCK, NVFP4Tensor
from deepseek_fp4_plugin.quantization.recipe import WEIGHTS_AT_ONCE, Solution, measured

MIN_CODE, MAX_CODE = 1, 126  # 2^-9 and 448: every positive finite E4M3 value
INPUT_HEADROOM = 8.0  # a power of two: an input of the calibrated amax is rounded as without, larger ones still fit


def search(w: Tensor, scale_2: Tensor, offsets: Sequence[int], metric: Tensor | None = None) -> NVFP4Tensor:
    """NVFP4 of `w` with the block scales that make the error smallest.

    w: FP32 [rows, cols] or [experts, rows, cols], finite.  scale_2: FP32 [] or [experts].
    offsets: codes to try, relative to max's; 0 is tried first whether it is among them or not.
    metric: FP32 [cols / 16, 16, 16], with a leading axis for experts; the error e of a block of 16 columns counts
    e^T metric e.  None: the squared error.  Raises ValueError for a width that is not a multiple of 16.
    """
    if w.shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 needs a last axis that is a multiple of {BLOCK}, got shape {list(w.shape)}")
    stacked = w if w.ndim == 3 else w.unsqueeze(0)
    experts, rows, cols = stacked.shape
    blocks = stacked.unflatten(-1, (-1, BLOCK))
    metrics = None if metric is None else metric.reshape(experts, cols // BLOCK, BLOCK, BLOCK)
    scale = torch.empty(experts, rows, cols // BLOCK, dtype=torch.uint8, device=w.device)
    for expert, tensor_scale in enumerate(scale_2.expand(experts)):
        for columns, some in _chunks(rows, cols // BLOCK, chunk(w.device), whole_rows=metrics is None):
            part = blocks[expert, some, columns].transpose(0, 1)
            weight = None if metrics is None else metrics[expert, columns]
            scale[expert, some, columns] = best_codes(part, tensor_scale, offsets, weight).T.to(torch.uint8)
    return encoded(w, scale.reshape(*w.shape[:-1], -1), scale_2)


def best_codes(blocks: Tensor, scale_2: Tensor, offsets: Sequence[int], metric: Tensor | None = None) -> Tensor:
    """The best E4M3 code of every block.

    blocks: FP32 [groups, n, 16].  scale_2: FP32 [].  metric: FP32 [groups, 16, 16] or None.  Returns int32 [groups, n].
    """
    base = max_codes(blocks, scale_2)
    best, best_loss = base, torch.full(base.shape, torch.inf, device=blocks.device)
    for offset in (0, *(o for o in offsets if o)):
        code = (base + offset).clamp_(MIN_CODE, MAX_CODE)
        loss = _weighted(_rounding_error(blocks, step_of(code, scale_2)), metric)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better, code, best)
    return best


def max_codes(blocks: Tensor, scale_2: Tensor) -> Tensor:
    """The E4M3 codes that `max` gives blocks [..., n, 16]: int32 [..., n]."""
    return nvfp4.block_scales(blocks.abs().amax(-1), scale_2).view(torch.uint8).int()


def step_of(code: Tensor, scale_2: Tensor) -> Tensor:
    """What one unit of E2M1 is worth under E4M3 `code` (integers); 1 where the tensor scale is zero."""
    step = code.to(torch.uint8).view(torch.float8_e4m3fn).float() * scale_2
    return torch.where(step == 0, 1.0, step)


def encoded(w: Tensor, code: Tensor, scale_2: Tensor) -> NVFP4Tensor:
    """`w` rounded under scales given as E4M3 codes, uint8 [..., cols / 16]."""
    scale = code.view(torch.float8_e4m3fn)
    return NVFP4Tensor(nvfp4.encode_blocks(w.unflatten(-1, (-1, BLOCK)), scale, scale_2), scale, scale_2)


def shared_scale(weights: Sequence[Tensor]) -> Tensor:
    """`weight_scale_2` of weights that share it, FP32 []: max's, so that max's block scales are candidates."""
    return nvfp4.tensor_scale(torch.stack([weight.abs().amax() for weight in weights]).amax())


def solutions(weights: Sequence[Tensor], stacked: NVFP4Tensor, choices: Sequence[str]) -> list[Solution]:
    """Cut the result for `weights` stacked along their rows into one for each."""
    ends = torch.tensor([weight.shape[0] for weight in weights]).cumsum(0).tolist()
    found = []
    for weight, end, choice in zip(weights, ends, choices, strict=True):
        rows = slice(end - weight.shape[0], end)
        tensor = NVFP4Tensor(stacked.packed[rows].contiguous(), stacked.scale[rows].contiguous(), stacked.scale_2)
        found.append(Solution(tensor, measured(weight, tensor), choice))
    return found


def roomy_input_scale(amax: Tensor) -> Tensor:
    """`input_scale` of searched recipes: that of inputs INPUT_HEADROOM times as large as calibration saw.

    A tensor scale that is too small cuts inputs off; one that is too large by a few powers of two changes no rounding,
    since block scales move within E4M3's range (docs/quantization.md).
    """
    return nvfp4.tensor_scale(amax) * INPUT_HEADROOM


def chunk(device: torch.device) -> int:
    """How many weights are searched at once: temporaries of 1 MB stay in a core's cache, of 64 MB fill a GPU."""
    return 2**18 if device.type == "cpu" else 2**24


def rows_at_once(device: torch.device) -> int:
    """How many weights go through a recipe at once that takes several copies of them."""
    return WEIGHTS_AT_ONCE if device.type == "cpu" else 16 * WEIGHTS_AT_ONCE


def _rounding_error(blocks: Tensor, step: Tensor) -> Tensor:
    """What rounding `blocks` [..., 16] with `step` [...] takes from them."""
    step = step.unsqueeze(-1)
    return torch.addcmul(blocks, e2m1.round_to_values(blocks / step), step, value=-1)


def _weighted(error: Tensor, metric: Tensor | None) -> Tensor:
    """e^T metric e of [groups, n, 16] errors, FP32 [groups, n]."""
    return (error * (error if metric is None else error @ metric)).sum(-1)


def _chunks(rows: int, blocks: int, weights: int, whole_rows: bool) -> Iterator[tuple[slice, slice]]:
    """Pieces of a matrix of blocks as (columns, rows): of whole rows, or of few columns where each has its metric."""
    size = max(1, weights // BLOCK)
    height = min(rows, max(1, size // blocks if whole_rows else size))
    width = blocks if whole_rows else min(blocks, max(1, size // height))
    for column in range(0, blocks, width):
        for row in range(0, rows, height):
            yield slice(column, column + width), slice(row, row + height)
