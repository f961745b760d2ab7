"""Reasoning apart from the answer: the written rules on known texts, and one result for every cut of the stream."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_fp4_plugin.serving.reasoning import REASONING_PARSERS, Split
from deepseek_fp4_plugin.serving.tool_calls import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    ToolCallParser,
)

PIECES = [
    "<think>", "</think>", "<think", "</thi", "<", "</", ">", "\n", "\n\n", " ", "answer", "思考", "é", "🙂", "`",
    "```", CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR, CALLS_BEGIN[:7], CALL_END[:-1], "function",
    f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}get_weather\n```json\n", '{"city": "巴黎"}', f"\n```{CALL_END}",
    f"\n{CALL_BEGIN}function{SEPARATOR}second\n```json\n", "\n```json\n", "<｜tool▁",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=14).map("".join)


def cut(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def parse(pieces: list[str], parser_name: str, opened: bool = False):
    """Reasoning, content and calls (name, arguments) of a stream of pieces, both parsers in a row as the server has."""
    reasoning_parser, tool_parser = REASONING_PARSERS[parser_name](opened), ToolCallParser()
    reasoning, content, calls = "", "", []

    def take(split: Split, last: bool = False):
        nonlocal reasoning, content
        reasoning += split.reasoning
        for out in [tool_parser.feed(split.content)] + ([tool_parser.finish()] if last else []):
            content += out.content
            for delta in out.calls:
                if delta.name is not None:
                    assert delta.index == len(calls)
                    calls.append([delta.name, ""])
                assert delta.index == len(calls) - 1
                calls[-1][1] += delta.arguments

    for piece in pieces:
        take(reasoning_parser.feed(piece))
    take(reasoning_parser.finish(), last=True)
    return reasoning, content, calls


def check_cuts(text: str, cuts: list[int], parser_name: str, opened: bool) -> None:
    whole = parse([text], parser_name, opened)
    assert parse(cut(text, cuts), parser_name, opened) == whole
    assert parse(list(text), parser_name, opened) == whole
    if parser_name == "deepseek-r1":  # an independent statement of the rule
        head, _, tail = text.partition("</think>")
        assert whole[0] == head
        if CALLS_BEGIN not in tail:
            assert (whole[1], whole[2]) == (tail, [])


arguments = (
    texts,
    st.lists(st.integers(0, 500), max_size=12),
    st.sampled_from(sorted(REASONING_PARSERS)),
    st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(*arguments)
def test_any_cut_gives_the_same_result(text, cuts, parser_name, opened):
    check_cuts(text, cuts, parser_name, opened)


@pytest.mark.proof
@settings(max_examples=10_000, deadline=None)
@given(*arguments)
def test_any_cut_gives_the_same_result_ten_thousand(text, cuts, parser_name, opened):
    check_cuts(text, cuts, parser_name, opened)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\n1+1\n</think>\n\n2", "<think>\n1+1\n", "\n\n2"),
        ("1+1</think>2", "1+1", "2"),  # a template that opened the block
        ("never closed", "never closed", ""),
        ("a</think>b<think>c</think>d", "a", "b<think>c</think>d"),  # split once
        ("half </thi", "half </thi", ""),
    ],
)
def test_deepseek_r1_keeps_every_character_but_the_tag(text, reasoning, content):
    assert parse(list(text), "deepseek-r1")[:2] == (reasoning, content)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\n1+1\n</think>\n\n2", "1+1", "2"),
        ("\n<think>\n1+1", "1+1", ""),
        ("no thinking, <think> later", "", "no thinking, <think> later"),
        ("<thin", "", "<thin"),
        ("<think></think>ok", "", "ok"),
    ],
)
def test_deepseek_r1_0528_files_an_unthinking_answer_as_content(text, reasoning, content):
    assert parse(list(text), "deepseek-r1-0528")[:2] == (reasoning, content)


def test_deepseek_r1_0528_with_the_tag_in_the_prompt():
    assert parse(["1+1\n</think>\n2"], "deepseek-r1-0528", opened=True)[:2] == ("1+1", "2")
