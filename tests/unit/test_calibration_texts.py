"""Calibration's texts: what becomes of files, records and chats, large and odd ones, refusals."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepseek_fp4_plugin.quantization.calibration_data import CalibrationData, load_calibration, token_batches
from deepseek_fp4_plugin.tokenizer import Tokenizer

CNN_SUBSET = Path(__file__).parents[3] / "shared/data/cnn_dailymail/validation_subset_1000.jsonl.gz"
TEXT = "A week has seven days.\n\nThe earth goes around the sun in one year. 1+1=2.\n" * 40


@pytest.fixture(scope="module")
def tokenizer(tiny_with_tokenizer) -> Tokenizer:
    return Tokenizer.from_folder(tiny_with_tokenizer)


def load(name, tokenizer, samples=4, tokens=16, seed=0, vocab_size=1024) -> CalibrationData:
    return load_calibration(name, tokenizer, samples, tokens, vocab_size, seed)


def test_plain_text_is_cut_into_stretches_chosen_by_seed(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    ids = tokenizer.encode(TEXT)
    data = load(path, tokenizer)
    assert len(data.samples) == 4 and len({tuple(sample) for sample in data.samples}) > 1
    for sample in data.samples:
        assert len(sample) == 16
        assert any(ids[start : start + 16] == sample for start in range(0, len(ids), 16))
    assert load(path, tokenizer) == data
    assert load(path, tokenizer, seed=1).samples != data.samples
    assert load(path, tokenizer, seed=1).digest != data.digest
    assert load(path, tokenizer, samples=10**6).samples  # fewer stretches than asked for: all of them


def test_a_text_shorter_than_one_sample_is_used_whole(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("Hello")
    assert load(tmp_path / "a.txt", tokenizer).samples == [tokenizer.encode("Hello")]


@pytest.mark.parametrize("field", ["text", "article", "content"])
def test_records_are_one_sample_each(tmp_path, tokenizer, field):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, field: f"Record number {i} and its text."}) for i in range(9)))
    data = load(path, tokenizer)
    texts = [tokenizer.decode(sample) for sample in data.samples]
    assert all(text == "Record number "[: len(text)] or text.startswith("Record number ") for text in texts)
    assert len(set(texts)) == 4 and max(map(len, data.samples)) == 16


def test_chats_go_through_the_template(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    expected = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert load(tmp_path / "chat.jsonl", tokenizer, tokens=512).samples == [expected]


def test_gzipped_files(tmp_path, tokenizer):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "Hello"}))
    assert load(tmp_path / "a.jsonl.gz", tokenizer).samples == [tokenizer.encode("Hello")]


def test_parquet(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": [1, 2], "article": ["First article.", "Second article."]})
    parquet.write_table(table, tmp_path / "a.parquet")
    texts = {tokenizer.decode(sample) for sample in load(tmp_path / "a.parquet", tokenizer).samples}
    assert texts == {"First article.", "Second article."}
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"b\.parquet is not a readable Parquet file"):
        load(tmp_path / "b.parquet", tokenizer)


def test_the_cnn_dailymail_subset(tokenizer):
    if not CNN_SUBSET.is_file():
        pytest.skip("needs the shared cnn_dailymail subset")
    data = load(CNN_SUBSET, tokenizer, samples=32, tokens=64)
    assert len(data.samples) == 32 and data.num_tokens == 32 * 64


def test_builtin_text(tokenizer):
    data = load("builtin", tokenizer, samples=8, tokens=64)
    assert len(data.samples) == 8 and data.description == "the package's own text"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, r"absent\.txt cannot be read: .*No such file"),
        ("latin.txt", b"\xff\xfe\xfa", r"latin\.txt cannot be read"),
        ("bad.jsonl", b'{"text": "x"}\n{"text": \n', r"line 2 of .*bad\.jsonl is not JSON"),
        ("list.jsonl", b"[1]\n", r"line 1 of .*list\.jsonl is a JSON list"),
        ("fields.jsonl", b'{"body": "x"}\n', r"record 1 of .* none of the fields text, .*; it has body"),
        ("roles.jsonl", b'{"messages": "hello"}\n', r"record 1 of .*: messages is not a list"),
        ("empty.jsonl", b"\n", r"empty\.jsonl holds no text"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz cannot be read"),
        (
            "b.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:12] + b"\xff" * 20,
            r"b\.jsonl\.gz cannot be read",
        ),
        ("deep.jsonl", b"[" * 100_000, r"line 1 of .*deep\.jsonl is not JSON"),
        ("long.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"line 1 of .*long\.jsonl is not JSON"),
        ("data.csv", b"a,b\n", r"data\.csv holds no text"),
        ("data.csv", b"a,b\n1,2\n", r"record 1 of .* has none of the fields text, .*; it has a, b"),
        ("wide.csv", b"text\nx,y,z\n", r"a line of .*wide\.csv has more fields than its first line names"),
        ("data.json", b"{", r"data\.json is not JSON"),
        ("data.json", b"[1]", r"entry 1 of .*data\.json is a JSON int"),
        ("a.xml", b"<a/>", r"neither cnn_dailymail, builtin nor a \.txt, \.jsonl, .* nor a data set's id"),
        ("wikitext", None, r"neither cnn_dailymail, builtin nor a \.txt"),
    ],
)
def test_unusable_files_are_one_clear_sentence(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / name, tokenizer)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"token id \d+, but the model has 50 tokens"):
        load("builtin", tokenizer, vocab_size=50)


def test_cnn_dailymail_without_the_library_says_what_to_do(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the `datasets` package .*pass a \.txt, \.jsonl or \.parquet file"):
        load("cnn_dailymail", tokenizer)


def test_cnn_dailymail_that_cannot_be_fetched_says_what_to_do(tokenizer, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'abisee/cnn_dailymail' on the Hub\nlong story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"cannot be fetched \(Couldn't reach .* on the Hub\); pass a \.txt"):
        load("cnn_dailymail", tokenizer)


def test_cnn_dailymail_is_asked_for_as_the_card_names_it(tokenizer, monkeypatch):
    asked = {}

    class Stream(list):
        def shuffle(self, seed, buffer_size):
            asked["seed"] = seed
            return self

        def take(self, count):
            return self[:count]

    def load_dataset(*args, **kwargs):
        asked["args"], asked["kwargs"] = args, kwargs
        return Stream({"article": f"Article {i} of many, and long enough."} for i in range(100))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = load("cnn_dailymail", tokenizer, samples=3, seed=5)
    assert asked["args"] == ("abisee/cnn_dailymail", "3.0.0")
    assert asked["kwargs"] == {"split": "train", "streaming": True} and asked["seed"] == 5
    assert len(data.samples) == 3 and tokenizer.decode(data.samples[1]) == "Article 1 of man"
    assert "cnn_dailymail" in data.description


def test_cnn_dailymail_through_the_real_library(tokenizer, tmp_path, monkeypatch):
    """A folder laid out as the data set's repository and named as it: the library prefers it to the hub."""
    pytest.importorskip("datasets", reason="needs datasets")
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "abisee" / "cnn_dailymail"
    (folder / "3.0.0").mkdir(parents=True)
    rows = [f"Article {i:03d} says something." for i in range(50)]
    table = pyarrow.table({"article": rows, "highlights": rows, "id": rows})
    parquet.write_table(table, folder / "3.0.0" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: 3.0.0\n  data_files:\n  - split: train\n    path: 3.0.0/train-*\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    found = [load("cnn_dailymail", tokenizer, samples=5, tokens=64, seed=seed).samples for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    texts = {tokenizer.decode(sample) for sample in found[0]}
    assert len(texts) == 5 and texts <= set(rows)


def test_batches_hold_whole_samples():
    samples = [[0] * size for size in (5, 5, 5, 20, 1)]
    assert list(token_batches(samples, 10)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(token_batches(samples, 1000)) == [(0, 5)]


# ---------------------------------------------------------------- large and odd inputs


class CountingTokenizer:
    """The tokenizer, and how many characters it was given."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.characters += len(text)
        return self.tokenizer.encode(text, add_special_tokens)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def large_text(characters: int) -> str:
    words = ["week", "seven", "days", "earth", "sun", "one", "year", "12+7=19"]
    generator = torch.Generator().manual_seed(3)
    picks = torch.randint(0, len(words), (characters // 5,), generator=generator).tolist()
    return "".join(f"{words[pick]}{chr(10) if pick == 0 else ' '}" for pick in picks)[:characters]


def test_of_a_large_text_only_what_is_needed_is_tokenized(tmp_path, tokenizer):
    text = large_text(3 * 2**20)
    (tmp_path / "a.txt").write_text(text)
    counting = CountingTokenizer(tokenizer)
    data = load(tmp_path / "a.txt", counting, samples=4, tokens=32)
    assert [len(sample) for sample in data.samples] == [32] * 4 and counting.characters < 30_000
    for sample in data.samples:
        assert tokenizer.decode(sample) in text
    assert load(tmp_path / "a.txt", tokenizer, samples=4, tokens=32) == data
    other = load(tmp_path / "a.txt", tokenizer, samples=4, tokens=32, seed=1)
    assert other.samples != data.samples
    places = [text.index(tokenizer.decode(sample)) for sample in (*data.samples, *other.samples)]
    assert max(places) > len(text) // 2  # not only its beginning


def test_of_a_large_text_all_is_used_when_all_is_asked_for(tmp_path, tokenizer):
    text = large_text(2**20 + 5000)
    (tmp_path / "a.txt").write_text(text)
    data = load(tmp_path / "a.txt", tokenizer, samples=10**6, tokens=2048)
    whole = len(tokenizer.encode(text))
    assert whole - 2048 < data.num_tokens <= whole + 300  # cut between words, not quite as in one piece
    assert len({tuple(sample) for sample in data.samples}) == len(data.samples)


def test_a_text_up_to_a_million_characters_is_cut_as_ever(tmp_path, tokenizer):
    """The same batches as the first version's, by its own few lines."""
    text = large_text(200_000)
    (tmp_path / "a.txt").write_text(text)
    ids = tokenizer.encode(text)
    cut = [ids[start : start + 32] for start in range(0, max(len(ids) - 32, 0) + 1, 32)]
    expected = [cut[index] for index in random.Random(7).sample(range(len(cut)), 50)]
    assert load(tmp_path / "a.txt", tokenizer, samples=50, tokens=32, seed=7).samples == expected


@pytest.mark.parametrize(
    "text", ["a" * (2 * 2**20), " " * (2 * 2**20), "学" * (2**20 + 7)], ids=["one", "blank", "cjk"]
)
def test_large_texts_without_words(tmp_path, tokenizer, caplog, text):
    (tmp_path / "a.txt").write_text(text)
    data = load(tmp_path / "a.txt", tokenizer, samples=4, tokens=32)
    assert [len(sample) for sample in data.samples] == [32] * 4
    assert "different; is this the right text?" in caplog.text


@pytest.mark.parametrize("form", ["text", "messages"])
def test_of_a_long_record_only_its_beginning_is_tokenized(tmp_path, tokenizer, form):
    text = large_text(2**20)
    record = {"text": text} if form == "text" else {"messages": [{"role": "user", "content": text}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    counting = CountingTokenizer(tokenizer)
    whole = tokenizer.encode(text) if form == "text" else tokenizer.encode_chat(record["messages"])
    assert load(tmp_path / "a.jsonl", counting, tokens=500).samples == [whole[:500]]
    assert counting.characters < 100_000


def test_records_are_chosen_as_ever_and_not_kept(tmp_path, tokenizer):
    rows = [f"Record number {i} and its text." for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    expected = [tokenizer.encode(rows[i])[:16] for i in random.Random(5).sample(range(300), 20)]
    assert load(tmp_path / "a.jsonl", tokenizer, samples=20, seed=5).samples == expected


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer, name):
    content = "Hello" if ".txt" in name else '{"text": "Hello"}\n\ufeff{"text": "Hello"}\n'
    data = ("\ufeff" + content).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert {tuple(sample) for sample in load(tmp_path / name, tokenizer).samples} == {tuple(tokenizer.encode("Hello"))}


BLANKS = [None, "Only text.", "", "  \n", "Other text."]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_waited_for(tmp_path, tokenizer, make):
    make(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read: it is not a regular file"):
        load(tmp_path / "a.jsonl", tokenizer)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_without_text_are_left_out_and_counted(tmp_path, tokenizer, caplog, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in BLANKS))
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": BLANKS}), path)
    data = load(path, tokenizer, samples=2)
    assert {tokenizer.decode(sample) for sample in data.samples} == {"Only text.", "Other text."}
    assert f"3 of the 5 records of {path} have no text and are left out" in caplog.text


def test_records_that_are_all_without_text(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "", "messages": null}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl holds no text to calibrate on"):
        load(tmp_path / "a.jsonl", tokenizer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 5}, "record 1 of .*: text is int, expected a text"),
        ({"text": ["a"], "id": 1}, "record 1 of .*: text is list, expected a text"),
        ({"text": "\ud800"}, "record 1 of .*: the text is not valid Unicode at character 0"),
        ({"id": 1}, "record 1 of .* has none of the fields text, .*; it has id"),
    ],
)
def test_records_of_the_wrong_kind_are_named_with_their_field(tmp_path, tokenizer, record, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.jsonl", tokenizer)


@pytest.mark.parametrize(("text", "tokens"), [("x", 1), ("      ", None)])
def test_too_little_text_is_said_with_counts(tmp_path, tokenizer, caplog, text, tokens):
    (tmp_path / "a.txt").write_text(text)
    data = load(tmp_path / "a.txt", tokenizer, samples=4, tokens=32)
    assert tokens in (None, data.num_tokens)
    assert f"a.txt gives {data.num_tokens} tokens in 1 samples, of 128 asked for" in caplog.text
    assert "different; is this the right text?" in caplog.text


def test_enough_text_is_no_reason_for_a_warning(tokenizer, caplog):
    load("builtin", tokenizer, samples=4, tokens=32)
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
def test_memory_of_a_large_text(tiny_with_tokenizer, tmp_path):
    """128 tokens of 16 MB: the text itself and what decoding it takes. Tokenizing all of it takes some 3 GB."""
    (tmp_path / "a.txt").write_text(large_text(16_000_000))
    code = (
        "import re, sys\nfrom deepseek_fp4_plugin.quantization.calibration_data import load_calibration\n"
        "from deepseek_fp4_plugin.tokenizer import Tokenizer\ntokenizer = Tokenizer.from_folder(sys.argv[1])\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024\n"
        "before = peak()\nassert load_calibration(sys.argv[2], tokenizer, 4, 32, 1024).num_tokens == 128\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(tiny_with_tokenizer), str(tmp_path / "a.txt")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    print(f"peak memory of 128 tokens of a 16 MB text: {int(done.stdout) / 1e6:.0f} MB above the start")
    assert int(done.stdout) < 100_000_000
