"""r1_nano's held-out problems, and how an answer to one is graded."""

import json
from importlib.resources import files
from typing import NamedTuple

END_THINK = "</think>"
_BOX = "\\boxed{"
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
    r"""The content of the last complete \boxed{...}, None without one."""
    start = text.rfind(_BOX)
    while start >= 0:
        depth, begin = 1, start + len(_BOX)
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end]
        start = text.rfind(_BOX, 0, start)
    return None


def normalized(answer: str) -> str:
    """Lower case, without spaces, with ASCII punctuation."""
    return "".join(answer.translate(_SAME).split()).casefold()
