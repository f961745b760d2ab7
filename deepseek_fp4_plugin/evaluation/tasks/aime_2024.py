"""AIME 2024: the 30 problems of both papers; an answer is an integer from 0 to 999.

American Invitational Mathematics Examination, Mathematical Association of America (the problems are its own).
"""

from collections.abc import Iterable, Sequence
from typing import Any

from deepseek_fp4_plugin.evaluation.answers import boxed, last_number
from deepseek_fp4_plugin.evaluation.task import Example, Grade, Settings, Source, Task, Tools
from deepseek_fp4_plugin.evaluation.tasks.math_500 import prompt


def grade(example: Example, answers: Sequence[str], tools: Tools) -> list[Grade]:
    """The last box, or the last number where there is no box; a box that is no plain integer goes to math-verify."""
    (text,) = answers
    answer = boxed(text)
    if answer is None:
        answer = last_number(text)
    if answer is None:
        return [Grade(False)]
    plain = answer.strip().replace(",", "")
    if plain.isascii() and plain.isdigit() and len(plain) < 20:
        return [Grade(int(plain) == int(example.gold), answer)]
    right, note = tools.judge.equal(str(int(example.gold)), answer)
    return [Grade(right, answer, note)]


def _examples(rows: Iterable[dict[str, Any]]) -> list[Example]:
    return [Example(str(row["id"]), row["problem"], str(row["answer"])) for row in rows]


TASK = Task(
    name="aime_2024",
    title="AIME 2024",
    citation="Mathematical Association of America, AIME I and II 2024",
    licence="the problems belong to the MAA; quoted for evaluation",
    source=Source("HuggingFaceH4/aime_2024", split="train"),
    examples=_examples,
    prompt=prompt,
    grade=grade,
    settings=Settings(repeats=10),
    card=(89.0, 91.3),
)
