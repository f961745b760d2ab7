"""Streams put together: nothing is lost or reordered, one call a chunk, and failures end all."""

import asyncio

import pytest

from deepseek_fp4_plugin.serving.reasoning import DeepseekR1Parser
from deepseek_fp4_plugin.serving.streaming import ChoiceParser, merge, to_json
from deepseek_fp4_plugin.serving.tool_calls import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    ToolCallParser,
)


class InPlace:
    """Like the engine's outputs: one object, changed by each step of the iteration."""

    def __init__(self, name: str, count: int):
        self.name, self.count, self.diff = name, count, ""

    async def stream(self):
        for i in range(self.count):
            self.diff = f"{self.name}{i} "
            yield self
            await asyncio.sleep(0)


@pytest.mark.parametrize("number", [1, 3])
def test_a_slow_consumer_loses_nothing(number):
    async def run() -> dict[int, str]:
        texts = dict.fromkeys(range(number), "")
        async for index, item in merge([InPlace("abc"[i], 20).stream() for i in range(number)]):
            for _ in range(5):  # sending takes a while
                await asyncio.sleep(0)
            texts[index] += item.diff
        return texts

    texts = asyncio.run(run())
    assert texts == {i: "".join(f"{'abc'[i]}{k} " for k in range(20)) for i in range(number)}


def test_an_error_in_one_stream_ends_all():
    async def failing():
        yield 1
        raise RuntimeError("broken")

    async def endless():
        while True:
            yield 2
            await asyncio.sleep(0)

    async def run() -> None:
        async for _ in merge([failing(), endless()]):
            pass

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(asyncio.wait_for(run(), 10))


def test_calls_of_one_piece_become_a_chunk_each():
    def call(name: str) -> str:
        return f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{{}}\n```{CALL_END}"

    parser = ChoiceParser(DeepseekR1Parser(), ToolCallParser())
    delta = parser.feed(f"hm</think>so{CALLS_BEGIN}{call('a')}\n{call('b')}{CALLS_END}", last=True)
    first, second = (part.as_message() for part in delta.split_calls())
    assert (first["reasoning_content"], first["content"]) == ("hm", "so")
    assert [c["function"] for c in first["tool_calls"]] == [{"name": "a", "arguments": "{}"}]
    assert [c["function"] for c in second["tool_calls"]] == [{"name": "b", "arguments": "{}"}]
    assert [c["index"] for c in first["tool_calls"] + second["tool_calls"]] == [0, 1]
    assert parser.has_calls


def test_json_is_utf8_whatever_is_in_it():
    assert to_json({"a": "你\ud800"}) == '{"a":"你?"}'.encode()
