"""From the engine's outputs to answers: one way for whole answers and streams, so that both say the same."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from deepseek_fp4_plugin.serving.json_bytes import to_json
from deepseek_fp4_plugin.serving.reasoning import ReasoningParser, Split
from deepseek_fp4_plugin.serving.tool_calls import ToolCallDelta, ToolCallParser


@dataclass
class Delta:
    """What a piece of generated text added to a choice."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)

    def split_calls(self) -> list["Delta"]:
        """One delta for each tool call, because many clients read only the first call of a chunk."""
        if len(self.calls) < 2:
            return [self]
        return [Delta(self.reasoning, self.content, self.calls[:1])] + [Delta(calls=[c]) for c in self.calls[1:]]

    def as_message(self) -> dict[str, Any]:
        """The `delta` of a chunk; the role is the first chunk's."""
        message: dict[str, Any] = {}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.content:
            message["content"] = self.content
        if self.calls:
            message["tool_calls"] = [_call_delta(call) for call in self.calls]
        return message


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _joined(calls: list[ToolCallDelta]) -> list[ToolCallDelta]:
    """Neighbouring pieces of one call as one."""
    joined: list[ToolCallDelta] = []
    for call in calls:
        if joined and joined[-1].index == call.index:
            joined[-1].arguments += call.arguments
        else:
            joined.append(call)
    return joined


class ChoiceParser:
    """The parsers of one choice in a row: reasoning first, tool calls in what is left."""

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tools: ToolCallParser | None,
        check: Callable[[str, str], str | None] | None = None,
    ) -> None:
        """check: says of a call's name and whole arguments what is wrong with them."""
        self._reasoning, self._tools, self._check = reasoning, tools, check
        self._calls: list[tuple[str, list[str]]] = []  # names, and the arguments' pieces

    @property
    def has_calls(self) -> bool:
        return bool(self._calls)

    def call_errors(self) -> list[dict[str, Any]]:
        """What the finished calls' arguments break of their schemas."""
        if self._check is None:
            return []
        errors = [self._check(name, "".join(pieces)) for name, pieces in self._calls]
        return [{"index": index, "error": error} for index, error in enumerate(errors) if error is not None]

    @property
    def has_reasoned(self) -> bool:
        """Whether the text so far began with reasoning."""
        return self._reasoning is not None and self._reasoning.has_reasoned

    def feed(self, text: str, last: bool) -> Delta:
        """The next piece of text, the last one or not."""
        split = self._reasoning.feed(text) if self._reasoning else Split(content=text)
        if last and self._reasoning:
            end = self._reasoning.finish()
            split = Split(split.reasoning + end.reasoning, split.content + end.content)
        if self._tools is None:
            return Delta(split.reasoning, split.content)
        out = self._tools.feed(split.content)
        delta = Delta(split.reasoning, out.content, out.calls)
        if last:
            end_calls = self._tools.finish()
            delta.content += end_calls.content
            delta.calls += end_calls.calls
        for call in delta.calls:
            if call.name is not None:
                self._calls.append((call.name, []))
            self._calls[call.index][1].append(call.arguments)
        delta.calls = _joined(delta.calls)
        return delta

    def message(self, text: str) -> dict[str, Any]:
        """The whole answer's `message`."""
        delta = self.feed(text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": delta.content}
        if self._reasoning is not None:
            message["reasoning_content"] = delta.reasoning
        if delta.calls:
            calls = [_call_delta(call) for call in delta.calls]
            for entry in calls:
                del entry["index"]
            message["tool_calls"] = calls
            message["content"] = delta.content or None
        return message


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def merge(streams: list[AsyncIterator[Any]]) -> AsyncIterator[tuple[int, Any]]:
    """Items of all streams as they come, with the stream's number. An exception in one ends them all.

    A stream goes on only when its item has been dealt with: the engine's outputs are updated in place.
    """
    if len(streams) == 1:
        async for item in streams[0]:
            yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Any, asyncio.Event]] = asyncio.Queue()
    end = object()

    async def pump(number: int, stream: AsyncIterator[Any]) -> None:
        dealt_with = asyncio.Event()
        try:
            async for item in stream:
                queue.put_nowait((number, item, dealt_with))
                await dealt_with.wait()
                dealt_with.clear()
            queue.put_nowait((number, end, dealt_with))
        except Exception as error:
            queue.put_nowait((number, error, dealt_with))

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            number, item, dealt_with = await queue.get()
            if item is end:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item
                dealt_with.set()
    finally:
        for task in tasks:
            task.cancel()


async def until_disconnect(work: Awaitable[None], receive: Callable[[], Awaitable[Any]]) -> bool:
    """Do `work`, but cancel it when the client goes. True when it was done."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        for other in (task, watcher):
            if not other.done():
                other.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await other


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
