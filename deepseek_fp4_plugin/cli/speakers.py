"""Who answers a chat: a model in this process, or an OpenAI server somewhere. Both stream (reasoning, content)."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from deepseek_fp4_plugin.cli.generate import summary
from deepseek_fp4_plugin.serving.reasoning import DeepseekR1_0528Parser, Split

if TYPE_CHECKING:
    from deepseek_fp4_plugin.config import SamplingParams
    from deepseek_fp4_plugin.llm import LLM

Messages = list[dict[str, str]]


class LocalSpeaker:
    """An LLM. After a stream, `text` is the whole answer, `note` what it cost, `cut` whether a limit ended it."""

    def __init__(self, llm: "LLM", params: "SamplingParams"):
        self._llm, self._params = llm, params
        self.text = self.note = ""
        self.cut = False

    def stream(self, messages: Messages) -> Generator[Split, None, None]:
        """The answer as it comes. Leaving the iteration early ends the request."""
        from deepseek_fp4_plugin.llm import GenerationError

        assert self._llm.tokenizer is not None
        parser, began = DeepseekR1_0528Parser(), time.perf_counter()
        handle = self._llm.generate_async(self._llm.tokenizer.encode_chat(messages), self._params, streaming=True)
        try:
            for output in handle:
                yield parser.feed(output.outputs[0].text_diff)
            yield parser.finish()
        except GenerationError as error:
            raise ValueError(f"this answer could not be finished: {error}") from None
        finally:
            handle.abort()
        answer = handle.outputs[0]
        self.text, self.cut = answer.text, answer.finish_reason == "length"
        self.note = summary([handle.output], time.perf_counter() - began)


class RemoteSpeaker:
    """An OpenAI-compatible server. `url` with or without /v1; `model` None: the first that it names.

    Raises ValueError with one sentence where the server cannot be reached or refuses.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None, fields: dict[str, Any]):
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        if not self._url.startswith(("http://", "https://")):
            raise ValueError(f"--url {url}: give http://HOST:PORT or https://...")
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self.model = model or self._first_model()
        self._fields = fields
        self.text = self.note = ""
        self.cut = False

    def stream(self, messages: Messages) -> Generator[Split, None, None]:
        """The answer as it comes; a server's own reasoning fields, or the tags in its content."""
        body = {"model": self.model, "messages": messages, "stream": True, **self._fields}
        parser, parsed, count = DeepseekR1_0528Parser(), False, 0
        began, first = time.perf_counter(), None
        self.text, self.cut = "", False
        with self._open("/chat/completions", body) as response:
            for line in response:
                data = line.strip().removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ValueError(f"{self._url}: {chunk['error'].get('message', chunk['error'])}")
                for choice in chunk["choices"]:
                    delta = choice.get("delta") or {}
                    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
                    content = delta.get("content") or ""
                    first, count = first or time.perf_counter(), count + bool(reasoning or content)
                    self.cut = self.cut or choice.get("finish_reason") == "length"
                    self.text += content
                    parsed = parsed or bool(reasoning)
                    yield Split(reasoning, content) if parsed else parser.feed(content)
        if not parsed:
            yield parser.finish()
        ended = time.perf_counter()
        self.note = (
            f"{count} pieces in {ended - began:.1f} s, the first after {((first or ended) - began) * 1000:.0f} ms"
        )

    def _first_model(self) -> str:
        with self._open("/models") as response:
            try:
                return json.load(response)["data"][0]["id"]
            except (ValueError, LookupError, TypeError):
                raise ValueError(f"{self._url}/models names no model; is this an OpenAI-compatible server?") from None

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            return urllib.request.urlopen(request, timeout=600)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{self._url}{path}: {_message(error)}") from None
        except (urllib.error.URLError, TimeoutError) as error:
            raise ValueError(f"{self._url} cannot be reached: {getattr(error, 'reason', error)}") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"HTTP {error.code} {error.reason}"
