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
from deepseek_fp4_plugin.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

# Between JSON's tokens: one line break at most and an indentation. Without a bound a model may write blanks for ever.
_JSON: Any = {"whitespace_pattern": r"\n?[ ]{0,20}"}


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


def _no_way_on(matcher: "LLMatcher") -> str:
    reason = _one_line(matcher.get_error()) if matcher.is_error() else "no token may follow"
    logger.error("structured output has no way on: %s", reason)
    return f"the structured output has no way on from here: {reason}"


def _has_bit(row: np.ndarray, token: int) -> bool:
    return bool(row.view(np.uint32)[token // 32] >> np.uint32(token % 32) & 1)


def _set_bit(row: np.ndarray, token: int) -> None:
    row.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))


def compile_grammar(
    tokenizer: Tokenizer, params: GuidedDecodingParams, vocab_size: int, thinking: Thinking = Thinking.OVER
) -> GrammarState:
    """The state at an answer's first token.

    vocab_size: rows of the logits; those without a token are never allowed.  thinking: see `thinking_after`.
    Raises ValueError when the grammar is wrong, cannot be enforced, or llguidance is not installed.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ValueError(
            "structured output needs the package llguidance, which is not installed here: pip install llguidance"
        ) from None
    vocabulary = _vocabulary(tokenizer, vocab_size)
    kind, grammar = _grammar(params)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
    if failed:
        raise ValueError(f"this {kind} cannot be enforced: {_one_line(messages[0])}")
    ids = (-1, -1)
    if thinking is not Thinking.OVER:
        assert tokenizer.think_start_id is not None and tokenizer.think_end_id is not None
        ids = (tokenizer.think_start_id, tokenizer.think_end_id)

    def fresh() -> LLMatcher:
        return LLMatcher(vocabulary, grammar, log_level=0)

    return GrammarState(fresh, vocab_size, tokenizer.eos_id, thinking, ids)


def _grammar(params: GuidedDecodingParams) -> tuple[str, str]:
    """What the request calls it, and the grammar in the library's form."""
    from llguidance import LLMatcher

    if params.json_object:
        return "JSON object", LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON)
    if params.json is not None:
        schema: Any = params.json
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except json.JSONDecodeError as error:
                raise ValueError(f"this JSON schema cannot be enforced: it is not JSON ({error})") from None
        if not isinstance(schema, dict):
            raise ValueError(f"this JSON schema cannot be enforced: it is no object but {json.dumps(schema)[:80]}")
        return "JSON schema", LLMatcher.grammar_from_json_schema(schema, overrides=_JSON)
    if params.regex is not None:
        return "regular expression", LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        if not params.choice or not all(params.choice):
            raise ValueError("a choice needs at least one text, and none of them empty")
        alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice)
        return "choice", LLMatcher.grammar_from_lark(f"start: {alternatives}")
    if params.grammar is not None:
        return "EBNF grammar", LLMatcher.grammar_from_lark(_lark(params.grammar))
    raise ValueError("structured output was asked for without saying which: give json, json_object, regex, "
                     "choice or grammar")  # fmt: skip


def _lark(grammar: str) -> str:
    """`root ::= ...` notation (GBNF, as trtllm-serve and vLLM take it) in Lark's; Lark's as it is."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    try:
        return any_to_lark(grammar)
    except (GbnfToLarkError, IndexError, RecursionError) as error:
        raise ValueError(f"this EBNF grammar cannot be enforced: {_one_line(str(error))}") from None


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> "LLTokenizer":
    """The library's view of the vocabulary; a second's work for R1's, so it is kept."""
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=tokenizer.eos_id)


def _one_line(message: str) -> str:
    return " ".join(message.split())[:300]
