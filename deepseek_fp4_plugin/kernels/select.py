"""The choice of backend, made once for each weight and each device. Alone in importing backends.

`TABLE` is asked from the top; the first backend that does not refuse a weight prepares it and multiplies by it. What
works without a prepared weight is the first one's on the device.

    cpu        native kernels on the checkpoint's bytes, BF16 activations; where the extension was built
    blackwell  NVFP4 weights by FP4 activations on FP4 tensor cores; NVIDIA GPUs of compute capability 10.0
               where a trial of it gives the reference's results
    cuda       kernels on NVFP4 weights in tiles, on BF16 and FP8 ones as they are, BF16 activations; NVIDIA GPUs of
               compute capability 9.0 and 10.0
    humming    NVFP4 weights by the humming-kernels package, where installed; BF16 activations; other NVIDIA GPUs
    decoded    weights decoded once at load to the compute dtype, then the platform's matrix product; any device
    reference  checkpoint bytes, decoded in FP32 on every call: the law that the others are tested against
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deepseek_fp4_plugin.kernels import blackwell, cpu, cuda, decoded, humming, reference
from deepseek_fp4_plugin.kernels.cuda_graph import GraphRecorder
from deepseek_fp4_plugin.kernels.recording import Recorder
from deepseek_fp4_plugin.kernels.weights import Backend, Case


@dataclass(frozen=True)
class Entry:
    """refuses: why this backend does not serve a case, or None.  reason: why it is preferred where it does."""

    name: str
    backend: Backend
    refuses: Callable[[Case], str | None]
    reason: str


def checked(name: str, backend: Backend) -> Backend:
    """The backend. Raises TypeError naming every operation that it lacks or takes with other arguments."""
    wrong = []
    for operation, wanted in vars(Backend).items():
        if operation.startswith("_") or not inspect.isfunction(wanted):
            continue
        own = getattr(backend, operation, None)
        if not callable(own):
            wrong.append(f"{operation} is missing")
            continue
        expected = list(inspect.signature(wanted).parameters)[1:]  # without self
        given = list(inspect.signature(own).parameters.values())
        surplus = given[len(expected) :]
        if [p.name for p in given[: len(expected)]] != expected or any(p.default is p.empty for p in surplus):
            wrong.append(f"{operation} does not take ({', '.join(expected)})")
    if wrong:
        raise TypeError(f"kernel backend {name!r} is not complete: {'; '.join(wrong)}")
    return backend


TABLE: tuple[Entry, ...] = (
    Entry("cpu", checked("cpu", cpu), cpu.refuses, "native kernels on the checkpoint's bytes"),
    Entry("blackwell", checked("blackwell", blackwell), blackwell.refuses, "FP4 tensor cores, the checkpoint's bytes"),
    Entry("cuda", checked("cuda", cuda), cuda.refuses, "NVFP4 decoded in registers, BF16 and FP8 as they are"),
    Entry("humming", checked("humming", humming), humming.refuses, "NVFP4 decoded in registers by humming-kernels"),
    Entry("decoded", checked("decoded", decoded), lambda case: None, "decoded once at load, the platform's products"),
    Entry("reference", checked("reference", reference), lambda case: None, "plain torch, decoded on every call"),
)


def choose(case: Case) -> Entry:
    """The first entry of the table that serves the case; a processor without its native kernels is told of once."""
    if case.device.type == "cpu" and not cpu.available():
        _warn()
    return next(entry for entry in TABLE if entry.refuses(case) is None)


def named(name: str) -> Entry:
    """The entry of this name. Raises ValueError for one that is unknown or cannot run here."""
    for entry in TABLE:
        if entry.name == name:
            if name == "cpu" and not cpu.available():
                raise ValueError(f"kernel backend 'cpu' cannot run here: {cpu.NOT_BUILT}")
            if name == "cuda" and not cuda.available():
                raise ValueError(f"kernel backend 'cuda' cannot run here: {cuda.NOT_INSTALLED}")
            if name == "humming" and not humming.available():
                raise ValueError(f"kernel backend 'humming' cannot run here: {humming.NOT_INSTALLED}")
            if name == "blackwell" and not blackwell.available():
                raise ValueError(f"kernel backend 'blackwell' cannot run here: {blackwell.NOT_INSTALLED}")
            return entry
    raise ValueError(f"unknown kernel backend {name!r}; choose from {', '.join(entry.name for entry in TABLE)}")


@functools.cache
def kernels(device: torch.device, dtype: torch.dtype | None = None) -> Backend:
    """The backend of operations without a prepared weight on tensors of `dtype`; None where they have one only."""
    return choose(Case(device, dtype)).backend


def explain(case: Case, backend: Backend | None = None) -> str:
    """Which backend serves a case, and why: for people.  backend: that was asked for by name; None: the first."""
    chosen = choose(case)
    if backend is not None and chosen.backend is not backend:
        return f"{next(entry.name for entry in TABLE if entry.backend is backend)} (it was asked for)"
    refused = [f"{e.name}: {why}" for e in TABLE[: TABLE.index(chosen)] if (why := e.refuses(case))]
    return f"{chosen.name} ({'; '.join([chosen.reason, *refused])})"


@functools.cache
def _warn() -> None:
    warnings.warn(
        "the native CPU kernels are not built, so weights are decoded to BF16 and run several times slower; "
        "reinstall the package with a C++17 compiler and cmake at hand",
        RuntimeWarning,
        stacklevel=4,
    )


def recorder(device: torch.device) -> Recorder | None:
    """What records and replays kernels on `device`, if anything does."""
    if device.type == "cuda":
        return GraphRecorder(device)
    return cpu.Recorder() if cpu.refuses(Case(device)) is None else None


def has_fp4_tensor_cores(device: torch.device) -> bool:
    """True on NVIDIA GPUs of compute capability 10.0 and above."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
