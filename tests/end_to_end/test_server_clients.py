"""Real clients against a real server process: the official `openai` package; curl is in test_server.py."""

import asyncio
import json
import subprocess

import pytest

from tests.end_to_end.server_process import Server, running_server

openai = pytest.importorskip("openai", reason="the official openai client is not installed")

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two digits",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": [1, 2, 3]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(scope="module")
def server(parsing_server):
    return parsing_server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def no_think(server):
    """A bias that keeps an untrained model from thinking for ever."""
    tokens = server.client().post("/tokenize", json={"prompt": "<think>", "add_special_tokens": False}).json()["tokens"]
    return {str(tokens[0]): -100}


def test_models(client, server):
    assert [model.id for model in client.models.list()] == [server.name]
    assert client.models.retrieve(server.name).id == server.name


def test_chat_and_its_stream_say_the_same(client, server):
    fields = {"model": server.name, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    assert whole.usage.completion_tokens <= 24
    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[-1].usage == whole.usage
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content


def test_completions(client, server):
    fields = {"model": server.name, "prompt": ["abc", "xyz"], "max_tokens": 8, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**fields, echo=True)
    assert [choice.text[:3] for choice in whole.choices] == ["abc", "xyz"]
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [choice.text[3:] for choice in whole.choices] == list(texts.values())


def test_logprobs(client, server):
    answer = client.chat.completions.create(
        model=server.name, messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=2, temperature=0
    )
    content = answer.choices[0].logprobs.content
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in content)


@pytest.mark.parametrize("limit", [1, 3, 20, 300])
def test_reasoning_tokens_count_thinking_that_was_cut(client, server, limit):
    fields = {"model": server.name, "messages": [{"role": "user", "content": "What is 17 * 23?"}], "temperature": 0,
              "max_tokens": limit, "extra_body": {"return_token_ids": True}}  # fmt: skip
    whole = client.chat.completions.create(**fields)
    choice, usage = whole.choices[0], whole.usage
    ids = choice.model_extra["token_ids"]
    (end,) = server.client().post("/tokenize", json={"prompt": "</think>", "add_special_tokens": False}).json()[
        "tokens"]  # fmt: skip
    assert usage.completion_tokens_details.reasoning_tokens == (ids.index(end) + 1 if end in ids else len(ids))
    assert (end in ids) == (limit == 300)
    *_, last = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    assert last.usage == usage
    direct = client.chat.completions.create(**fields, reasoning_effort="none")
    assert direct.usage.completion_tokens_details.reasoning_tokens == 0
    assert direct.choices[0].message.content


def test_tools_and_the_second_turn(client, server, no_think):
    fields = {"model": server.name, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False,
              "logit_bias": no_think, "max_tokens": 200, "seed": 1}  # fmt: skip
    message = client.chat.completions.create(messages=MESSAGES, **fields).choices[0].message
    (call,) = message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    with client.chat.completions.stream(messages=MESSAGES, **fields) as stream:
        arguments = [e.arguments_delta for e in stream if e.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert len(arguments) > 2
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    turn = [*MESSAGES, message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    after = client.chat.completions.create(model=server.name, messages=turn, tools=[TOOL], max_tokens=4)
    assert after.choices[0].finish_reason in ("stop", "length")


def test_response_format_with_a_pydantic_model(client, server, no_think):
    import pydantic

    class Answer(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        sure: bool
        digit: int = pydantic.Field(ge=0, le=9)

    parsed = client.chat.completions.parse(
        model=server.name, messages=MESSAGES, response_format=Answer, logit_bias=no_think, max_tokens=400
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_errors_are_the_clients_own_classes(client, server):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=server.name, messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        client.chat.completions.create(model=server.name, messages=MESSAGES, extra_body={"nonsense": 1})


def test_sixty_four_at_once(server):
    async def run() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> tuple[str, str]:
                fields = {"model": server.name, "messages": [{"role": "user", "content": f"What is {number} + 1?"}],
                          "max_tokens": 16, "temperature": 0}  # fmt: skip
                whole = await client.chat.completions.create(**fields)
                text = ""
                async for chunk in await client.chat.completions.create(**fields, stream=True):
                    text += chunk.choices[0].delta.content or ""
                return whole.choices[0].message.content, text

            return await asyncio.gather(*(one(number) for number in range(64)))

    pairs = asyncio.run(run())
    assert all(whole == streamed for whole, streamed in pairs)
    server.wait_idle()


def chat_command(*arguments: str, lines: str) -> subprocess.CompletedProcess:
    command = [*Server.program(), "chat", *arguments]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)


def test_the_chat_command_talks_to_a_server(server, tmp_path):
    answered = chat_command("--url", server.url, "--temperature", "0", lines="What is 607 + 68?\nWhat is 96 plus 6?\n")
    assert answered.returncode == 0, answered.stderr
    assert "675" in answered.stdout
    assert "102" in answered.stdout
    assert answered.stdout.count("<think>") == answered.stdout.count("</think>") == 2
    assert "the first after" in answered.stderr
    for arguments, word in (
        (["--url", "http://127.0.0.1:9"], "cannot be reached"),
        (["other", "--url", server.url], "no model 'other'"),
        (["--url", "ftp://x"], "--url"),
    ):
        failed = chat_command(*arguments, lines="hi\n")
        assert failed.returncode == 1
        assert word in failed.stderr
        assert "Traceback" not in failed.stderr


def test_the_chat_command_brings_a_key_and_splits_tags_itself(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with running_server(tmp_path, "--api_key_file", "key", "--max_seq_len", "2048") as server:
        assert "API key" in chat_command("--url", server.url, lines="hi\n").stderr
        arguments = ["--url", f"{server.url}/v1", "--api-key-file", str(tmp_path / "key"), "--temperature", "0"]
        answered = chat_command(*arguments, lines="What is 607 + 68?\n")
    assert answered.returncode == 0, answered.stderr
    assert "675" in answered.stdout.rpartition("</think>")[2]
