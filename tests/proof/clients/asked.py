"""What every client asks, and what r1_nano answers: greedily it does such sums right, and thinks first."""

import contextlib
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

KEY = "secret"  # the server's
QUESTION = "What is 607 + 68?"
ANSWER = "675"
THOUGHT = "hundreds"  # stands in its thinking, and nowhere else
TOOL_QUESTION = "What is 2 + 3? Use the tool."
LIMIT = 400  # tokens: no answer is as long


class Answer(BaseModel):
    """A form that nobody writes by chance, of keywords that every client passes on (Anthropic's drops `maximum`)."""

    model_config = ConfigDict(extra="forbid")
    sure: bool
    digit: Literal[1, 2, 3]


ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"type": "integer", "enum": [1, 2, 3]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def is_sum(arguments: dict) -> bool:
    """Whether the arguments of a call are what ADD allows."""
    return set(arguments) == {"a", "b"} and 0 <= arguments["a"] <= 9 and arguments["b"] in (1, 2, 3)


@contextlib.contextmanager
def refused(kind: type[Exception], said: str) -> Iterator[None]:
    """The server refuses what stands inside, and the client raises its own class with the server's words."""
    try:
        yield
    except kind as error:
        if said not in str(error):
            raise AssertionError(f"{said} is not in its words") from error
    else:
        raise AssertionError(f"no {kind.__name__}")
