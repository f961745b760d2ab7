"""The router: its FP32 product for few tokens, and group-limited top-k in one launch."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, together

_FEW_ROWS = 16
_MANY_ROWS = 512  # from here BF16 products of the weights' three parts are ahead of FP32 ones
_MAX_EXPERTS, _MAX_GROUPS = 512, 32


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See kernels/reference/linear.py. A few BF16 rows by FP32 weights here, the rest by the library: many of them by
    the three BF16 numbers that each weight is the sum of, with exact products and FP32 sums.
    """
    fp32 = x.dtype is torch.bfloat16 and weight.dtype is torch.float32 and weight.is_contiguous()
    if fp32 and x.shape[0] >= _MANY_ROWS:
        products = torch.mm(x, _three_parts(weight).T, out_dtype=torch.float32)
        return products.unflatten(1, (3, -1)).sum(1)
    aligned = x.stride(1) == 1 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0 and weight.data_ptr() % 16 == 0
    if not (fp32 and aligned and 0 < x.shape[0] <= _FEW_ROWS and weight.shape[1] % 4 == 0):
        return reference.plain_linear(x, weight)
    together(x, weight)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    kernel("small.cu", "router", "3P4i", (), x.device.index)(
        (weight.shape[0], 1, 1),
        256,
        0,
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.shape[0],
        weight.shape[1],
        weight.shape[0],
        x.stride(0),
    )
    return y


def _three_parts(weight: Tensor) -> Tensor:
    """FP32 [out, in] to BF16 [3 * out, in], smallest first, whose sum it is: 24 bits are three times 8."""
    parts = [weight.bfloat16()]
    for _ in range(2):
        weight = weight - parts[-1]
        parts.append(weight.bfloat16())
    return torch.cat(parts[::-1])


def local_ids(ids: Tensor, slots: Tensor) -> Tensor:
    """See kernels/reference/routing.py."""
    together(ids, slots)
    ids, slots = ids.contiguous(), slots.contiguous()
    places = torch.empty_like(ids)
    kernel("small.cu", "local_ids", "3Pi", (), ids.device.index)(
        (-(-ids.numel() // 256), 1, 1), 256, 0, ids.data_ptr(), slots.data_ptr(), places.data_ptr(), ids.numel()
    )
    return places


def route(
    logits: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, normalize: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/routing.py. Of equal scores the first."""
    tokens, experts = logits.shape
    if experts > _MAX_EXPERTS or n_group > _MAX_GROUPS or k > 32 or logits.dtype is not torch.float32:
        return reference.route(logits, bias, k, n_group, topk_group, normalize, scaling)
    together(logits, bias)
    logits, bias = logits.contiguous(), bias.contiguous()
    ids = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    kernel("small.cu", "route", "4P6if", (), logits.device.index)(
        (tokens, 1, 1),
        -(-experts // 32) * 32,
        0,
        logits.data_ptr(),
        bias.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        tokens,
        experts,
        k,
        n_group,
        topk_group,
        int(normalize),
        scaling,
    )
    return ids, weights
