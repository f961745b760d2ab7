"""MATH-500: 500 competition problems, free-form answers.

Hendrycks et al., Measuring Mathematical Problem Solving With the MATH Dataset, arXiv 2103.03874; the 500 of Lightman et
al., Let's Verify Step by Step, arXiv 2305.20050. MIT licence. Graded by math-verify on the last box.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from deepseek_fp4_plugin.evaluation.answers import boxed
from deepseek_fp4_plugin.evaluation.task import Example, Grade, Settings, Source, Task, Tools

DIRECTIVE = "Please reason step by step, and put your final answer within \\boxed{}."  # the model card's
_TAIL = 2000  # characters in which an answer without a box is looked for


def prompt(example: Example) -> str:
    return f"{example.question}\n{DIRECTIVE}"


def grade(example: Example, answers: Sequence[str], tools: Tools) -> list[Grade]:
    """The last box; without one, what math-verify finds in the text's end."""
    (text,) = answers
    answer = boxed(text)
    right, note = tools.judge.equal(example.gold, answer) if answer else tools.judge.finds(example.gold, text[-_TAIL:])
    return [Grade(right, answer, note)]


def _examples(rows: Iterable[dict[str, Any]]) -> list[Example]:
    return [Example(row["unique_id"], row["problem"], row["answer"]) for row in rows]


TASK = Task(
    name="math_500",
    title="MATH-500",
    citation="arXiv 2103.03874, arXiv 2305.20050",
    licence="MIT",
    source=Source("HuggingFaceH4/MATH-500"),
    examples=_examples,
    prompt=prompt,
    grade=grade,
    settings=Settings(repeats=3),
    card=(98.0, 98.1),
)
