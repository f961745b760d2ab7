"""LangChain: ChatOpenAI over chats and responses, ChatAnthropic over messages."""

import anthropic
import openai
from asked import ADD, ANSWER, KEY, LIMIT, QUESTION, THOUGHT, TOOL_QUESTION, Answer, is_sum, refused
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

ADD_TOOL = {"type": "function", "function": {"name": "add", "description": "Add two digits", "parameters": ADD}}


class Client:
    def __init__(self, url: str, model: str):
        def openai_chat(**fields) -> ChatOpenAI:
            given = {"model": model, "api_key": KEY, "temperature": 0, "max_tokens": LIMIT, "max_retries": 0}
            return ChatOpenAI(base_url=f"{url}/v1", **{**given, **fields})

        def messages(**fields) -> ChatAnthropic:
            given = {"model": model, "api_key": KEY, "temperature": 0, "max_tokens": LIMIT, "max_retries": 0}
            return ChatAnthropic(base_url=url, **{**given, **fields})

        self.openai, self.messages = openai_chat, messages
        self.all = (openai_chat(), openai_chat(use_responses_api=True), messages())

    def chat(self) -> None:
        for chat in self.all:
            answer = chat.invoke([HumanMessage(QUESTION, name="bob")])
            assert ANSWER in answer.text
            assert answer.usage_metadata["output_tokens"] > 10

    def streams(self) -> None:
        for chat in self.all:
            pieces = [piece.text for piece in chat.stream(QUESTION) if piece.text]
            assert len(pieces) > 3
            assert ANSWER in "".join(pieces)

    def tools(self) -> None:
        for chat in self.all:
            with_tools = chat.bind_tools([ADD_TOOL], tool_choice="any", parallel_tool_calls=False)
            message = with_tools.invoke(TOOL_QUESTION)
            (call,) = message.tool_calls
            assert is_sum(call["args"])
            turns = [HumanMessage(TOOL_QUESTION), message, ToolMessage("5", tool_call_id=call["id"])]
            assert chat.bind_tools([ADD_TOOL]).invoke(turns).text

    def structured_output(self) -> None:
        for chat in self.all:
            assert isinstance(chat.with_structured_output(Answer, method="json_schema").invoke(QUESTION), Answer)
        by_a_tool = self.openai().with_structured_output(Answer, method="function_calling")
        assert isinstance(by_a_tool.invoke(QUESTION), Answer)

    def reasoning(self) -> None:
        for chat in self.all[1:]:  # ChatOpenAI reads no reasoning from chats: neither reasoning_content nor reasoning
            blocks = {block["type"]: block for block in chat.invoke(QUESTION).content_blocks}
            assert THOUGHT in str(blocks["reasoning"])
            assert THOUGHT not in blocks["text"]["text"]
        usage = self.openai(reasoning_effort="none").invoke(QUESTION).usage_metadata
        assert usage["output_token_details"]["reasoning"] == 0

    def errors(self) -> None:
        for make, kinds in ((self.openai, openai), (self.messages, anthropic)):
            with refused(kinds.NotFoundError, "gpt"):
                make(model="gpt").invoke(QUESTION)
            with refused(kinds.BadRequestError, "temperature"):
                make(temperature=-1).invoke(QUESTION)
            with refused(kinds.AuthenticationError, "API key"):
                make(api_key="wrong").invoke(QUESTION)
