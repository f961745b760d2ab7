"""RMSNorm, and the latents that the cache holds: a launch each."""

import torch
from torch import Tensor

from deepseek_fp4_plugin.kernels import reference
from deepseek_fp4_plugin.kernels.cuda.exchange import LONGEST_ROW, sum_and_norm
from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, together


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kernels/reference/norm.py; rows that cannot be read 16 bytes at a time go there."""
    rows = x.reshape(-1, weight.shape[0])
    if not _readable(rows, weight):
        return reference.rms_norm(x, weight, eps)
    together(rows, weight)
    y = torch.empty(rows.shape, dtype=torch.bfloat16, device=x.device)
    kernel("small.cu", "rms_norm", _LAYOUT, (), x.device.index)(
        (rows.shape[0], 1, 1),
        _threads(rows.shape[1]),
        0,
        rows.data_ptr(),
        weight.data_ptr(),
        0,
        0,
        y.data_ptr(),
        0,
        0,
        rows.shape[1],
        0,
        rows.stride(0),
        0,
        eps,
    )
    return y.view(x.shape)


def add(x: Tensor, y: Tensor) -> Tensor:
    """See kernels/reference/elementwise.py; what cannot be read 16 bytes at a time goes there."""
    same = x.dtype is y.dtype is torch.bfloat16 and x.shape == y.shape and x.numel() % 8 == 0
    if not (same and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (x, y))):
        return reference.add(x, y)
    together(x, y)
    total = torch.empty_like(x)
    kernel("small.cu", "add_rows", "3Pq", (), x.device.index)(
        (-(-x.numel() // 2048), 1, 1), 256, 0, x.data_ptr(), y.data_ptr(), total.data_ptr(), x.numel()
    )
    return total


def add_rms_norm(
    x: Tensor, hidden: Tensor, weight: Tensor, eps: float, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/norm.py; a launch for all."""
    rows = [x, hidden] if other is None else [x, hidden, other]
    same = all(row.shape == (x.shape[0], weight.shape[0]) for row in rows)
    if not (same and all(_readable(row, weight) for row in rows)) or x.shape[1] > LONGEST_ROW:
        return reference.add_rms_norm(x, hidden, weight, eps, other)
    together(weight, *rows)
    return sum_and_norm(x, hidden, weight, eps, other)


def latent_entries(kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See kernels/reference/attention.py."""
    if not _latents(kv, weight):
        return reference.latent_entries(kv, weight, eps, cos, sin)
    return _entries(kv, weight, eps, cos, sin, None, None)


def store_latents(
    cache: Tensor, slots: Tensor, kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """See kernels/reference/attention.py; a launch for both."""
    fits = cache.dtype in (torch.bfloat16, torch.float8_e4m3fn) and cache.is_contiguous() and cache.data_ptr() % 16 == 0
    if not (fits and _latents(kv, weight)):
        return reference.store_latents(cache, slots, kv, weight, eps, cos, sin)
    return _entries(kv, weight, eps, cos, sin, cache, slots.contiguous())


def _latents(kv: Tensor, weight: Tensor) -> bool:
    """Whether the kernel has them."""
    return _readable(kv, weight) and kv.shape[1] % 8 == 0


def _entries(
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor | None,
    slots: Tensor | None,
) -> Tensor:
    rope = kv.shape[1] - weight.shape[0]
    together(kv, weight, cos, sin, *(t for t in (cache, slots) if t is not None))
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(kv.shape, dtype=torch.bfloat16, device=kv.device)
    kernel("small.cu", "rms_norm", _LAYOUT, (), kv.device.index)(
        (kv.shape[0], 1, 1),
        _threads(weight.shape[0]),
        0,
        kv.data_ptr(),
        weight.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        0 if cache is None else cache.data_ptr(),
        0 if slots is None else slots.data_ptr(),
        weight.shape[0],
        rope,
        kv.stride(0),
        int(cache is not None and cache.dtype is torch.float8_e4m3fn),
        eps,
    )
    return y


_LAYOUT = "7P4if"


def _threads(n: int) -> int:
    """One for 8 values, as far as a block goes."""
    return min(1024, -(-n // 256) * 32)


def _readable(rows: Tensor, weight: Tensor) -> bool:
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(-1) == 1 for t in (rows, weight))
    bf16 = rows.dtype is weight.dtype is torch.bfloat16
    return bf16 and aligned and rows.stride(0) % 8 == 0 and weight.shape[0] % 8 == 0
