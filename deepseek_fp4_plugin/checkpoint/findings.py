"""What is wrong, odd or unused in a checkpoint, as a list: looking goes on after the first thing found.

The loader and the quantizer refuse at an error and say the warnings; `inspect` shows everything.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError


class Severity(StrEnum):
    """ERROR: cannot be used.  WARNING: can, and is said each time.  NOTE: for who looks closely."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing, in one sentence that says what, where and what to do.

    subject: the tensor, file or field.  count: how many tensors it stands for; `subject` is the first of them.
    unused: the tensors are read by nothing and come into no result.
    """

    severity: Severity
    subject: str
    sentence: str
    count: int = 1
    unused: bool = False

    def __str__(self) -> str:
        return self.sentence if self.count == 1 else f"{self.sentence} ({self.count - 1:,} more like it)"


def error(subject: str, sentence: str, count: int = 1) -> Finding:
    return Finding(Severity.ERROR, subject, sentence, count)


def warning(subject: str, sentence: str, count: int = 1, unused: bool = False) -> Finding:
    return Finding(Severity.WARNING, subject, sentence, count, unused)


def note(subject: str, sentence: str, count: int = 1, unused: bool = False) -> Finding:
    return Finding(Severity.NOTE, subject, sentence, count, unused)


def refuse(findings: Iterable[Finding]) -> None:
    """Raises CheckpointError with the first error's sentence, if there is one, and the number of the others."""
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if len(errors) > 1:
        others = f"{len(errors) - 1} more finding{'s' if len(errors) > 2 else ''}"
        raise CheckpointError(f"{errors[0]} [and {others}: deepseek-fp4 inspect lists them]")
    if errors:
        raise CheckpointError(str(errors[0]))
