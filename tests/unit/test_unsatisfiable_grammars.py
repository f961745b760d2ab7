"""Structured output that no text satisfies is refused before it begins; what can be satisfied meets no dead end."""

import json
import random

import numpy as np
import pytest

from deepseek_fp4_plugin.config import GuidedDecodingParams
from deepseek_fp4_plugin.engine.grammar import GrammarError, GrammarState, compile_grammar
from deepseek_fp4_plugin.engine.lark_check import endless_rule
from deepseek_fp4_plugin.engine.schema_check import without_endless_parts
from deepseek_fp4_plugin.tokenizer import Tokenizer
from tests.end_to_end.server_process import R1_NANO
from tests.unit.test_grammar import VOCABULARY, allowed, walk

LOOP = {"n": {"$ref": "#/$defs/n"}}
TWO_STEPS = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
ENDLESS = {"N": {"type": "object", "properties": {"next": {"$ref": "#/$defs/N"}}, "required": ["next"]}}
LIST = {"type": "array", "items": {"$ref": "#/$defs/L"}, "minItems": 1}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(R1_NANO)


IMPOSSIBLE_SCHEMAS = [
    {"$ref": "#/$defs/n", "$defs": LOOP},
    {"$ref": "#/$defs/a", "$defs": TWO_STEPS},
    {"$ref": "#"},
    {"allOf": [{"$ref": "#"}]},
    {"anyOf": [{"$ref": "#"}]},
    {"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}}, "required": ["x"], "$defs": LOOP},
    {"$ref": "#/$defs/N", "$defs": ENDLESS},
    {"type": "object", "properties": {"x": {"$ref": "#/$defs/N"}}, "required": ["x"], "$defs": ENDLESS},
    {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["x"]},
    {"type": "object", "patternProperties": {"^x": {"$ref": "#"}}, "required": ["xy"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
    {"$ref": "#/$defs/L", "$defs": {"L": LIST}},
    {"anyOf": [{"$ref": "#/$defs/N"}, {"$ref": "#/$defs/L"}], "$defs": {**ENDLESS, "L": LIST}},
    {"type": "object", "properties": {"n": {"$ref": "#"}}, "allOf": [{"required": ["n"]}]},
    {"type": "object", "properties": {"n": {"$ref": "#"}}, "anyOf": [{"required": ["n"]}]},
    {"anyOf": []},
    {"anyOf": [False, False]},
    {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 3}, {"enum": []}]},
    {"enum": []},
    {"const": 1, "type": "string"},
    {"enum": [1, 2], "type": "string"},
    {"allOf": [{"const": 1}, {"const": 2}]},
    {"type": "integer", "minimum": 5, "maximum": 3},
    {"type": "integer", "minimum": 1, "maximum": 4, "multipleOf": 5},
    {"type": "string", "minLength": 5, "maxLength": 3},
    {"type": "string", "pattern": "^a{5}$", "maxLength": 3},
    {"type": "string", "pattern": r"[^\s\S]"},
    {"type": "array", "minItems": 3, "maxItems": 2},
    {"type": "array", "items": False, "minItems": 1},
    {"type": "object", "minProperties": 3, "maxProperties": 1},
    {"type": "object", "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"type": "object", "patternProperties": {"^a": False}, "required": ["abc"]},
    {"type": []},
]
WRONG_SCHEMAS = [
    {"$ref": "#/nowhere"}, {"$ref": 5}, {"properties": []}, {"required": "x"}, {"minimum": "x"},
    {"type": "string", "format": "nonsense"}, {"patternProperties": {"(": {}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", [*IMPOSSIBLE_SCHEMAS, *WRONG_SCHEMAS], ids=lambda s: json.dumps(s)[:70])
def test_a_schema_that_no_text_satisfies_is_refused(tokenizer, schema):
    with pytest.raises(GrammarError, match=r"this JSON schema cannot be enforced: .") as caught:
        compile_grammar(tokenizer, GuidedDecodingParams(json=schema), VOCABULARY)
    assert "\n" not in str(caught.value) and "<state>" not in str(caught.value)


@pytest.mark.parametrize(
    "params",
    [
        {"regex": r"[^\s\S]"},
        {"regex": r"a[^\s\S]"},
        {"regex": "a{5,3}"},
        {"regex": "\\"},
        {"regex": "a\\"},
        {"regex": "(a{1000}){1000}"},
        {"regex": "(" * 3000 + "a" + ")" * 3000},
        {"grammar": "root ::= foo"},
        {"grammar": 'foo ::= "a"'},
        {"grammar": 'root ::= root "a"'},
        {"grammar": 'root ::= "a" root'},
        {"grammar": "root ::= a\na ::= b\nb ::= a"},
        {"grammar": 'root ::= "a" | bad\nbad ::= "b" bad'},
        {"grammar": "root ::= (((("},
        {"grammar": "::="},
        {"grammar": 'start: start "a"'},
        {"grammar": 'start: "a" start'},
        {"grammar": 'start: "x" (a | b)\na: "1" a\nb: "2" b'},
        {"grammar": 'start: "x" b?\nb: "y" b'},
        {"grammar": "start: /[^\\s\\S]/"},
        {"grammar": 'start: "a" | "b" /[^\\s\\S]/'},
        {"grammar": 'start: A\nA: "a" & "b"'},
        {"grammar": 'start: A\nA: A "x" | "y"'},
        {"grammar": 'start: %json {"$ref":"#"}'},
        {"grammar": 'start: %json {"enum":[]}'},
        {"grammar": "start: foo"},
        {"grammar": "start: @x"},
        {"grammar": "start: x{3,2}\nx: \"a\""},
        {"choice": []},
    ],
    ids=lambda p: str(p)[:60],
)  # fmt: skip
def test_a_grammar_that_is_wrong_or_never_ends_is_refused(tokenizer, params):
    with pytest.raises(GrammarError, match=r"cannot be enforced: .") as caught:
        compile_grammar(tokenizer, GuidedDecodingParams(**params), VOCABULARY)
    assert "\n" not in str(caught.value) and "<state>" not in str(caught.value)


@pytest.mark.parametrize(
    ("grammar", "rule"),
    [
        ('start: start "a" | "b"', None),
        ('start: a\na: "x" a?', None),
        ('start: a\na: "x" (a | "y")', None),
        ('start: "(" start ")" | "x"', None),
        ('start: a{0,3}\na: "x" b\nb: a', "b"),
        ('start: "ok"\nunused: "x" unused', None),
        ('start: [a] "b"\na: a', "a"),
        ('start: %json {"a": "}"} | b\nb: "x" -> y\n  | b', None),
        ('%import common.INT\nstart: INT "," tail // a note\ntail: INT tail', "tail"),
        ('start: "a".."z" b\nb: b "c"\n  | "d"', None),
        ("start: <think> a~2..3\na[temperature=0.5]: a /x/", "a"),
        ("what is this §", None),
    ],
)
def test_rules_that_never_end(grammar, rule):
    assert endless_rule(grammar) == rule


NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/T"}}, "required": ["v"],
        "additionalProperties": False}  # fmt: skip
POSSIBLE = [
    # A branch, a property or items that never end are kept away from; the rest stands.
    {"anyOf": [{"$ref": "#/$defs/N"}, {"const": 7}], "$defs": ENDLESS},
    {"type": "object", "properties": {"c": {"$ref": "#/$defs/N"}, "b": {"const": 1}}, "required": ["b"],
     "additionalProperties": False, "$defs": ENDLESS},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "array", "items": {"$ref": "#/$defs/N"}, "$defs": ENDLESS},
    {"$ref": "#/$defs/T", "$defs": {"T": NODE}},
    {"$ref": "#/$defs/a~1b/c%20d", "$defs": {"a/b": {"c d": {"const": "x"}}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", POSSIBLE, ids=lambda s: json.dumps(s)[:70])
def test_what_can_end_does(tokenizer, schema):
    for seed in range(6):
        state = compile_grammar(tokenizer, GuidedDecodingParams(json=schema), VOCABULARY)
        json.loads(walk(tokenizer, state, seed, limit=3000))


def test_only_what_never_ends_is_changed():
    schema = {"properties": {"a": {"$ref": "#/$defs/T"}}, "$defs": {"T": NODE}}
    assert without_endless_parts(schema) is schema
    mixed = {"properties": {"bad": {"$ref": "#/$defs/N"}, "good": {"type": "null"}}, "$defs": ENDLESS}
    before = json.dumps(mixed)
    mended = without_endless_parts(mixed)
    assert mended["properties"] == {"bad": False, "good": {"type": "null"}}
    assert json.dumps(mixed) == before


def test_schemas_too_deep_to_be_read_are_refused_not_crashed_on():
    deep: dict = {"type": "array"}
    for _ in range(100_000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ValueError, match="nested too deeply"):
        without_endless_parts(deep)


class Matcher:
    """A stand-in for the library's: a trie of allowed texts over letters, with dead ends that it finds on the way."""

    def __init__(self, fails_after: tuple[int, ...]):
        self.fails_after, self.seen, self.error = fails_after, [], False

    def unsafe_compute_mask_ptr(self, address: int, size: int) -> None:
        import ctypes

        row = np.ctypeslib.as_array((ctypes.c_int32 * (size // 4)).from_address(address))
        self.error = self.error or tuple(self.seen) == self.fails_after
        row[:] = 0 if self.error else 0b1100

    def consume_token(self, token: int) -> bool:
        self.seen.append(token)
        return True

    def consume_tokens(self, tokens) -> bool:
        self.seen += tokens
        return True

    def rollback(self, count: int) -> bool:
        del self.seen[len(self.seen) - count :]
        return True

    def is_error(self) -> bool:
        return self.error

    def is_stopped(self) -> bool:
        return False

    def get_error(self) -> str:
        return "limit reached\n<state>\nsecrets"


def test_a_dead_end_in_the_middle_says_so_and_is_no_end():
    state = GrammarState(lambda: Matcher((2, 3)), 32, 1)
    # Met while looking ahead: the rows of that draft allow nothing, the text itself may still go elsewhere.
    masks = state.masks([2, 3, 2])
    assert [allowed(row) for row in masks] == [{2, 3}, {2, 3}, set(), set()]
    state.advance([2])
    assert allowed(state.masks([])[0]) == {2, 3}
    state.advance([2])
    assert allowed(state.masks([])[0]) == {2, 3}
    # Met by the text: nothing is allowed, not even the end, and the reason is one sentence.
    state = GrammarState(lambda: Matcher((2, 3)), 32, 1)
    state.advance([2, 3])
    assert [allowed(row) for row in state.masks([2])] == [set(), set()]
    assert not state.finished
    assert state.failure == "the grammar of this answer has no way on from here: limit reached"


def test_random_schemas_never_lead_into_a_dead_end(tokenizer):
    """Recursive schemas made at random: refused, or every random text of them goes on to its end."""
    rng, refused = random.Random(3), 0
    for _ in range(60):
        names = [f"d{i}" for i in range(rng.randint(1, 4))]
        schema = {"$ref": "#/$defs/d0", "$defs": {name: _random_schema(rng, names, 2) for name in names}}
        try:
            state = compile_grammar(tokenizer, GuidedDecodingParams(json=schema), VOCABULARY)
        except GrammarError:
            refused += 1
            continue
        for _ in range(120):
            choices = sorted(allowed(state.masks([])[0]))
            assert choices, (schema, state.failure)
            token = tokenizer.eos_id if tokenizer.eos_id in choices else rng.choice(choices)
            state.advance([token])
            if state.finished:
                break
    assert 5 < refused < 55


def _random_schema(rng: random.Random, names: list[str], depth: int):
    kind = rng.choice(["ref", "ref", "object", "object", "array", "any", "const"] if depth else ["ref", "const"])
    if kind == "ref":
        return {"$ref": f"#/$defs/{rng.choice(names)}"}
    if kind == "const":
        return {"const": rng.choice([1, "a"])}
    if kind == "any":
        return {"anyOf": [_random_schema(rng, names, depth - 1) for _ in range(rng.randint(1, 2))]}
    if kind == "array":
        return {"type": "array", "items": _random_schema(rng, names, depth - 1), "minItems": rng.randint(0, 1)}
    keys = ["x", "y"][: rng.randint(1, 2)]
    return {"type": "object", "properties": {key: _random_schema(rng, names, depth - 1) for key in keys},
            "required": [key for key in keys if rng.random() < 0.5], "additionalProperties": False}  # fmt: skip
