"""Request fields that give an answer a form, and tools, on a real server: they act, or are refused."""

import json
import re

import pytest

from tests.end_to_end.server_fields import events, field, ids_of, ok, refused, speculating_server

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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with speculating_server(tmp_path_factory) as running:
        yield running


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
