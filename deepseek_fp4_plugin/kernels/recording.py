"""What keeps a function's kernel calls and makes them again without Python: native calls on a CPU, a graph on a GPU."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Results = tuple[Tensor, ...]


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

    def cut(self, work: Callable[[], None]) -> None: ...


def cut(work: Callable[[], None]) -> None:
    """Do `work`, which the recorder of a CPU cannot hold: torch's own arithmetic, a collective over processes.

    Where a recording is under way it ends in front of the work and another begins behind it; the replay does the work
    again in between. So `work` must read and write tensors that stay where they are, and return nothing. A GPU's graph
    holds such work like any other.
    """
    recording = _get_current_dispatch_mode()
    if isinstance(recording, Cutting):
        recording.cut(work)
    else:
        work()
