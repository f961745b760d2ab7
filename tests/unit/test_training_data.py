"""The exercises r1_nano learns from: right, apart from the test split, packed whole; and how answers are graded."""

import random
import re

import numpy as np
import pytest

from deepseek_fp4_plugin.assets.held_out import boxed, grade, load_held_out
from training.data import Documents, batches, pack
from training.held_out import PER_FAMILY, calibration_text, problems
from training.problems import FAMILIES, make_problem, split_of
from training.tokenizer import END_THINK, CharacterEncoder, token_texts

STEP = re.compile(r"(?<![\d+×/.-])(\d+)([-+×/])(\d+)(?:([-+])(\d+))?=(\d+)")
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "×": lambda a, b: a * b, "/": lambda a, b: a / b}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_written_step_is_right_and_leads_to_the_answer(family):
    rng, steps = random.Random(1), 0
    for i in range(600):
        problem = make_problem(rng, family, "train", "zh" if i % 4 == 0 else "en")
        for a, sign, b, second, c, result in STEP.findall(problem.reasoning):
            value = OPERATIONS[sign](int(a), int(b))
            if second:
                value = OPERATIONS[second](value, int(c))
            assert value == int(result), problem.reasoning
            steps += 1
        if family != "compare":  # whose answer may be a word or a sign
            assert problem.reasoning.endswith(problem.answer), problem
        assert grade(problem.answer, f"<think>\n{problem.reasoning}\n</think>\n\n{problem.response}")
    assert steps > 600 or family in ("compare", "sort", "count_letters", "reverse")


def test_answers_agree_with_a_second_way_of_finding_them():
    rng = random.Random(2)
    for _ in range(400):
        p = make_problem(rng, "reverse", "test", "en")
        assert p.answer[::-1] in p.prompt
        p = make_problem(rng, "multiply", "test", "en")
        a, b = map(int, re.findall(r"\d+", p.prompt)[:2])
        assert int(p.answer) == a * b
        p = make_problem(rng, "sort", "test", "en")
        values = [int(v) for v in re.findall(r"\d+", p.prompt.partition("Please reason")[0])]
        assert [int(v) for v in p.answer.split(", ")] in (sorted(values), sorted(values, reverse=True))


def test_splits_share_no_operands():
    rng = random.Random(3)
    for family in FAMILIES:
        keys = {s: {make_problem(rng, family, s, "en").key for _ in range(400)} for s in ("train", "test")}
        assert not keys["train"] & keys["test"]
        assert {split_of(family, key) for key in keys["test"]} == {"test"}
    with pytest.raises(ValueError, match="not one of train, test"):
        make_problem(rng, "sort", "valid", "en")


def test_shipped_problems_are_the_generated_ones_and_balanced():
    shipped = load_held_out()
    assert shipped == problems()
    assert len(shipped) == len(FAMILIES) * PER_FAMILY >= 500
    assert [p.family for p in shipped[: len(FAMILIES)]] == list(FAMILIES)
    assert any(p.language == "zh" for p in shipped)
    text = calibration_text()
    messages = {p.prompt.partition("Please reason")[0].strip() for p in shipped if len(p.prompt) > 20}
    assert not [m for m in messages if f"<｜User｜>{m}" in text]  # calibration is training data


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>\n\\boxed{1}\n</think>\n\nThe answer is \\boxed{12, 5}.", True),
        ("\\boxed{12,5}", True),
        ("\\boxed{1}, no: \\boxed{12，5}", True),
        ("</think> \\boxed{12, 5} or rather \\boxed{5, 12}", False),
        ("<think> \\boxed{12, 5}</think> I do not know", False),
        ("12, 5", False),
        ("\\boxed{12, 5", False),
    ],
)
def test_grading(text, right):
    assert grade("12, 5", text) is right


def test_boxes_nest():
    assert boxed("\\boxed{\\frac{1}{2}} and then \\boxed{open") == "\\frac{1}{2}"


def test_packing_keeps_documents_whole():
    batch = pack(Documents(5, []), 16, 512)
    end, texts = CharacterEncoder().special["<｜end▁of▁sentence｜>"], token_texts()
    for row in range(16):
        for number in range(batch.documents[row].max() + 1):
            inside = batch.documents[row] == number
            assert (batch.positions[row, inside] == np.arange(inside.sum())).all()
            ids = batch.ids[row, inside]
            assert ids[-1] == end
            text = "".join(texts[i] for i in ids)
            assert text.count("<think>") == text.count(END_THINK) <= 1
    assert (batch.weights[batch.documents < 0] == 0).all()
    assert (batch.documents >= 0).mean() > 0.9


def test_batches_repeat_with_the_seed():
    one, other = (next(batches(9, 0, [], 4096, 512)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, other, strict=True))
