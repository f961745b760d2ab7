"""Write the hard problems that ship with the package: longer operands and more steps than r1_nano was trained on.

python -m training.hard
"""

import json
import random
from collections.abc import Callable

from deepseek_fp4_plugin.assets.held_out import HeldOutProblem
from training.held_out import ASSETS

PER_FAMILY = 80
_LETTERS = "aeorst"  # few, so that they come back


def _subtract(rng: random.Random) -> tuple[str, str]:
    """Four digits; training goes to three, seldom four."""
    b, a = sorted(rng.randrange(1000, 10_000) for _ in range(2))
    return f"What is {a} - {b}?", str(a - b)


def _multiply(rng: random.Random) -> tuple[str, str]:
    """Four digits by one; training has at most three."""
    a, b = rng.randrange(1000, 10_000), rng.randrange(2, 10)
    return f"What is {a} * {b}?", str(a * b)


def _count(rng: random.Random) -> tuple[str, str]:
    """Words of 12 to 16 letters."""
    text = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(12, 16)))
    letter = rng.choice(text)
    return f"How many {letter}'s are in {text}?", str(text.count(letter))


def _maximum(rng: random.Random) -> tuple[str, str]:
    """The largest of six or seven numbers of up to four digits; training has at most five of three."""
    values = rng.sample(range(10_000), rng.randint(6, 7))
    return f"What is the maximum of {', '.join(map(str, values))}?", str(max(values))


FAMILIES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "subtract_4": _subtract,
    "multiply_4": _multiply,
    "count_16": _count,
    "maximum_7": _maximum,
}


def problems(seed: int = 20250528) -> list[HeldOutProblem]:
    """PER_FAMILY problems of each family, families in turn, no problem twice."""
    rng, found, seen = random.Random(seed), [], set()
    for _ in range(PER_FAMILY):
        for family, make in FAMILIES.items():
            prompt, answer = make(rng)
            while prompt in seen:
                prompt, answer = make(rng)
            seen.add(prompt)
            found.append(HeldOutProblem(family, prompt, answer, "en"))
    return found


def main() -> None:
    lines = [json.dumps(problem._asdict(), ensure_ascii=False) for problem in problems()]
    (ASSETS / "hard.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
