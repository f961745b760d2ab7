"""Request bodies: what is accepted, what is refused with which sentence, and that the documented schema says so."""

import importlib.metadata
import json
import typing

import pytest
from pydantic import ValidationError

from deepseek_fp4_plugin.serving import messages_protocol, request_parts, responses_protocol
from deepseek_fp4_plugin.serving.api_errors import ApiError, describe_validation
from deepseek_fp4_plugin.serving.messages_protocol import CountTokensRequest, MessagesRequest
from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest, CompletionRequest
from deepseek_fp4_plugin.serving.responses_protocol import ResponsesRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PLAIN = {"model": "m", "prompt": "hi"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"stop": ["a", ""]}, "stop"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"top_p_min": 0.5}, "top_p_min"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"documents": []}, "documents"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"echo": True}, "echo"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "no"}}},
            "response_format",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields, param):
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({**CHAT, **fields})
    message, at = describe_validation(caught.value)
    assert at is not None
    assert at.split(".")[0] == param
    assert param in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "fields", [{"suffix": "x"}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [1, "a"]}, {"logprobs": 21}]
)
def test_refused_in_plain_completions(fields):
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({**PLAIN, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "low"},
        {"messages": [{"role": "user", "content": "x", "name": "Bob"}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": False}}},
        {"temperature": 0, "top_p": 1, "n": 2, "stop": "x", "seed": -5},
        {"stop": None, "tools": None, "logit_bias": None, "stream_options": None, "reasoning_effort": None},
        {"use_beam_search": False, "length_penalty": 1.0, "top_p_min": 0.0, "echo": False, "early_stopping": False},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}]},
        {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b", "refusal": None}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}}},
    ],
)
def test_accepted(fields):
    ChatCompletionRequest.model_validate({**CHAT, **fields})


@pytest.mark.parametrize("fields", [{"": 1}, {"messages": [{"role": "user", "content": "a", "": 1}]}])
def test_a_field_without_a_name_is_shown_so(fields):
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "a"}], **fields})
    message, param = describe_validation(caught.value)
    assert param is not None and param.endswith("''")
    assert message == f"{param}: this server knows no such field; remove it"


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]})
    assert "surrogate" in describe_validation(caught.value)[0]


def test_every_form_of_prompt():
    for prompt in ("text", ["a", "b"], [1, 2], [[1], [2, 3]]):
        assert CompletionRequest.model_validate({**PLAIN, "prompt": prompt}).prompt == prompt


def test_the_schema_forbids_what_the_server_forbids():
    for model in (ChatCompletionRequest, CompletionRequest):
        schema = model.model_json_schema()
        assert schema["additionalProperties"] is False
        json.dumps(schema)


def test_every_parameter_of_the_official_clients_is_known():
    """Null at the least: what a newer client may send must not be refused as unknown."""
    pytest.importorskip("anthropic", reason="the anthropic client is not installed")
    chats = pytest.importorskip("openai.types.chat", reason="the openai client is not installed")
    openai = pytest.importorskip("openai.types")
    installed = [importlib.metadata.version(name).rsplit(".", 1)[0] for name in ("openai", "anthropic")]
    if installed != ["3.57", "2.14"]:
        pytest.skip(f"openai 3.57 and anthropic 2.14 were read, not {installed}")
    responses = pytest.importorskip("openai.types.responses")
    anthropic = pytest.importorskip("anthropic.types")
    reasoning = pytest.importorskip("openai.types.shared_params").Reasoning
    call_output = pytest.importorskip("openai.types.responses.response_input_param").FunctionCallOutput
    pairs = [
        (chats.completion_create_params.CompletionCreateParamsStreaming, ChatCompletionRequest),
        (openai.completion_create_params.CompletionCreateParamsStreaming, CompletionRequest),
        (responses.response_create_params.ResponseCreateParamsStreaming, ResponsesRequest),
        (anthropic.message_create_params.MessageCreateParamsStreaming, MessagesRequest),
        (anthropic.MessageCountTokensParams, CountTokensRequest),
        (chats.ChatCompletionContentPartTextParam, request_parts.TextPart),
        (chats.ChatCompletionAssistantMessageParam, request_parts.AssistantMessage),
        (chats.ChatCompletionFunctionToolParam, request_parts.Tool),
        (chats.ChatCompletionStreamOptionsParam, request_parts.StreamOptions),
        (responses.ResponseInputTextParam, responses_protocol.InputText),
        (responses.ResponseOutputTextParam, responses_protocol.InputText),
        (responses.EasyInputMessageParam, responses_protocol.MessageItem),
        (responses.ResponseOutputMessageParam, responses_protocol.MessageItem),
        (responses.ResponseFunctionToolCallParam, responses_protocol.CallItem),
        (responses.ResponseReasoningItemParam, responses_protocol.ReasoningItem),
        (responses.FunctionToolParam, responses_protocol.FunctionTool),
        (responses.ResponseTextConfigParam, responses_protocol.TextOptions),
        (call_output, responses_protocol.CallOutputItem),
        (reasoning, responses_protocol.ReasoningOptions),
        (anthropic.TextBlockParam, messages_protocol.TextBlock),
        (anthropic.ToolUseBlockParam, messages_protocol.ToolUseBlock),
        (anthropic.ToolResultBlockParam, messages_protocol.ToolResultBlock),
        (anthropic.ThinkingBlockParam, messages_protocol.ThinkingBlock),
        (anthropic.ToolParam, messages_protocol.MessagesTool),
        (anthropic.OutputConfigParam, messages_protocol.OutputConfig),
    ]
    for theirs, ours in pairs:
        known = {field.alias or name for name, field in ours.model_fields.items()}
        assert set(typing.get_type_hints(theirs)) - known == set(), (theirs, ours)


def test_the_error_body_is_openai_s():
    error = ApiError(429, "full", "RateLimitError", code="queue_full").body()["error"]
    assert error == {"message": "full", "type": "RateLimitError", "param": None, "code": "queue_full"}
    assert ApiError(400, "x", param="n").body()["error"]["code"] == 400
