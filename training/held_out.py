"""Write the held-out problems and the calibration text that ship with the package.

python -m training.held_out
"""

import json
import random
from pathlib import Path

from deepseek_fp4_plugin.assets.held_out import HeldOutProblem
from training.data import CHINESE_SHARE
from training.problems import FAMILIES, make_problem
from training.sentences import paragraph
from training.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

PER_FAMILY = 56
CALIBRATION_BYTES = 200_000
ASSETS = Path(__file__).parents[1] / "deepseek_fp4_plugin/assets"


def problems(seed: int = 20250528) -> list[HeldOutProblem]:
    """PER_FAMILY problems of the test split for each family, families in turn, no operands twice."""
    rng, found, operands = random.Random(seed), [], set()
    for _ in range(PER_FAMILY):
        for family in FAMILIES:
            while True:
                language = "zh" if rng.random() < CHINESE_SHARE else "en"
                problem = make_problem(rng, family, "test", language)
                if (family, problem.key) not in operands:
                    break
            operands.add((family, problem.key))
            found.append(HeldOutProblem(family, problem.prompt, problem.answer, language))
    return found


def calibration_text(seed: int = 7) -> str:
    """Training problems with their solutions, as the model reads them, and plain paragraphs; a blank line between."""
    rng, parts, size = random.Random(seed), [], 0
    families = tuple(FAMILIES)
    while size < CALIBRATION_BYTES:
        if rng.random() < 0.15:
            part = paragraph(rng)
        else:
            language = "zh" if rng.random() < CHINESE_SHARE else "en"
            p = make_problem(rng, rng.choice(families), "train", language)
            part = f"{BOS}{USER}{p.prompt}{ASSISTANT}{THINK}\n{p.reasoning}\n{END_THINK}\n\n{p.response}{EOS}"
        parts.append(part)
        size += len(part.encode()) + 2
    return "\n\n".join(parts) + "\n"


def main() -> None:
    lines = [json.dumps(problem._asdict(), ensure_ascii=False) for problem in problems()]
    (ASSETS / "held_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (ASSETS / "calibration.txt").write_text(calibration_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
