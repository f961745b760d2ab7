"""AutoGen's OpenAIChatCompletionClient and its AssistantAgent."""

import asyncio
import json

import openai
from asked import ANSWER, KEY, LIMIT, QUESTION, THOUGHT, TOOL_QUESTION, Answer, refused
from autogen_agentchat.agents import AssistantAgent
from autogen_core import FunctionCall
from autogen_core.models import AssistantMessage, FunctionExecutionResult, FunctionExecutionResultMessage, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient

MESSAGES = [UserMessage(content=QUESTION, source="user")]  # its source is sent as the message's name
ABLE = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True, "family": "r1"}


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Client:
    def __init__(self, url: str, model: str):
        self.url, self.model = f"{url}/v1", model

    def client(self, **fields) -> OpenAIChatCompletionClient:
        given = {"model": self.model, "api_key": KEY, "temperature": 0, "max_tokens": LIMIT, "max_retries": 0}
        return OpenAIChatCompletionClient(base_url=self.url, model_info=ABLE, **{**given, **fields})

    def chat(self) -> None:
        assert ANSWER in asyncio.run(self.client().create(MESSAGES)).content
        result = asyncio.run(AssistantAgent("solver", self.client()).run(task=QUESTION))
        assert ANSWER in result.messages[-1].content

    def streams(self) -> None:
        async def run() -> None:
            *pieces, last = [piece async for piece in self.client().create_stream(MESSAGES)]
            assert len(pieces) > 3
            assert ANSWER in last.content and last.content in "".join(pieces)

        asyncio.run(run())

    def tools(self) -> None:
        async def run() -> None:
            client, tools = self.client(), [FunctionTool(add, "Add two numbers", strict=True)]
            question = UserMessage(content=TOOL_QUESTION, source="user")
            held = {"tool_choice": "required", "extra_create_args": {"parallel_tool_calls": False}}
            first = await client.create([question], tools=tools, **held)
            (call,) = first.content
            assert isinstance(call, FunctionCall)
            assert set(json.loads(call.arguments)) == {"a", "b"}
            result = FunctionExecutionResult(content="5", name=call.name, call_id=call.id, is_error=False)
            said = AssistantMessage(content=first.content, thought=first.thought, source="solver")
            after = await client.create([question, said, FunctionExecutionResultMessage(content=[result])], tools=tools)
            assert after.content

        asyncio.run(run())

    def structured_output(self) -> None:
        answer = asyncio.run(self.client().create(MESSAGES, json_output=Answer))
        Answer.model_validate_json(answer.content)

    def reasoning(self) -> None:
        answer = asyncio.run(self.client().create(MESSAGES))
        assert THOUGHT in answer.thought
        assert THOUGHT not in answer.content

    def errors(self) -> None:
        for kind, said, fields in (
            (openai.NotFoundError, "gpt", {"model": "gpt"}),
            (openai.BadRequestError, "temperature", {"temperature": -1}),
            (openai.AuthenticationError, "API key", {"api_key": "wrong"}),
        ):
            with refused(kind, said):
                asyncio.run(self.client(**fields).create(MESSAGES))
