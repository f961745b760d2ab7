"""smolagents' OpenAIModel, alone and under a ToolCallingAgent."""

import openai
from asked import ANSWER, KEY, LIMIT, QUESTION, THOUGHT, TOOL_QUESTION, Answer, refused
from smolagents import ChatMessage, OpenAIModel, ToolCallingAgent, tool

MESSAGES = [ChatMessage(role="user", content=[{"type": "text", "text": QUESTION}])]
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": Answer.model_json_schema()}}


class Client:
    def __init__(self, url: str, model: str):
        self.url, self.model = f"{url}/v1", model

    def client(self, model_id=None, api_key=KEY, **fields) -> OpenAIModel:
        return OpenAIModel(
            model_id or self.model, api_base=self.url, api_key=api_key, client_kwargs={"max_retries": 0},
            **{"temperature": 0, "max_tokens": LIMIT, **fields},
        )  # fmt: skip

    def chat(self) -> None:
        assert ANSWER in self.client().generate(MESSAGES).content

    def streams(self) -> None:
        pieces = [delta.content for delta in self.client().generate_stream(MESSAGES) if delta.content]
        assert len(pieces) > 3
        assert ANSWER in "".join(pieces)

    def tools(self) -> None:
        seen = []

        @tool
        def add(a: int, b: int) -> int:
            """Add two numbers.

            Args:
                a: one
                b: the other
            """
            seen.append((a, b))
            return a + b

        # Every step of such an agent is one call of add or of final_answer.
        agent = ToolCallingAgent([add], self.client(parallel_tool_calls=False, reasoning_effort="none"), max_steps=2)
        agent.run(TOOL_QUESTION)
        assert seen
        for step in agent.memory.steps[1:3]:
            assert step.error is None
            assert step.tool_calls

    def structured_output(self) -> None:
        Answer.model_validate_json(self.client().generate(MESSAGES, response_format=FORM).content)

    def reasoning(self) -> None:
        answer = self.client().generate(MESSAGES)
        assert THOUGHT in answer.raw.choices[0].message.reasoning_content
        assert THOUGHT not in answer.content

    def errors(self) -> None:
        for kind, said, fields in (
            (openai.NotFoundError, "gpt", {"model_id": "gpt"}),
            (openai.BadRequestError, "temperature", {"temperature": -1}),
            (openai.AuthenticationError, "API key", {"api_key": "wrong"}),
        ):
            with refused(kind, said):
                self.client(**fields).generate(MESSAGES)
