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

    def cut(self, work: Callable[..., Results], *tensors: Tensor) -> Results: ...


def cut(work: Callable[..., Results], *tensors: Tensor) -> Results:
    """The results of `work(*tensors)`, which the recorder of a CPU cannot hold: torch's own arithmetic, a collective.

    Where such a recording is under way it ends in front of the work and another begins behind it; the replay does the
    work again in between, and puts its results where the recorded ones are. So what else `work` reads must
    stay where it is. A GPU's graph holds such work like any other.
    """
    recording = _get_current_dispatch_mode()
    return recording.cut(work, *tensors) if isinstance(recording, Cutting) else work(*tensors)
