"""MMLU-Pro: 12,032 questions from 14 fields, up to ten choices.

Wang et al., MMLU-Pro: A More Robust and Challenging Multi-Task Language Understanding Benchmark, arXiv 2406.01574. MIT
licence. Asked without examples; the letter is found by the rules of the benchmark's own scripts, none is guessed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from deepseek_fp4_plugin.evaluation.answers import choice_letter
from deepseek_fp4_plugin.evaluation.task import Example, Grade, Settings, Source, Task, Tools


def choices(question: str, options: Sequence[str]) -> str:
    """A multiple-choice question as text, its options lettered from A."""
    lettered = "\n".join(f"{chr(ord('A') + i)}) {option}" for i, option in enumerate(options))
    return (
        "Answer this multiple-choice question. Think it through step by step first; then write, as the last line of "
        f"your reply, `Answer: X`, X being the letter of the one right choice.\n\n{question}\n\n{lettered}"
    )


def grade(example: Example, answers: Sequence[str], tools: Tools) -> list[Grade]:
    (text,) = answers
    letter = choice_letter(text)
    return [Grade(letter == example.gold, letter)]


def _examples(rows: Iterable[dict[str, Any]]) -> list[Example]:
    return [Example(str(row["question_id"]), choices(row["question"], row["options"]), row["answer"]) for row in rows]


TASK = Task(
    name="mmlu_pro",
    title="MMLU-Pro",
    citation="arXiv 2406.01574",
    licence="MIT",
    source=Source("TIGER-Lab/MMLU-Pro"),
    examples=_examples,
    prompt=lambda example: example.question,
    grade=grade,
    settings=Settings(max_tokens=16384),
    card=(85.0, 84.2),
)
