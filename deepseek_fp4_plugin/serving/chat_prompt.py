"""A chat request's messages and tools as the prompt's token ids, and the grammar of the calls it may make."""

import json
from typing import Any

from deepseek_fp4_plugin.engine.closed_objects import closed_objects
from deepseek_fp4_plugin.engine.grammar import WHITESPACE
from deepseek_fp4_plugin.engine.schema_check import without_endless_parts
from deepseek_fp4_plugin.serving.api_errors import bad_request
from deepseek_fp4_plugin.serving.options import template_variables
from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest
from deepseek_fp4_plugin.serving.reasoning import END_THINK, THINK
from deepseek_fp4_plugin.serving.request_parts import (
    AllowedToolsChoice,
    AssistantMessage,
    Message,
    NamedToolChoice,
    SystemMessage,
    TextPart,
    Tool,
    ToolMessage,
)
from deepseek_fp4_plugin.serving.tool_calls import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from deepseek_fp4_plugin.tokenizer import Tokenizer

_TOOLS_HEAD = "## Tools\n\nYou may call these functions. Their parameters are JSON schemas.\n"
_CALL_FORM = (
    f"\n\nTo call functions, write exactly this form, one block for each call:\n{CALLS_BEGIN}{CALL_BEGIN}function"
    f'{SEPARATOR}FUNCTION_NAME\n```json\n{{"argument": "value"}}\n```{CALL_END}{CALLS_END}'
)


class ChatPrompt:
    """Renders chats with one template, and knows which variables that template reads."""

    def __init__(self, tokenizer: Tokenizer, template: str | None) -> None:
        self.tokenizer, self.template = tokenizer, template
        source = template if template is not None else tokenizer.chat_template
        if source is None:
            raise ValueError("this checkpoint's tokenizer has no chat template; give one with --chat_template")
        self.variables = template_variables(source)

    def render(
        self,
        messages: list[Message],
        tools: list[Tool] | None = None,
        add_generation_prompt: bool = True,
        kwargs: dict[str, Any] | None = None,
        effort: str | None = None,
    ) -> str:
        """The prompt. `effort` none: it ends in an empty think block.

        Raises ApiError 400 for messages or variables that the template cannot honour.
        """
        for name in kwargs or {}:
            if name not in self.variables or name in ("messages", "tools", "add_generation_prompt"):
                raise bad_request(f"chat_template_kwargs: this model's template has no variable {name[:100]!r}",
                                  "chat_template_kwargs")  # fmt: skip
        plain = _plain(messages)
        described = [tool.model_dump(exclude_none=True) for tool in tools or []]
        if described and "tools" not in self.variables:
            plain.insert(0, {"role": "system", "content": tools_text(described)})
            described = []
        arguments = {
            "add_generation_prompt": add_generation_prompt,
            "tools": described or None,
            "chat_template": self.template,
            **({"reasoning_effort": effort} if effort and "reasoning_effort" in self.variables else {}),
            **(kwargs or {}),
        }
        try:
            text = self.tokenizer.apply_chat_template(plain, **arguments)
        except ValueError:
            # Templates differ on a turn of calls alone: some need content null there, some break on it.
            plain = [message | {"content": message["content"] or ""} for message in plain]
            try:
                text = self.tokenizer.apply_chat_template(plain, **arguments)
            except ValueError as error:
                raise bad_request(f"messages: {error}", "messages") from None
        if effort == "none" and add_generation_prompt and self.tokenizer.think_end_id is not None:
            text = text.rstrip("\n")
            text += ("" if text.endswith(THINK) else THINK) + f"\n\n{END_THINK}\n\n"
        return text


def tools_text(tools: list[dict[str, Any]]) -> str:
    """The tools as a system text, for templates (DeepSeek's own among them) that know of none."""
    parts = [_TOOLS_HEAD]
    for tool in tools:
        function = tool["function"]
        description = f": {function['description']}" if function.get("description") else ""
        parameters = json.dumps(function.get("parameters") or {"type": "object", "properties": {}}, ensure_ascii=False)
        parts.append(f"\n- `{function['name']}`{description}\n```json\n{parameters}\n```")
    return "".join(parts) + _CALL_FORM


def _text(content: str | list[TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or [])


def _plain(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as the template takes them. Raises ApiError for a tool result that answers no call."""
    plain: list[dict[str, Any]] = []
    called: dict[str, str] = {}
    for number, message in enumerate(messages):
        entry: dict[str, Any] = {"role": message.role, "content": _text(message.content)}
        if message.name is not None and not isinstance(message, ToolMessage):
            entry["name"] = message.name
        if isinstance(message, SystemMessage):
            entry["role"] = "system"
        elif isinstance(message, AssistantMessage):
            if message.content is None and not message.tool_calls:
                raise bad_request(f"messages.{number}.content: an assistant message needs content or tool_calls",
                                  f"messages.{number}.content")  # fmt: skip
            if message.tool_calls:
                entry["content"] = entry["content"] or None
                called |= {call.id: call.function.name for call in message.tool_calls}
                entry["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": call.function.model_dump()}
                    for call in message.tool_calls
                ]
        elif isinstance(message, ToolMessage):
            if message.tool_call_id not in called:
                raise bad_request(f"messages.{number}.tool_call_id: no earlier assistant message has this call",
                                  f"messages.{number}.tool_call_id")  # fmt: skip
            if message.name is not None and message.name != called[message.tool_call_id]:
                raise bad_request(f"messages.{number}.name: that call was of {called[message.tool_call_id]!r}",
                                  f"messages.{number}.name")  # fmt: skip
        plain.append(entry)
    return plain


def tools_of(request: ChatCompletionRequest, parser: str | None) -> tuple[list[Tool], str | NamedToolChoice]:
    """The tools the model may see and the choice made of them; none of either under `tool_choice: none`.

    Raises ApiError for choices that name no tool, and for tools that the server has no parser for.
    """
    choice = request.tool_choice if request.tool_choice is not None else ("auto" if request.tools else "none")
    if choice == "none" or (choice == "auto" and not request.tools):
        return [], "none"
    if not request.tools:
        raise bad_request("tool_choice: it needs tools", "tool_choice")
    if parser is None:
        raise bad_request(
            "tools: this server was started without --tool_parser and would not recognise a call; "
            "start it with --tool_parser deepseek_v3 or send tool_choice none",
            "tools",
        )
    names = [tool.function.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise bad_request("tools: two functions have the same name", "tools")
    wanted = [choice] if isinstance(choice, NamedToolChoice) else []
    if isinstance(choice, AllowedToolsChoice):
        wanted = choice.allowed_tools.tools
    for named in wanted:
        if named.function.name not in names:
            raise bad_request(f"tool_choice: no tool is named {named.function.name[:100]!r}", "tool_choice")
    if isinstance(choice, AllowedToolsChoice):
        allowed = {named.function.name for named in wanted}
        return [tool for tool in request.tools if tool.function.name in allowed], choice.allowed_tools.mode
    if isinstance(choice, NamedToolChoice):
        return [tool for tool in request.tools if tool.function.name == choice.function.name], choice
    return request.tools, choice


def call_arguments(tool: Tool, number: int) -> dict[str, Any]:
    """The schema of a call's arguments: an object, whatever else `parameters` says; parts that never end are left out.

    Raises ApiError for parameters that describe no object, or none that ends.
    """
    schema, param = tool.function.parameters or {}, f"tools.{number}.function.parameters"
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise bad_request(f"{param}: the arguments of a call are an object, not {json.dumps(kind)[:60]}", param)
    try:
        return without_endless_parts(closed_objects({**schema, "type": "object"}))
    except ValueError as error:
        raise bad_request(f"{param}: this JSON schema cannot be enforced: {error}", param) from None


def call_grammar(
    tools: list[Tool],
    choice: str | NamedToolChoice,
    parallel: bool,
    marker_ids: dict[str, int],
    answer: str | None = None,
) -> str | None:
    """A Lark grammar that holds the answer to calls of `tools`, or None where it is left free.

    Required and named choices, and any choice with a strict tool. Under `auto` free text is an answer too, or, where
    the request asks for a form, a text of the Lark rule `answer`.
    marker_ids: token id of each marker that is one token.
    """
    free = answer is None and not any(tool.function.strict for tool in tools)
    if choice == "none" or (choice == "auto" and free):
        return None

    def marker(text: str) -> str:
        return f"<[{marker_ids[text]}]>" if text in marker_ids else json.dumps(text, ensure_ascii=False)

    lines = []
    for number, tool in enumerate(tools):
        held = choice != "auto" or tool.function.strict
        schema = call_arguments(tool, number) if held else {"type": "object"}
        # What no mask can enforce is checked behind the call (call_check.py), unless strictness was asked for.
        options = {"x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": not tool.function.strict}}
        lines.append(
            f'call{number}: {marker(CALL_BEGIN)} "function" {marker(SEPARATOR)} '
            f"{json.dumps(tool.function.name + chr(10) + '```json' + chr(10))} arguments{number} "
            f'"\\n```" {marker(CALL_END)}'
        )
        lines.append(f"arguments{number}: %json {json.dumps({**schema, **options})}")
    lines.append("call: " + " | ".join(f"call{number}" for number in range(len(tools))))
    once = parallel is False or isinstance(choice, NamedToolChoice)
    lines.append(f"calls: {marker(CALLS_BEGIN)} call" + ("" if once else ' ("\\n" call)*') + f" {marker(CALLS_END)}")
    if choice != "auto":
        lines.append("start: calls")
    elif answer is not None:
        lines.append(f"start: calls | answer\nanswer: {answer}")
    else:
        lines.append("start: TEXT? calls?\nTEXT: /(?s:.+)/")
    return "\n".join(lines)
