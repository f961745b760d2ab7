"""r1_nano's held-out problems, and how an answer to one is graded."""

import json
import re
from importlib.resources import files
from typing import NamedTuple

END_THINK = "</think>"
_BRACE = re.compile(r"\\boxed\s{0,4}\{|\\\\|\\[{}]|[{}]")
_SAME = str.maketrans({"，": ",", "：": ":", "。": ".", "、": ",", "−": "-"})


class HeldOutProblem(NamedTuple):
    """A problem whose operands never occur in training. prompt: the user's message.  answer: what the box must hold."""

    family: str
    prompt: str
    answer: str
    language: str


def load_held_out() -> list[HeldOutProblem]:
    """All held-out problems, families interleaved, so that the first n are balanced too."""
    text = (files(__package__) / "held_out.jsonl").read_text(encoding="utf-8")
    return [HeldOutProblem(**json.loads(line)) for line in text.splitlines()]


def grade(answer: str, text: str) -> bool:
    """True when the last box of a response, behind its reasoning if it has some, holds `answer`."""
    found = boxed(text.rpartition(END_THINK)[2])
    return found is not None and normalized(found) == normalized(answer)


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...}, None without one. Escaped braces do not count."""
    open_at: list[int | None] = []  # where each open brace's box begins, None for a brace of another kind
    last: tuple[int, str] | None = None
    for match in _BRACE.finditer(text):
        token = match.group()
        if token in ("\\{", "\\}", "\\\\"):
            continue
        if token == "}":
            begin = open_at.pop() if open_at else None
            if begin is not None and (last is None or begin > last[0]):
                last = begin, text[begin : match.start()]
        else:
            open_at.append(None if token == "{" else match.end())
    return None if last is None else last[1]


def normalized(answer: str) -> str:
    """Lower case, without spaces, with ASCII punctuation."""
    return "".join(answer.translate(_SAME).split()).casefold()
