"""What a wrong request is told: one sentence about the field as it was sent, however much is wrong with it."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from deepseek_fp4_plugin.serving import messages_protocol, responses_protocol
from deepseek_fp4_plugin.serving.api_errors import ApiError, bad_request
from deepseek_fp4_plugin.serving.bodies import read_body
from deepseek_fp4_plugin.serving.messages_protocol import MessagesRequest
from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest
from deepseek_fp4_plugin.serving.responses_protocol import ResponsesRequest

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
USED = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}


def chat(*messages: Any, **fields: Any) -> tuple[Any, dict[str, Any]]:
    return ChatCompletionRequest, {"model": "m", "messages": list(messages) or [USER], **fields}


def message(*messages: Any, **fields: Any) -> tuple[Any, dict[str, Any]]:
    return MessagesRequest, {"model": "m", "max_tokens": 1, "messages": list(messages) or [USER], **fields}


def response(given: Any = "hi", **fields: Any) -> tuple[Any, dict[str, Any]]:
    return ResponsesRequest, {"model": "m", "input": given, **fields}


def result(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", **fields}]}


WRONG: list[tuple[tuple[Any, dict[str, Any]], str, str]] = [
    (chat({"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}), "messages.0.content.1.type",
     "reads text alone, so 'image_url'"),
    (chat({"role": "user", "content": [{"type": "text", "text": None}]}), "messages.0.content.0.text", "required"),
    (chat({"role": "function", "content": "a"}), "messages.0.role", "one of 'system', 'developer', 'user'"),
    (chat({"content": "a"}), "messages.0.role", "required"),
    (chat(None), "messages.0", "JSON object"),
    (chat({"role": "assistant", "content": "a", "function_call": {}}), "messages.0.function_call", "None"),
    (chat({"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {}}}]}),
     "messages.0.tool_calls.0.function.arguments", "valid string"),
    (chat(tools=[TOOL], tool_choice={}), "tool_choice.type", "required"),
    (chat(tools=[TOOL], tool_choice={"type": "function", "name": "f"}), "tool_choice.function", "required"),
    (chat(response_format={"type": "json_schema", "json_schema": {}}), "response_format.json_schema.schema",
     "required"),
    (message({"role": "user", "content": [{"type": "image", "source": {}}]}), "messages.0.content.0.type",
     "reads text alone, so 'image'"),
    (message(USER, USED, result(content=[{"type": "image"}])), "messages.2.content.0.content.0.type",
     "reads text alone, so 'image'"),
    (message(USER, USED, result(content=5)), "messages.2.content.0.content", "valid string"),
    (message(USER, result(content="5"), system="Be brief."), "messages.1.content.0.tool_use_id", "no earlier message"),
    (message({"role": "user", "content": USED["content"]}), "messages.0.content.0", "the assistant's"),
    (message(USER, {"role": "assistant", "content": result(content="5")["content"]}), "messages.1.content.0",
     "the user's"),
    (message({"role": "user", "content": [{"type": "server_tool_use"}]}), "messages.0.content.0.type", "one of 'text'"),
    (message(mcp_servers=[{}]), "mcp_servers", "at most 0"),
    (response([5]), "input.0", "JSON object"),
    (response([{"type": "item_reference", "id": "a"}]), "input.0.type", "one of 'message'"),
    (response([{"role": "user", "content": [{"type": "input_image"}]}]), "input.0.content.0.type",
     "reads text alone, so 'input_image'"),
    (response([USER, {"type": "function_call_output", "call_id": "a", "output": "5"}], instructions="Be brief."),
     "input.1.call_id", "no earlier item"),
    (response(tools=[{"type": "mcp"}]), "tools.0.type", "one of 'function'"),
    (response(tools=[{"type": "function"}]), "tools.0.name", "required"),
    (response(prompt={"id": "a"}), "prompt", "None"),
]  # fmt: skip


def read(model: Any, body: dict[str, Any]) -> None:
    request = read_body(json.dumps(body).encode(), model)
    if isinstance(request, MessagesRequest):
        messages_protocol.chat_fields(request)
    if isinstance(request, ResponsesRequest):
        responses_protocol.as_messages(request.input)


def told(model: Any, body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(model, body)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(("request_", "param", "words"), WRONG, ids=[param for _, param, _ in WRONG])
def test_the_field_is_named_as_it_was_sent(request_, param, words):
    error = told(*request_)
    assert error.param == param
    assert error.message.startswith(f"{param}: ") and words in error.message
    assert "tag" not in error.message and "\n" not in error.message


def test_names_of_a_chat_become_those_of_the_form_that_was_sent():
    error = bad_request("tools.0.function.name: no", "tools.0.function.name")
    assert error.renamed(messages_protocol.CHAT_NAMES).param == "tools.0.name"
    assert error.renamed(responses_protocol.CHAT_NAMES).message == "tools.0.name: no"


@pytest.mark.parametrize("request_", [
    (CompletionRequest, {"model": "m", "prompt": [-1] * 10_000}),
    (DetokenizeRequest, {"tokens": [-1] * 10_000}),
    chat(*[{}] * 10_000),
    chat({"role": "user", "content": [{}] * 10_000}),
    chat({"role": "assistant", "content": "a", "tool_calls": [{}] * 10_000}),
    chat(**{f"field{i}": 1 for i in range(10_000)}),
    message(*[{}] * 10_000),
    message({"role": "user", "content": [{}] * 10_000}),
    response([{}] * 10_000),
])  # fmt: skip
def test_a_request_that_is_wrong_all_over_is_told_one_thing(request_):
    """Ten thousand complaints would take the memory and the time of as many requests."""
    model, body = request_
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 4  # of one entry and of a union's alternatives


def test_an_answer_repeats_no_long_name():
    name = "k" * 100_000
    for body in ({name: 1}, {"metadata": {name: 1}}):
        error = told(*chat(**body))
        assert len(json.dumps(error.body())) < 500


def test_what_asks_for_nothing_is_taken():
    read(*message(mcp_servers=[]))
