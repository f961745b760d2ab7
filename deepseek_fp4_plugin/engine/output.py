"""From emitted token ids to what a caller reads: text as it comes, stop strings, request outputs."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from deepseek_fp4_plugin.engine.request import Emission
from deepseek_fp4_plugin.engine.step_plan import TokenLogprobs
from deepseek_fp4_plugin.tokenizer import IncrementalDetokenizer


class StopStrings:
    """Decodes a request's tokens and watches for its stop strings, over token boundaries.

    Text that may be the beginning of a stop string is held back until it is known not to be one. The stop string
    itself, and what follows, is left out unless `include` is set.  think_ids: the tokens that open and close a think
    block whose text is passed by unread; thinking: one is open already.
    """

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        stops: Sequence[str],
        include: bool = False,
        think_ids: tuple[int, int] | None = None,
        thinking: bool = False,
    ):
        self._think_ids, self._thinking = think_ids, thinking
        self._detokenizer, self._stops, self._include = detokenizer, tuple(stops), include
        self._held = ""
        self._ends: list[int] = []  # characters decoded after each token
        self._longest = max(map(len, self._stops))
        self.stop: str | None = None
        self.num_released = 0  # characters given out

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """The text that `tokens` let out; `last`: no more will come. Sets `stop` where a stop string ended it."""
        text, unread = self._held, ""
        for token in tokens:
            piece = self._detokenizer.add([token])
            if self._think_ids is not None:
                self._thinking = self._thinking or (not self._ends and token == self._think_ids[0])
            self._ends.append((self._ends[-1] if self._ends else 0) + len(piece))
            text += piece
            if self._thinking:
                unread, text = unread + text, ""
                self._thinking = self._think_ids is None or token != self._think_ids[1]
        if last:
            text += self._detokenizer.flush()
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # the earliest, of these the longest
            at, _, self.stop = min(found)
            out, self._held = text[: at + len(self.stop) if self._include else at], ""
        elif last:
            out, self._held = text, ""
        else:
            keep = self._possible(text)
            out, self._held = text[: len(text) - keep], text[len(text) - keep :]
        out = unread + out
        self.num_released += len(out)
        return out

    @property
    def num_kept_tokens(self) -> int:
        """How many tokens the released text needs: the others spell the stop string and what came with it."""
        return min(bisect.bisect_left(self._ends, self.num_released) + 1, len(self._ends)) if self.num_released else 0

    def _possible(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for size in range(min(len(text), self._longest - 1), 0, -1):
            end = text[len(text) - size :]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0


@dataclass
class CompletionOutput:
    """One of a request's `n` answers. `*_diff` is what the last update brought."""

    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    accepted_draft: list[bool] = field(default_factory=list)  # which tokens had been drafted
    cumulative_logprob: float | None = None
    finish_reason: str | None = None  # "stop", "length", "timeout", "cancelled", "error"
    stop_reason: int | str | None = None  # the stop id or string; None for the end-of-text token
    prompt_logprobs: list[TokenLogprobs] | None = None  # one a prompt token but the first
    text_diff: str = ""
    _pieces: list[str] = field(default_factory=list, repr=False)
    _num_read: int = field(default=0, repr=False)

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces[:] = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._num_read :]

    @property
    def logprobs_diff(self) -> list[TokenLogprobs]:
        return self.logprobs[self._num_read :] if self.logprobs else []

    @property
    def accepted_draft_diff(self) -> list[bool]:
        return self.accepted_draft[self._num_read :]

    def begin_update(self) -> None:
        """Make what comes next the `*_diff`."""
        self._num_read, self.text_diff = len(self.token_ids), ""

    def extend(self, emission: Emission, text: str) -> None:
        """Take an emission and the text that it brought."""
        self.token_ids += emission.tokens
        self.accepted_draft += emission.accepted
        if emission.logprobs:
            self.logprobs = (self.logprobs or []) + emission.logprobs
            gained = sum(entry[token].logprob for entry, token in zip(emission.logprobs, emission.tokens, strict=True))
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + gained
        if emission.prompt_logprobs:
            self.prompt_logprobs = (self.prompt_logprobs or []) + emission.prompt_logprobs
        if text:
            self._pieces.append(text)
            self.text_diff += text
        if emission.finish_reason is not None:
            self.finish_reason, self.stop_reason = emission.finish_reason, emission.stop_reason

    def drop_tail(self, count: int) -> None:
        """Forget the last `count` tokens: those of a stop sequence that is not part of the output."""
        if count:
            keep = len(self.token_ids) - count
            del self.token_ids[keep:], self.accepted_draft[keep:]
            if self.logprobs:
                del self.logprobs[keep:]


@dataclass
class RequestMetrics:
    """Times are time.perf_counter() seconds; counts are over all of a request's answers."""

    arrival: float = 0.0
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    preemptions: int = 0
    steps: int = 0  # steps that emitted tokens
    drafted: int = 0
    accepted: int = 0


@dataclass
class RequestOutput:
    """What a request has given so far. One object for the request's life, updated in place."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.outputs[0].text

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].prompt_logprobs
