"""Every form of record and file that calibration text may have, and several sources together."""

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from deepseek_fp4_plugin.quantization.calibration_data import CalibrationData, load_calibration
from deepseek_fp4_plugin.tokenizer import Tokenizer

QUESTION, ANSWER = "What is 2 + 3?", "It is 5."
ASKED = {"role": "user", "content": QUESTION}
CHAT = [ASKED, {"role": "assistant", "content": ANSWER}]
GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k/train.even.jsonl.gz"


@pytest.fixture(scope="module")
def tokenizer(tiny_with_tokenizer) -> Tokenizer:
    return Tokenizer.from_folder(tiny_with_tokenizer)


def load(name, tokenizer, samples=4, tokens=512, seed=0) -> CalibrationData:
    return load_calibration(name, tokenizer, samples, tokens, 1024, seed)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]}, CHAT),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": QUESTION}]},
            [{"role": "system", "content": "Be brief."}, ASKED],
        ),
        ({"conversations": CHAT, "id": 7}, CHAT),
        ({"question": QUESTION, "answer": ANSWER}, CHAT),
        ({"question": QUESTION}, [ASKED]),
        ({"question": QUESTION, "answer": None}, [ASKED]),
        ({"problem": QUESTION, "solution": ANSWER, "level": "Level 5"}, CHAT),
        ({"query": QUESTION, "response": ANSWER}, CHAT),
        ({"instruction": QUESTION, "input": "", "output": ANSWER}, CHAT),
        (
            {"instruction": "Add.", "input": "2 and 3", "output": ANSWER},
            [{"role": "user", "content": "Add.\n\n2 and 3"}, CHAT[1]],
        ),
        ({"messages": CHAT, "conversations": None}, CHAT),
    ],
)
def test_what_is_a_chat_goes_through_the_template(tmp_path, tokenizer, record, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    ids = tokenizer.encode_chat(expected, add_generation_prompt=False)
    assert load(tmp_path / "a.jsonl", tokenizer).samples == [ids]
    assert load(tmp_path / "a.jsonl", tokenizer, tokens=5).samples == [ids[:5]]


def test_texts_go_before_questions_and_ids_before_all(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Hello", "question": QUESTION, "answer": ANSWER}))
    assert load(tmp_path / "a.jsonl", tokenizer).samples == [tokenizer.encode("Hello")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Hello", "input_ids": list(range(40))}))
    assert load(tmp_path / "a.jsonl", tokenizer, tokens=16).samples == [list(range(16))]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": "hi"}, "record 1 of .*: conversations is not a list of objects with from and value"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "a turn from 'tool'; known are human, user, gpt"),
        ({"conversations": [{"from": "human", "value": 5}]}, "a turn from 'human'; .* with a text"),
        ({"question": ["x"]}, "record 1 of .*: question is list, expected a text"),
        ({"question": "x", "answer": {"text": "y"}}, "record 1 of .*: answer is dict, expected a text"),
        ({"input_ids": "1 2 3"}, "record 1 of .*: input_ids is not a list of token ids"),
        ({"input_ids": [1, -1]}, "input_ids is not a list of token ids"),
        ({"input_ids": [1, 2000]}, "token id 2000, but the model has 1024 tokens"),
    ],
)
def test_records_that_cannot_be_used_are_named_with_their_field(tmp_path, tokenizer, record, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path / "a.jsonl", tokenizer)
    assert "\n" not in str(raised.value)


ROWS = [{"question": f"What is {i} + 1?", "answer": f'It is "{i + 1}",\nplainly.'} for i in range(6)]


def separated(delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


FORMS = {
    "a.json": json.dumps(ROWS),
    "b.json": json.dumps({"version": 2, "data": ROWS}),
    "c.json": "\n".join(map(json.dumps, ROWS)),
    "a.csv": separated(","),
    "a.tsv": separated("\t"),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_gives_the_same(tmp_path, tokenizer, name, compressed):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    path = tmp_path / (f"{name}.gz" if compressed else name)
    content = ("\ufeff" + FORMS[name]).encode()
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert load(path, tokenizer).samples == load(tmp_path / "a.jsonl", tokenizer).samples


def test_one_object_is_one_record(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(json.dumps({"messages": CHAT}))
    assert load(tmp_path / "a.json", tokenizer).samples == [tokenizer.encode_chat(CHAT, add_generation_prompt=False)]


def test_a_field_of_a_csv_may_be_long_and_the_modules_limit_stays(tmp_path, tokenizer):
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "word " * 40_000 + "\n")
    assert load(tmp_path / "a.csv", tokenizer, tokens=64).num_tokens == 64
    assert csv.field_size_limit() == before


def test_several_sources_share_the_samples(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "b.csv").write_text("text\n" + "\n".join(f"Row {i} of many." for i in range(9)))
    (tmp_path / "c,d.csv").write_text("text\nOne text.\n")
    first, second = tmp_path / "a.jsonl", tmp_path / "b.csv"
    mixed = load(f"{first}, {second},builtin", tokenizer, samples=8, tokens=32)
    parts = [load(first, tokenizer, 3, 32), load(second, tokenizer, 3, 32), load("builtin", tokenizer, 2, 32)]
    assert mixed.samples == [sample for part in parts for sample in part.samples]
    assert mixed.description == (
        "the file a.jsonl (3 samples), the file b.csv (3 samples), the package's own text (2 samples)"
    )
    assert load(str(tmp_path / "c,d.csv"), tokenizer).samples == [tokenizer.encode("One text.")]
    with pytest.raises(ValueError, match="3 sources needs a sample of each, got 2"):
        load(f"{first},{second},builtin", tokenizer, samples=2)
    with pytest.raises(ValueError, match="names nothing between two commas, or at an end"):
        load(f"{first},", tokenizer)
    with pytest.raises(ValueError, match=r"absent\.txt cannot be read"):
        load(f"{first},{tmp_path}/absent.txt", tokenizer)


def test_real_questions_and_answers(tokenizer):
    if not GSM8K.is_file():
        pytest.skip("needs the shared GSM8K subset")
    data = load(GSM8K, tokenizer, samples=16, tokens=64)
    assert len(data.samples) == 16 and all(sample[0] == tokenizer.bos_id for sample in data.samples)


# ---------------------------------------------------------------- data sets of the hub


def repository(folder: Path, rows: list[dict], config: str, split: str) -> None:
    """A folder laid out as a data set's repository."""
    (folder / config).mkdir(parents=True)
    (folder / config / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n"
        f"    path: {config}/{split}.jsonl\n---\n"
    )


def test_any_data_set_through_the_real_library(tokenizer, tmp_path, monkeypatch):
    """The library prefers a folder of the data set's name to the hub."""
    pytest.importorskip("datasets", reason="needs datasets")
    rows = [{"question": "", "answer": None}, *ROWS]
    repository(tmp_path / "some" / "questions", rows, "main", "train")
    repository(tmp_path / "some" / "held-out.v2", ROWS, "hard", "test")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.chdir(tmp_path)
    expected = sorted(load("a.jsonl", tokenizer, samples=6).samples)
    for name, described in (
        ("some/questions", "some/questions (train)"),
        ("some/questions:main", "some/questions main (train)"),
        ("some/held-out.v2:hard:test", "some/held-out.v2 hard (test)"),
        ("some/held-out.v2::test", "some/held-out.v2 (test)"),
    ):
        data = load(name, tokenizer, samples=10)
        assert (sorted(data.samples), data.description) == (expected, described)
    assert len(load("some/questions,a.jsonl", tokenizer, samples=4).samples) == 4
    with pytest.raises(ValueError, match=r"some/held-out\.v2:hard cannot be fetched \(.*train"):
        load("some/held-out.v2:hard", tokenizer)
    with pytest.raises(ValueError, match="some/absent cannot be fetched"):
        load("some/absent", tokenizer)
