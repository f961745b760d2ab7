"""Long requests hold nobody: while one is read, rendered or tokenized, /health answers and short ones are served.

Each kind of work is stopped in its middle for as long as the others are asked, so no clock is needed.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.llm import LLM
from deepseek_fp4_plugin.serving import bodies, generation, service
from deepseek_fp4_plugin.serving.app import create_app
from deepseek_fp4_plugin.serving.chat_prompt import ChatPrompt
from deepseek_fp4_plugin.serving.metrics import Metrics
from deepseek_fp4_plugin.serving.options import ServerOptions
from deepseek_fp4_plugin.tokenizer import Tokenizer

MODEL, LIMIT = "r1_nano", 2048
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def app():
    config = EngineConfig.from_kwargs(MODEL, max_seq_len=LIMIT, max_batch_size=8)
    with LLM(MODEL, config=config) as llm:
        yield create_app(llm, ServerOptions(tool_parser="deepseek_v3"), MODEL)


def client(app) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://busy", timeout=60)


def chat(messages: list[dict[str, str]] = HI, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"model": MODEL, "max_tokens": 1, "messages": messages, **fields}


def complete(prompt: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": MODEL, "max_tokens": 1, "prompt": prompt, **fields}


HELD: dict[str, tuple[Any, str, tuple[str, dict[str, Any]]]] = {
    "a long body": (bodies, "read_body", complete("x", stop=["y" * 50_000])),
    "many messages": (ChatPrompt, "render", chat([*HI, {"role": "assistant", "content": "ho"}] * 30)),
    "a long message": (ChatPrompt, "render", chat([{"role": "user", "content": "a " * 6000}])),
    "a long text": (Tokenizer, "encode", complete("a " * 5000, truncate_prompt_tokens=100)),
    "the length of a text": (LLM, "check_length", complete("a " * 5000)),
    "a grammar": (LLM, "generate_async", chat(guided_regex="a+")),
    "tools": (service, "call_grammar", chat(tools=[TOOL], tool_choice="required")),
    "a long conversation as a response": (
        service, "as_chat", ("/v1/responses", {"model": MODEL, "max_output_tokens": 1, "input": HI * 30})),
    "a long conversation as a message": (
        service, "as_chat", ("/v1/messages", {"model": MODEL, "max_tokens": 1, "messages": HI * 30})),
    "counting tokens": (
        ChatPrompt, "render", ("/v1/messages/count_tokens", {"model": MODEL, "messages": HI})),
    "/tokenize": (Tokenizer, "encode", ("/tokenize", {"prompt": "a"})),
    "/detokenize": (service.Service, "detokenize", ("/detokenize", {"tokens": [7]})),
    "tables of log-probabilities": (
        generation.Answer, "_body", complete([7] * 300, logprobs=5, echo=True)),
    "metrics": (Metrics, "exposition", ("/metrics", {})),
}  # fmt: skip


@pytest.mark.parametrize("kind", HELD)
def test_others_are_served_while_one_is_worked_on(app, monkeypatch, kind):
    owner, name, (path, body) = HELD[kind]
    begun, go_on = threading.Event(), threading.Event()
    work: Callable[..., Any] = getattr(owner, name)
    loop_thread = threading.get_ident()

    def held(*args: Any, **kwargs: Any) -> Any:
        if not begun.is_set() and (owner is not Tokenizer or len(args[1]) != len("short")):
            assert threading.get_ident() != loop_thread, f"{name} ran on the event loop's thread"
            begun.set()
            assert go_on.wait(60)
        return work(*args, **kwargs)

    monkeypatch.setattr(owner, name, held)

    async def run() -> None:
        async with client(app) as http:
            heavy = asyncio.create_task(http.post(path, json=body) if body else http.get(path))
            try:
                while not begun.is_set():
                    assert not heavy.done(), heavy.result().text
                    await asyncio.sleep(0.002)
                assert (await http.get("/health")).status_code == 200
                short_path, short = complete("short", max_tokens=3)
                answer = await http.post(short_path, json=short)
                assert answer.status_code == 200, answer.text
                assert not heavy.done()
            finally:
                go_on.set()
            answer = await heavy  # answered, or too long
            assert answer.status_code == 200 or f"at most {LIMIT - 1} fit" in answer.text

    asyncio.run(run())


@pytest.mark.parametrize(("path", "body"), [
    complete("a" * 100_000),
    complete(["short", "a " * 50_000]),
    chat([{"role": "user", "content": "nothing but words " * 4_000}]),
    ("/v1/messages", {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "a" * 100_000}]}),
    ("/v1/responses", {"model": MODEL, "input": "a" * 100_000}),
])  # fmt: skip
def test_what_cannot_fit_is_refused_before_it_is_tokenized(app, monkeypatch, path, body):
    encode = Tokenizer.encode

    def short_only(self, text: str, *args: Any, **kwargs: Any) -> list[int]:
        assert len(text) < 1000, "a text that cannot fit was tokenized"
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(Tokenizer, "encode", short_only)

    async def run() -> None:
        async with client(app) as http:
            answer = await http.post(path, json=body)
            assert answer.status_code == 400
            message = answer.json()["error"]["message"]
            assert f"at most {LIMIT - 1} fit" in message and "the prompt has at least " in message

    asyncio.run(run())


def test_a_long_prompt_that_is_to_be_truncated_is_no_mistake(app):
    async def run() -> None:
        async with client(app) as http:
            path, body = complete("a" * 100_000, truncate_prompt_tokens=50)
            answer = await http.post(path, json=body)
            assert answer.json()["usage"]["prompt_tokens"] == 50

    asyncio.run(run())
