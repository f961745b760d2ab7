"""LlamaIndex' OpenAILike, as a chat, as a completion and with its tools."""

import openai
from asked import ANSWER, KEY, LIMIT, QUESTION, THOUGHT, TOOL_QUESTION, Answer, refused
from llama_index.core.base.llms.types import ChatMessage, ThinkingBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

MESSAGES = [ChatMessage(role="user", content=QUESTION)]


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Client:
    def __init__(self, url: str, model: str):
        self.url, self.model = f"{url}/v1", model

    def client(self, **fields) -> OpenAILike:
        given = {"model": self.model, "api_key": KEY, "temperature": 0, "max_tokens": LIMIT, "max_retries": 0,
                 "is_chat_model": True, "is_function_calling_model": True, "context_window": 4096}  # fmt: skip
        return OpenAILike(api_base=self.url, **{**given, **fields})

    def chat(self) -> None:
        assert ANSWER in self.client().chat(MESSAGES).message.content
        prompt = f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜>"
        assert ANSWER in self.client(is_chat_model=False).complete(prompt).text

    def streams(self) -> None:
        pieces = [part.delta for part in self.client().stream_chat(MESSAGES) if part.delta]
        assert len(pieces) > 3
        assert ANSWER in "".join(pieces)

    def tools(self) -> None:
        tool = FunctionTool.from_defaults(add)
        client = self.client(additional_kwargs={"reasoning_effort": "none"})
        first = client.chat_with_tools([tool], TOOL_QUESTION, tool_required=True, allow_parallel_tool_calls=False)
        (call,) = client.get_tool_calls_from_response(first)
        assert call.tool_name == "add" and set(call.tool_kwargs) == {"a", "b"}
        result = ChatMessage(role="tool", content="5", additional_kwargs={"tool_call_id": call.tool_id})
        turns = [ChatMessage(role="user", content=TOOL_QUESTION), first.message, result]
        assert client.chat_with_tools([tool], chat_history=turns).message.content

    def structured_output(self) -> None:
        for way in (True, False):  # by response_format, by a tool
            client = self.client(should_use_structured_outputs=way)
            assert isinstance(client.as_structured_llm(Answer).chat(MESSAGES).raw, Answer)

    def reasoning(self) -> None:
        *_, last = self.client().stream_chat(MESSAGES)
        (thinking,) = (block for block in last.message.blocks if isinstance(block, ThinkingBlock))
        assert THOUGHT in thinking.content

    def errors(self) -> None:
        for kind, said, fields in (
            (openai.NotFoundError, "gpt", {"model": "gpt"}),
            (openai.BadRequestError, "temperature", {"additional_kwargs": {"temperature": -1}}),
            (openai.AuthenticationError, "API key", {"api_key": "wrong"}),
        ):
            with refused(kind, said):
                self.client(**fields).chat(MESSAGES)
