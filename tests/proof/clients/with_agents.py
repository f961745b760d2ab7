"""OpenAI's Agents SDK over chats and over responses."""

import asyncio

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from asked import ANSWER, KEY, LIMIT, QUESTION, THOUGHT, TOOL_QUESTION, Answer, refused
from openai.types.shared import Reasoning

set_tracing_disabled(True)


class Client:
    def __init__(self, url: str, model: str):
        self.url, self.model = f"{url}/v1", model

    def agents(self, model=None, key=KEY, settings=None, **fields) -> list[Agent]:
        client = openai.AsyncOpenAI(base_url=self.url, api_key=key, max_retries=0)
        given = {"temperature": 0, "max_tokens": LIMIT, "store": False, "metadata": {"a": "b"}, **(settings or {})}
        return [
            Agent(
                name="calculator",
                model=kind(model=model or self.model, openai_client=client),
                model_settings=ModelSettings(**given),
                **fields,
            )
            for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel)
        ]

    def chat(self) -> None:
        for agent in self.agents():
            assert ANSWER in Runner.run_sync(agent, QUESTION).final_output

    def streams(self) -> None:
        async def run() -> None:
            for agent in self.agents():
                events = Runner.run_streamed(agent, QUESTION).stream_events()
                raw = [event.data async for event in events if event.type == "raw_response_event"]
                pieces = [data.delta for data in raw if data.type == "response.output_text.delta"]
                assert len(pieces) > 3
                assert ANSWER in "".join(pieces)

        asyncio.run(run())

    def tools(self) -> None:
        seen = []

        @function_tool
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            seen.append((a, b))
            return a + b

        held = {"tool_choice": "required", "parallel_tool_calls": False, "reasoning": Reasoning(effort="none")}
        for agent in self.agents(tools=[add], settings=held):
            result = Runner.run_sync(agent, TOOL_QUESTION, max_turns=3)
            assert [item.type for item in result.new_items if "tool" in item.type] == [
                "tool_call_item", "tool_call_output_item"
            ]  # fmt: skip
            assert result.final_output
        assert len(seen) == 2

    def structured_output(self) -> None:
        for agent in self.agents(output_type=Answer):
            assert isinstance(Runner.run_sync(agent, QUESTION).final_output, Answer)

    def reasoning(self) -> None:
        for agent in self.agents():
            result = Runner.run_sync(agent, QUESTION)
            assert result.new_items[0].type == "reasoning_item"
            assert THOUGHT in str(result.new_items[0].raw_item)
            assert THOUGHT not in result.final_output
        for agent in self.agents(settings={"reasoning": Reasoning(effort="none")}):
            assert [item.type for item in Runner.run_sync(agent, QUESTION).new_items] == ["message_output_item"]

    def errors(self) -> None:
        for kind, said, fields in (
            (openai.NotFoundError, "gpt", {"model": "gpt"}),
            (openai.BadRequestError, "temperature", {"settings": {"temperature": -1}}),
            (openai.AuthenticationError, "API key", {"key": "wrong"}),
        ):
            for agent in self.agents(**fields):
                with refused(kind, said):
                    Runner.run_sync(agent, QUESTION)
