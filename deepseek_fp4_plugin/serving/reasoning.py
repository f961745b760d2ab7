"""The `<think>` text apart from the answer, the same however the stream is cut.

A parser is fed the generated text in pieces of any size and answers each with what is certain by then. What might
still turn out to be a tag is held back until the next piece or `finish`, so the concatenated results depend on the
text alone. The text is split once: tags in the answer are the answer's own.
"""

from collections.abc import Callable
from typing import NamedTuple

THINK = "<think>"
END_THINK = "</think>"


class Split(NamedTuple):
    """What one piece of text added to each field."""

    reasoning: str = ""
    content: str = ""


def held_suffix(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `marker`."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


class DeepseekR1Parser:
    """`deepseek-r1`, as trtllm-serve has it: thinking from the first character to the first `</think>`.

    Nothing but that tag is removed: a `<think>` that the model wrote stays at the head of the reasoning, line breaks
    stay on both sides, and a text without `</think>` is reasoning to the end.
    """

    def __init__(self, prompt_opens_think: bool = False) -> None:
        self._thinking = True
        self._held = ""

    @property
    def has_reasoned(self) -> bool:
        """Whether the text so far began with reasoning."""
        return True

    def feed(self, text: str) -> Split:
        """Take the next piece of generated text."""
        if not self._thinking:
            return Split(content=text)
        text = self._held + text
        reasoning, tag, content = text.partition(END_THINK)
        if tag:
            self._thinking, self._held = False, ""
            return Split(reasoning, content)
        keep = len(text) - held_suffix(text, END_THINK)
        self._held = text[keep:]
        return Split(reasoning=text[:keep])

    def finish(self) -> Split:
        """The text has ended: what was held back was no tag."""
        held, self._held = self._held, ""
        return Split(reasoning=held)


class DeepseekR1_0528Parser:
    """`deepseek-r1-0528`: for a model that writes `<think>` itself, and sometimes does not think.

    A text is reasoning only when it opens with `<think>` (after white space), or the prompt left one open. Both tags
    go, and the line breaks around them, so the fields hold reasoning and answer as one would print them.
    """

    def __init__(self, prompt_opens_think: bool = False) -> None:
        self._state = "after_tag" if prompt_opens_think else "start"  # start, after_tag, thinking, gap, answer
        self._held = ""
        self.has_reasoned = prompt_opens_think
        """Whether the text so far began with reasoning."""

    def feed(self, text: str) -> Split:
        """Take the next piece of generated text."""
        text, self._held = self._held + text, ""
        reasoning = ""
        if self._state == "start":
            stripped = text.lstrip()
            if stripped.startswith(THINK):
                self._state, text, self.has_reasoned = "after_tag", stripped[len(THINK) :], True
            elif THINK.startswith(stripped):
                self._held = text
                return Split()
            else:
                self._state = "answer"
        if self._state == "after_tag":
            text = text.lstrip("\n")
            if not text:
                return Split()
            self._state = "thinking"
        if self._state == "thinking":
            reasoning, tag, rest = text.partition(END_THINK)
            if tag:
                self._state, text, reasoning = "gap", rest, reasoning.rstrip("\n")
            else:
                # Line breaks are held as well: those before the closing tag go.
                keep = len(text[: len(text) - held_suffix(text, END_THINK)].rstrip("\n"))
                self._held = text[keep:]
                return Split(reasoning=text[:keep])
        if self._state == "gap":
            text = text.lstrip("\n")
            if text:
                self._state = "answer"
        return Split(reasoning, text)

    def finish(self) -> Split:
        """The text has ended: what was held back was no tag."""
        held, self._held = self._held, ""
        return Split(content=held) if self._state == "start" else Split(reasoning=held)


ReasoningParser = DeepseekR1Parser | DeepseekR1_0528Parser

REASONING_PARSERS: dict[str, Callable[[bool], ReasoningParser]] = {
    "deepseek-r1": DeepseekR1Parser,
    "deepseek-r1-0528": DeepseekR1_0528Parser,
}
"""`--reasoning_parser`'s choices; called with whether the prompt ends in an open `<think>`."""
