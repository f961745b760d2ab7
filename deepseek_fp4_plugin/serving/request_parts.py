"""The parts of OpenAI-compatible requests: messages, tools, forms of an answer; and what every body is."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationInfo, model_validator

from deepseek_fp4_plugin.serving.api_errors import bad_request
from deepseek_fp4_plugin.serving.json_bytes import to_json

ALL_TEXT = {"all_text": True}  # the context of validating what is known to hold no half of a surrogate pair


class Strict(BaseModel):
    """A known field that is null is a field left out, as OpenAI has it; an unknown one is refused either way."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if len(value) > len(known):  # one unknown field is told, however many there are
            unknown = next(name for name in value if name not in known)
            if cls.model_config["extra"] == "forbid":
                value = {name: part for name, part in value.items() if name in known or name == unknown}
        if None not in value.values():
            return value
        return {name: part for name, part in value.items() if part is not None or name not in known}


def _integer(value: Any) -> Any:
    """JSON knows only numbers: 2.0 is an integer there."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_integer)]

FAIL_FAST = Field(fail_fast=True)  # of lists without a bound: a million complaints would take longer than all else


class Body(Strict):
    """A whole request body. `_ready`: what another process has made of it, the prompts' token ids or the answer."""

    _ready: Any = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, body: Any, info: ValidationInfo) -> Any:
        # JSON can spell half a surrogate pair; no tokenizer can read it and no answer can repeat it.
        try:
            if isinstance(body, dict) and info.context != ALL_TEXT:
                to_json(body, errors="strict")
        except UnicodeEncodeError:
            raise ValueError("a text holds half a surrogate pair, which is no Unicode") from None
        return body


class TextPart(Strict):
    """A piece of a message. This is a text model: no other type of part exists."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None  # every prompt is cached by what it says


Content = str | Annotated[list[TextPart], FAIL_FAST]


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Int | None = None


class SystemMessage(Strict):
    """`developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Strict):
    """An earlier answer. Its reasoning may be sent back; the chat template drops it, as DeepSeek's does."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="vLLM's name of reasoning_content.")
    reasoning_details: list[Any] | None = None
    tool_calls: Annotated[list[ToolCall], FAIL_FAST] | None = None
    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None


class ToolMessage(Strict):
    """A tool's result. `tool_call_id` must be that of a call in an earlier assistant message."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(Strict):
    """`strict`: hold the arguments to `parameters` while they are generated. Required and named calls always are."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    name: str


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1)


class AllowedToolsChoice(Strict):
    """Some of the request's tools; the others are not shown to the model."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(Strict):
    """The schema of `response_format`; it is always enforced, so `strict` changes nothing."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any object, or, as other servers take it, one of `schema`."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class JsonFormat(Strict):
    """trtllm-serve's short form."""

    type: Literal["json"]
    schema_: dict[str, Any] = Field(alias="schema")


class RegexFormat(Strict):
    type: Literal["regex"]
    regex: str = Field(min_length=1)


class EbnfFormat(Strict):
    """`root ::= ...` notation, or Lark's."""

    type: Literal["ebnf"]
    ebnf: str = Field(min_length=1)


class ChoiceFormat(Strict):
    """One of these texts."""

    type: Literal["choice"]
    choice: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, max_length=1024)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | JsonFormat | RegexFormat | EbnfFormat | ChoiceFormat,
    Field(discriminator="type"),
]


class StructuredOutputs(Strict):
    """vLLM's word for the form of an answer: exactly one of the first five."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = Field(None, min_length=1)
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=1024)
    grammar: str | None = Field(None, min_length=1)
    json_object: bool = False
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    disable_additional_properties: bool = Field(
        True, description="False: undeclared properties are allowed where the schema does not speak of them."
    )
    disable_fallback: bool = Field(True, description="Nothing is ever answered in another form.")

    def form(self) -> dict[str, Any]:
        """The arguments of GuidedDecodingParams."""
        names = {"json": self.json_, "regex": self.regex, "choice": self.choice, "grammar": self.grammar,
                 "json_object": self.json_object or None}  # fmt: skip
        given = {name: value for name, value in names.items() if value is not None}
        if len(given) != 1:
            raise bad_request(
                f"structured_outputs: give exactly one of {', '.join(names)}, not {' and '.join(given) or 'none'}",
                "structured_outputs",
            )
        spaces = "" if self.disable_any_whitespace else self.whitespace_pattern
        return {**given, "whitespace_pattern": spaces if {"json", "json_object"} & set(given) else None,
                "additional_properties": not self.disable_additional_properties}  # fmt: skip


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the token counts. `continuous_usage_stats`: counts so far in every chunk."""

    include_usage: bool = True
    continuous_usage_stats: bool = False
    include_obfuscation: bool = Field(False, description="No padding is ever added.")
