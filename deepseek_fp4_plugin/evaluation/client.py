"""Who answers: an OpenAI-compatible server by its URL, or an LLM in this process."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deepseek_fp4_plugin.config import SamplingParams
from deepseek_fp4_plugin.evaluation.task import Settings
from deepseek_fp4_plugin.llm import LLM

Messages = Sequence[dict[str, str]]
_START = "<think>\n"
_RETRIES = 8  # with the client library's growing pauses; on faults of the server only


@dataclass(frozen=True)
class Completion:
    """text: reasoning included, between <think> tags.  finish: "stop" or "length"."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


class ClientError(RuntimeError):
    """No answer, and asking again would not help."""


class Client(Protocol):
    name: str

    async def complete(self, messages: Messages, settings: Settings, seed: int) -> Completion:
        """Raises ClientError."""
        ...

    async def aclose(self) -> None: ...


class HttpClient:
    """url: of the API (http://host:port/v1).  model: its name there; None takes the server's only one.

    The key comes from OPENAI_API_KEY, as everywhere; it is written nowhere.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float = 3600.0):
        import openai

        self._errors = openai.OpenAIError
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=_RETRIES, timeout=timeout
        )
        self._model, self._url = model, url
        self.name = f"{model or 'the model'} at {url}"

    async def complete(self, messages: Messages, settings: Settings, seed: int) -> Completion:
        try:
            if self._model is None:
                self._model = (await self._client.models.list()).data[0].id
                self.name = f"{self._model} at {self._url}"
            reply = await self._client.chat.completions.create(
                model=self._model,
                messages=list(messages),  # type: ignore[arg-type]
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=seed,
            )
        except self._errors as error:
            raise ClientError(f"{self._url}: {' '.join(str(error).split())}") from None
        choice = reply.choices[0]
        text = choice.message.content or ""
        extra = choice.message.model_extra or {}
        reasoning = extra.get("reasoning_content") or extra.get("reasoning")
        if reasoning:
            closed = f"{reasoning}\n</think>\n\n{text}" if text or choice.finish_reason == "stop" else reasoning
            text = _START + closed
        usage = reply.usage
        return Completion(
            text, choice.finish_reason, usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0
        )

    async def aclose(self) -> None:
        await self._client.close()


class LlmClient:
    """An LLM of this process."""

    def __init__(self, llm: LLM):
        if llm.tokenizer is None:
            raise ValueError("evaluation needs a tokenizer beside the model")
        self.llm, self.name = llm, llm.config.model
        self._tokenizer = llm.tokenizer

    async def complete(self, messages: Messages, settings: Settings, seed: int) -> Completion:
        ids = self._tokenizer.encode_chat(list(messages))
        room = self.llm.max_request_tokens - len(ids)
        if room < 1:
            raise ClientError(f"the prompt has {len(ids)} tokens and max_seq_len leaves no room for an answer")
        sampled: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": seed}
        params = SamplingParams(max_tokens=min(settings.max_tokens, room), **(sampled if settings.temperature else {}))
        handle = self.llm.generate_async(ids, params)
        try:
            output = await handle
        except asyncio.CancelledError:
            handle.abort()
            raise
        answer = output.outputs[0]
        opened = self._tokenizer.think_start_id in ids[-3:]  # the template may open the reasoning
        text = _START + answer.text if opened else answer.text
        return Completion(text, answer.finish_reason or "stop", len(ids), answer.length)

    async def aclose(self) -> None:
        self.llm.shutdown()
