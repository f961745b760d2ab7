"""Task: one benchmark. Where its questions come from, how they are asked, how an answer is graded."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepseek_fp4_plugin.evaluation.judge import Judge
from deepseek_fp4_plugin.evaluation.sandbox import Sandbox


@dataclass(frozen=True)
class Example:
    """A question. id: stable over runs.  gold: what a right answer holds, in the task's own form."""

    id: str
    question: str
    gold: Any
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """One graded part of an answer. answer: what was found in the text; None where nothing was.

    note: why it is wrong, where there is more to say than that it is.
    """

    right: bool
    answer: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """How often and how a task's questions are asked; the card's and its peers' values by default (R1's advice)."""

    repeats: int = 1
    max_tokens: int = 32768
    temperature: float = 0.6
    top_p: float = 0.95


@dataclass(frozen=True)
class Source:
    """The original data on the Hugging Face hub. files: read as JSON lines where the hub's own loader is a script."""

    hub_id: str
    config: str | None = None
    split: str = "test"
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tools:
    """What grading may use."""

    judge: Judge
    sandbox: Sandbox


# Yields prompts, each a user's message of one more turn, and is sent the answers (thinking removed).
Conversation = Generator[str, str, None]


@dataclass(frozen=True)
class Task:
    """name: on the command line.  title: in tables.  card: the model card's FP8 and FP4 scores, where it has them.

    examples: rows of the data to questions.  prompt: a question's one message; or converse, where it takes several.
    grade: the answers (thinking removed), one a message, to one Grade for each graded part.
    private: its authors ask that questions are never written out in plain text.
    """

    name: str
    title: str
    citation: str
    licence: str
    source: Source | None
    examples: Callable[[Iterable[dict[str, Any]]], list[Example]]
    grade: Callable[[Example, Sequence[str], Tools], list[Grade]]
    prompt: Callable[[Example], str] | None = None
    converse: Callable[[Example], Conversation] | None = None
    settings: Settings = Settings()
    card: tuple[float, float] | None = None
    private: bool = False

    def conversation(self, example: Example) -> Conversation:
        if self.converse is not None:
            return self.converse(example)
        assert self.prompt is not None
        return _once(self.prompt(example))


def _once(prompt: str) -> Conversation:
    yield prompt
