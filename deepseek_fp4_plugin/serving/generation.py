"""One generation request from admission to its last byte: whole or streamed, chat or plain."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from deepseek_fp4_plugin.llm import CompletionOutput, EngineDeadError, GenerationError, RequestHandle, RequestOutput
from deepseek_fp4_plugin.serving.api_errors import ApiError
from deepseek_fp4_plugin.serving.aside import Aside
from deepseek_fp4_plugin.serving.json_bytes import to_json
from deepseek_fp4_plugin.serving.logprobs import DraftedTokens, TokenTexts
from deepseek_fp4_plugin.serving.metrics import Metrics
from deepseek_fp4_plugin.serving.middleware import send_error
from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest, CompletionRequest
from deepseek_fp4_plugin.serving.streaming import DONE, ChoiceParser, Delta, event, merge, until_disconnect

logger = logging.getLogger(__name__)

_JSON_HEADERS = [(b"content-type", b"application/json")]
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(eq=False)
class Job:
    """What is running for one HTTP request, and what its log line will say."""

    request: ChatCompletionRequest | CompletionRequest
    handles: list[RequestHandle]
    release: Callable[["Job"], None]
    facts: dict[str, Any]
    began: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    closed: bool = False
    outputs: dict[int, RequestOutput] = field(default_factory=dict)  # newest, by prompt

    def abort(self) -> None:
        """Stop generating; what waits for an output gets one that says `cancelled`."""
        for handle in self.handles:
            handle.abort()

    def seen(self, prompt: int, output: RequestOutput) -> None:
        self.outputs[prompt] = output
        if self.first_token is None:
            self.first_token = output.metrics.first_token

    def usage(self) -> dict[str, Any]:
        """Token counts so far, over all prompts and choices."""
        outputs = self.outputs.values()
        prompt = sum(len(output.prompt_token_ids) for output in outputs)
        completion = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(output.metrics.cached_tokens for output in outputs)},
        }

    def close(self, metrics: Metrics) -> None:
        """Free what is still running and settle the accounts. Called once, however the request ended."""
        if self.closed:
            return
        self.closed = True
        self.abort()
        self.release(self)
        now = time.perf_counter()
        usage = self.usage()
        self.facts |= {
            "stream": self.request.stream,
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        }
        if self.request.user is not None:
            self.facts["user"] = self.request.user
        if self.first_token is not None:
            self.facts["first_token_seconds"] = round(self.first_token - self.began, 4)
            metrics.first_token.observe(self.first_token - self.began)
        reasons = [choice.finish_reason for output in self.outputs.values() for choice in output.outputs]
        self.facts["finish_reasons"] = sorted({reason or "unfinished" for reason in reasons})
        metrics.whole.observe(now - self.began)
        for output in self.outputs.values():
            metrics.prompt_length.observe(len(output.prompt_token_ids))
            for choice in output.outputs:
                metrics.finished.labels(choice.finish_reason or "unfinished").inc()
                metrics.output_length.observe(len(choice.token_ids))
                if self.first_token is not None and len(choice.token_ids) > 1:
                    metrics.per_token.observe((now - self.first_token) / (len(choice.token_ids) - 1))


class Answer(Response):
    """Runs a job while the client is there; `parser` makes the parsers of each chat choice, None for plain ones."""

    media_type = None
    done = DONE  # what ends a stream

    def __init__(
        self,
        job: Job,
        model: str,
        texts: TokenTexts,
        metrics: Metrics,
        aside: Aside,
        parser: Callable[[], ChoiceParser] | None = None,
        prompt_texts: list[str] | None = None,
        think_end_id: int | None = None,
    ) -> None:
        super().__init__()
        self.job, self.model, self.texts, self.metrics, self.parser = job, model, texts, metrics, parser
        self.aside = aside
        self.prompt_texts = prompt_texts  # for echo
        self.think_end_id = think_end_id  # to count reasoning tokens
        self.chat = parser is not None
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        run = self._stream(send) if self.job.request.stream else self._whole(send)
        try:
            if not await until_disconnect(run, receive):
                self.metrics.disconnected.inc()
                self.job.facts["disconnected"] = True
        finally:
            self.job.close(self.metrics)

    # ------------------------------------------------------------------ whole answers

    async def _whole(self, send: Any) -> None:
        try:
            outputs = await asyncio.gather(*(handle.aresult() for handle in self.job.handles))
            for prompt, output in enumerate(outputs):
                self.job.seen(prompt, output)
                _check(output)
            body = await self._written(list(outputs))
        except Exception as error:
            for prompt, handle in enumerate(self.job.handles):
                self.job.seen(prompt, handle.output)
            await send_error(send, _as_api_error(error), self._error_body)
            return
        headers = [*_JSON_HEADERS, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _written(self, outputs: list[RequestOutput]) -> bytes:
        """The body. Tables over many tokens are made beside the event loop."""
        request = self.job.request
        plain = request.logprobs in (None, False) and request.prompt_logprobs is None
        if (plain and not request.return_accepted_drafts) or self.job.usage()["total_tokens"] < 256:
            return to_json(self._body(outputs))
        return await self.aside.python(lambda: to_json(self._body(outputs)))

    def _body(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        choices, reasoning = [], 0
        for prompt, output in enumerate(outputs):
            for choice in output.outputs:
                parser = self.parser() if self.parser else None
                entry: dict[str, Any] = {"index": prompt * self.job.request.n + choice.index}
                if parser is not None:
                    entry["message"] = parser.message(choice.text)
                    reasoning += self._reasoning_tokens(choice.token_ids, parser)
                    entry["logprobs"] = self._chat_logprobs(choice.token_ids, choice.logprobs)
                else:
                    entry |= self._plain_choice(prompt, output, choice)
                entry |= _ending(choice, parser)
                request = self.job.request
                if request.prompt_logprobs is not None:
                    entry["prompt_logprobs"] = self.texts.prompt_logprobs(
                        output.prompt_token_ids, output.prompt_logprobs, request.prompt_logprobs
                    )
                if request.return_token_ids:
                    entry |= {"token_ids": choice.token_ids, "prompt_token_ids": output.prompt_token_ids}
                if request.return_accepted_drafts:
                    entry["tokens"] = self.texts.drafted(
                        choice.token_ids, choice.accepted_draft, request.skip_special_tokens
                    )
                choices.append(entry)
        usage = self.job.usage()
        if self.think_end_id is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return {**self._frame(chunk=False), "choices": choices, "usage": usage}

    def _plain_choice(self, prompt: int, output: RequestOutput, choice: CompletionOutput) -> dict[str, Any]:
        request = self.job.request
        assert isinstance(request, CompletionRequest)
        nothing = request.max_tokens == 0  # echo alone
        text, ids, logprobs = ("", [], []) if nothing else (choice.text, choice.token_ids, choice.logprobs)
        entry: dict[str, Any] = {"text": self._echoed(prompt) + text, "logprobs": None}
        if request.logprobs is not None:
            table = self.texts.completion_logprobs(ids, logprobs or [], request.logprobs)
            if request.echo:
                head = self.texts.completion_logprobs(
                    output.prompt_token_ids, output.prompt_logprobs or [], request.logprobs
                )
                shift = len(self._echoed(prompt))
                table["text_offset"] = [offset + shift for offset in table["text_offset"]]
                table = {name: head[name] + table[name] for name in table}
            entry["logprobs"] = table
        return entry

    def _echoed(self, prompt: int) -> str:
        return self.prompt_texts[prompt] if self.prompt_texts is not None else ""

    def _chat_logprobs(self, ids: list[int], logprobs: Any) -> dict[str, Any] | None:
        request = self.job.request
        assert isinstance(request, ChatCompletionRequest)
        if not request.logprobs:
            return None
        return {"content": self.texts.chat_logprobs(ids, logprobs or [], request.top_logprobs or 0)}

    def _reasoning_tokens(self, ids: list[int], parser: ChoiceParser) -> int:
        """Up to the end of the thinking; all of them where that was cut."""
        if not parser.has_reasoned:
            return 0
        return ids.index(self.think_end_id) + 1 if self.think_end_id in ids else len(ids)

    def _frame(self, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    # ------------------------------------------------------------------ streams

    async def _stream(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            async for data in self._events():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            # The status is out: a last event says what happened, and no [DONE] follows.
            failure = self._failure(_as_api_error(error))
            await send({"type": "http.response.body", "body": failure, "more_body": False})
            return
        await send({"type": "http.response.body", "body": self.done, "more_body": False})

    def _error_body(self, error: ApiError) -> dict[str, Any]:
        return error.body()

    def _failure(self, error: ApiError) -> bytes:
        """The last event of a stream that fails."""
        return event(self._error_body(error))

    async def _deltas(self) -> AsyncIterator[tuple[Delta, CompletionOutput, ChoiceParser]]:
        """What comes of a chat's only choice."""
        assert self.parser is not None
        parser = self.parser()
        async for output in self.job.handles[0]:
            self.job.seen(0, output)
            _check(output)
            choice = output.outputs[0]
            yield parser.feed(choice.text_diff, choice.finish_reason is not None), choice, parser
            if choice.finish_reason is not None:
                return

    async def _events(self) -> AsyncIterator[bytes]:
        request, job = self.job.request, self.job
        options = request.stream_options
        choices: dict[int, _StreamedChoice] = {}
        frame = self._frame(chunk=True)
        running_usage = options is not None and options.continuous_usage_stats
        async for prompt, output in merge([aiter(handle) for handle in job.handles]):
            job.seen(prompt, output)
            _check(output)
            parts = []
            for choice in output.outputs:
                index = prompt * request.n + choice.index
                streamed = choices.get(index)
                if streamed is None:
                    streamed = choices[index] = _StreamedChoice(self, prompt, index)
                for entry in streamed.entries(output, choice):
                    chunk = {**frame, "choices": [entry]}
                    if running_usage:
                        chunk["usage"] = job.usage()
                    parts.append(event(chunk))
            if parts:
                yield b"".join(parts)
        if options is not None and options.include_usage:
            usage = job.usage()
            if self.think_end_id is not None:
                counts = [streamed.reasoning_tokens for streamed in choices.values()]
                usage["completion_tokens_details"] = {"reasoning_tokens": sum(counts)}
            yield event({**frame, "choices": [], "usage": usage})


class _StreamedChoice:
    """One choice of a stream: its parsers and how far it has come."""

    def __init__(self, answer: Answer, prompt: int, index: int) -> None:
        self.answer, self.prompt, self.index = answer, prompt, index
        self.parser = answer.parser() if answer.parser else None
        self.started = self.finished = False
        self.offset = len(answer._echoed(prompt))
        self.token_ids: list[int] = []
        self.drafted = DraftedTokens(answer.texts.tokenizer, answer.job.request.skip_special_tokens)

    def entries(self, output: RequestOutput, choice: CompletionOutput) -> list[dict[str, Any]]:
        """The `choices` entries that a new output of the engine makes: none, one, or one for each tool call."""
        if self.finished:
            return []
        request = self.answer.job.request
        ids, first = choice.token_ids_diff, not self.started
        self.token_ids = choice.token_ids
        self.finished = choice.finish_reason is not None
        if self.parser is not None:
            deltas = self.parser.feed(choice.text_diff, self.finished).split_calls()
        else:
            deltas = [Delta(content=choice.text_diff)]
        wanted = request.return_token_ids or request.return_accepted_drafts
        wanted = wanted or getattr(request, "logprobs", None) not in (None, False)
        if not (any(deltas) or self.finished or (wanted and ids) or (first and ids)):
            return []
        self.started = True
        entries = []
        for number, delta in enumerate(deltas):
            last = number == len(deltas) - 1
            entry: dict[str, Any] = {"index": self.index}
            if self.parser is not None:
                entry["delta"] = ({"role": "assistant", "content": ""} if first and not number else {}) | (
                    delta.as_message()
                )
                logprobs = self.answer._chat_logprobs(ids, choice.logprobs_diff) if last else None
            else:
                entry["text"], logprobs = self._plain(output, choice, first)
            entry["logprobs"] = logprobs
            entry |= _ending(choice, self.parser) if self.finished and last else {"finish_reason": None}
            if last and request.return_token_ids:
                entry["token_ids"] = ids
                if first:
                    entry["prompt_token_ids"] = output.prompt_token_ids
            if last and request.return_accepted_drafts:
                entry["tokens"] = self.drafted.feed(ids, choice.accepted_draft_diff, self.finished)
            entries.append(entry)
        return entries

    @property
    def reasoning_tokens(self) -> int:
        return self.answer._reasoning_tokens(self.token_ids, self.parser) if self.parser is not None else 0

    def _plain(self, output: RequestOutput, choice: CompletionOutput, first: bool) -> tuple[str, dict[str, Any] | None]:
        request, texts = self.answer.job.request, self.answer.texts
        assert isinstance(request, CompletionRequest)
        nothing = request.max_tokens == 0
        text, table = ("" if nothing else choice.text_diff), None
        if request.logprobs is not None:
            ids, logprobs = ([], []) if nothing else (choice.token_ids_diff, choice.logprobs_diff or [])
            table = texts.completion_logprobs(ids, logprobs, request.logprobs, self.offset)
            if first and request.echo:
                head = texts.completion_logprobs(
                    output.prompt_token_ids, output.prompt_logprobs or [], request.logprobs
                )
                table = {name: head[name] + table[name] for name in table}
        self.offset += len(text)
        return (self.answer._echoed(self.prompt) + text if first else text), table


def _ending(choice: CompletionOutput, parser: ChoiceParser | None) -> dict[str, Any]:
    """How a choice ended, as its entry says it."""
    ending: dict[str, Any] = {"finish_reason": _finish_reason(choice, parser), "stop_reason": choice.stop_reason}
    if parser is not None and ending["finish_reason"] == "tool_calls" and (errors := parser.call_errors()):
        ending["tool_call_errors"] = errors
    return ending


def _finish_reason(choice: CompletionOutput, parser: ChoiceParser | None) -> str | None:
    if parser is not None and parser.has_calls and choice.finish_reason == "stop":
        return "tool_calls"
    return choice.finish_reason


def _check(output: RequestOutput) -> None:
    """Raises ApiError for a request that the engine ended without an answer."""
    for choice in output.outputs:
        if choice.finish_reason == "timeout":
            raise ApiError(504, "the answer took longer than this server allows (--request_timeout)", "TimeoutError")
        if choice.finish_reason not in (None, "stop", "length"):
            raise ApiError(503, "the request was cancelled because the server is shutting down",
                           "ServiceUnavailableError")  # fmt: skip


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, GenerationError):
        kind = "BadRequestError" if error.own_fault else "InternalServerError"
        return ApiError(400 if error.own_fault else 500, f"the answer could not be finished: {error}", kind)
    if isinstance(error, EngineDeadError):
        return ApiError(503, f"the answer is lost: {error}", "ServiceUnavailableError")
    logger.error("generation failed: %s: %s", type(error).__name__, error)
    return ApiError(503, "the engine failed; see /health and the server's log", "ServiceUnavailableError")
