"""r1_nano's own problems: 500 held-out ones, and a hard set that it gets right about half of the time.

Made by training/ for the embedded model; MIT licence. The held-out problems stand near 100 % in every precision and so
show nothing but a broken engine; the hard ones have longer operands and more steps than it was trained on, so that
recipes and activation modes can be told apart.
"""

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from deepseek_fp4_plugin.assets.held_out import boxed, load_held_out, normalized
from deepseek_fp4_plugin.evaluation.task import Example, Grade, Settings, Task, Tools


def grade(example: Example, answers: Sequence[str], tools: Tools) -> list[Grade]:
    answer = boxed(answers[0])
    return [Grade(answer is not None and normalized(answer) == normalized(example.gold), answer)]


def held_out_rows() -> list[dict[str, Any]]:
    return [problem._asdict() for problem in load_held_out()]


def hard_rows() -> list[dict[str, Any]]:
    text = (files("deepseek_fp4_plugin.assets") / "hard.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _examples(rows: Iterable[dict[str, Any]]) -> list[Example]:
    return [Example(f"{i:03}-{row['family']}", row["prompt"], row["answer"]) for i, row in enumerate(rows)]


def _task(name: str, title: str) -> Task:
    return Task(
        name=name,
        title=title,
        citation="training/",
        licence="MIT",
        source=None,
        examples=_examples,
        prompt=lambda example: example.question,
        grade=grade,
        settings=Settings(max_tokens=1024),
    )


TASK = _task("r1_nano", "r1_nano, held out")
HARD = _task("r1_nano_hard", "r1_nano, hard")
BUILT_IN = {"r1_nano": held_out_rows, "r1_nano_hard": hard_rows}
