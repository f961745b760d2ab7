"""Anthropic's /v1/messages: its request, and that request as a chat."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from deepseek_fp4_plugin.serving.api_errors import ApiError, bad_request
from deepseek_fp4_plugin.serving.request_parts import FAIL_FAST, Body, Int, Strict

# ---------------------------------------------------------------------------- blocks


class _Block(Strict):
    """`cache_control` changes nothing: every prompt is cached by what it says."""

    cache_control: dict[str, Any] | None = None


class TextBlock(_Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class ThinkingBlock(_Block):
    """Earlier thinking. The chat template drops it, as DeepSeek's does."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(_Block):
    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    toolset_name: None = None


class ToolResultBlock(_Block):
    """`is_error`: the text says so itself; the template knows no other way."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], FAIL_FAST] | None = None
    is_error: bool | None = None
    toolset_name: None = None


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class InputMessage(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], FAIL_FAST]


# ---------------------------------------------------------------------------- the request


class MessagesTool(_Block):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None
    input_examples: list[Any] | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class MessagesToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    """`disabled` answers at once. The budget is a wish: `max_tokens` alone is held."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Int | None = Field(None, ge=1)
    display: str | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """`effort`: the model has no levels."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Strict):
    user_id: str | None = None


class ContextEdit(Strict):
    """Thinking is never sent to the model again, whichever turns were to be kept."""

    type: Literal["clear_thinking_20251015"]
    keep: Any = None


class ContextManagement(Strict):
    edits: list[ContextEdit] | None = None


class CountTokensRequest(Body):
    """Body of POST /v1/messages/count_tokens."""

    model: str
    messages: list[InputMessage] = Field(min_length=1, fail_fast=True)
    system: str | Annotated[list[TextBlock], FAIL_FAST] | None = None
    tools: list[MessagesTool] | None = Field(None, max_length=128)
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    cache_control: dict[str, Any] | None = None
    speed: Literal["standard"] | None = None
    inference_geo: str | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: Int = Field(ge=1, le=2**31 - 1)
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Int | None = Field(None, ge=-1, le=2**31 - 1)
    stop_sequences: list[str] | None = Field(None, max_length=64, description="Looked for behind the thinking.")
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: None = None
    diagnostics: None = None
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None


# ---------------------------------------------------------------------------- as a chat

CHAT_NAMES = {"max_completion_tokens": "max_tokens", "response_format": "output_config.format",
              "stop": "stop_sequences", "function.parameters": "input_schema"}  # fmt: skip
"""Fields of the chat that are called otherwise here; errors speak of them by their name."""


def chat_fields(request: CountTokensRequest) -> dict[str, Any]:
    """The fields of the chat request that answers `request`."""
    _check_blocks(request.messages)
    messages = [message for given in request.messages for message in _messages(given)]
    if request.system:
        messages.insert(0, {"role": "system", "content": _text(request.system)})
    fields: dict[str, Any] = {"model": request.model, "messages": messages, **_tools(request)}
    if request.thinking is not None and request.thinking.type == "disabled":
        fields["reasoning_effort"] = "none"
    if request.output_config is not None and request.output_config.format is not None:
        schema = request.output_config.format.schema_
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    if isinstance(request, MessagesRequest):
        fields |= {
            "max_completion_tokens": request.max_tokens,
            "stream": request.stream,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "stop": request.stop_sequences or None,
            "stop_in_thinking": False,
            "user": (request.metadata.user_id or "")[:256] or None if request.metadata else None,
        }
    return fields


def _tools(request: CountTokensRequest) -> dict[str, Any]:
    choice = request.tool_choice
    fields: dict[str, Any] = {}
    if request.tools:
        fields["tools"] = [
            {"type": "function", "function": {"name": tool.name, "description": tool.description,
                                              "parameters": tool.input_schema, "strict": tool.strict}}
            for tool in request.tools
        ]  # fmt: skip
    if choice is not None:
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if choice.type == "tool":
            if choice.name is None:
                raise bad_request("tool_choice.name: say which tool", "tool_choice.name")
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        else:
            fields["tool_choice"] = {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    return fields


def _check_blocks(messages: list[InputMessage]) -> None:
    """Raises ApiError for calls that the user makes, and for results of none or of the assistant's making."""
    called: set[str] = set()
    for number, message in enumerate(messages):
        for place, block in enumerate([] if isinstance(message.content, str) else message.content):
            field = f"messages.{number}.content.{place}"
            if isinstance(block, ToolUseBlock | ThinkingBlock | RedactedThinkingBlock) and message.role != "assistant":
                raise bad_request(f"{field}: {block.type} is the assistant's, not of role {message.role!r}", field)
            if isinstance(block, ToolResultBlock):
                if message.role != "user":
                    raise bad_request(f"{field}: tool_result is the user's, not of role {message.role!r}", field)
                if block.tool_use_id not in called:
                    raise bad_request(
                        f"{field}.tool_use_id: no earlier message has this call (a chat's tool_call_id)",
                        f"{field}.tool_use_id",
                    )
            elif isinstance(block, ToolUseBlock):
                called.add(block.id)


def _messages(given: InputMessage) -> list[dict[str, Any]]:
    """One message as a chat's: results of tools first, as turns of their own."""
    if isinstance(given.content, str):
        return [{"role": given.role, "content": given.content}]
    messages: list[dict[str, Any]] = []
    text, calls, others = "", [], 0
    for block in given.content:
        if isinstance(block, TextBlock):
            text += block.text
            others += 1
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ToolResultBlock):
            content = _text(block.content or "")
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
    if given.role == "assistant":
        return [{"role": "assistant", "content": text or (None if calls else ""), "tool_calls": calls or None}]
    if others or not messages:
        messages.append({"role": given.role, "content": text})
    return messages


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


_KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large",
          429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}  # fmt: skip


def error_form(path: str) -> Callable[[ApiError], dict[str, Any]]:
    """What makes the error bodies of a path's answers."""
    return error_body if path.startswith("/v1/messages") else ApiError.body


def error_body(error: ApiError) -> dict[str, Any]:
    """Anthropic's error body."""
    kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}
