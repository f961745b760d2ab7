"""OpenAI's /v1/responses: its request, and that request as a chat.

What the model cannot have (hosted tools) or this server does not keep (items by reference, conversations) is refused;
bookkeeping that cannot change the text is accepted, as in chats.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, PrivateAttr, Tag

from deepseek_fp4_plugin.serving.api_errors import bad_request
from deepseek_fp4_plugin.serving.request_parts import FAIL_FAST, Body, Int, Strict

# ---------------------------------------------------------------------------- items


class InputText(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


Text = str | Annotated[list[InputText], FAIL_FAST]


class _Item(Strict):
    id: str | None = None
    status: str | None = None


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text
    phase: str | None = None


class CallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: None = None
    caller: None = None
    async_: Literal[False] | None = Field(None, alias="async")


class CallOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Text
    name: str | None = None
    namespace: None = None
    caller: None = None


class ReasoningItem(_Item):
    """Earlier reasoning. The chat template drops it, as DeepSeek's does."""

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None


def _item_type(value: Any) -> str | None:
    return value.get("type") or "message" if isinstance(value, dict) else getattr(value, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_type),
]

# ---------------------------------------------------------------------------- the request


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    output_schema: dict[str, Any] | None = Field(None, description="Not shown to the model.")
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Literal[False] | None = None
    async_: Literal[False] | None = Field(None, alias="async")


class HostedTool(Strict):
    """What OpenAI runs itself. Agents always offer them, so they are let pass; the model is not shown them."""

    model_config = ConfigDict(extra="allow")
    type: Literal["web_search", "web_search_2025_08_26", "web_search_preview", "image_generation", "tool_search"]


class NamedTool(Strict):
    type: Literal["function"]
    name: str


class AllowedToolsOf(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class TextFormatOf(Strict):
    """`format` of `text`: what `response_format` is to a chat, one level flatter."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormatOf | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Strict):
    """`summary`: reasoning is given whole, never summed up."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: Literal["standard"] | None = None


class ResponsesStreamOptions(Strict):
    include_obfuscation: bool = False


Includable = Literal[
    "reasoning.encrypted_content", "message.input_image.image_url", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]  # fmt: skip


class ResponsesRequest(Body):
    """Body of POST /v1/responses. `_conversation`: where another process has read it, all its messages as JSON."""

    _conversation: bytes = PrivateAttr(b"[]")

    model: str
    input: str | Annotated[list[Item], FAIL_FAST]
    instructions: str | None = Field(None, description="A system text before everything; not kept for a next response.")
    previous_response_id: str | None = Field(None, description="Go on behind a response that this server still keeps.")
    store: bool = Field(True, description="Keep this response in memory for previous_response_id.")
    stream: bool = False
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: Int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    tools: list[Annotated[FunctionTool | HostedTool, Field(discriminator="type")]] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolsOf | None = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Includable] | None = Field(
        None, description="Accepted; reasoning is given in plain, nothing is encrypted, and no hosted tool has results."
    )
    truncation: Literal["disabled"] | None = None
    background: Literal[False] = False
    conversation: None = None
    prompt: None = None
    max_tool_calls: Int | None = Field(None, ge=1, description="Of hosted tools, of which there are none.")
    metadata: dict[str, str] | None = None
    client_metadata: dict[str, Any] | None = None
    user: str | None = Field(None, max_length=256)
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    moderation: None = None
    context_management: None = None
    background_options: None = None
    access_programs: None = None
    image: None = None
    safety_identifier: str | None = None

    # Beyond OpenAI's, as in chats.
    top_k: Int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    priority: Int = 0
    cache_salt: str | None = None


# ---------------------------------------------------------------------------- as a chat

CHAT_NAMES = {"max_completion_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input",
              "function.parameters": "parameters"}  # fmt: skip
"""Fields of the chat that are called otherwise here; errors speak of them by their name."""

_SAME = ("model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "priority",
         "cache_salt", "user", "parallel_tool_calls")  # fmt: skip

_OF_A_FUNCTION = {"name", "description", "parameters", "strict"}


def chat_fields(request: ResponsesRequest, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of the chat request that answers `request`; `messages` are all of the conversation."""
    fields: dict[str, Any] = {name: getattr(request, name) for name in _SAME}
    first = [{"role": "system", "content": request.instructions}] if request.instructions else []
    fields |= {
        "messages": [*first, *messages],
        "max_completion_tokens": request.max_output_tokens,
        "reasoning_effort": request.reasoning.effort if request.reasoning else None,
        "response_format": _response_format(request.text.format if request.text else None),
        "tools": [{"type": "function", "function": tool.model_dump(include=_OF_A_FUNCTION, exclude_none=True)}
                  for tool in request.tools or [] if isinstance(tool, FunctionTool)] or None,
    }  # fmt: skip
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif isinstance(choice, AllowedToolsOf):
        named = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools]
        fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": named}}
    else:
        fields["tool_choice"] = choice
    return fields


def _response_format(form: TextFormatOf | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    if form.schema_ is None:
        raise bad_request("text.format.schema: a json_schema needs one", "text.format.schema")
    return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_, "strict": form.strict}}


def as_messages(given: str | list[Item], before: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Input items as a chat's messages; calls join the assistant's turn that they belong to.

    before: the conversation that they go on. Raises ApiError for results of calls that nobody made.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    called = {call["id"] for message in before for call in message.get("tool_calls") or ()}
    for number, item in enumerate(given):
        if isinstance(item, MessageItem):
            messages.append({"role": item.role, "content": _text(item.content)})
        elif isinstance(item, CallOutputItem):
            if item.call_id not in called:
                field = f"input.{number}.call_id"
                raise bad_request(f"{field}: no earlier item has this call (a chat's tool_call_id)", field)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif isinstance(item, CallItem):
            called.add(item.call_id)
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.name, "arguments": item.arguments}
            messages[-1].setdefault("tool_calls", []).append(
                {"id": item.call_id, "type": "function", "function": function}
            )
    if not messages:
        raise bad_request("input: it holds no message", "input")
    return messages


def _text(content: Text) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
