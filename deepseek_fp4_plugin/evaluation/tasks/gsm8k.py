"""GSM8K: 1,319 grade-school word problems; an answer is a number.

Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168. MIT licence.
"""

from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from deepseek_fp4_plugin.evaluation.answers import boxed, json_answer, last_number
from deepseek_fp4_plugin.evaluation.task import Example, Grade, Settings, Source, Task, Tools
from deepseek_fp4_plugin.evaluation.tasks.math_500 import prompt


def grade(example: Example, answers: Sequence[str], tools: Tools) -> list[Grade]:
    """The last number of the last box, of a JSON answer's field, or of the whole text."""
    (text,) = answers
    place = boxed(text)
    if place is None:
        place = json_answer(text)
    answer = last_number(text if place is None else place)
    return [Grade(_equal(answer, example.gold), answer)]


def _equal(answer: str | None, gold: str) -> bool:
    try:
        return answer is not None and Decimal(answer) == Decimal(gold)
    except InvalidOperation:
        return False


def gold_number(solution: str) -> str:
    """What stands behind the last #, without separators."""
    return solution.rpartition("#")[2].strip().replace(",", "")


def _examples(rows: Iterable[dict[str, Any]]) -> list[Example]:
    return [Example(str(i), row["question"], gold_number(row["answer"])) for i, row in enumerate(rows)]


TASK = Task(
    name="gsm8k",
    title="GSM8K",
    citation="arXiv 2110.14168",
    licence="MIT",
    source=Source("openai/gsm8k", "main"),
    examples=_examples,
    prompt=prompt,
    grade=grade,
    settings=Settings(max_tokens=8192),
)
