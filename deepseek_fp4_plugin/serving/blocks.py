"""An answer as a row of blocks, reasoning, texts and tool calls, each opened, added to and closed.

OpenAI's responses and Anthropic's messages are both written this way; chat completions are not.
"""

from dataclasses import dataclass
from typing import Literal

from deepseek_fp4_plugin.serving.streaming import Delta


@dataclass
class Block:
    """Number `index` of its answer. `text` is all there is so far: of a call its arguments."""

    index: int
    kind: Literal["reasoning", "text", "call"]
    text: str = ""
    id: str = ""  # of a call
    name: str = ""


@dataclass
class Change:
    """What happened to a block; `text` is what was added."""

    what: Literal["open", "add", "close"]
    block: Block
    text: str = ""


class Blocks:
    """The blocks of one answer; `feed` its deltas, then `finish` once."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None
        self._call = -1  # number of the open call

    def feed(self, delta: Delta) -> list[Change]:
        """What a delta changes, in order."""
        changes: list[Change] = []
        if delta.reasoning:
            self._add("reasoning", delta.reasoning, changes)
        if delta.content:
            self._add("text", delta.content, changes)
        for call in delta.calls:
            if call.index != self._call:
                changes += self.finish()
                self._call = call.index
                changes.append(self._new(Block(len(self.all), "call", id=call.id or "", name=call.name or "")))
            if call.arguments:
                self._add("call", call.arguments, changes)
        return changes

    def finish(self) -> list[Change]:
        """Close what is open."""
        closed, self._open = self._open, None
        return [Change("close", closed)] if closed is not None else []

    def _add(self, kind: Literal["reasoning", "text", "call"], text: str, changes: list[Change]) -> None:
        if self._open is None or self._open.kind != kind:
            changes += self.finish()
            changes.append(self._new(Block(len(self.all), kind)))
        assert self._open is not None
        self._open.text += text
        changes.append(Change("add", self._open, text))

    def _new(self, block: Block) -> Change:
        self.all.append(block)
        self._open = block
        return Change("open", block)
