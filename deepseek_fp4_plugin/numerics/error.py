"""How far apart two tensors are: for tolerances, reports and bitwise mismatches."""

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise in decibels, over all elements; infinite when equal."""
    reference, noise = reference.double(), approximation.double() - reference.double()
    return float(10 * torch.log10(reference.square().sum() / noise.square().sum()))


def relative_rms(reference: Tensor, approximation: Tensor) -> float:
    """||approximation - reference|| / ||reference||, in FP64."""
    return float((approximation.double() - reference.double()).norm() / reference.double().norm())


def relative_max(reference: Tensor, approximation: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value."""
    return float((approximation.double() - reference.double()).abs().max() / reference.double().abs().max())


def first_mismatch(expected: Tensor, actual: Tensor) -> str | None:
    """None when both have the same shape, dtype and bytes; otherwise one line naming the first difference."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return f"expected {expected.dtype} {list(expected.shape)}, got {actual.dtype} {list(actual.shape)}"
    if expected.numel() == 0:
        return None
    size = expected.element_size()
    left = expected.contiguous().reshape(-1).view(torch.uint8).reshape(-1, size)
    right = actual.contiguous().reshape(-1).view(torch.uint8).reshape(-1, size)
    wrong = (left != right).any(1).nonzero().flatten()
    if wrong.numel() == 0:
        return None
    flat = int(wrong[0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), expected.shape)] if expected.ndim else []
    a, b = expected.reshape(-1)[flat].float().item(), actual.reshape(-1)[flat].float().item()
    return (
        f"{wrong.numel()} of {left.shape[0]} elements differ, first at {index}: expected {a!r} "
        f"(bytes {bytes(left[flat].tolist()).hex()}), got {b!r} (bytes {bytes(right[flat].tolist()).hex()})"
    )
