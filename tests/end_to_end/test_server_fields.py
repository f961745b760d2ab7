"""Every documented request field, on a real server: it acts, or it is refused."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest, CompletionRequest
from tests.end_to_end.server_process import Server, running_server

MTP = """
speculative_config:
  decoding_type: MTP
  num_nextn_predict_layers: 3
  use_relaxed_acceptance_for_thinking: true
  relaxed_topk: 10
  relaxed_delta: 0.6
"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "巴黎"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        "strict": None,
    },
}
covered: set[str] = set()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "args.yaml").write_text(MTP)
    arguments = ["--max_batch_size", "4", "--max_num_tokens", "512", "--max_seq_len", "2048",
                 "--extra_llm_api_options", "args.yaml", "--tool_parser", "deepseek_v3"]  # fmt: skip
    with running_server(folder, *arguments) as running:
        yield running


def field(*names: str):
    """Marks a test as the one that shows these fields to act or to be refused."""
    covered.update(names)
    return lambda test: test


def ok(response: httpx.Response) -> dict:
    assert response.status_code == 200, response.text
    return response.json()


def refused(response: httpx.Response, word: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert word in error["message"]
    assert error["type"] == "BadRequestError"


def text(server: Server, prompt="abc", **fields) -> str:
    return ok(server.complete(prompt, **{"temperature": 0, **fields}))["choices"][0]["text"]


def tokens(server: Server, prompt="abc", **fields) -> list[int]:
    body = ok(server.complete(prompt, return_token_ids=True, **{"temperature": 0, **fields}))
    return body["choices"][0]["token_ids"]


def ids_of(server: Server, string: str) -> list[int]:
    return ok(httpx.post(f"{server.url}/tokenize", json={"prompt": string, "add_special_tokens": False}))["tokens"]


def events(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# ---------------------------------------------------------------------------- sampling


@field("model")
def test_model(server):
    wrong = httpx.post(f"{server.url}/v1/completions", json={"model": "gpt", "prompt": "a"})
    assert wrong.status_code == 404
    assert wrong.json()["error"]["code"] == "model_not_found"
    assert server.name in wrong.json()["error"]["message"]
    assert ok(server.complete())["model"] == server.name


@field("temperature", "top_p", "seed")
def test_defaults_are_the_models_own_advice(server):
    advised = [tokens(server, temperature=None, seed=s, max_tokens=40) for s in range(3)]
    explicit = [tokens(server, temperature=0.6, top_p=0.95, seed=s, max_tokens=40) for s in range(3)]
    other = [tokens(server, temperature=1.0, top_p=1.0, seed=s, max_tokens=40) for s in range(3)]
    assert advised == explicit
    assert advised != other
    assert len({tuple(t) for t in other}) > 1
    assert tokens(server, temperature=1.0, seed=-5) == tokens(server, temperature=1.0, seed=-5)


@field("top_k", "min_p")
def test_every_way_to_be_greedy_gives_the_same(server):
    chat = {"messages": [{"role": "user", "content": "What is 607 + 68?"}]}  # the model is sure here: no ties
    prompt = ok(httpx.post(f"{server.url}/tokenize", json=chat))["tokens"]
    greedy = tokens(server, prompt, max_tokens=20)
    for fields in ({"top_k": 1}, {"top_p": 0}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert tokens(server, prompt, max_tokens=20, **{"temperature": 1.0, **fields}) == greedy, fields


@field("n", "best_of")
def test_n(server):
    body = ok(server.complete(["abc", "xyz"], n=3, temperature=1.0, best_of=3))
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    chunks = events(server.complete(["abc", "xyz"], n=2, temperature=1.0, stream=True))
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == set(range(4))
    refused(server.complete(n=2, best_of=3), "best_of")


@field("frequency_penalty", "presence_penalty", "repetition_penalty")
def test_penalties_push_repetition_out(server):
    # With every other token banned but two, the penalized one gives way to the other.
    two = {str(t): 100 for t in ids_of(server, "qz")}
    plain = tokens(server, logit_bias=two, max_tokens=12)
    assert set(plain) <= set(ids_of(server, "qz"))
    for fields in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 1.5}):
        assert tokens(server, logit_bias=two, max_tokens=12, **fields) != plain or len(set(plain)) == 2
        assert len(set(tokens(server, logit_bias=two, max_tokens=12, **fields))) == 2


@field("logit_bias")
def test_logit_bias(server):
    (wanted,) = ids_of(server, "Q")
    assert tokens(server, logit_bias={str(wanted): 100}) == [wanted] * 8
    first = tokens(server)[0]
    assert first not in tokens(server, logit_bias={str(first): -100})
    refused(server.complete(logit_bias={"9999999": 1}), "logit_bias")
    refused(server.complete(logit_bias={"abc": 1}), "logit_bias")


@field("bad_words")
def test_bad_words(server):
    spelled = dict(zip(map(str, ids_of(server, "Qx")), (100, 60), strict=True))
    assert set(text(server, logit_bias=spelled)) == {"Q"}
    assert "Q" not in text(server, logit_bias=spelled, bad_words=["Q"])


# ---------------------------------------------------------------------------- ends


@field("stop", "include_stop_str_in_output")
def test_stop(server):
    q, x = (str(t) for t in ids_of(server, "Qx"))
    # A pattern of known text: Q has the larger bias, the frequency penalty lets x in.
    fields = {"logit_bias": {q: 100, x: 99}, "frequency_penalty": 2, "max_tokens": 20}
    whole = text(server, **fields)
    assert {"Q", "x"} == set(whole)
    at = whole.index("xQ")
    body = ok(server.complete(stop=["nothing", "xQ"], temperature=0, **fields))["choices"][0]
    assert (body["text"], body["finish_reason"], body["stop_reason"]) == (whole[:at], "stop", "xQ")
    assert text(server, stop="xQ", include_stop_str_in_output=True, **fields) == whole[:at] + "xQ"
    streamed = events(server.complete(stop="xQ", stream=True, temperature=0, **fields))
    assert "".join(c["choices"][0]["text"] for c in streamed) == whole[:at]


@field("stop_token_ids", "ignore_eos", "min_tokens", "max_tokens")
def test_ends(server):
    eos = {"1": 100}
    body = ok(server.complete(logit_bias=eos))
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("", "stop")
    assert body["choices"][0]["stop_reason"] is None
    assert len(tokens(server, logit_bias=eos, ignore_eos=True)) == 8
    assert len(tokens(server, logit_bias=eos, min_tokens=5)) >= 5
    (q,) = ids_of(server, "Q")
    body = ok(server.complete(logit_bias={str(q): 100}, stop_token_ids=[q]))["choices"][0]
    assert (body["text"], body["finish_reason"], body["stop_reason"]) == ("", "stop", q)
    body = ok(server.complete(max_tokens=3, ignore_eos=True))
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    refused(server.complete(min_tokens=9), "min_tokens")
    refused(server.complete(max_tokens=0), "max_tokens")


@field("max_completion_tokens")
def test_both_names_of_the_limit(server):
    both = {"max_tokens": 3, "max_completion_tokens": 3}
    for fields in ({"max_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}, both):
        assert ok(server.chat(ignore_eos=True, **fields))["usage"]["completion_tokens"] == 3
    refused(server.chat(max_tokens=3, max_completion_tokens=4), "max_completion_tokens")


@field("skip_special_tokens", "spaces_between_special_tokens")
def test_special_tokens(server):
    special = {str(ids_of(server, "<|EOT|>")[0]): 100}
    assert text(server, logit_bias=special) == ""
    assert text(server, logit_bias=special, skip_special_tokens=False) == "<|EOT|>" * 8
    refused(server.complete(spaces_between_special_tokens=False), "spaces_between_special_tokens")


# ---------------------------------------------------------------------------- prompts


@field("prompt", "echo", "logprobs", "prompt_logprobs")
def test_prompts_echo_and_logprobs(server):
    ids = ids_of(server, "abc")
    body = ok(server.complete([ids, ids], echo=True, logprobs=2, max_tokens=2, temperature=0, ignore_eos=True))
    first, second = body["choices"]
    assert first["text"].startswith("abc")
    assert first["text"] == second["text"]
    logprobs = first["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 5
    assert logprobs["tokens"][:3] == ["a", "b", "c"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["text_offset"][:4] == [0, 1, 2, 3]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    # The prompt's log-probabilities are those of generating it.
    again = ok(server.complete("ab", logprobs=20, max_tokens=1, temperature=0))["choices"][0]["logprobs"]
    if "c" in again["top_logprobs"][0]:
        assert again["top_logprobs"][0]["c"] == pytest.approx(logprobs["token_logprobs"][2], abs=0.05)
    body = ok(server.complete("abc", echo=True, max_tokens=0, logprobs=1))["choices"][0]
    assert body["text"] == "abc"
    assert len(body["logprobs"]["tokens"]) == 3
    body = ok(server.complete("abc", prompt_logprobs=3))["choices"][0]
    assert body["prompt_logprobs"][0] is None
    assert str(ids[1]) in body["prompt_logprobs"][1]
    refused(server.complete("abc", prompt_logprobs=3, stream=True), "prompt_logprobs")
    streamed = events(server.complete("abc", echo=True, logprobs=0, max_tokens=3, stream=True, temperature=0))
    assert "".join(c["choices"][0]["text"] for c in streamed) == "abc" + text(server, max_tokens=3)
    refused(server.complete([10**8]), "vocabulary")
    refused(server.complete(""), "empty")
    refused(server.complete("a" * 3000), "2048")


@field("top_logprobs")
def test_chat_logprobs(server):
    body = ok(server.chat(logprobs=True, top_logprobs=3, temperature=0, max_tokens=4))["choices"][0]
    content = body["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["token"] == entry["top_logprobs"][0]["token"]
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])
        if not entry["token"].startswith("bytes:"):
            assert bytes(entry["bytes"]).decode() == entry["token"]
    assert ok(server.chat(logprobs=True))["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    chunks = events(server.chat(logprobs=True, top_logprobs=1, temperature=0, max_tokens=4, stream=True))
    assert sum(len(c["choices"][0]["logprobs"]["content"]) for c in chunks if c["choices"][0]["logprobs"]) == 4
    refused(server.chat(top_logprobs=2), "top_logprobs")


@field("suffix", "add_special_tokens", "truncate_prompt_tokens")
def test_prompt_preparation(server):
    refused(server.complete(suffix="x"), "suffix")
    body = ok(server.complete("abcdef", truncate_prompt_tokens=2, echo=True, max_tokens=1))
    assert body["usage"]["prompt_tokens"] == 2
    assert body["choices"][0]["text"].startswith("ef")
    # This tokenizer adds nothing of its own, so both settings give the prompt as it is.
    for flag in (True, False):
        assert ok(server.complete("abc", add_special_tokens=flag))["usage"]["prompt_tokens"] == 3


@field("messages", "add_generation_prompt", "chat_template_kwargs", "chat_template", "documents")
def test_chat_prompts(server):
    def count(messages, **fields):
        body = {"model": server.name, "messages": messages, "max_tokens": 1, **fields}
        return ok(httpx.post(f"{server.url}/v1/chat/completions", json=body))["usage"]["prompt_tokens"]

    user = {"role": "user", "content": "hi"}
    assert count([user]) == 5  # bos, User, h, i, Assistant
    assert count([{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]) == 5
    assert count([{"role": "system", "content": "sys"}, user]) == 8
    assert count([{"role": "developer", "content": "sys"}, user]) == 8
    answered = [user, {"role": "assistant", "content": "ok", "reasoning_content": "dropped"}]
    assert count(answered) == count(answered, add_generation_prompt=False) + 1
    tool_turn = [user, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"}]  # fmt: skip
    assert count(tool_turn) > 10
    tool_turn[2]["tool_call_id"] = "c2"
    refused(server.chat(messages=tool_turn), "tool_call_id")
    refused(server.chat(messages=[user, {"role": "assistant", "content": None}]), "content")
    refused(server.chat(chat_template_kwargs={"no_such_variable": 1}), "no_such_variable")
    refused(server.chat(chat_template="{{ x }}"), "chat_template")
    refused(server.chat(documents=[]), "documents")


# ---------------------------------------------------------------------------- streams


@field("stream", "stream_options")
def test_stream(server):
    whole = ok(server.chat(temperature=0, ignore_eos=True))
    chunks = events(server.chat(temperature=0, ignore_eos=True, stream=True))
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "role" not in chunks[-1]["choices"][0]["delta"]
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        == (whole["choices"][0]["message"]["content"])
    )
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({c["id"] for c in chunks}) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    for options, with_usage in (({"include_usage": True}, True), ({}, True), ({"include_usage": False}, False)):
        chunks = events(server.chat(temperature=0, ignore_eos=True, stream=True, stream_options=options))
        assert (chunks[-1]["choices"] == []) == with_usage
        if with_usage:
            assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    options = {"continuous_usage_stats": True}
    chunks = events(server.chat(temperature=0, stream=True, stream_options=options))
    assert all("usage" in c for c in chunks)
    refused(server.chat(stream_options={}), "stream_options")


@field("return_token_ids", "return_accepted_drafts")
def test_tokens_beside_the_text(server):
    body = ok(server.chat(temperature=0, return_token_ids=True, return_accepted_drafts=True))["choices"][0]
    assert len(body["token_ids"]) == len(body["tokens"])
    assert body["prompt_token_ids"][0] == 0
    assert "".join(t["text"] for t in body["tokens"]) == body["message"]["content"]
    chunks = events(server.chat(temperature=0, stream=True, return_token_ids=True, return_accepted_drafts=True))
    choices = [c["choices"][0] for c in chunks]
    assert [i for c in choices for i in c["token_ids"]] == body["token_ids"]
    assert [t for c in choices for t in c["tokens"]] == body["tokens"]


@field("return_token_ids")
def test_a_stream_has_the_ids_of_tokens_that_bring_no_text(server):
    """A character in two tokens is text when the second one comes; the first one's id is told all the same."""
    pair = ids_of(server, "\N{EN DASH}")
    assert len(pair) == 2
    fields = {"temperature": 0, "max_tokens": 6, "stream": True, "return_token_ids": True, "ignore_eos": True}
    chunks = events(server.complete(**fields, logit_bias={str(pair[0]): 100}))
    assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == pair[:1] * 6


@field("relaxed_acceptance", "relaxed_topk", "relaxed_delta")
def test_relaxed_acceptance_can_be_steered(server):
    # An open think block in the prompt makes the first step a thinking one; with every token in the top k, every
    # draft passes.
    prompt = ids_of(server, "<think>abc")
    base = {"max_tokens": 24, "ignore_eos": True, "temperature": 0, "return_accepted_drafts": True,
            "logit_bias": {str(ids_of(server, tag)[0]): -100 for tag in ("<think>", "</think>")}}  # fmt: skip

    def accepted(**fields) -> int:
        body = ok(server.complete(prompt, **base, **fields))["choices"][0]
        return sum(t["accepted_draft"] for t in body["tokens"])

    everything = accepted(relaxed_topk=1024, relaxed_delta=1.0)
    assert everything >= 16  # three of four, but for the ends
    strict = accepted(relaxed_acceptance=False)
    assert strict < everything
    assert accepted(relaxed_topk=1) == strict
    unspeculated = text(server, prompt=prompt, **{k: v for k, v in base.items() if k != "return_accepted_drafts"},
                        relaxed_acceptance=False)  # fmt: skip
    assert unspeculated == text(server, prompt=prompt, relaxed_topk=1, **{
        k: v for k, v in base.items() if k != "return_accepted_drafts"})  # fmt: skip


# ---------------------------------------------------------------------------- structured output


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["a", "ok"],
    "additionalProperties": False,
}


@field("response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "schema"),
        ({"response_format": {"type": "json", "schema": SCHEMA}}, "schema"),
        ({"guided_json": SCHEMA}, "schema"),
        ({"guided_json": json.dumps(SCHEMA)}, "schema"),
        ({"response_format": {"type": "regex", "regex": r"\d{3}-[a-f]{2}"}}, r"\d{3}-[a-f]{2}"),
        ({"guided_regex": r"\d{3}-[a-f]{2}"}, r"\d{3}-[a-f]{2}"),
        ({"response_format": {"type": "ebnf", "ebnf": 'root ::= "yes" | "no" [0-9]'}}, r"yes|no[0-9]"),
        ({"guided_grammar": 'start: "yes" | "no" /[0-9]/'}, r"yes|no[0-9]"),
        ({"response_format": {"type": "choice", "choice": ['say "hi"\n', "谢谢"]}}, 'say "hi"\n|谢谢'),
        ({"guided_choice": ["left", "right"]}, "left|right"),
    ],
)
def test_structured_output(server, fields, check, temperature):
    body = ok(server.complete(max_tokens=200, temperature=temperature, seed=7, **fields))["choices"][0]
    assert body["finish_reason"] == "stop"
    if check == "schema":
        value = json.loads(body["text"])
        assert set(value) == {"a", "ok"}
        assert 0 <= value["a"] <= 99
        assert isinstance(value["ok"], bool)
    else:
        assert re.fullmatch(check, body["text"]), body["text"]


def test_any_json_object(server):
    quick = {str(ids_of(server, "}")[0]): 60, str(ids_of(server, '"')[0]): 30}
    body = ok(server.complete(response_format={"type": "json_object"}, max_tokens=400, temperature=0, logit_bias=quick))
    assert isinstance(json.loads(body["choices"][0]["text"]), dict)


def test_structured_output_waits_for_the_end_of_thinking(server):
    think, end = ids_of(server, "<think>")[0], ids_of(server, "</think>")[0]
    chosen = {"type": "choice", "choice": ["left", "right"]}
    # A chat turn that opens a think block: forced by a bias, closed by it.
    body = ok(server.chat(response_format=chosen, max_tokens=40, temperature=0, return_token_ids=True,
                          logit_bias={str(think): 60, str(end): 80}))["choices"][0]  # fmt: skip
    assert re.fullmatch(r"(<think>)+</think>(left|right)", body["message"]["content"])
    # One that does not: held from its first token.
    body = ok(server.chat(response_format=chosen, max_tokens=40, temperature=0, logit_bias={str(think): -100}))
    assert body["choices"][0]["message"]["content"] in ("left", "right")
    # An end of text inside the thinking is closed: the answer must come.
    prompt = ids_of(server, "<think>abc")
    body = ok(server.complete(prompt, guided_choice=["left", "right"], max_tokens=60, temperature=0,
                              logit_bias={"1": 100, str(end): 50}))["choices"][0]  # fmt: skip
    assert re.fullmatch(r"[^<]*</think>(left|right)", body["text"])


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "(a"},
        {"guided_regex": "(?=a)b"},
        {"guided_json": {"type": "nonsense"}},
        {"guided_json": {"not": {"type": "string"}}},
        {"guided_json": {"$ref": "http://example.com/schema"}},
        {"guided_json": "not json"},
        {"guided_grammar": "garbage ("},
        {"guided_choice": ["a"], "guided_regex": "b"},
        {"guided_choice": ["a"], "ignore_eos": True},
        {"guided_choice": ["a"], "min_tokens": 2},
        {"guided_choice": ["a"], "bad_words": ["x"]},
    ],
)
def test_structured_output_that_cannot_be_enforced_is_refused(server, fields):
    assert server.complete(**fields).status_code == 400


LOOP = {"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}
ENDLESS = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": LOOP}}}, "response_format"),
        ({"response_format": {"type": "json", "schema": ENDLESS}}, "response_format"),
        ({"guided_json": ENDLESS}, "guided_json"),
        ({"guided_json": {"type": "object", "properties": {"x": LOOP}, "required": ["x"], **LOOP}}, "guided_json"),
        ({"response_format": {"type": "ebnf", "ebnf": "root ::= foo"}}, "response_format"),
        ({"response_format": {"type": "ebnf", "ebnf": 'root ::= root "a"'}}, "response_format"),
        ({"guided_grammar": 'start: "a" start'}, "guided_grammar"),
        ({"guided_regex": r"[^\s\S]"}, "guided_regex"),
        ({"response_format": {"type": "structural_tag", "structures": [], "triggers": []}}, "response_format"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_structured_output_that_no_text_satisfies_is_refused(server, fields, param, stream):
    answer = server.complete(stream=stream, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert "EBNF" not in error["message"] or "grammar" in str(fields) or "ebnf" in str(fields)


# ---------------------------------------------------------------------------- tools


def tool(parameters, name: str = "f", **more) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


NUMBER = {"properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["x"]}


@pytest.mark.parametrize(
    "parameters",
    [
        NUMBER,
        {**NUMBER, "type": ["object", "null"]},
        {"$ref": "#/$defs/a", "$defs": {"a": NUMBER}},
        {"anyOf": [{"type": "string"}, NUMBER]},
        {"allOf": [NUMBER]},
        {},
    ],
)
def test_the_arguments_of_a_held_call_are_an_object(server, parameters):
    quick = {str(ids_of(server, "<think>")[0]): -100, str(ids_of(server, "}")[0]): 40}
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        body = ok(server.chat(tools=[tool(parameters)], tool_choice=choice, parallel_tool_calls=False, temperature=1.0,
                              seed=5, max_tokens=400, logit_bias=quick))["choices"][0]  # fmt: skip
        if body["finish_reason"] == "length":  # it goes on adding properties, which the schema allows
            assert body["message"].get("tool_calls") is None or body["message"]["tool_calls"][0]["function"][
                "arguments"
            ].lstrip().startswith("{")
            continue
        (call,) = body["message"]["tool_calls"]
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"type": "string"}, "an object"),
        ({"type": ["string", "null"]}, "an object"),
        (ENDLESS, "always needs another"),
        ({"type": "object", "properties": {"x": {"type": "string", "pattern": "(?=a)b"}}}, "look-ahead"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "this JSON schema cannot be enforced"),
    ],
)
def test_a_tool_that_cannot_be_held_is_named(server, parameters, said):
    tools = [tool(NUMBER, "fine"), tool(parameters, "wrong")]
    answer = server.chat(tools=tools, tool_choice="required")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tools.1.function.parameters")
    assert said in error["message"] and error["message"].startswith("tools.1.function.parameters: ")
    assert "EBNF" not in error["message"] and "call0" not in error["message"]
    allowed = [{"type": "function", "function": {"name": name}} for name in ("fine", "wrong")]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": allowed}}
    assert server.chat(tools=tools, tool_choice=choice).json()["error"] == error
    # Where nothing holds the model to the schema, nothing is wrong with it.
    assert server.chat(tools=tools, tool_choice="auto", max_tokens=2).status_code == 200


@field("tools", "tool_choice", "parallel_tool_calls")
def test_tools(server):
    fields = {"tools": [WEATHER], "temperature": 1.0, "max_tokens": 300}
    no_think = {str(ids_of(server, "<think>")[0]): -100}
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        # Asked once before, so that both that are compared find the same part of the prompt in the cache.
        ok(server.chat(tool_choice=choice, seed=3, parallel_tool_calls=False, logit_bias=no_think, **fields))
        body = ok(server.chat(tool_choice=choice, seed=3, parallel_tool_calls=False, logit_bias=no_think, **fields))
        choice_ = body["choices"][0]
        assert choice_["finish_reason"] == "tool_calls", body
        (call,) = choice_["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["city"] in ("Paris", "巴黎")
        assert 1 <= arguments["days"] <= 9
        chunks = events(server.chat(tool_choice=choice, seed=3, parallel_tool_calls=False, logit_bias=no_think,
                                    stream=True, **fields))  # fmt: skip
        deltas = [d for c in chunks for d in c["choices"][0]["delta"].get("tool_calls", [])]
        assert deltas[0]["function"]["name"] == "get_weather"
        assert deltas[0]["id"]
        assert "".join(d["function"]["arguments"] for d in deltas) == call["function"]["arguments"]
        assert len(deltas) > 3  # the arguments came piece by piece
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    begin = ids_of(server, "<｜tool▁calls▁begin｜>")[0]
    none = ok(server.chat(tools=[WEATHER], tool_choice="none", logit_bias={str(begin): 100}, temperature=0))
    assert "tool_calls" not in none["choices"][0]["message"]
    assert "tool▁calls" not in none["choices"][0]["message"]["content"]
    with_tools = ok(server.chat(tools=[WEATHER], tool_choice="auto"))["usage"]["prompt_tokens"]
    assert with_tools > none["usage"]["prompt_tokens"] + 50
    # A strict tool under auto: free text, but a call once begun keeps to the schema.
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    body = ok(server.chat(tools=[strict], temperature=0, parallel_tool_calls=False, max_tokens=300,
                          logit_bias={str(begin): 40, **no_think}))["choices"][0]  # fmt: skip
    assert json.loads(body["message"]["tool_calls"][0]["function"]["arguments"])["city"] in ("Paris", "巴黎")
    refused(server.chat(tool_choice="required"), "tools")
    refused(server.chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "other"}}), "other")
    refused(server.chat(tools=[WEATHER, WEATHER]), "same name")


UNHELD = {
    "type": "object",
    "properties": {
        "x": {"type": "array", "items": {"enum": [7]}, "minItems": 2, "maxItems": 2, "uniqueItems": True},
        "file": {"type": "string", "format": "path", "maxLength": 3},
    },
    "required": ["x", "file"],
}


def test_what_no_mask_can_enforce_is_checked_behind_the_call(server):
    quick = {str(ids_of(server, "<think>")[0]): -100}
    fields = {"tools": [tool(UNHELD)], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200,
              "logit_bias": quick}  # fmt: skip
    choice = ok(server.chat(**fields))["choices"][0]
    arguments = json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
    assert arguments["x"] == [7, 7] and set(arguments) == {"x", "file"}
    (error,) = choice["tool_call_errors"]
    assert error["index"] == 0 and error["error"].startswith("/x: ")
    last = events(server.chat(stream=True, **fields))[-1]["choices"][0]
    assert last["finish_reason"] == "tool_calls" and last["tool_call_errors"] == [error]
    # A schema without such keywords leaves nothing to say; a strict function is refused rather than half held.
    fine = {**UNHELD, "properties": {**UNHELD["properties"], "x": {"const": 1}}}
    assert "tool_call_errors" not in ok(server.chat(**{**fields, "tools": [tool(fine)]}))["choices"][0]
    refused(server.chat(**{**fields, "tools": [tool(UNHELD, strict=True)]}), "uniqueItems")


def test_tools_and_a_form_for_the_answer_together(server):
    begin, no_think = ids_of(server, "<｜tool▁calls▁begin｜>")[0], {str(ids_of(server, "<think>")[0]): -100}
    fields = {"tools": [WEATHER], "parallel_tool_calls": False, "max_tokens": 300, "temperature": 1.0, "seed": 3}
    forms = [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, None),
        ({"response_format": {"type": "regex", "regex": "a/b[0-9]"}}, "a/b[0-9]"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
    ]
    for form, pattern in forms:
        whole = ok(server.chat(**fields, **form, logit_bias={**no_think, str(begin): -100}))["choices"][0]["message"]
        assert "tool_calls" not in whole
        if pattern is None:
            assert set(json.loads(whole["content"])) == {"a", "ok"}
        else:
            assert re.fullmatch(pattern, whole["content"])
        strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
        called = ok(server.chat(**{**fields, "tools": [strict]}, **form, logit_bias={**no_think, str(begin): 100}))
        (call,) = called["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "巴黎")
    refused(server.chat(**fields, guided_grammar='start: "a"'), "guided_grammar")
    refused(server.chat(**fields, guided_json={"not": {}}), "guided_json: this JSON schema")


def test_allowed_tools(server):
    no_think = {str(ids_of(server, "<think>")[0]): -100}
    tools = [tool(NUMBER, name) for name in ("f", "g", "h")]

    def choose(mode, *names):
        chosen = [{"type": "function", "function": {"name": name}} for name in names]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": chosen}}
        return server.chat(tools=tools, tool_choice=choice, max_tokens=200, logit_bias=no_think, temperature=1.0,
                           seed=1, parallel_tool_calls=False)  # fmt: skip

    (call,) = ok(choose("required", "g"))["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "g"
    two, three = (ok(choose("auto", *names))["usage"]["prompt_tokens"] for names in (("f", "h"), ("f", "g", "h")))
    assert two < three
    refused(choose("auto", "other"), "other")


LOOSE = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}


@field("structured_outputs", "guided_whitespace_pattern")
def test_undeclared_properties_and_blanks(server):
    def written(seed=0, **fields) -> str:
        return ok(server.complete(max_tokens=300, temperature=1.0, seed=seed, **fields))["choices"][0]["text"]

    for seed in range(4):
        for fields in ({"guided_json": LOOSE}, {"structured_outputs": {"json": LOOSE}}):
            assert re.fullmatch(r"{ ?\"a\" ?: ?[12] ?}", written(seed, **fields))
        for name, value in (("guided_whitespace_pattern", ""), ("structured_outputs", None)):
            own = {name: value, "guided_json": LOOSE} if value is not None else {
                name: {"json": LOOSE, "disable_any_whitespace": True}}  # fmt: skip
            assert re.fullmatch(r'{"a":[12]}', written(seed, **own))
        wide = {"structured_outputs": {"json": LOOSE, "whitespace_pattern": "[ ]{3}"}}
        assert re.fullmatch(r'{   "a"   :   [12]   }', written(seed, **wide))
    more = {str(ids_of(server, ",")[0]): 100, str(ids_of(server, "}")[0]): -100}
    opened = {"logit_bias": more, "structured_outputs": {"json": LOOSE, "disable_additional_properties": False}}
    assert re.match(r'{ ?"a" ?: ?[12] ?, ?"', written(**opened))
    assert re.match(r'{ ?"a" ?: ?[12] ?, ?"', written(guided_json={**LOOSE, "additionalProperties": True},
                                                      logit_bias=more))  # fmt: skip
    other = [{"regex": "[ab]{3}"}, {"choice": ["x"]}, {"grammar": 'start: "q"'}, {"json": json.dumps(LOOSE)}]
    for outputs, check in zip(other, ("[ab]{3}", "x", "q", ".*"), strict=True):
        assert re.fullmatch(check, written(structured_outputs=outputs))
    refused(server.complete(structured_outputs={}), "structured_outputs")
    refused(server.complete(structured_outputs={"regex": "a", "choice": ["a"]}), "structured_outputs")
    refused(server.complete(structured_outputs={"regex": "a"}, guided_regex="a"), "structured_outputs")
    refused(server.complete(guided_whitespace_pattern=" "), "guided_whitespace_pattern")
    refused(server.complete(structured_outputs={"json": LOOSE, "whitespace_pattern": "("}), "structured_outputs")


@field("stop_in_thinking")
def test_stop_texts_inside_the_thinking(server):
    def answer(**fields) -> dict:
        return ok(server.chat("What is 607 + 68?", temperature=0, max_tokens=400, **fields))["choices"][0]

    free = answer()["message"]["content"]
    thought, _, after = free.partition("</think>")
    assert free.startswith("<think>") and "6" in thought and "6" in after
    cut, spared = answer(stop="6"), answer(stop="6", stop_in_thinking=False)
    assert cut["message"]["content"] == thought[: thought.index("6")]
    assert spared["message"]["content"] == f"{thought}</think>{after[: after.index('6')]}"
    assert cut["stop_reason"] == spared["stop_reason"] == "6"
    streamed = events(server.chat("What is 607 + 68?", temperature=0, max_tokens=400, stop="6", stop_in_thinking=False,
                                  stream=True))  # fmt: skip
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed)
    assert text == spared["message"]["content"]
    # A block that the prompt has opened, and a prompt that has none.
    prompt = [*ids_of(server, "<think>"), *ids_of(server, thought.removeprefix("<think>")[:20])]
    whole = ok(server.complete(prompt, temperature=0, max_tokens=200))["choices"][0]["text"]
    opened = ok(server.complete(prompt, temperature=0, max_tokens=200, stop="6", stop_in_thinking=False))["choices"][0]
    before, tag, behind = whole.partition("</think>")
    assert opened["text"] == before + tag + behind.partition("6")[0]
    (q,) = ids_of(server, "Q")
    plain = ok(server.complete("abc", logit_bias={str(q): 100}, stop="Q", stop_in_thinking=False))["choices"][0]
    assert (plain["text"], plain["stop_reason"]) == ("", "Q")


# ---------------------------------------------------------------------------- the rest


@field("cache_salt")
def test_cache_salt(server):
    prompt = "The same long beginning of a prompt, again and again. " * 4

    def cached(salt):
        body = ok(server.complete(prompt, cache_salt=salt, max_tokens=1))
        return body["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0
    assert cached("one") > 100
    assert cached("two") == 0


@field("priority")
def test_priority(server):
    """With every slot taken and both kinds waiting, the high ones leave the queue first, though they came last."""
    finished = []

    def run(name, **fields):
        ok(server.complete(ignore_eos=True, temperature=0, **fields))
        finished.append(name)

    with ThreadPoolExecutor(8) as threads:
        # Streams that nobody reads to the end keep the four slots until they are closed.
        with ExitStack() as busy:
            lines = []  # kept: a stream whose iterator is dropped closes
            for _ in range(4):
                body = {"model": server.name, "prompt": "abc", "max_tokens": 1900, "ignore_eos": True, "stream": True}
                stream = busy.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", json=body))
                lines.append(stream.iter_lines())
                next(lines[-1])
            low = [threads.submit(run, "low", max_tokens=200, priority=-1) for _ in range(4)]
            server.wait_until_waiting(4)
            high = [threads.submit(run, "high", max_tokens=40, priority=1) for _ in range(4)]
            server.wait_until_waiting(8)
        for job in low + high:
            job.result()
    assert finished[:4] == ["high"] * 4
    assert finished[4:] == ["low"] * 4


@field("user")
def test_user_is_in_the_access_log_and_the_prompt_is_not(server):
    ok(server.chat("a very secret prompt", user="customer-17"))
    line = json.loads(server.wait_for_line('"customer-17"'))
    assert line["path"] == "/v1/chat/completions"
    assert line["status"] == 200
    assert line["completion_tokens"] >= 1
    assert "secret" not in server.log


@field("use_beam_search", "length_penalty", "early_stopping", "top_p_min", "thinking_token_budget")
def test_refused_fields(server):
    for fields in ({"use_beam_search": True}, {"length_penalty": 0.5}, {"early_stopping": True}, {"top_p_min": 0.1},
                   {"reasoning_effort": "enormous"}, {"thinking_token_budget": 10}, {"echo": True},
                   {"unknown_field": 1}):  # fmt: skip
        refused(server.chat(**fields), next(iter(fields)))


@field("store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
       "modalities", "verbosity", "prediction", "audio", "web_search_options", "functions", "function_call",
       "continue_final_message", "prompt_cache_options", "moderation", "allowed_token_ids", "logits_processors",
       "return_tokens_as_token_ids", "detokenize", "request_id", "lora_request", "disaggregated_params",
       "kv_transfer_params", "vllm_xargs", "include_reasoning", "mm_processor_kwargs", "media_io_kwargs")  # fmt: skip
@pytest.mark.parametrize(
    "fields",
    [
        {"store": False}, {"store": True}, {"metadata": {"a": "b"}}, {"metadata": None}, {"service_tier": "auto"},
        {"prompt_cache_key": "x"}, {"prompt_cache_retention": "24h"}, {"safety_identifier": "u"},
        {"modalities": ["text"]}, {"verbosity": "medium"}, {"prediction": None},
        {"prediction": {"type": "content", "content": "5"}}, {"audio": None, "web_search_options": None},
        {"functions": None, "function_call": None}, {"continue_final_message": False}, {"tool_choice": "auto"},
        {"n": None, "stream": None, "stream_options": None, "logprobs": None, "parallel_tool_calls": None,
         "response_format": None, "priority": None, "echo": None, "tools": None},
        {"top_k": -1, "temperature": 0}, {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
        {"moderation": None, "allowed_token_ids": None, "logits_processors": None, "request_id": None,
         "lora_request": None, "disaggregated_params": None, "kv_transfer_params": None, "vllm_xargs": None,
         "mm_processor_kwargs": None, "media_io_kwargs": None},
        {"return_tokens_as_token_ids": False, "detokenize": True, "include_reasoning": True},
    ],
)  # fmt: skip
def test_fields_that_cannot_change_the_text_change_nothing(server, fields):
    plain = ok(server.chat(temperature=0))["choices"]
    assert ok(server.chat(**{"temperature": 0, **fields}))["choices"] == plain
    streamed = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert events(server.chat(**{"temperature": 0, **fields, **streamed}))[0]["choices"][0]["delta"]


def test_fields_that_could_change_the_text_are_refused_still(server):
    for fields in ({"modalities": ["text", "audio"]}, {"audio": {"voice": "x"}}, {"functions": [{"name": "f"}]},
                   {"web_search_options": {}}, {"continue_final_message": True}, {"nonsense": None},
                   {"moderation": {"model": "m"}}, {"allowed_token_ids": [5]}, {"return_tokens_as_token_ids": True},
                   {"detokenize": False}, {"include_reasoning": False}, {"vllm_xargs": {"a": 1}}):  # fmt: skip
        refused(server.chat(**fields), next(iter(fields)))
    refused(server.complete(top_k=-2), "top_k")


def test_no_limit_of_top_k_overrides_the_servers(server):
    """-1 is vLLM's word for it."""
    free = tokens(server, top_k=0, temperature=1.0, seed=4, max_tokens=30)
    assert tokens(server, top_k=-1, temperature=1.0, seed=4, max_tokens=30) == free


def test_messages_of_all_clients(server):
    def answer(messages):
        return ok(server.chat(messages=messages, temperature=0))["choices"][0]["message"]["content"]

    plain = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
             {"role": "assistant", "content": "ok"}, {"role": "user", "content": "2 + 3?"}]  # fmt: skip
    wanted = answer(plain)
    for name in ("bob", None):
        assert answer([{**message, "name": name} for message in plain]) == wanted
    for thought in ({"reasoning_content": "t"}, {"reasoning": "t"}, {"reasoning_details": [{"type": "x", "text": "t"}]},
                    {"refusal": None, "audio": None, "tool_calls": None, "function_call": None}):  # fmt: skip
        assert answer([m | thought if m["role"] == "assistant" else m for m in plain]) == wanted


@field("reasoning_effort")
def test_reasoning_effort(server):
    whole = ok(server.chat(temperature=0))
    for level in ("minimal", "low", "medium", "high", "xhigh", "max", None):
        body = ok(server.chat(temperature=0, reasoning_effort=level))
        assert (body["choices"], body["usage"]) == (whole["choices"], whole["usage"])
    think = {str(ids_of(server, "<think>")[0]): 60}
    open_ = ok(server.chat(temperature=0, logit_bias=think, return_token_ids=True))["choices"][0]
    assert open_["message"]["content"].startswith("<think>")
    none = ok(server.chat(temperature=0, reasoning_effort="none", return_token_ids=True, max_tokens=200))["choices"][0]
    block = ids_of(server, "<think>\n\n</think>\n\n")
    assert none["prompt_token_ids"] == open_["prompt_token_ids"] + block
    assert "think>" not in none["message"]["content"]


def test_every_documented_field_has_a_test(server):
    schemas = ok(httpx.get(f"{server.url}/openapi.json"))["components"]["schemas"]
    documented = set(schemas["ChatCompletionRequest"]["properties"]) | set(schemas["CompletionRequest"]["properties"])
    assert documented == set(ChatCompletionRequest.model_fields) | set(CompletionRequest.model_fields)
    assert documented - covered == set()
