"""The OpenAI-compatible requests and responses, and the error body. A field that is not here is refused, none ignored.

Types are strict: "0.5" is not a number. Fields that exist elsewhere and have no meaning for this model are listed with
the one value that asks for nothing, so that a client which always sends them works and any other value is a clear 400.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from deepseek_fp4_plugin.serving.json_bytes import to_json

MAX_LOGPROBS = 20
ALL_TEXT = {"all_text": True}  # the context of validating what is known to hold no half of a surrogate pair


class ApiError(Exception):
    """Answered as an error body. `kind` is OpenAI's `type`; `param` the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "BadRequestError",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param
        self.code, self.headers = code, headers

    def renamed(self, names: dict[str, str]) -> "ApiError":
        """The same error about a request in which chat fields have other names."""
        old = self.param or ""
        first, dot, rest = old.partition(".")
        param = names.get(first, first) + dot + rest
        if "function.parameters" in names:
            param = param.replace("function.parameters", names["function.parameters"]).replace(".function.", ".")
        if param == old:
            return self
        message = self.message.replace(old, param, 1)
        return ApiError(self.status, message, self.kind, param, self.code, self.headers)

    def __reduce__(self) -> tuple[Any, ...]:
        return ApiError, (self.status, self.message, self.kind, self.param, self.code, self.headers)

    def body(self) -> dict[str, Any]:
        """OpenAI's error body; `object`, and the status as `code` where no name is usual, as trtllm-serve has them."""
        return {
            "object": "error",
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code if self.code is not None else self.status,
            },
        }


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def _is_alternative(part: str) -> bool:
    """Whether a part of an error's path names a union's alternative and no field."""
    return part in ("str", "int", "float", "bool", "constrained-int", "constrained-str") or any(c in part for c in "[(")


# By which a list's entries are told apart.
_KINDS = {"system", "developer", "user", "assistant", "tool", "message", "function_call", "function_call_output",
          "reasoning", "text", "thinking", "redacted_thinking", "tool_use", "tool_result"}  # fmt: skip


def _field_path(error: Any, form: str) -> list[str]:
    """The fields and positions that lead to what is wrong, without what pydantic adds for a union's alternatives.

    form: the name of the request's class.
    """
    parts = [str(part) for part in error["loc"] if part != "body" and not _is_alternative(str(part))]
    path: list[str] = []
    for number, part in enumerate(parts):
        listed = number > 1 and parts[number - 1].isdigit()
        inside, last = path[-2] if listed else "", number == len(parts) - 1
        if part in _KINDS and (inside in ("messages", "input") or (inside == "content" and not last)):
            continue
        if path == ["tool_choice"] and part[:1].isupper():
            continue
        if number == 1 and path == ["response_format"] and not last:
            continue
        if inside == "tools" and form == "ResponsesRequest" and not last:
            continue
        path.append(part)
    return path


def _of_union(error: Any, param: str) -> tuple[str, str]:
    """About an entry of a list, or a form of the answer, whose kind is unknown or missing."""
    field = f"{param}.{'role' if 'role' in error['ctx']['discriminator'] else 'type'}"
    if not param.rpartition(".")[2].isdigit():
        field = param
    if error["type"] == "union_tag_invalid":
        known, given = error["ctx"]["expected_tags"], _shown(error["ctx"]["tag"])
        return f"{field}: input should be one of {known}, got {given}", field
    if not isinstance(error["input"], dict):
        return f"{param}: input should be a JSON object, got {_shown(error['input'])}", param
    return f"{field}: field required", field


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _is_other_medium(error: Any, path: list[str]) -> bool:
    """Whether a part of a message is no text: an image, a sound, a file."""
    if error["type"] == "union_tag_invalid":
        return path[-2:-1] == ["content"] and not str(error["ctx"]["tag"]).startswith("server_")
    return (
        error["type"] == "literal_error" and path[-1] == "type" and path[-3:-2] in (["content"], ["output"], ["system"])
    )


def describe_validation(error: ValidationError | Any) -> tuple[str, str | None]:
    """One sentence about the first thing wrong in a body, and the field it is in."""
    errors, form = error.errors(), getattr(error, "title", "")
    # Of a union's complaints the deepest is about the alternative that was meant.
    first = max(errors, key=lambda e: len(e["loc"])) if errors[0]["type"] != "extra_forbidden" else errors[0]
    path = _field_path(first, form)
    param = ".".join((part or "''") if len(part) <= 100 else part[:97] + "..." for part in path) or None
    if param is not None and path[0] == "prompt" and form == "CompletionRequest":
        return (
            "prompt: give a text, a list of texts, a list of token ids, or a list of such lists; none empty",
            "prompt",
        )
    if param is not None and _is_other_medium(first, path):
        param = param.removesuffix(".type") + ".type"
        kind = first["ctx"]["tag"] if first["type"] == "union_tag_invalid" else first["input"]
        return f"{param}: this model reads text alone, so {_shown(kind)} cannot be taken; send text", param
    if param is not None and first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _of_union(first, param)
    if first["type"] == "extra_forbidden":
        return f"{param}: this server knows no such field; remove it", param
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    shown = _shown(first.get("input"))
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "input should be a JSON object (Content-Type: application/json)"
    if first["type"] == "missing" and param is None:
        return "the body is empty; send a JSON object (Content-Type: application/json)", None
    if first["type"] == "missing":
        return f"{param}: {message}", param
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, "), param
    return f"{param or 'the body'}: {message}, got {shown}", param


class _Strict(BaseModel):
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


class _Body(_Strict):
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


# ---------------------------------------------------------------------------- requests: parts


class TextPart(_Strict):
    """A piece of a message. This is a text model: no other type of part exists."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None  # every prompt is cached by what it says


Content = str | Annotated[list[TextPart], FAIL_FAST]


class FunctionCall(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Int | None = None


class SystemMessage(_Strict):
    """`developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(_Strict):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(_Strict):
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


class ToolMessage(_Strict):
    """A tool's result. `tool_call_id` must be that of a call in an earlier assistant message."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(_Strict):
    """`strict`: hold the arguments to `parameters` while they are generated. Required and named calls always are."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Strict):
    name: str


class NamedToolChoice(_Strict):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(_Strict):
    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1)


class AllowedToolsChoice(_Strict):
    """Some of the request's tools; the others are not shown to the model."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(_Strict):
    """The schema of `response_format`; it is always enforced, so `strict` changes nothing."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class JsonObjectFormat(_Strict):
    """Any object, or, as other servers take it, one of `schema`."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class JsonSchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class JsonFormat(_Strict):
    """trtllm-serve's short form."""

    type: Literal["json"]
    schema_: dict[str, Any] = Field(alias="schema")


class RegexFormat(_Strict):
    type: Literal["regex"]
    regex: str = Field(min_length=1)


class EbnfFormat(_Strict):
    """`root ::= ...` notation, or Lark's."""

    type: Literal["ebnf"]
    ebnf: str = Field(min_length=1)


class ChoiceFormat(_Strict):
    """One of these texts."""

    type: Literal["choice"]
    choice: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, max_length=1024)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | JsonFormat | RegexFormat | EbnfFormat | ChoiceFormat,
    Field(discriminator="type"),
]


class StructuredOutputs(_Strict):
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


class StreamOptions(_Strict):
    """`include_usage`: a last chunk with the token counts. `continuous_usage_stats`: counts so far in every chunk."""

    include_usage: bool = True
    continuous_usage_stats: bool = False
    include_obfuscation: bool = Field(False, description="No padding is ever added.")


# ---------------------------------------------------------------------------- requests


class GenerationRequest(_Body):
    """What chat and plain completions share."""

    model: str = Field(description="One of the names in /v1/models; another is answered 404.")
    stream: bool = False
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, max_length=256, description="Written into the access log.")

    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy. None: the server's default.")
    top_p: float | None = Field(None, ge=0, le=1, description="None: the server's default.")
    top_k: Int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1: no limit. None: the server's default.")
    min_p: float | None = Field(None, ge=0, le=1)
    top_p_min: Annotated[float, Field(ge=0, le=0)] | None = Field(
        None, description="Only 0: a decaying top_p is not offered."
    )
    seed: Int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: Int = Field(1, ge=1, le=128)
    best_of: Int | None = Field(None, ge=1, le=128, description="Only n: answers are not ranked.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,7}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(None, description="Token id (as a string) to a number added to its logit; -100 bans the token.")
    )
    bad_words: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, max_length=256, description="Texts that must not be generated."
    )
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = Field(None, max_length=64)
    stop_token_ids: list[Annotated[Int, Field(ge=0)]] | None = Field(None, max_length=256)
    include_stop_str_in_output: bool = False
    stop_in_thinking: bool = Field(True, description="False: `stop` is looked for behind </think> only.")
    ignore_eos: bool = False
    min_tokens: Int | None = Field(None, ge=0, le=2**31 - 1)
    skip_special_tokens: bool = True
    spaces_between_special_tokens: Literal[True] = True
    truncate_prompt_tokens: Int | None = Field(
        None, ge=1, le=2**31 - 1, description="Keep this many tokens, the last, of the prompt."
    )
    prompt_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool = False
    return_accepted_drafts: bool = Field(
        False, description="With each choice, its tokens' texts and whether each was an accepted draft."
    )
    relaxed_acceptance: bool | None = Field(
        None, description="False: verify drafts strictly even while thinking. None: as the server is configured."
    )
    relaxed_topk: Int | None = Field(None, ge=1, le=1024)
    relaxed_delta: float | None = Field(None, ge=0, le=1)

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = Field(None, min_length=1)
    guided_choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=1024)
    guided_grammar: str | None = Field(None, min_length=1)
    guided_whitespace_pattern: str | None = Field(
        None, description="A regular expression for what may stand between JSON's tokens; left out: one blank."
    )
    structured_outputs: StructuredOutputs | None = None

    cache_salt: str | None = Field(
        None, min_length=1, max_length=1024, description="Prompts with different salts share no cached prefix."
    )
    priority: Int = Field(0, ge=-(2**31), le=2**31 - 1, description="Higher runs first.")

    use_beam_search: Literal[False] = False
    length_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    early_stopping: Literal[False] | None = None
    moderation: None = None

    # Of vLLM and TensorRT-LLM.
    allowed_token_ids: None = None
    logits_processors: None = None
    return_tokens_as_token_ids: Literal[False] = False
    detokenize: Literal[True] = True
    request_id: None = Field(None, description="Send it as the header X-Request-Id.")
    lora_request: None = None
    disaggregated_params: None = None
    kv_transfer_params: None = None
    vllm_xargs: None = None

    # Bookkeeping of OpenAI's platform. Nothing is stored or billed here, so none of it can change an answer.
    store: bool = False
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    prompt_cache_key: str | None = Field(None, description="Every prompt is cached by what it says.")
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: Int | None = Field(None, ge=1, le=2**31 - 1)
    max_tokens: Int | None = Field(None, ge=1, le=2**31 - 1, description="The older name of max_completion_tokens.")
    logprobs: bool = False
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Only with logprobs.")
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | None = Field(
        None, description="Default: auto when there are tools."
    )
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    add_special_tokens: bool = Field(
        False, description="Also add the tokenizer's own; the template writes BOS already."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the server's chat template; a name it does not use is refused."
    )
    chat_template: None = Field(None, description="Templates from clients are not run; see --chat_template.")
    documents: None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None,
        description="none: answer without thinking. The model has no levels: others change nothing, "
        "unless the chat template reads reasoning_effort.",
    )
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="The model has no levels of it.")
    prediction: dict[str, Any] | None = Field(None, description="A hint for speed, not used; the text is the same.")
    audio: None = None
    web_search_options: None = None
    functions: None = Field(None, description="Superseded by tools.")
    function_call: None = Field(None, description="Superseded by tool_choice.")
    continue_final_message: Literal[False] = False
    thinking_token_budget: None = None
    include_reasoning: Literal[True] = True
    mm_processor_kwargs: None = None
    media_io_kwargs: None = None
    echo: Literal[False] = Field(False, description="True is for /v1/completions.")


def as_chat(fields: dict[str, Any]) -> ChatCompletionRequest:
    """A request of another form as a chat's. Raises ApiError 400."""
    try:
        return ChatCompletionRequest.model_validate(fields, context=ALL_TEXT)  # it was a body before
    except ValidationError as error:
        message, param = describe_validation(error)
        raise bad_request(message, param) from None


TokenIds = Annotated[list[Annotated[Int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


def _kind_of_prompt(value: Any) -> str:
    """Which of its types a prompt is meant to be: trying all of them takes seconds for millions of tokens."""
    first = value[0] if isinstance(value, list) and value else value
    kind = "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "tokens"
    return kind if isinstance(value, list) else "text"


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(min_length=1, max_length=2048), Tag("texts")]
        | Annotated[TokenIds, Tag("tokens")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048), Tag("lists")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: Int | None = Field(
        None, ge=0, le=2**31 - 1, description="None: up to the context length. 0: only with echo."
    )
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = Field(False, description="Put the prompt, and its log-probabilities if asked, before the text.")
    add_special_tokens: bool = True
    suffix: Literal[""] | None = Field(None, description="Filling in the middle is not offered.")


class TokenizeRequest(_Body):
    """A text (`prompt`), or a chat (`messages`) as the chat route would render it. Exactly one."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, fail_fast=True)
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: list[Annotated[Int, Field(ge=0)]] = Field(fail_fast=True)
    skip_special_tokens: bool = False


# ---------------------------------------------------------------------------- responses


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorResponse(BaseModel):
    object: Literal["error"]
    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class DraftedToken(BaseModel):
    text: str
    accepted_draft: bool


class ResponseMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, TopLogprob] | None] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    tokens: list[DraftedToken] | None = None


class ToolCallError(BaseModel):
    """What a required call's arguments break of their schema; `index` is the call's."""

    index: int
    error: str


class ChatChoice(_Choice):
    message: ResponseMessage
    tool_call_errors: list[ToolCallError] | None = None
    logprobs: ChatLogprobs | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    prompt: str


class VersionResponse(BaseModel):
    version: str
