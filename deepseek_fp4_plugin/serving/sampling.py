"""A request's fields as the engine's SamplingParams. What the two cannot mean together is refused here."""

from dataclasses import dataclass
from typing import Any

from deepseek_fp4_plugin.config import GuidedDecodingParams, SamplingParams
from deepseek_fp4_plugin.serving.answer_form import asked_form
from deepseek_fp4_plugin.serving.api_errors import bad_request
from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest, CompletionRequest


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request gets that does not say: the model's own advice, or OpenAI's 1.0."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None  # None: as many as the context holds


def sampling_params(
    request: ChatCompletionRequest | CompletionRequest,
    defaults: SamplingDefaults,
    vocab_size: int,
    call_grammar: str | None = None,
    stop_token_ids: list[int] | None = None,
    bad_token_ids: list[int] | None = None,
) -> SamplingParams:
    """Raises ApiError 400 for what cannot be honoured.

    call_grammar: of the calls that tool_choice asks for, and of an answer beside them.
    stop_token_ids, bad_token_ids: tokens to add to the request's own.
    """
    if request.best_of is not None and request.best_of != request.n:
        raise bad_request(f"best_of: only n ({request.n}) is offered, answers are not ranked", "best_of")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options: only with stream", "stream_options")
    if call_grammar is not None:
        guided: GuidedDecodingParams | None = GuidedDecodingParams(grammar=call_grammar)
    else:
        asked = asked_form(request)
        guided = asked[1] if asked is not None else None
    if guided is not None:
        for name, given in (("min_tokens", request.min_tokens), ("bad_words", request.bad_words),
                            ("ignore_eos", request.ignore_eos)):  # fmt: skip
            if given:
                raise bad_request(f"{name}: it cannot be combined with structured output, which decides the tokens "
                                  "and the end itself", name)  # fmt: skip
    stop = [request.stop] if isinstance(request.stop, str) else list(request.stop or [])
    if "" in stop:
        raise bad_request("stop: an empty text would stop everything", "stop")
    max_tokens, logprobs = _length_and_logprobs(request)
    if max_tokens is None:
        max_tokens = defaults.max_tokens
    fields: dict[str, Any] = {
        "temperature": defaults.temperature if request.temperature is None else request.temperature,
        "top_p": defaults.top_p if request.top_p is None else request.top_p,
        "top_k": defaults.top_k if request.top_k is None else max(0, request.top_k),
        "min_p": request.min_p,
        "seed": None if request.seed is None else request.seed % 2**64,
        "n": request.n,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "repetition_penalty": request.repetition_penalty,
        "logit_bias": _logit_bias(request, vocab_size),
        "bad": request.bad_words or None,
        "bad_token_ids": bad_token_ids or None,
        "stop": stop or None,
        "stop_token_ids": [*(request.stop_token_ids or []), *(stop_token_ids or [])] or None,
        "include_stop_str_in_output": request.include_stop_str_in_output,
        "stop_in_thinking": request.stop_in_thinking,
        "ignore_eos": request.ignore_eos,
        "min_tokens": request.min_tokens,
        "skip_special_tokens": request.skip_special_tokens,
        "truncate_prompt_tokens": request.truncate_prompt_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": _prompt_logprobs(request),
        "guided_decoding": guided,
        "use_relaxed_acceptance_for_thinking": request.relaxed_acceptance,
        "relaxed_topk": request.relaxed_topk,
        "relaxed_delta": request.relaxed_delta,
    }
    stated = {name: value for name, value in fields.items() if value is not None}
    try:
        return SamplingParams(max_tokens=max_tokens, **stated)  # None: as many as the context holds
    except ValueError as error:
        raise bad_request(str(error)) from None


def _length_and_logprobs(request: ChatCompletionRequest | CompletionRequest) -> tuple[int | None, int | None]:
    if isinstance(request, CompletionRequest):
        if request.max_tokens == 0 and not request.echo:
            raise bad_request("max_tokens: 0 is only for echo, where the prompt is the answer", "max_tokens")
        return max(1, request.max_tokens) if request.max_tokens is not None else None, request.logprobs
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) > 1:
        raise bad_request("max_tokens: it differs from max_completion_tokens; send one", "max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs: only with logprobs", "top_logprobs")
    return next(iter(both), None), (request.top_logprobs or 0) if request.logprobs else None


def _prompt_logprobs(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        return max(request.logprobs, request.prompt_logprobs or 0)
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request("prompt_logprobs: not with stream", "prompt_logprobs")
    return request.prompt_logprobs


def _logit_bias(request: ChatCompletionRequest | CompletionRequest, vocab_size: int) -> dict[int, float] | None:
    bias = {}
    for token, value in (request.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit()) or int(token) >= vocab_size:
            raise bad_request(f"logit_bias: {token[:20]!r} is no token id of this model (0 to {vocab_size - 1})",
                              "logit_bias")  # fmt: skip
        bias[int(token)] = value
    return bias or None
