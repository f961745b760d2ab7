"""pydantic-ai over chats, responses and messages."""

from asked import ADD, ANSWER, KEY, LIMIT, QUESTION, THOUGHT, TOOL_QUESTION, Answer, is_sum, refused
from pydantic_ai import Agent, ModelRequest, NativeOutput, ThinkingPart, ToolDefinition, ToolOutput, ToolReturnPart
from pydantic_ai.direct import model_request_sync
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Client:
    def __init__(self, url: str, model: str):
        self.url, self.model = url, model

    def agents(self, model=None, key=KEY, settings=None, **fields) -> list[Agent]:
        name = model or self.model
        chats = OpenAIProvider(base_url=f"{self.url}/v1", api_key=key)
        models = [
            OpenAIChatModel(name, provider=chats),
            OpenAIResponsesModel(name, provider=chats),
            AnthropicModel(name, provider=AnthropicProvider(base_url=self.url, api_key=key)),
        ]
        given = {"temperature": 0, "max_tokens": LIMIT, **(settings or {})}
        return [Agent(model, model_settings=given, **fields) for model in models]

    def chat(self) -> None:
        for agent in self.agents():
            assert ANSWER in agent.run_sync(QUESTION).output

    def streams(self) -> None:
        for agent in self.agents():
            pieces = list(agent.run_stream_sync(QUESTION).stream_text(delta=True, debounce_by=None))
            assert len(pieces) > 3
            assert ANSWER in "".join(pieces)

    def tools(self) -> None:
        tools = ModelRequestParameters(function_tools=[ToolDefinition(name="add", parameters_json_schema=ADD)])
        settings = {"temperature": 0, "max_tokens": LIMIT, "thinking": False, "parallel_tool_calls": False}
        question = ModelRequest.user_text_prompt(TOOL_QUESTION)
        for agent in self.agents():
            held = {**settings, "tool_choice": "required"}
            call = model_request_sync(agent.model, [question], model_settings=held, model_request_parameters=tools)
            (part,) = call.tool_calls
            assert is_sum(part.args_as_dict())
            result = ModelRequest([ToolReturnPart(part.tool_name, 5, part.tool_call_id)])
            turns = [question, call, result]
            assert model_request_sync(
                agent.model, turns, model_settings=settings, model_request_parameters=tools
            ).parts  # fmt: skip

    def structured_output(self) -> None:
        for agent in self.agents(output_type=NativeOutput(Answer))[:2]:  # it takes Claude models alone for able
            assert isinstance(agent.run_sync(QUESTION).output, Answer)
        for agent in self.agents(output_type=ToolOutput(Answer), settings={"parallel_tool_calls": False}):
            assert isinstance(agent.run_sync(QUESTION).output, Answer)

    def reasoning(self) -> None:
        for agent in self.agents():
            parts = agent.run_sync(QUESTION).new_messages()[-1].parts
            (thinking,) = (part for part in parts if isinstance(part, ThinkingPart))
            assert THOUGHT in str(thinking)

    def errors(self) -> None:
        for said, fields in (
            ("gpt", {"model": "gpt"}),
            ("temperature", {"settings": {"temperature": -1}}),
            ("API key", {"key": "wrong"}),
        ):
            for agent in self.agents(**fields):
                with refused(ModelHTTPError, said):
                    agent.run_sync(QUESTION)
