"""/v1/messages with Anthropic's official client, its types over bodies and streams."""

import json

import pytest

from tests.end_to_end.server_process import running_server

anthropic = pytest.importorskip("anthropic", reason="the official anthropic client is not installed")
from anthropic.types import Message, RawMessageStreamEvent  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

EVENT = TypeAdapter(RawMessageStreamEvent)
TOOL = {
    "name": "add",
    "description": "Add two digits",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": [1, 2, 3]}},
        "required": ["a", "b"],
    },
}
QUESTION = [{"role": "user", "content": "What is 607 + 68?"}]
DIRECT = {"thinking": {"type": "disabled"}}
CALL = {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, **DIRECT}


@pytest.fixture(scope="module")
def server(parsing_server):
    return parsing_server


@pytest.fixture(scope="module")
def client(server):
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture
def ask(client, server):
    def create(messages=QUESTION, **fields):
        fields = {"model": server.name, "max_tokens": 400, **fields}
        fields["extra_body"] = {
            "temperature": 0,
            **fields.get("extra_body", {}),
        }  # the newest client has no such argument
        return client.messages.create(messages=messages, **fields)

    return create


def test_an_answer_says_what_a_chat_says(ask, server):
    message = ask(thinking={"type": "enabled", "budget_tokens": 1024})
    Message.model_validate(message.to_dict())
    chat = server.chat("What is 607 + 68?", temperature=0, max_tokens=400).json()
    thinking, text = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", chat["choices"][0]["message"]["reasoning_content"])
    assert (text.type, text.text) == ("text", chat["choices"][0]["message"]["content"])
    assert "675" in text.text
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == chat["usage"]["prompt_tokens"]
    assert usage.output_tokens == chat["usage"]["completion_tokens"]
    assert [block.type for block in ask(**DIRECT).content] == ["text"]


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 6}, {"stop_sequences": ["7"], **DIRECT}, CALL])
def test_a_stream_builds_the_whole_message(ask, client, server, fields):
    whole = ask(**fields)
    events = list(ask(stream=True, **fields))
    for event in events:
        EVENT.validate_python(event.to_dict())
    assert [event.type for event in (events[0], *events[-2:])] == ["message_start", "message_delta", "message_stop"]
    request = {
        "model": server.name,
        "max_tokens": 400,
        "extra_body": {"temperature": 0},
        "messages": QUESTION,
        **fields,
    }
    with client.messages.stream(**request) as stream:
        final = stream.get_final_message()

    def content(message):
        return [{k: v for k, v in block.to_dict().items() if k != "id"} for block in message.content]

    assert content(final) == content(whole)
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert final.usage.output_tokens == whole.usage.output_tokens
    wanted = {"max_tokens": "max_tokens", "stop_sequences": "stop_sequence", "tools": "tool_use"}
    assert whole.stop_reason == next((reason for name, reason in wanted.items() if name in fields), "end_turn")
    if "stop_sequences" in fields:
        assert whole.stop_sequence == "7" and "7" not in whole.content[-1].text


def test_stop_sequences_spare_the_thinking(ask):
    free = ask()
    assert "6" in free.content[0].thinking
    stopped = ask(stop_sequences=["6"])
    assert stopped.content[0] == free.content[0]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "6")


def test_tools_over_two_turns(ask, client, server):
    first = ask(**CALL)
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert set(call.input) == {"a", "b"} and 0 <= call.input["a"] <= 9
    named = ask(**{**CALL, "tool_choice": {"type": "tool", "name": "add"}})
    assert named.content[-1].name == "add"
    turns = [*QUESTION, {"role": "assistant", "content": [block.to_dict() for block in first.content]},
             {"role": "user", "content": [
                 {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "675"}]},
                 {"type": "text", "text": "So?"}]}]  # fmt: skip
    after = ask(turns, tools=[TOOL], max_tokens=8)
    assert after.stop_reason in ("max_tokens", "end_turn")
    counted = client.messages.count_tokens(model=server.name, messages=turns, tools=[TOOL])
    assert counted.input_tokens == after.usage.input_tokens + after.usage.cache_read_input_tokens
    turns[2]["content"][0]["tool_use_id"] = "other"
    with pytest.raises(anthropic.BadRequestError, match="tool_call_id"):
        ask(turns, tools=[TOOL])
    cut = ask(**{**CALL, "max_tokens": 12})
    assert cut.stop_reason == "max_tokens"


def test_what_claude_code_sends(ask, client, server):
    plain = ask(system="You are brief.")
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is 607 + 68?", **cached}]}]
    more = ask(messages, system=[{"type": "text", "text": "You are brief.", **cached}], metadata={"user_id": "u"},
               service_tier="auto", thinking={"type": "adaptive"},
               extra_body={"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
                           "output_config": {"effort": "high"}},
               extra_headers={"anthropic-beta": "interleaved-thinking-2025-05-14"})  # fmt: skip
    assert [block.to_dict() for block in more.content] == [block.to_dict() for block in plain.content]
    history = [*QUESTION, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "redacted_thinking", "data": "d"},
        {"type": "text", "text": "675"}]}, {"role": "user", "content": "Sure?"}]  # fmt: skip
    dropped = [*QUESTION, {"role": "assistant", "content": "675"}, {"role": "user", "content": "Sure?"}]
    one, two = (client.messages.count_tokens(model=server.name, messages=m) for m in (history, dropped))
    assert one == two


def test_structured_output(ask):
    schema = {"type": "object", "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
              "required": ["digit"], "additionalProperties": False}  # fmt: skip
    message = ask(extra_body={"output_config": {"format": {"type": "json_schema", "schema": schema}}}, **DIRECT)
    assert 0 <= json.loads(message.content[-1].text)["digit"] <= 9


def test_errors_are_the_clients_own_classes(ask, client, server):
    with pytest.raises(anthropic.NotFoundError) as missing:
        ask(model="claude")
    assert missing.value.body["error"]["type"] == "not_found_error"
    for fields, word in (({"max_tokens": 0}, "max_tokens"), ({"extra_body": {"temperature": 3}}, "temperature"),
                         ({"extra_body": {"nonsense": 1}}, "nonsense"),
                         ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "other"),
                         ({**CALL, "tools": [{"name": "f", "input_schema": {"allOf": 5}}]}, "tools.0.input_schema: "),
                         ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages"),
                         ):  # fmt: skip
        with pytest.raises(anthropic.BadRequestError, match=word) as refused:
            ask(**fields)
        assert refused.value.body["type"] == "error"
        assert refused.value.body["error"]["type"] == "invalid_request_error"


def test_the_clients_own_key_header(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with running_server(tmp_path, "--api_key_file", "key", "--max_seq_len", "512") as server:
        for key, admitted in (("secret", True), ("wrong", False)):
            client = anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0)
            request = {"model": server.name, "messages": QUESTION, "max_tokens": 2}
            if admitted:
                assert client.messages.create(**request).stop_reason == "max_tokens"
            else:
                with pytest.raises(anthropic.AuthenticationError) as refused:
                    client.messages.create(**request)
                assert refused.value.body["error"]["type"] == "authentication_error"
