"""Request: one sequence being generated, and everything the scheduler knows about it."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deepseek_fp4_plugin.engine.step_plan import Sampling, TokenLogprobs

if TYPE_CHECKING:
    from deepseek_fp4_plugin.tokenizer import Tokenizer


class RequestError(ValueError):
    """A request that cannot be served as asked; the others go on."""


def too_long(tokens: str, limit: int) -> str:
    """Of a prompt that does not fit."""
    return (
        f"the prompt has {tokens} tokens and at most {limit - 1} fit (max_seq_len and the cache allow {limit} "
        "with the answer); shorten it or raise max_seq_len / kv_cache_config.max_tokens"
    )


def check_length(tokenizer: "Tokenizer | None", prompt: str | Sequence[int], limit: int) -> None:
    """Raises RequestError for a prompt that leaves no room below `limit` tokens, a text's however it is tokenized."""
    if not isinstance(prompt, str):
        if len(prompt) >= limit:
            raise RequestError(too_long(str(len(prompt)), limit))
    elif tokenizer is not None and 4 * len(prompt) >= limit:  # a character has at most four bytes
        fewest = tokenizer.fewest_tokens(prompt)
        if fewest >= limit:
            raise RequestError(too_long(f"at least {fewest}", limit))


class GenerationError(RuntimeError):
    """A request that could not be finished; the others went on.

    own_fault: the request itself forbade every token.  outputs: what there is, failed requests included; set by LLM.
    """

    def __init__(self, message: str, own_fault: bool = False):
        super().__init__(message)
        self.own_fault = own_fault
        self.outputs: Any = None


class StopText(Protocol):
    """What stop strings ask of a text; see engine/output.py."""

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """The text that `tokens` let out."""
        ...

    @property
    def stop(self) -> str | None:
        """The stop string that was met."""
        ...

    @property
    def num_kept_tokens(self) -> int:
        """How many of the tokens belong to the output once `stop` was met."""
        ...


class GrammarState(Protocol):
    """What structured output asks of a grammar; see engine/grammar.py."""

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        """int32 [len(drafts) + 1, ceil(vocab / 32)]: the tokens allowed now and after each draft."""
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """Take emitted tokens."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the text cannot go on, where it cannot."""
        ...


class SpeculationCounts:
    """What verification gave in one phase: how many sampled steps had how many drafts, and accepted how many."""

    __slots__ = ("outcomes",)

    def __init__(self, outcomes: dict[tuple[int, int], int] | None = None):
        self.outcomes = dict(outcomes or {})  # (drafted, accepted) -> steps

    def add(self, other: "SpeculationCounts") -> None:
        for outcome, steps in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + steps

    @property
    def steps(self) -> int:
        return sum(self.outcomes.values())

    @property
    def emitted(self) -> int:
        """Tokens: the accepted drafts and one more in each step."""
        return sum((accepted + 1) * steps for (_, accepted), steps in self.outcomes.items())

    @property
    def drafted(self) -> list[int]:
        """Steps that verified a first, second, ... draft."""
        return self._by_position(0)

    @property
    def accepted(self) -> list[int]:
        """Steps that accepted a first, second, ... draft."""
        return self._by_position(1)

    def _by_position(self, which: int) -> list[int]:
        longest = max((drafted for drafted, _ in self.outcomes), default=0)
        return [sum(n for outcome, n in self.outcomes.items() if outcome[which] > i) for i in range(longest)]


@dataclass(slots=True)
class Stopping:
    """When a request ends, beside its grammar and its stop strings."""

    max_tokens: int
    stop_ids: frozenset[int] = frozenset()  # end-of-text and the request's own
    eos_ids: frozenset[int] = frozenset()  # those that are no `stop_reason`
    min_tokens: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """`token_ids` are the prompt and what was emitted; of these, `num_computed` have their latents in the cache."""

    request_id: int
    token_ids: list[int]
    sampling: Sampling
    stopping: Stopping
    priority: int = 0  # higher runs first
    deadline: float | None = None  # time.monotonic() seconds
    salt: str | None = None
    relaxed_topk: int = 1
    relaxed_delta: float = 0.0  # inside the thinking phase
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_text: StopText | None = None
    grammar: GrammarState | None = None
    dp_rank: int | None = None  # the attention-data-parallel rank that shall serve it
    dp_relax: bool = False  # or another, where that one is full

    num_prompt_tokens: int = field(init=False)
    arrival: int = 0  # order of arrival, set by the scheduler
    watched: frozenset[int] = frozenset()  # tokens that change more than the text, set by the scheduler
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache when first scheduled
    blocks: "array[int]" = field(default_factory=lambda: array("q"))
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks registered so far
    drafts: list[int] = field(default_factory=list)
    slot: int = -1  # where the ranks keep it while it runs
    num_sent_blocks: int = 0  # of `blocks`, those that the ranks have been told of
    decoding: bool = False  # a step has sampled since it entered its slot: the ranks have its newest token and drafts
    share: "Share | None" = None  # of a step under way
    thinking: bool = False  # the prompt, or what was emitted, is inside <think>
    num_preemptions: int = 0
    num_prompt_logprobs: int = 0  # delivered
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    thinking_counts: SpeculationCounts = field(default_factory=SpeculationCounts)
    answer_counts: SpeculationCounts = field(default_factory=SpeculationCounts)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def looks_back(self) -> str | None:
        """Why the tokens of a step cannot be chosen before those of the last step are known here, or None."""
        if self.grammar is not None:
            return "grammar"
        if self.sampling.penalized:
            return "penalties"
        if self.bad_words:
            return "bad_words"
        return "min_tokens" if self.num_output_tokens < self.stopping.min_tokens else None

    def banned(self, drafts: list[int]) -> tuple[tuple[int, ...], ...]:
        """Token ids that may not come, after the known tokens and after each draft: len(drafts) + 1 tuples."""
        first, minimum = self.num_output_tokens, self.stopping.min_tokens
        if first >= minimum and not self.bad_words:
            return ()
        text = self.token_ids + drafts if self.bad_words else self.token_ids
        rows = []
        for i in range(len(drafts) + 1):
            row = list(self.stopping.stop_ids) if first + i < minimum else []
            end = len(self.token_ids) + i
            for word in self.bad_words:
                prefix = list(word[:-1])
                if end - len(prefix) >= 0 and text[end - len(prefix) : end] == prefix:
                    row.append(word[-1])
            rows.append(tuple(row))
        return tuple(rows)


@dataclass(slots=True, eq=False)
class Share:
    """A request's share of a step under way: tokens computed, of these drafts, and whether it samples."""

    request: Request
    count: int
    num_drafts: int
    sample: bool


@dataclass(slots=True)
class Emission:
    """What one step gave one request: the engine's side of a stream. The last one has a `finish_reason`."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)  # which of `tokens` had been drafted
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    text: str | None = None  # set where stop strings made the engine decode; else the reader decodes
    finish_reason: str | None = None  # "stop", "length", "timeout", "cancelled", "error"
    stop_reason: int | str | None = None
    failure: GenerationError | None = None  # of "error"; without one the engine itself has failed
