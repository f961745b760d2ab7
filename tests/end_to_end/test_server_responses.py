"""/v1/responses with the official client, and its types over every body and every event."""

import json
import uuid

import pytest

from deepseek_fp4_plugin.serving.responses import ResponseStore, StoredResponse

openai = pytest.importorskip("openai", reason="the official openai client is not installed")
from openai.types.responses import Response, ResponseStreamEvent  # noqa: E402
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter  # noqa: E402

EVENT = TypeAdapter(ResponseStreamEvent)
TOOL = {
    "type": "function",
    "name": "add",
    "description": "Add two digits",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": [1, 2, 3]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def server(parsing_server):
    return parsing_server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def ask(client, server):
    def create(given="What is 607 + 68?", **fields):
        fields = {"model": server.name, "temperature": 0, "max_output_tokens": 400, **fields}
        return client.responses.create(input=given, **fields)

    return create


def checked(response) -> Response:
    """The body again, strictly as the client's own type has it."""
    return Response.model_validate(response.to_dict(), strict=False)


def test_an_answer_says_what_a_chat_says(ask, server):
    response = checked(ask())
    chat = server.chat("What is 607 + 68?", temperature=0, max_tokens=400).json()
    message = chat["choices"][0]["message"]
    reasoning, text = response.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", message["reasoning_content"])
    assert response.output_text == text.content[0].text == message["content"]
    assert "675" in response.output_text
    assert (response.status, text.status, response.incomplete_details) == ("completed", "completed", None)
    usage = response.usage
    assert usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert usage.output_tokens == chat["usage"]["completion_tokens"]
    assert (
        usage.output_tokens_details.reasoning_tokens == chat["usage"]["completion_tokens_details"]["reasoning_tokens"]
    )
    direct = ask(reasoning={"effort": "none"})
    assert [item.type for item in direct.output] == ["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_output_tokens": 6},
        {"tools": [TOOL], "tool_choice": "required", "reasoning": {"effort": "none"}, "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": "required", "reasoning": {"effort": "none"}, "max_output_tokens": 14},
    ],
)
def test_a_stream_builds_the_whole_response(ask, fields):
    fields = {**fields, "extra_body": {"seed": 3}}
    whole, events = ask(**fields), list(ask(stream=True, **fields))
    for number, event in enumerate(events):
        EVENT.validate_python(event.to_dict())
        assert event.sequence_number == number
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == f"response.{last.response.status}"
    assert last.response.status == ("incomplete" if fields.get("max_output_tokens") else "completed")

    def content(response):
        names = ("id", "call_id")
        return [{k: v for k, v in item.to_dict().items() if k not in names} for item in response.output]

    assert content(last.response) == content(whole)
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    assert last.response.usage.output_tokens_details == whole.usage.output_tokens_details
    for index, item in enumerate(last.response.output):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        assert (mine[0].type, mine[-1].type) == ("response.output_item.added", "response.output_item.done")
        assert mine[-1].item == item
        deltas = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        (done,) = [event for event in mine if event.type.endswith(("text.done", "arguments.done"))]
        given = item.arguments if item.type == "function_call" else item.content[0].text
        assert deltas == given == (done.arguments if item.type == "function_call" else done.text)
        assert {event.item_id for event in mine if hasattr(event, "item_id")} == {item.id}


def test_tools_over_two_turns(ask, client):
    first = ask(tools=[TOOL], tool_choice={"type": "function", "name": "add"}, reasoning={"effort": "none"})
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert set(json.loads(call.arguments)) == {"a", "b"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    # Behind the stored response, or with everything sent again, is the same prompt and the same answer.
    stored = ask([result], tools=[TOOL], previous_response_id=first.id)
    question = {"role": "user", "content": "What is 607 + 68?"}
    again = ask([question, *(item.to_dict() for item in first.output), result], tools=[TOOL])
    assert stored.usage.input_tokens == again.usage.input_tokens
    assert stored.output_text == again.output_text
    assert checked(stored).previous_response_id == first.id
    with pytest.raises(openai.BadRequestError, match="tool_call_id") as caught:
        ask([question, result], tools=[TOOL])
    assert caught.value.param.startswith("input.")
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    chosen = ask(tools=[TOOL, {**TOOL, "name": "other"}], tool_choice=allowed, reasoning={"effort": "none"})
    assert {item.name for item in chosen.output if item.type == "function_call"} == {"add"}


def test_a_conversation_is_kept_until_it_is_deleted(ask, client):
    first = ask("What is 607 + 68?", instructions="Be brief.")
    second = ask("And 96 + 6?", previous_response_id=first.id)
    turns = [{"role": "user", "content": "What is 607 + 68?"}, {"role": "assistant", "content": first.output_text},
             {"role": "user", "content": "And 96 + 6?"}]  # fmt: skip
    by_hand = ask(turns, store=False)
    assert second.usage.input_tokens == by_hand.usage.input_tokens  # instructions are not handed on
    assert second.output_text == by_hand.output_text
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    client.responses.delete(first.id)
    for name in (first.id, by_hand.id, "resp_none"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            ask("more", previous_response_id=name)
    assert ask("more", previous_response_id=second.id, max_output_tokens=1).status == "incomplete"


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    sure: bool
    digit: int = Field(ge=0, le=9)


def test_structured_output(client, server, ask):
    parsed = client.responses.parse(model=server.name, input="What is 2 + 3?", text_format=Answer, temperature=0,
                                    reasoning={"effort": "none"}, max_output_tokens=100)  # fmt: skip
    assert isinstance(parsed.output_parsed, Answer)
    wrong = {"type": "json_schema", "name": "x", "schema": {"not": {}}}
    with pytest.raises(openai.BadRequestError, match=r"text\.format") as caught:
        ask(text={"format": wrong})
    assert caught.value.param == "text.format"


def test_what_clients_send_besides(ask):
    plain = ask()
    more = {"store": False, "metadata": {"a": "b"}, "user": "u", "truncation": "disabled", "parallel_tool_calls": True,
            "include": ["reasoning.encrypted_content", "web_search_call.action.sources"],
            "reasoning": {"effort": "medium", "summary": "auto"},
            "service_tier": "auto", "prompt_cache_key": "k", "text": {"verbosity": "low"}, "top_logprobs": 0,
            "tools": [{"type": "web_search"}]}  # fmt: skip
    given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is 607 + 68?"}]},
             {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}]  # fmt: skip
    assert ask(given, **more).output_text == plain.output_text


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tools"),
        ({"tools": [{"type": "computer"}]}, "tools"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": []}, "input"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_refusals(server, fields, word):
    body = {"model": server.name, "input": "hi", **fields}
    answer = server.client().post("/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]
    assert server.client().post("/v1/responses", json={"model": "gpt", "input": "hi"}).status_code == 404


def test_the_store_is_bounded():
    def response(name: str, size: int) -> StoredResponse:
        return StoredResponse(name, json.dumps({"id": name}).encode(), b"x" * size)

    store = ResponseStore(max_bytes=10_000, max_count=5)
    names = [uuid.uuid4().hex for _ in range(8)]
    for name in names:
        store.keep(response(name, 10))
        store.get(names[0])  # used again and again
    assert len(store) == 5
    assert store.get(names[0]) and store.get(names[-1])
    store.keep(response("large", 9_960))
    assert store.bytes <= 10_000
    assert len(store) == 1
    store.keep(response("too large", 20_000))
    assert (len(store), store.bytes) == (0, 0)
