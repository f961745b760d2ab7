"""An answer's blocks: the same however the stream was cut, each opened and closed once, in order."""

import pytest

from deepseek_fp4_plugin.serving.blocks import Blocks
from deepseek_fp4_plugin.serving.reasoning import DeepseekR1_0528Parser
from deepseek_fp4_plugin.serving.streaming import ChoiceParser
from deepseek_fp4_plugin.serving.tool_calls import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    ToolCallParser,
)


def call(name: str, arguments: str) -> str:
    return f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


TEXT = f"<think>why</think>Well: {CALLS_BEGIN}{call('f', '{}')}\n{call('g', '[1]')}{CALLS_END}"
WANTED = [("reasoning", "why", ""), ("text", "Well:", ""), ("call", "{}", "f"), ("call", "[1]", "g")]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_blocks_do_not_depend_on_the_pieces(size):
    parser, blocks, changes = ChoiceParser(DeepseekR1_0528Parser(), ToolCallParser()), Blocks(), []
    for at in range(0, len(TEXT), size):
        changes += blocks.feed(parser.feed(TEXT[at : at + size], at + size >= len(TEXT)))
    changes += blocks.finish()
    assert [(block.kind, block.text, block.name) for block in blocks.all] == WANTED
    assert [block.index for block in blocks.all] == [0, 1, 2, 3]
    assert [change.block.index for change in changes] == sorted(change.block.index for change in changes)
    for block in blocks.all:
        mine = [change for change in changes if change.block is block]
        assert [mine[0].what, mine[-1].what] == ["open", "close"]
        assert {change.what for change in mine[1:-1]} == {"add"}
        assert "".join(change.text for change in mine) == block.text
    assert blocks.finish() == []
