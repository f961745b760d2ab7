"""Structured output: which tokens may come next, as bit masks, over drafted tokens too. The parsing is llguidance's.

A request that may think is let alone until its `</think>`: a model like R1-0528 opens with `<think>` itself, so at the
first token both that and the grammar are open, and whichever comes decides. Inside the thinking only the end of the
text is closed, so an answer must follow.
"""

import enum
import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek_fp4_plugin.config import GuidedDecodingParams
from deepseek_fp4_plugin.engine import lark_check
from deepseek_fp4_plugin.engine.closed_objects import closed_objects
from deepseek_fp4_plugin.engine.request import RequestError
from deepseek_fp4_plugin.engine.schema_check import without_endless_parts
from deepseek_fp4_plugin.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

WHITESPACE = "[ ]?"
"""What may stand between JSON's tokens: a blank. Without a bound a model may write blanks for ever."""


class Thinking(enum.Enum):
    """Where a text stands with respect to its think block."""

    POSSIBLE = "the next token may open it"
    OPEN = "inside it"
    OVER = "behind it, or there is none"


def thinking_after(prompt: Sequence[int], tokenizer: Tokenizer) -> Thinking:
    """How a text begins that follows `prompt`: an open block in it goes on; an assistant's turn may open one."""
    if tokenizer.think_start_id is None or tokenizer.think_end_id is None:
        return Thinking.OVER
    for token in reversed(prompt):
        if token == tokenizer.think_start_id:
            return Thinking.OPEN
        if token == tokenizer.think_end_id:
            break
    return Thinking.POSSIBLE if prompt and prompt[-1] in tokenizer.turn_start_ids else Thinking.OVER


class GrammarState:
    """One request's place in its grammar. `masks` looks ahead, `advance` moves."""

    def __init__(
        self,
        fresh: "Callable[[], LLMatcher]",
        vocab_size: int,
        eos_id: int,
        thinking: Thinking = Thinking.OVER,
        think_ids: tuple[int, int] = (-1, -1),
    ) -> None:
        self._fresh, self._vocab_size, self._eos_id = fresh, vocab_size, eos_id
        self._matcher = fresh()
        self._thinking, self._think_ids = thinking, think_ids
        self._consumed: list[int] = []
        self._dead = False
        self.finished = False
        """The text is complete; only the end-of-text token may follow."""
        self.failure: str | None = None
        """Why no token may follow, not even the end: the grammar leads nowhere from here, or a limit of the library."""

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        """Allowed tokens after each draft: int32 [len(drafts) + 1, ceil(vocab / 32)], bit t of a row set for token t.

        Row i holds after drafts[:i]. Behind a draft that is not allowed the rows are those of that place, of no use.
        A row without a bit: the grammar has no way on from there, and `failure` says why.
        """
        rows = np.zeros((len(drafts) + 1, (self._vocab_size + 31) // 32), dtype=np.int32)
        if self._dead:
            return rows
        thinking, consumed = self._thinking, 0
        for i in range(len(drafts) + 1):
            reason = self._fill(rows[i], thinking)
            if reason is not None:
                rows[i + 1 :] = rows[i]
                self.failure, self._dead = reason, i == 0
                logger.warning("structured output: %s", reason)
                if i:  # the drafts that lead there may yet be refused
                    self._start_over()
                return rows
            # The end is never consumed: the library does not count it, and could not be rolled back.
            if i == len(drafts) or drafts[i] == self._eos_id or not _has_bit(rows[i], drafts[i]):
                rows[i + 1 :] = rows[i]
                break
            thinking, moved = self._next(thinking, drafts[i])
            consumed += moved
        if consumed:
            self._matcher.rollback(consumed)
        return rows

    def advance(self, tokens: Sequence[int]) -> None:
        """Take the tokens that were emitted. Nothing may follow one that the grammar does not allow."""
        for token in tokens:
            if self.finished or self._dead:
                return
            if token == self._eos_id:
                self.finished = True
                return
            self._thinking, moved = self._next(self._thinking, token)
            if not moved:
                continue
            self._consumed.append(token)
            if self._matcher.is_error():
                self.failure, self._dead = _no_way_on(self._matcher), True
            self.finished = not self._dead and self._matcher.is_stopped()

    def _next(self, thinking: Thinking, token: int) -> tuple[Thinking, bool]:
        """The state behind `token`, and whether the matcher consumed it."""
        start, end = self._think_ids
        if thinking is Thinking.POSSIBLE and token == start:
            return Thinking.OPEN, False
        if thinking is Thinking.OPEN:
            return (Thinking.OVER if token == end else Thinking.OPEN), False
        self._matcher.consume_token(token)
        return Thinking.OVER, True

    def _fill(self, row: np.ndarray, thinking: Thinking) -> str | None:
        """Set the row's bits; why there are none, where there are none."""
        if thinking is Thinking.OPEN:
            row[:] = -1
            row[self._eos_id // 32] &= ~np.int32(1 << (self._eos_id % 32))
            return None
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error() or not row.any():
            row[:] = 0
            return _no_way_on(self._matcher)
        if thinking is Thinking.POSSIBLE:
            _set_bit(row, self._think_ids[0])
        return None

    def _start_over(self) -> None:
        """A new matcher where the emitted text is: one that has met an error is of no more use."""
        self._matcher = self._fresh()
        if self._consumed:
            self._matcher.consume_tokens(self._consumed)


_NO_TEXT = "no text satisfies it"


def _reason(matcher: "LLMatcher") -> str:
    """Why a mask is empty; of the library's error what comes before its own state."""
    error = _one_line(matcher.get_error().partition("<state>")[0]) if matcher.is_error() else "NoExtension"
    return _NO_TEXT if error.startswith("NoExtension") else error


def _no_way_on(matcher: "LLMatcher") -> str:
    return f"the grammar of this answer has no way on from here: {_reason(matcher)}"


def _has_bit(row: np.ndarray, token: int) -> bool:
    return bool(row.view(np.uint32)[token // 32] >> np.uint32(token % 32) & 1)


def _set_bit(row: np.ndarray, token: int) -> None:
    row.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))


class GrammarError(RequestError):
    """A grammar that is wrong, cannot be enforced, or that no text satisfies."""


def compile_grammar(
    tokenizer: Tokenizer, params: GuidedDecodingParams, vocab_size: int, thinking: Thinking = Thinking.OVER
) -> GrammarState:
    """The state at an answer's first token.

    vocab_size: rows of the logits; those without a token are never allowed.  thinking: see `thinking_after`.
    Raises GrammarError when the grammar is wrong, cannot be enforced, or cannot be satisfied by a text that ends;
    ValueError when llguidance is not installed.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise ValueError(
            "structured output needs the package llguidance, which is not installed here: pip install llguidance"
        ) from None
    kind, name = _kind(params)
    try:
        matcher = _matcher(_vocabulary(tokenizer, vocab_size), _grammar(params), vocab_size)
        if kind == "EBNF grammar":
            _check_lark(_vocabulary(tokenizer, vocab_size), _lark(params.grammar or ""), vocab_size)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises Exception itself, and its panics are not even that
        raise GrammarError(f"{name} cannot be enforced: {_one_line(str(error))}") from None
    ids = (-1, -1)
    if thinking is not Thinking.OVER:
        assert tokenizer.think_start_id is not None and tokenizer.think_end_id is not None
        ids = (tokenizer.think_start_id, tokenizer.think_end_id)
    return GrammarState(matcher.deep_copy, vocab_size, tokenizer.eos_id, thinking, ids)


def _matcher(vocabulary: "LLTokenizer", grammar: str, vocab_size: int) -> "LLMatcher":
    """A matcher at the beginning, not changed by what was looked at. Raises ValueError where no text may begin."""
    from llguidance import LLMatcher

    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    for _ in range(2):  # a grammar that reaches the library's limits may pass once
        probe, row = matcher.deep_copy(), np.zeros((vocab_size + 31) // 32, dtype=np.int32)
        probe.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if probe.is_error() or not row.any():
            raise ValueError(_reason(probe))
    return matcher


def _check_lark(vocabulary: "LLTokenizer", grammar: str, vocab_size: int) -> None:
    """Raises ValueError for a grammar that may lead to a place from which no text ends."""
    from llguidance import LLMatcher

    rule = lark_check.endless_rule(grammar)
    if rule is not None:
        raise ValueError(f"no text ends that begins rule {rule}, which always needs another of its kind")

    def matches_nothing(pattern: str) -> bool:
        try:
            _matcher(vocabulary, LLMatcher.grammar_from_lark(f"start: {pattern}"), vocab_size)
        except ValueError as error:
            return str(error) == _NO_TEXT
        return False

    pattern = lark_check.empty_pattern(grammar, matches_nothing)
    if pattern is not None:
        raise ValueError(f"{pattern} matches no text")


def _kind(params: GuidedDecodingParams) -> tuple[str, str]:
    """What the request asks for, and the words for it in a message."""
    for given, kind in (
        (params.json_object or None, "JSON object"),
        (params.json, "JSON schema"),
        (params.regex, "regular expression"),
        (params.choice, "choice"),
        (params.grammar, "EBNF grammar"),
    ):
        if given is not None:
            return kind, f"this {kind}"
    raise ValueError("structured output was asked for without saying which: give json, json_object, regex, "
                     "choice or grammar")  # fmt: skip


def _grammar(params: GuidedDecodingParams) -> str:
    """The grammar in the library's form. Raises ValueError for what is wrong at first sight."""
    from llguidance import LLMatcher

    schema = enforced_schema(params)
    if schema is not None:
        spaces: Any = {
            "whitespace_pattern": WHITESPACE if params.whitespace_pattern is None else params.whitespace_pattern
        }
        return LLMatcher.grammar_from_json_schema(schema, overrides=spaces)
    if params.regex is not None:
        if (len(params.regex) - len(params.regex.rstrip("\\"))) % 2:  # the library would leave it out
            raise ValueError("it ends in a backslash that escapes nothing")
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        if not params.choice or not all(params.choice):
            raise ValueError("it needs at least one text, and none of them empty")
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        return LLMatcher.grammar_from_lark(f"start: {alternatives}")
    return LLMatcher.grammar_from_lark(_lark(params.grammar or ""))


def enforced_schema(params: GuidedDecodingParams) -> dict[str, Any] | None:
    """The JSON schema that the answer is held to: closed where it was left open, without parts that never end.

    None where the form is not JSON. Raises ValueError for what is no schema.
    """
    if params.json_object:
        return {"type": "object"}
    if params.json is None:
        return None
    schema: Any = params.json
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(schema, dict):
        raise ValueError(f"it is no object but {json.dumps(schema)[:80]}")
    return without_endless_parts(schema if params.additional_properties else closed_objects(schema))


def _lark(grammar: str) -> str:
    """`root ::= ...` notation (GBNF, as trtllm-serve and vLLM take it) in Lark's; Lark's as it is."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    return any_to_lark(grammar)


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> "LLTokenizer":
    """The library's view of the vocabulary; a second's work for R1's, so it is kept."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=tokenizer.eos_id)


def _one_line(message: str) -> str:
    return " ".join(message.split())[:300]
