"""Tasks on invented rows: right answers are right, wrong ones wrong, and nothing hostile hurts."""

import json
import os
import shutil
from collections.abc import Iterator

import pytest

from deepseek_fp4_plugin.evaluation.answers import boxed, choice_letter, code_block, last_number, without_thinking
from deepseek_fp4_plugin.evaluation.data import load_examples
from deepseek_fp4_plugin.evaluation.judge import Judge
from deepseek_fp4_plugin.evaluation.runner import graded
from deepseek_fp4_plugin.evaluation.sandbox import Sandbox
from deepseek_fp4_plugin.evaluation.task import Tools
from deepseek_fp4_plugin.evaluation.tasks import TASKS
from tests import evaluation_rows


def needs_bubblewrap() -> None:
    """CI installs it: there a missing sandbox is a failure."""
    if shutil.which("bwrap") is None and not os.environ.get("CI"):
        pytest.skip("bubblewrap (bwrap) is not installed")


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    with Judge() as judge:
        yield Tools(judge, Sandbox())


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return evaluation_rows.write(tmp_path_factory.mktemp("rows"))


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\n"


RIGHT = {
    "math_500": [["so \\boxed{0.75}"], ["\\boxed{x = 2}"]],
    "aime_2024": [["\\boxed{201}"]],
    "gsm8k": [["\\boxed{7 \\text{ pens}}"]],
    "mmlu_pro": [["...\nAnswer: C"], ["**Answer: B**"]],
    "livecodebench": [
        [fenced("a, b = map(int, input().split())\nprint(a + b)")],
        [fenced("class Solution:\n    def scale(self, values, by):\n        return [v * by for v in values]")],
    ],
    "scicode": [[fenced("def square(x):\n    return x ** 2"), fenced("def total(x):\n    return np.sum(square(x))")]],
}
WRONG = {
    "math_500": [["so \\boxed{\\frac{3}{5}}"], ["it is two, or not"]],
    "aime_2024": [["\\boxed{200}"]],
    "gsm8k": [["no idea"]],
    "mmlu_pro": [["Answer: A"], ["none of them"]],
    "livecodebench": [[fenced("print(5)")], ["no code"]],
    "scicode": [[fenced("def square(x):\n    return x * 3"), fenced("def total(x): return 1 / 0")]],
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_and_wrong_answers(name, tools, places):
    if name in ("livecodebench", "scicode"):
        needs_bubblewrap()
    examples, _ = load_examples(TASKS[name], places[name])
    assert len(examples) == len(RIGHT[name])  # LiveCodeBench's old problem is outside the window
    for example, right, wrong in zip(examples, RIGHT[name], WRONG[name], strict=True):
        thought = [f"<think>\n\\boxed{{9}} Answer: A\n</think>\n{text}" for text in right]
        assert all(grade.right for grade in graded(TASKS[name], example, thought, tools)), example.id
        assert not any(grade.right for grade in graded(TASKS[name], example, wrong, tools)), example.id
        cut_off = [f"<think>\nI think {text}" for text in right]  # an answer inside unfinished reasoning is none
        assert not any(grade.right for grade in graded(TASKS[name], example, cut_off, tools)), example.id


def test_gpqa_choices_are_shuffled_once_and_for_all(places):
    first, digest = load_examples(TASKS["gpqa_diamond"], places["gpqa_diamond"])
    again, same = load_examples(TASKS["gpqa_diamond"], places["gpqa_diamond"])
    assert first == again and digest == same
    for example in first:
        line = next(line for line in example.question.split("\n") if line.endswith(") right"))
        assert line[0] == example.gold
    assert len({example.gold for example in first}) > 1


def test_every_task_asks_its_questions(places):
    for name, path in places.items():
        for example in load_examples(TASKS[name], path)[0]:
            prompt = next(TASKS[name].conversation(example))
            assert example.extra.get("problem_description_main", example.question) in prompt
    assert "def square(x):\n    return 1" in _second_prompt(places)


def _second_prompt(places) -> str:
    example = load_examples(TASKS["scicode"], places["scicode"])[0][0]
    conversation = TASKS["scicode"].conversation(example)
    next(conversation)
    return conversation.send(fenced("def square(x):\n    return 1"))


def test_the_built_in_sets():
    held_out, _ = load_examples(TASKS["r1_nano"])
    hard, _ = load_examples(TASKS["r1_nano_hard"])
    assert len(held_out) > 400 and len(hard) == 320 and len({example.question for example in hard}) == 320


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read"),
        ("[1]\n", "JSON objects"),
        ('{"a": 1}\n', "its rows are not MATH-500's"),
        ("", "no row"),
        ('{"unique_id": "1", "problem": "", "answer": ""}\n' * 2, "the same id"),
    ],
)
def test_data_that_are_none(tmp_path, content, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        load_examples(TASKS["math_500"], path)


def test_hidden_tests_unpickle_to_text_only(tmp_path):
    import base64
    import pickle
    import zlib

    class Evil:
        def __reduce__(self):
            return (os.system, ("true",))

    row = dict(evaluation_rows.ROWS["livecodebench"][0])
    row["private_test_cases"] = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="UnpicklingError"):
        load_examples(TASKS["livecodebench"], path)


# What would take a quadratic or backtracking rule minutes.
HOSTILE = {
    "open boxes": "\\boxed{" * 200_000,
    "nested boxes": "\\boxed{" * 100_000 + "1" + "}" * 100_000,
    "braces": "{" * 500_000 + "}" * 500_000,
    "letters": "A " * 500_000,
    "answers": "answer is " * 100_000,
    "quotes": '"answer" : "' * 100_000,
    "spaces": "Answer:" + " " * 1_000_000,
    "stars": "*_" * 500_000 + "answer",
    "digits": "1" * 1_000_000,
    "commas": "1," * 500_000,
    "fences": "```\n" * 250_000,
    "thinking": "<think>" * 100_000 + "</think>" * 100_000,
    "unicode": "\u0661\u0662\U0001f600\ud800" * 100_000,
    "newlines": "\n" * 1_000_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_extraction_survives_hostile_text(kind):
    text = HOSTILE[kind]
    for rule in (boxed, choice_letter, code_block, last_number, without_thinking):
        rule(text)


HOSTILE_ANSWERS = [
    "9" * 9000, "9^{9^{9^{9^{9}}}}", "\\frac{" * 500 + "1" + "}{2}" * 500, "(" * 4000, "\\sqrt{" * 900, "\x00\ud800",
    "x^{1000000} + " * 200 + "1", "\\int" * 500, "1" * 20_000,
]  # fmt: skip


def test_the_judge_survives_hostile_answers():
    with Judge(seconds=1) as judge:
        for answer in HOSTILE_ANSWERS:
            assert judge.equal("7", answer)[0] is False, answer[:20]
        assert judge.equal("7", "7.0") == (True, "")  # and works afterwards
