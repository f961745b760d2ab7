"""Answers made elsewhere, graded by our rules: what the known formats hold, and where we differ from them."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.evaluation.answers import code_block, json_answer
from deepseek_fp4_plugin.evaluation.task import Example, Grade, Task, Tools
from deepseek_fp4_plugin.evaluation.tasks.gsm8k import gold_number


@dataclass(frozen=True)
class Answered:
    """A question with somebody's answer.  published: the verdict that came with it.  extracted: the answer it found."""

    id: str
    gold: Any
    text: str
    published: bool | None = None
    extracted: str | None = None


@dataclass(frozen=True)
class Regraded:
    answered: Answered
    grade: Grade

    @property
    def agrees(self) -> bool | None:
        """With the published verdict; None where there is none."""
        published = self.answered.published
        return None if published is None else published == self.grade.right


def regrade(task: Task, path: Path, tools: Tools, golds: dict[str, Any] | None = None) -> list[Regraded]:
    """golds: by id, in the place of those in the file. Raises ValueError for a file that is none of the known kinds."""
    known = _FORMATS.get(task.name, {})
    results = []
    for number, row in enumerate(_lines(path), 1):
        reader = next((read for field, read in known.items() if field in row), None)
        if reader is None:
            raise ValueError(
                f"{path}: line {number} is no {task.title} transcript; it needs one of the fields {', '.join(known)}"
                if known
                else f"{path}: no transcript format of {task.title} is known"
            )
        try:
            answered = reader(row)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path}: line {number} is broken: {type(error).__name__} {error}") from None
        if golds is not None and answered.id in golds:
            answered = Answered(answered.id, golds[answered.id], answered.text, answered.published, answered.extracted)
        results.append(Regraded(answered, _grade(task, answered, tools)))
    return results


def _grade(task: Task, answered: Answered, tools: Tools) -> Grade:
    if task.name == "livecodebench":  # transcripts come without tests: the extraction is what can be compared
        code = code_block(answered.text)
        return Grade(code == (answered.extracted or ""), code)
    (grade,) = task.grade(Example(answered.id, "", answered.gold), [answered.text], tools)
    return grade


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number} is not an object")
                    yield row
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _qwen_math(row: dict[str, Any]) -> Answered:
    return Answered(
        str(row.get("problem_index", row.get("idx"))),
        str(row["gt"]),
        row["code"][0],
        bool(row["score"][0]),
        str(row["pred"][0]),
    )


def _zero_eval_math(row: dict[str, Any]) -> Answered:
    text = row["output"][0]
    found = json_answer(text)
    return Answered(str(row["id"]), row["answer"], text if found is None else "\\boxed{" + found + "}")


def _zero_eval_gsm(row: dict[str, Any]) -> Answered:
    return Answered(str(row["id"]), gold_number(str(row["answer"])), row["output"][0])


def _mmlu_pro(row: dict[str, Any]) -> Answered:
    return Answered(str(row["question_id"]), row["answer"], row["text"], row["pred"] == row["answer"], row["pred"])


def _letters(row: dict[str, Any]) -> Answered:
    return Answered(
        str(row["id"]),
        row["correct_answer"],
        f"Answer: {row['model_answer']}",
        bool(row["is_correct"]),
        row["model_answer"],
    )


def _livecodebench(row: dict[str, Any]) -> Answered:
    return Answered(str(row["question_id"]), None, row["output_list"][0], True, row["code_list"][0])


_FORMATS: dict[str, dict[str, Callable[[dict[str, Any]], Answered]]] = {
    "math_500": {"gt": _qwen_math, "output": _zero_eval_math},
    "aime_2024": {"gt": _qwen_math},
    "gsm8k": {"output": _zero_eval_gsm},
    "mmlu_pro": {"question_id": _mmlu_pro},
    "gpqa_diamond": {"model_answer": _letters},
    "livecodebench": {"output_list": _livecodebench},
}
