"""Structured output without a model: masks allow what the grammar allows, drafts included, after thinking only."""

import json
import random
import re

import numpy as np
import pytest
import torch

from deepseek_fp4_plugin.config import GuidedDecodingParams
from deepseek_fp4_plugin.engine.grammar import Thinking, compile_grammar, thinking_after
from deepseek_fp4_plugin.tokenizer import Tokenizer
from tests.end_to_end.server_process import R1_NANO

VOCABULARY = 1024  # r1_nano's rows; its tokenizer has fewer tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(R1_NANO)


def allowed(row: np.ndarray) -> set[int]:
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return set(np.nonzero(bits)[0].tolist())


def walk(tokenizer, state, seed: int, limit: int = 400) -> str:
    """A random text of the grammar: a token drawn from each mask until only the end is left."""
    rng, ids = random.Random(seed), []
    while len(ids) < limit:
        choices = sorted(allowed(state.masks([])[0]))
        assert choices, "a mask that allows nothing"
        assert max(choices) < tokenizer.vocab_size
        # An end is taken whenever it may be, so that free lists end.
        token = tokenizer.eos_id if tokenizer.eos_id in choices else rng.choice(choices)
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        state.advance([token])
    else:
        raise AssertionError(f"no end: {tokenizer.decode(ids)[:200]}")
    return tokenizer.decode(ids)


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "bc"]},
        "count": {"type": "integer", "minimum": 3, "maximum": 12},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["kind", "count", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_every_text_of_a_schema_is_valid(tokenizer, seed):
    value = json.loads(walk(tokenizer, compile_grammar(tokenizer, GuidedDecodingParams(json=SCHEMA), VOCABULARY), seed))
    assert set(value) == {"kind", "count", "tags"}
    assert value["kind"] in ("a", "bc")
    assert 3 <= value["count"] <= 12
    assert len(value["tags"]) <= 3


@pytest.mark.parametrize(
    ("params", "pattern"),
    [
        (GuidedDecodingParams(regex=r"[a-c]{2,4}\d"), r"[a-c]{2,4}\d"),
        (GuidedDecodingParams(choice=['say "hi"\n', "谢谢", "\\ {}"]), r'say "hi"\n|谢谢|\\ \{\}'),
        (GuidedDecodingParams(grammar='root ::= "x" item item\nitem ::= [0-9] | "yes"'), r"x([0-9]|yes){2}"),
        (GuidedDecodingParams(grammar='start: "x" /[0-9]/'), r"x[0-9]"),
    ],
)
def test_every_text_of_a_grammar_matches(tokenizer, params, pattern):
    for seed in range(5):
        assert re.fullmatch(pattern, walk(tokenizer, compile_grammar(tokenizer, params, VOCABULARY), seed))


def test_masks_after_drafts_are_those_of_having_advanced(tokenizer):
    state = compile_grammar(tokenizer, GuidedDecodingParams(json=SCHEMA), VOCABULARY)
    ids = tokenizer.encode('{"kind": "bc", "count": 7', add_special_tokens=False)
    for start in range(len(ids) - 3):
        drafts = ids[start : start + 3]
        ahead = state.masks(drafts)
        again = state.masks(drafts)
        assert (ahead == again).all(), "masks() changed the state"
        stepped = compile_grammar(tokenizer, GuidedDecodingParams(json=SCHEMA), VOCABULARY)
        stepped.advance(ids[:start])
        for i in range(4):
            assert (stepped.masks([])[0] == ahead[i]).all()
            stepped.advance(drafts[i : i + 1])
        state.advance(ids[start : start + 1])


def test_a_draft_that_is_not_allowed_shows_in_its_mask(tokenizer):
    state = compile_grammar(tokenizer, GuidedDecodingParams(choice=["ab"]), VOCABULARY)
    a, b, x = (tokenizer.encode(c, add_special_tokens=False)[0] for c in "abx")
    masks = state.masks([a, x, b])
    assert allowed(masks[0]) == {a}
    assert allowed(masks[1]) == {b}
    state.advance([a, b])
    assert state.finished
    assert allowed(state.masks([])[0]) == {tokenizer.eos_id}
    # Drafts beyond the end do no harm.
    state = compile_grammar(tokenizer, GuidedDecodingParams(choice=["ab"]), VOCABULARY)
    assert allowed(state.masks([a, b, tokenizer.eos_id, a])[2]) == {tokenizer.eos_id}
    assert allowed(state.masks([])[0]) == {a}


def test_thinking_is_let_alone_until_it_is_closed(tokenizer):
    start, end, eos = tokenizer.think_start_id, tokenizer.think_end_id, tokenizer.eos_id
    a, b, x = (tokenizer.encode(c, add_special_tokens=False)[0] for c in "abx")
    choice = GuidedDecodingParams(choice=["ab"])
    state = compile_grammar(tokenizer, choice, VOCABULARY, Thinking.POSSIBLE)
    assert allowed(state.masks([])[0]) == {a, start}
    # Over the boundary within one step's drafts: thinking, its end, the grammar.
    masks = state.masks([start, x, end, a])
    assert {x, end, start} <= allowed(masks[1])
    assert eos not in allowed(masks[1])
    assert allowed(masks[3]) == {a}
    assert allowed(masks[4]) == {b}
    state.advance([start, x, x])
    assert x in allowed(state.masks([])[0])
    state.advance([end])
    assert allowed(state.masks([])[0]) == {a}
    state.advance([a, b])
    assert state.finished
    assert allowed(compile_grammar(tokenizer, choice, VOCABULARY, Thinking.OVER).masks([])[0]) == {a}


def test_relaxed_acceptance_never_takes_what_the_grammar_forbids():
    from deepseek_fp4_plugin.engine.speculative import passes_relaxed

    logits = torch.zeros(1, 1, 8)
    logits[..., 3:] = -torch.inf  # three tokens are left, a third each: below delta
    passed = [
        passes_relaxed(logits, torch.tensor([[d]]), torch.tensor([8]), torch.tensor([0.6]), 8).item() for d in range(8)
    ]
    assert passed == [True] * 3 + [False] * 5


def test_whether_a_prompt_leaves_room_for_thinking(tokenizer):
    user = tokenizer.encode_chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    start, end = tokenizer.think_start_id, tokenizer.think_end_id
    assert thinking_after(user, tokenizer) is Thinking.POSSIBLE
    assert thinking_after([*user, start, 100], tokenizer) is Thinking.OPEN
    assert thinking_after([*user, start, 100, end, 100], tokenizer) is Thinking.OVER
    assert thinking_after(tokenizer.encode("plain text"), tokenizer) is Thinking.OVER


@pytest.mark.parametrize(
    "params",
    [
        GuidedDecodingParams(regex="(a"),
        GuidedDecodingParams(regex="(?=a)b"),
        GuidedDecodingParams(json={"type": "nonsense"}),
        GuidedDecodingParams(json={"not": {"type": "string"}}),
        GuidedDecodingParams(json="[1]"),
        GuidedDecodingParams(json="{"),
        GuidedDecodingParams(grammar="root ::= ("),
        GuidedDecodingParams(grammar="garbage ("),
        GuidedDecodingParams(choice=[]),
        GuidedDecodingParams(choice=["a", ""]),
        GuidedDecodingParams(),
    ],
)
def test_what_cannot_be_enforced_is_one_sentence(tokenizer, params):
    with pytest.raises(ValueError, match=r".") as caught:
        compile_grammar(tokenizer, params, VOCABULARY)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_refusal_names_it(tokenizer, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="llguidance"):
        compile_grammar(tokenizer, GuidedDecodingParams(choice=["a"]), VOCABULARY)
