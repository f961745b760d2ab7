"""What keeps a function's kernel calls and makes them again without Python: native calls on a CPU, a graph on a GPU."""

import functools
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Results = tuple[Tensor, ...]
First = TypeVar("First")
Second = TypeVar("Second")


class Unrecordable(RuntimeError):
    """The function computes something that the recorder cannot hold."""


class Recorder(Protocol):
    """Records functions, all in the same memory."""

    def record(self, function: Callable[[], Results]) -> tuple[Callable[[], Results], Results]:
        """Calls `function`, perhaps twice; returns what replays it on what its tensors then hold, and its results.

        A replay returns the same tensors, filled anew; another recording's replay may overwrite them. The tensors that
        `function` reads must stay where they are. Raises Unrecordable.
        """
        ...


@runtime_checkable
class Cutting(Protocol):
    """A recording under way that other work may interrupt."""

    def cut(self, work: Callable[..., Results], *tensors: Tensor) -> Results: ...


def cut(work: Callable[..., Results], *tensors: Tensor) -> Results:
    """The results of `work(*tensors)`, which the recorder of a CPU cannot hold: torch's own arithmetic, a collective.

    Where such a recording is under way it ends in front of the work and another begins behind it; the replay does the
    work again in between, and puts its results where the recorded ones are. So what else `work` reads must
    stay where it is. A GPU's graph holds such work like any other.
    """
    recording = _get_current_dispatch_mode()
    return recording.cut(work, *tensors) if isinstance(recording, Cutting) else work(*tensors)


def beside(device: torch.device, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """The results of both, neither of which reads what the other makes.

    In a GPU's graph they are branches: kernels of few rows leave room for the other's.
    Elsewhere one follows the other.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return first(), second()
    here, aside = torch.cuda.current_stream(device), _aside(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        other = second()
    own = first()
    here.wait_stream(aside)
    return own, other


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
