"""Anthropic's own Python client, on /v1/messages."""

import anthropic
from asked import ADD, ANSWER, KEY, LIMIT, QUESTION, THOUGHT, TOOL_QUESTION, Answer, is_sum, refused

MESSAGES = [{"role": "user", "content": QUESTION}]
DIRECT = {"thinking": {"type": "disabled"}}


class Client:
    def __init__(self, url: str, model: str):
        self.url = url
        self.client = anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0)
        self.asked = {"model": model, "max_tokens": LIMIT, "extra_body": {"temperature": 0}}

    def chat(self) -> None:
        message = self.client.messages.create(messages=MESSAGES, **self.asked)
        assert ANSWER in message.content[-1].text
        assert message.stop_reason == "end_turn"
        count = self.client.messages.count_tokens(messages=MESSAGES, model=self.asked["model"])
        assert count.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens

    def streams(self) -> None:
        with self.client.messages.stream(messages=MESSAGES, **self.asked) as stream:
            pieces = list(stream.text_stream)
            final = stream.get_final_message().content[-1].text
        assert len(pieces) > 3
        assert ANSWER in final and "".join(pieces) == final

    def tools(self) -> None:
        tools = [{"name": "add", "description": "Add two digits", "input_schema": ADD}]
        question = {"role": "user", "content": TOOL_QUESTION}
        choice = {"type": "any", "disable_parallel_tool_use": True}
        first = self.client.messages.create(
            messages=[question], tools=tools, tool_choice=choice, **DIRECT, **self.asked
        )
        call = first.content[-1]
        assert first.stop_reason == "tool_use" and is_sum(call.input)
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "5"}]}
        turns = [question, {"role": "assistant", "content": first.content}, result]
        assert self.client.messages.create(messages=turns, tools=tools, **self.asked).content

    def structured_output(self) -> None:
        message = self.client.messages.parse(messages=MESSAGES, output_format=Answer, **self.asked)
        assert isinstance(message.parsed_output, Answer)

    def reasoning(self) -> None:
        thinking, text = self.client.messages.create(messages=MESSAGES, **self.asked).content
        assert thinking.type == "thinking" and THOUGHT in thinking.thinking
        assert THOUGHT not in text.text
        (text,) = self.client.messages.create(messages=MESSAGES, **DIRECT, **self.asked).content
        assert text.type == "text"

    def errors(self) -> None:
        with refused(anthropic.NotFoundError, "gpt"):
            self.client.messages.create(messages=MESSAGES, **{**self.asked, "model": "gpt"})
        with refused(anthropic.BadRequestError, "temperature"):
            self.client.messages.create(messages=MESSAGES, **{**self.asked, "extra_body": {"temperature": -1}})
        stranger = anthropic.Anthropic(base_url=self.url, api_key="wrong", max_retries=0)
        with refused(anthropic.AuthenticationError, "API key"):
            stranger.messages.create(messages=MESSAGES, **self.asked)
