"""The router: FP32 scores and group-limited top-k; of a few tokens in one launch, of some more in two."""

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, together

_FEW_ROWS = 4  # of which one launch makes the scores and chooses
_SOME_ROWS = 64  # whose products a kernel of our own makes, by slices of the inputs
_SLICES, _SQUARE, _SLICE_THREADS = 8, 32, 224  # as in source/router.cu; square: experts and tokens of a block
_CHOOSERS = 4  # tokens of a block that chooses
_MAX_EXPERTS, _MAX_GROUPS, _MAX_K = 512, 32, 32


class RouterWeight(NamedTuple):
    """parts: BF16 [n, experts, hidden], whose sum the weight is; one where it is BF16 in the checkpoint, as R1's is.
    scores: FP32 [4, experts], where blocks of one launch leave them for the first; below zero between launches."""

    parts: Tensor
    scores: Tensor


class Choice(NamedTuple):
    """How experts are chosen, as `ops.route` takes it, in the order of the kernels' parameters."""

    k: int
    n_group: int
    topk_group: int
    normalize: bool
    scaling: float


def prepare_router(weight: Tensor) -> RouterWeight:
    """FP32 [experts, hidden] as the fewest BF16 numbers whose sum it is: 24 bits are at most three times 8."""
    parts: list[Tensor] = []
    rest = weight.float()
    while not parts or (len(parts) < 3 and bool(rest.any())):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return RouterWeight(torch.stack(parts[::-1]), torch.full((_FEW_ROWS, weight.shape[0]), -1.0, device=weight.device))


def router(
    x: Tensor,
    weight: RouterWeight,
    bias: Tensor,
    k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/routing.py. Products are exact and summed in FP32."""
    ids, weights, _ = _router(x, weight, bias, None, Choice(k, n_group, topk_group, normalize, scaling))
    return ids, weights


def placed_router(
    x: Tensor,
    weight: RouterWeight,
    bias: Tensor,
    slots: Tensor,
    k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels/ops.py; of few tokens in the launch that chooses."""
    if slots.dtype is not torch.int64 or slots.shape != bias.shape:
        raise ValueError(f"slots must be int64 {list(bias.shape)}; they are {slots.dtype} {list(slots.shape)}")
    return _router(x, weight, bias, slots.contiguous(), Choice(k, n_group, topk_group, normalize, scaling))


def _router(
    x: Tensor, weight: RouterWeight, bias: Tensor, slots: Tensor | None, choice: Choice
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, weights, and the ids' slots, or the ids again."""
    if 0 < x.shape[0] <= _FEW_ROWS and _aligned(x) and _chooses(weight.parts.shape[1], choice.k, choice.n_group):
        return _few(x, weight, bias, slots, choice)
    ids, weights = _many(x, weight, bias, choice)
    return ids, weights, ids if slots is None else local_ids(ids, slots)


def _many(x: Tensor, weight: RouterWeight, bias: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Scores, and a launch that chooses by them."""
    tokens, experts = x.shape[0], weight.parts.shape[1]
    some = 0 < tokens <= _SOME_ROWS and _aligned(x) and _chooses(experts, choice.k, choice.n_group)
    if not some or len(weight.parts) > 1 or experts % _SQUARE:
        return route(scores(x, weight), bias, *choice)
    return _choose("route_slices", tokens, 32 * _slots(experts)[0][1], _sliced_scores(x, weight), bias, choice)


def _few(
    x: Tensor, weight: RouterWeight, bias: Tensor, slots: Tensor | None, choice: Choice
) -> tuple[Tensor, Tensor, Tensor]:
    """All of it in one launch."""
    together(x, weight.parts, bias, *(() if slots is None else (slots,)))
    tokens, (n, experts, width) = x.shape[0], weight.parts.shape
    bias, (ids, weights) = bias.contiguous(), _chosen(tokens, choice.k, x.device)
    places = ids if slots is None else torch.empty_like(ids)
    kernel("router.cu", "router", "3P5i5P4if", _slots(experts), x.device.index)(
        (experts, 1, 1),
        256,
        0,
        x.data_ptr(),
        weight.parts.data_ptr(),
        weight.scores.data_ptr(),
        width,
        x.stride(0),
        n,
        tokens,
        experts,
        ids.data_ptr(),
        weights.data_ptr(),
        bias.data_ptr(),
        *((0, 0) if slots is None else (slots.data_ptr(), places.data_ptr())),
        choice.k,
        choice.n_group,
        choice.topk_group,
        int(choice.normalize),
        choice.scaling,
    )
    return ids, weights, places


def scores(x: Tensor, weight: RouterWeight) -> Tensor:
    """x: BF16 [tokens, hidden].  Returns FP32 [tokens, experts]: the library's products, exact and summed in FP32."""
    n, experts, _ = weight.parts.shape
    if not x.shape[0]:
        return torch.empty(0, experts, dtype=torch.float32, device=x.device)
    products = torch.mm(x, weight.parts.flatten(0, 1).T, out_dtype=torch.float32)
    return products if n == 1 else products.unflatten(1, (n, experts)).sum(1)


def _sliced_scores(x: Tensor, weight: RouterWeight) -> Tensor:
    """As `scores`, of a weight of one part, by slices of the inputs: FP32 [slices, tokens, experts], to be summed."""
    together(x, weight.parts)
    (tokens, width), experts = x.shape, weight.parts.shape[1]
    logits = torch.empty(_SLICES, tokens, experts, dtype=torch.float32, device=x.device)
    kernel("router.cu", "router_slice", "3P4i", _slots(experts), x.device.index)(
        (experts // _SQUARE, _SLICES, -(-tokens // _SQUARE)),
        _SLICE_THREADS,
        0,
        x.data_ptr(),
        weight.parts.data_ptr(),
        logits.data_ptr(),
        width,
        x.stride(0),
        tokens,
        experts,
    )
    return logits


def _aligned(x: Tensor) -> bool:
    return x.shape[1] % 8 == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def _chooses(experts: int, k: int, n_group: int) -> bool:
    return experts <= _MAX_EXPERTS and n_group <= _MAX_GROUPS and k <= _MAX_K


def _chosen(tokens: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for each token's ids and weights."""
    ids = torch.empty(tokens, k, dtype=torch.int64, device=device)
    return ids, torch.empty(tokens, k, dtype=torch.float32, device=device)


def _slots(experts: int) -> tuple[tuple[str, int], ...]:
    return (("SLOTS", next(slots for slots in (1, 2, 4, 8, 16) if experts <= 32 * slots or slots == 16)),)


def local_ids(ids: Tensor, slots: Tensor) -> Tensor:
    """See kernels/reference/routing.py."""
    together(ids, slots)
    ids, slots = ids.contiguous(), slots.contiguous()
    places = torch.empty_like(ids)
    kernel("router.cu", "local_ids", "3Pi", _slots(slots.numel()), ids.device.index)(
        (-(-ids.numel() // 256), 1, 1), 256, 0, ids.data_ptr(), slots.data_ptr(), places.data_ptr(), ids.numel()
    )
    return places


def route(
    logits: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/routing.py. Of equal scores the first."""
    tokens, experts = logits.shape
    if not _chooses(experts, k, n_group) or logits.dtype is not torch.float32:
        return reference.route(logits, bias, k, n_group, topk_group, normalize, scaling)
    choice = Choice(k, n_group, topk_group, normalize, scaling)
    return _choose("route", -(-tokens // _CHOOSERS), 32 * _CHOOSERS, logits, bias, choice)


def _choose(
    function: str, blocks: int, threads: int, logits: Tensor, bias: Tensor, choice: Choice
) -> tuple[Tensor, Tensor]:
    """One of the launches that choose, of logits [tokens, experts] or of slices of them."""
    together(logits, bias)
    logits, bias = logits.contiguous(), bias.contiguous()
    tokens, experts = logits.shape[-2:]
    ids, weights = _chosen(tokens, choice.k, logits.device)
    kernel("router.cu", function, "4P6if2P", _slots(experts), logits.device.index)(
        (blocks, 1, 1),
        threads,
        0,
        logits.data_ptr(),
        bias.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        tokens,
        experts,
        *choice,
        0,
        0,
    )
    return ids, weights
