"""GPQA Diamond: 198 graduate questions in biology, physics and chemistry, four choices.

Rein et al., GPQA: A Graduate-Level Google-Proof Q&A Benchmark, arXiv 2311.12022. CC BY 4.0. Its authors ask that no
question be published in plain text: runs keep prompts as hashes and answers packed.
"""

import random
from collections.abc import Iterable
from typing import Any

from deepseek_fp4_plugin.evaluation.task import Example, Settings, Source, Task
from deepseek_fp4_plugin.evaluation.tasks.mmlu_pro import choices, grade


def _examples(rows: Iterable[dict[str, Any]]) -> list[Example]:
    """Choices in an order of their own for each question, the same in every run."""
    found = []
    for row in rows:
        identity = str(row["Record ID"])
        options = [str(row[name]).strip() for name in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))]
        order = list(range(4))
        random.Random(identity).shuffle(order)
        question = choices(str(row["Question"]).strip(), [options[i] for i in order])
        found.append(Example(identity, question, "ABCD"[order.index(0)]))
    return found


TASK = Task(
    name="gpqa_diamond",
    title="GPQA Diamond",
    citation="arXiv 2311.12022",
    licence="CC BY 4.0",
    source=Source("Idavidrein/gpqa", "gpqa_diamond", split="train"),
    examples=_examples,
    prompt=lambda example: example.question,
    grade=grade,
    settings=Settings(repeats=5),
    card=(81.0, 80.0),
    private=True,
)
