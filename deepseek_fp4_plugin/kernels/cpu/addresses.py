"""Tensors as addresses. The kernels see no dtype, shape or stride, so all of them are checked here, on every call."""

import torch
from torch import Tensor


def dense(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Address of a contiguous CPU tensor. ValueError for another device, dtype, shape or layout."""
    if x.dtype is dtype and x.shape == shape and x.is_cpu and x.is_contiguous():
        return x.data_ptr()
    raise _refused(name, x, dtype, shape, "contiguous")


def rows(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The same, where only the last axis must be contiguous: the kernel is given the other strides."""
    if x.dtype is dtype and x.shape == shape and x.is_cpu and (x.stride(-1) == 1 or x.shape[-1] <= 1):
        return x.data_ptr()
    raise _refused(name, x, dtype, shape, "contiguous in its last axis")


def _refused(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> ValueError:
    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    return ValueError(
        f"{name} must be {short(dtype)} {list(shape)} on the CPU, {layout}; it is {short(x.dtype)} {list(x.shape)} on "
        f"{x.device} with strides {list(x.stride())}"
    )
