"""The OpenAI-compatible requests and responses. A field that is not here is refused, none ignored.

Types are strict: "0.5" is not a number. Fields that exist elsewhere and have no meaning for this model are listed with
the one value that asks for nothing, so that a client which always sends them works and any other value is a clear 400.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError

from deepseek_fp4_plugin.serving.api_errors import bad_request, describe_validation
from deepseek_fp4_plugin.serving.request_parts import (
    ALL_TEXT,
    AllowedToolsChoice,
    Body,
    Int,
    Message,
    NamedToolChoice,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
    Tool,
    ToolCall,
)

MAX_LOGPROBS = 20


# ---------------------------------------------------------------------------- requests


class GenerationRequest(Body):
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


class TokenizeRequest(Body):
    """A text (`prompt`), or a chat (`messages`) as the chat route would render it. Exactly one."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, fail_fast=True)
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
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
