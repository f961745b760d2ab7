"""Long requests hold nobody: while one is read, rendered or tokenized, /health answers and short ones are served.

Each kind of work is stopped in its middle for as long as the others are asked, so no clock is needed.
"""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import psutil
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
# Without reuse an answer's counts do not depend on what was asked before.
ENGINE = {"max_seq_len": LIMIT, "max_batch_size": 8, "kv_cache_config": {"enable_block_reuse": False}}
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def app():
    config = EngineConfig.from_kwargs(MODEL, **ENGINE)
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


LONG = "a " * 10_000
CALLED = [{"role": "user", "content": [{"type": "text", "text": LONG[:3000]}]}] * 7
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "a text that is truncated": complete(LONG, truncate_prompt_tokens=40, max_tokens=3, temperature=0),
    "token ids": complete([7] * 9000, truncate_prompt_tokens=1000, temperature=0),
    "lists of token ids": complete([[7, 8] * 900] * 4, temperature=0),
    "an echo": complete([7] * 1000, echo=True, max_tokens=0, stop=["y" * 20_000]),
    "a chat": chat([*HI, {"role": "assistant", "content": "ho"}] * 300, truncate_prompt_tokens=90, temperature=0),
    "a chat with system and tools": chat(
        [{"role": "system", "content": "Be brief."}, *HI], tools=[TOOL], metadata={"a": LONG}, temperature=0),
    "a message": ("/v1/messages", {"model": MODEL, "max_tokens": 2, "messages": HI, "system": "Be brief.",
                                   "temperature": 0, "stop_sequences": ["y" * 20_000]}),
    "a response": ("/v1/responses", {"model": MODEL, "max_output_tokens": 2, "input": HI, "temperature": 0,
                                     "metadata": {"a": LONG}}),
    "counted": ("/v1/messages/count_tokens", {"model": MODEL, "messages": CALLED}),
    "/tokenize": ("/tokenize", {"prompt": LONG, "return_token_strs": True}),
    "/detokenize": ("/detokenize", {"tokens": [7] * 9000}),
    "too long a text": complete(LONG * 5),
    "too many token ids": complete([7] * 30_000),
    "too many messages": chat(HI * 3000),
    "too long a message": ("/v1/messages", {"model": MODEL, "max_tokens": 1, "messages": HI * 3000}),
    "too long a response": ("/v1/responses", {"model": MODEL, "input": HI * 3000}),
    "another model": ("/v1/completions", {"model": "other", "prompt": LONG}),
    "an unknown field": complete("a", unknown=LONG),
    "wrong all over": chat([{}] * 20_000),
    "an unknown call": ("/v1/messages", {"model": MODEL, "max_tokens": 1, "messages": [*HI, {
        "role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": LONG}]}]}),
    "a token that is none": ("/detokenize", {"tokens": [1 << 40] * 9000}),
    "tools without a parser's help": chat(HI, tool_choice="required", metadata={"a": LONG}),
}  # fmt: skip


@pytest.fixture(scope="module")
def reading_app():
    config = EngineConfig.from_kwargs(MODEL, **ENGINE)
    with LLM(MODEL, config=config) as llm:
        app = create_app(llm, ServerOptions(tool_parser="deepseek_v3"), MODEL, own_reader=True)
        yield app
        app.state.close()


def answered(app, path: str, body: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(app) as http:
            return await http.post(path, content=body if isinstance(body, bytes) else json.dumps(body).encode(),
                                   headers={"Content-Type": "application/json"})  # fmt: skip

    return asyncio.run(run())


def without_names(value: Any) -> Any:
    """An answer without ids and times."""
    if isinstance(value, dict):
        return {k: without_names(v) for k, v in value.items() if k not in ("id", "created", "created_at")}
    return [without_names(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", READ)
def test_a_process_of_its_own_reads_as_the_server_does(app, reading_app, kind):
    path, body = READ[kind]
    assert len(json.dumps(body)) > 16 << 10
    here, there = answered(app, path, body), answered(reading_app, path, body)
    assert (there.status_code, there.headers["content-type"]) == (here.status_code, here.headers["content-type"])
    assert without_names(there.json()) == without_names(here.json())


CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "5"}
GOING_ON = {
    "a long one": {"input": HI, "metadata": {"a": LONG}},
    "of many items": {"input": [*HI, {"role": "assistant", "content": "ho"}] * 100, "metadata": {"a": LONG}},
    "a call's result": {"input": [RESULT], "metadata": {"a": LONG}},
    "with instructions": {"input": HI, "instructions": "Be brief.", "metadata": {"a": LONG}},
    "too long a one": {"input": HI * 3000},
    "a result of no call": {"input": [{**RESULT, "call_id": "call_2"}], "metadata": {"a": LONG}},
    "behind an unknown one": {"input": HI, "metadata": {"a": LONG}, "previous_response_id": "resp_none"},
    "a short one": {"input": HI},
    "a short one with a call's result": {"input": [RESULT]},
    "a short one with a result of no call": {"input": [{**RESULT, "call_id": "call_2"}]},
}


@pytest.mark.parametrize("kind", GOING_ON)
def test_a_response_that_goes_on_is_read_by_that_process_too(app, reading_app, monkeypatch, kind):
    """Short ones too where what they go on from is long; 100 bytes are enough for that here."""
    monkeypatch.setattr(service, "SHORT_BODY", 100)
    render, answers = ChatPrompt.render, []
    for own in (app, reading_app):
        fields = {"model": MODEL, "temperature": 0, "max_output_tokens": 2}
        first = answered(own, "/v1/responses", {**fields, "input": [*HI, CALL, {**RESULT, "output": "4"}]})
        fields["previous_response_id"] = first.json()["id"]
        if own is reading_app:
            monkeypatch.setattr(ChatPrompt, "render", lambda *args: pytest.fail("the server rendered it"))
        second = answered(own, "/v1/responses", {**fields, **GOING_ON[kind]})
        monkeypatch.setattr(ChatPrompt, "render", render)
        answers.append([second.status_code, without_names(second.json())])
        if second.status_code == 200:  # what is kept is the whole conversation
            fields["previous_response_id"] = second.json()["id"]
            third = answered(own, "/v1/responses", {**fields, "input": "more"}).json()
            answers[-1] += [without_names(third), own.state.service.responses.conversation(third["id"])]
    for answer in answers:
        answer[1].pop("previous_response_id", None)
        if len(answer) > 2:
            answer[2].pop("previous_response_id")
    assert answers[0] == answers[1]


@pytest.mark.parametrize("body", [
    b'{"model": "r1_nano", "prompt": "a", "temperature": NaN, "user": "' + b"x" * 20_000 + b'"}',
    b'{"model": "r1_nano", "prompt": "\\ud800' + b"x" * 20_000 + b'"}',
    b'{"model": "r1_nano", "prompt": "' + b"x" * 20_000,
    b'{"model": "r1_nano", "prompt": "' + b"\xff" * 20_000 + b'"}',
    b"[" * 20_000,
])  # fmt: skip
def test_what_is_no_json_is_told_in_the_same_words(app, reading_app, body):
    here, there = answered(app, "/v1/completions", body), answered(reading_app, "/v1/completions", body)
    assert there.status_code == here.status_code == 400
    assert there.json() == here.json()


def test_long_bodies_never_become_objects_of_the_server(reading_app, monkeypatch):
    read_json = bodies.read_json

    def short_only(body: bytes) -> Any:
        assert len(body) < 16 << 10, "a long body was read by the server"
        return read_json(body)

    monkeypatch.setattr(bodies, "read_json", short_only)
    for kind in (
        "a text that is truncated",
        "token ids",
        "/tokenize",
        "/detokenize",
        "too many messages",
        "wrong all over",
    ):
        assert answered(reading_app, *READ[kind]).status_code in (200, 400)


def test_a_reader_that_is_lost_is_started_again(reading_app):
    before = {child.pid for child in psutil.Process().children()}
    (lost,) = [pid for pid in before if "spawn_main" in " ".join(psutil.Process(pid).cmdline())]
    psutil.Process(lost).kill()
    answer = answered(reading_app, *READ["token ids"])
    assert answer.status_code == 503
    assert "send it once more" in answer.json()["error"]["message"]
    assert answered(reading_app, *READ["token ids"]).status_code == 200
