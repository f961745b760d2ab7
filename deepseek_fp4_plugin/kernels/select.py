"""The choice of backend, made once for each weight and each device. Alone in importing backends.

`TABLE` is asked from the top; the first backend that does not refuse a weight prepares it and multiplies by it. What
works without a prepared weight is the first one's on the device.

    cpu        native kernels on the checkpoint's bytes, BF16 activations; where the extension was built
    blackwell  NVFP4 weights by FP4 activations on FP4 tensor cores; NVIDIA GPUs of compute capability 10.0
               where a trial of it gives the reference's results
    cuda       kernels on NVFP4 weights in tiles, on BF16 and FP8 ones as they are, BF16 activations; NVIDIA GPUs of
               compute capability 9.0, there many rows of FP8 activations too, and 10.0
    humming    NVFP4 weights by the humming-kernels package, where installed; BF16 activations; other NVIDIA GPUs from
               compute capability 8.0
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
    """refuses: why this backend does not serve a case, or None.  reason: why it is preferred where it does.
    missing: what there is not on this machine, so that it cannot be asked for by name, or None."""

    name: str
    backend: Backend
    refuses: Callable[[Case], str | None]
    reason: str
    missing: Callable[[], str | None] = lambda: None


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
    Entry(
        "cpu",
        checked("cpu", cpu),
        cpu.refuses,
        "native kernels on the checkpoint's bytes",
        lambda: None if cpu.available() else cpu.NOT_BUILT,
    ),
    Entry(
        "blackwell",
        checked("blackwell", blackwell),
        blackwell.refuses,
        "FP4 tensor cores, the checkpoint's bytes",
        lambda: None if blackwell.available() else blackwell.NOT_INSTALLED,
    ),
    Entry(
        "cuda",
        checked("cuda", cuda),
        cuda.refuses,
        "NVFP4 decoded in registers, BF16 and FP8 as they are",
        lambda: None if cuda.available() else cuda.NOT_INSTALLED,
    ),
    Entry(
        "humming",
        checked("humming", humming),
        humming.refuses,
        "NVFP4 decoded in registers by humming-kernels",
        lambda: None if humming.available() else humming.NOT_INSTALLED,
    ),
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
            if missing := entry.missing():
                raise ValueError(f"kernel backend {name!r} cannot run here: {missing}")
            return entry
    raise ValueError(f"unknown kernel backend {name!r}; choose from {', '.join(entry.name for entry in TABLE)}")


def refusal(name: str, case: Case) -> str | None:
    """Why the backend of this name does not serve a case, or None."""
    return next(entry for entry in TABLE if entry.name == name).refuses(case)


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
    """True on NVIDIA GPUs of compute capability 10: those whose FP4 tensor cores there is a kernel for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
