"""The compiled extension, if this installation has one, and the instruction-set path it takes."""

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

native: Any
try:
    from deepseek_fp4_plugin.kernels.cpu import _native as native  # type: ignore[attr-defined,no-redef]
except ImportError:
    native = None
_INTERFACE = 5  # counts with native/module.cpp's
if native is not None and getattr(native, "INTERFACE", 1) != _INTERFACE:
    raise ImportError("the native kernels were built from other sources than this package; run: pip install -e .")


NOT_BUILT = "it was not built; reinstall the package with a C++17 compiler and cmake at hand"


def available() -> bool:
    """Whether the extension was built."""
    return native is not None


def paths() -> list[str]:
    """Instruction-set paths that this processor can run, fastest first: of avx512, avx2_vnni, avx2, portable."""
    return native.paths() if native is not None else []


def path() -> str:
    """The path in use."""
    return native.path()


def require_bf16(*tensors: Tensor) -> None:
    """Raises ValueError for tensors that the kernels do not read."""
    for tensor in tensors:
        if tensor.dtype is not torch.bfloat16:
            raise ValueError(f"the CPU kernels take BF16, not {tensor.dtype}")


_FEW_ROWS = 16


def platform_is_faster(rows: int) -> bool:
    """Whether so many rows by BF16 weights are better left to torch: only with AVX-512 has it hardware for them."""
    return rows > _FEW_ROWS and native.path() == "avx512"


@contextmanager
def use_path(name: str):
    """Run the block on another path; for tests and measurements. Raises ValueError for one this processor lacks."""
    before = native.use_path(name)
    try:
        yield
    finally:
        native.use_path(before)
