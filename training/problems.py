"""Generated exercises with worked reasoning, in nine graded families, split by their operands."""

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from deepseek_fp4_plugin.assets.held_out import grade
from training import number_families, text_families
from training.exercise import Exercise

__all__ = ["FAMILIES", "Problem", "grade", "make_problem", "split_of"]

FAMILIES: dict[str, Callable[[random.Random, str], Exercise]] = {
    "add_subtract": number_families.add_subtract,
    "multiply": number_families.multiply,
    "compare": number_families.compare,
    "sort": number_families.sort,
    "count_letters": text_families.count_letters,
    "reverse": text_families.reverse,
    "dates_times": text_families.dates_times,
    "sequences": number_families.sequences,
    "word_problems": text_families.word_problems,
}
SPLITS = ("train", "test")
_TEST_SHARE = 8  # one set of operands in so many is kept out of training
DIRECTIVES = {
    "en": "Please reason step by step, and put your final answer within \\boxed{}.",
    "zh": "请一步一步推理，把最终答案放在\\boxed{}里。",
}


class Problem(NamedTuple):
    """prompt: the user's message.  reasoning: for the think block.  answer: what goes into the box.

    key: its operands in a canonical form, which decide the split.
    """

    family: str
    language: str
    prompt: str
    reasoning: str
    answer: str
    key: str = ""

    @property
    def response(self) -> str:
        """The text behind the reasoning."""
        sentence = {"en": "The answer is \\boxed{{{}}}.", "zh": "答案是\\boxed{{{}}}。"}[self.language]
        return sentence.format(self.answer)


def split_of(family: str, key: str) -> str:
    """The split that a set of operands belongs to, whatever the phrasing."""
    value = hashlib.blake2b(f"{family}:{key}".encode(), digest_size=4).digest()
    return "test" if int.from_bytes(value, "big") % _TEST_SHARE == 0 else "train"


def make_problem(rng: random.Random, family: str, split: str, language: str) -> Problem:
    """A problem of `family` whose operands belong to `split`; half of them with the step-by-step directive.

    language: en or zh. Raises KeyError for an unknown family or language, ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    make = FAMILIES[family]
    while True:
        exercise = make(rng, language)
        if split_of(family, exercise.key) == split:
            break
    prompt = exercise.prompt
    if rng.random() < 0.5:
        prompt += rng.choice(("\n", " ") if language == "en" else ("\n", "")) + DIRECTIVES[language]
    return Problem(family, language, prompt, exercise.reasoning, exercise.answer, exercise.key)
