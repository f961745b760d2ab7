"""DeepSeek's tool-call text on known answers; `test_reasoning.py` has the property over every cut."""

import json

import pytest

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


def parse(pieces):
    parser = ToolCallParser()
    outs = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    calls: list[list] = []
    for delta in (delta for out in outs for delta in out.calls):
        if delta.name is not None:
            assert delta.id is not None
            calls.append([delta.name, ""])
        calls[delta.index][1] += delta.arguments
    return "".join(out.content for out in outs), calls


PARIS = '{"city": "Paris"}'
TWO = f"Let me look.\n\n{CALLS_BEGIN}{call('weather', PARIS)}\n{call('clock', '{}')}{CALLS_END}"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_two_calls_with_text_before(size):
    content, calls = parse([TWO[i : i + size] for i in range(0, len(TWO), size)])
    assert content == "Let me look."
    assert calls == [["weather", PARIS], ["clock", "{}"]]


def test_the_name_and_the_arguments_come_while_they_are_written():
    parser = ToolCallParser()
    first = parser.feed(f'{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}run\n```json\n{{"code": "pri').calls
    assert (first[0].name, first[1].arguments) == ("run", '{"code": "pri')
    assert parser.feed("nt(1)").calls[0].arguments == "nt(1)"


def test_fences_and_braces_inside_a_string_argument_stay():
    arguments = json.dumps({"text": "```json\n{}\n```", "note": "a ` b `` c"})
    for size in (1, 5, 1000):
        text = CALLS_BEGIN + call("write", arguments) + CALLS_END
        assert parse([text[i : i + size] for i in range(0, len(text), size)]) == ("", [["write", arguments]])


@pytest.mark.parametrize(
    "text",
    [
        f"{CALLS_BEGIN}{CALL_BEGIN}code{SEPARATOR}x\n```json\n{{}}\n```{CALL_END}{CALLS_END}",  # not "function"
        f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}x\n{{}}",  # no fence
        f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}a name\n```json\n",
        f"hello {CALLS_BEGIN}",
        f"{CALLS_BEGIN}{CALLS_END}",
        CALLS_BEGIN[:-1],
    ],
)
def test_what_is_no_call_stays_in_the_content(text):
    assert parse(list(text)) == (text, [])
    assert parse([text]) == (text, [])


def test_a_call_cut_off_keeps_its_beginning():
    text = CALLS_BEGIN + call("weather", PARIS)
    assert parse([text[: text.index("ris")]]) == ("", [["weather", '{"city": "Pa']])
    assert parse([text[: -len(CALL_END) + 3]]) == ("", [["weather", PARIS]])
