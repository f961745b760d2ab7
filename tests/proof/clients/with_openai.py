"""OpenAI's own Python client: chat, completions and responses."""

import json

import openai
from asked import ADD, ANSWER, KEY, LIMIT, QUESTION, THOUGHT, TOOL_QUESTION, Answer, is_sum, refused

MESSAGES = [{"role": "user", "content": QUESTION}]
ASK_FOR_A_TOOL = [{"role": "user", "content": TOOL_QUESTION}]


class Client:
    def __init__(self, url: str, model: str):
        self.url = f"{url}/v1"
        self.openai = openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0)
        self.chats = {"model": model, "temperature": 0, "max_tokens": LIMIT}
        self.asked = {"model": model, "temperature": 0, "max_output_tokens": LIMIT}

    def chat(self) -> None:
        answer = self.openai.chat.completions.create(messages=MESSAGES, **self.chats).choices[0]
        assert ANSWER in answer.message.content
        assert answer.finish_reason == "stop"
        prompt = f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜>"
        assert ANSWER in self.openai.completions.create(prompt=prompt, **self.chats).choices[0].text
        assert ANSWER in self.openai.responses.create(input=QUESTION, **self.asked).output_text

    def streams(self) -> None:
        with self.openai.chat.completions.stream(messages=MESSAGES, **self.chats) as stream:
            pieces = [event.delta for event in stream if event.type == "content.delta"]
            final = stream.get_final_completion().choices[0].message.content
        assert len(pieces) > 3
        assert ANSWER in final and "".join(pieces) == final
        texts = [c.choices[0].text for c in self.openai.completions.create(prompt="abc", stream=True, **self.chats)]
        assert "".join(texts) == self.openai.completions.create(prompt="abc", **self.chats).choices[0].text
        with self.openai.responses.stream(input=QUESTION, **self.asked) as stream:
            pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response().output_text
        assert len(pieces) > 3
        assert ANSWER in final and "".join(pieces) == final

    def tools(self) -> None:
        function = {"name": "add", "description": "Add two digits", "parameters": ADD, "strict": True}
        fields = {"tools": [{"type": "function", "function": function}], **self.chats}
        message = self.openai.chat.completions.create(
            messages=ASK_FOR_A_TOOL, tool_choice="required", parallel_tool_calls=False, **fields
        ).choices[0].message  # fmt: skip
        (call,) = message.tool_calls
        assert is_sum(json.loads(call.function.arguments))
        result = {"role": "tool", "tool_call_id": call.id, "content": "5"}
        after = self.openai.chat.completions.create(messages=[*ASK_FOR_A_TOOL, message, result], **fields)
        assert after.choices[0].message.content

        fields = {"tools": [{"type": "function", **function}], **self.asked}
        first = self.openai.responses.create(
            input=TOOL_QUESTION, tool_choice="required", parallel_tool_calls=False, **fields
        )
        (call,) = (item for item in first.output if item.type == "function_call")
        assert is_sum(json.loads(call.arguments))
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
        assert self.openai.responses.create(input=[result], previous_response_id=first.id, **fields).output_text

    def structured_output(self) -> None:
        chat = self.openai.chat.completions.parse(messages=MESSAGES, response_format=Answer, **self.chats)
        assert isinstance(chat.choices[0].message.parsed, Answer)
        response = self.openai.responses.parse(input=QUESTION, text_format=Answer, **self.asked)
        assert isinstance(response.output_parsed, Answer)

    def reasoning(self) -> None:
        answer = self.openai.chat.completions.create(messages=MESSAGES, **self.chats)
        assert THOUGHT in answer.choices[0].message.reasoning_content
        assert THOUGHT not in answer.choices[0].message.content
        assert answer.usage.completion_tokens_details.reasoning_tokens > 10
        response = self.openai.responses.create(input=QUESTION, **self.asked)
        assert response.output[0].type == "reasoning" and THOUGHT in response.output[0].content[0].text
        at_once = self.openai.chat.completions.create(messages=MESSAGES, reasoning_effort="none", **self.chats)
        assert at_once.usage.completion_tokens_details.reasoning_tokens == 0

    def errors(self) -> None:
        for create, fields in (
            (self.openai.chat.completions.create, {**self.chats, "messages": MESSAGES}),
            (self.openai.completions.create, {**self.chats, "prompt": "abc"}),
            (self.openai.responses.create, {**self.asked, "input": QUESTION}),
        ):
            with refused(openai.NotFoundError, "gpt"):
                create(**{**fields, "model": "gpt"})
            with refused(openai.BadRequestError, "temperature"):
                create(**{**fields, "temperature": -1})
        stranger = openai.OpenAI(base_url=self.url, api_key="wrong", max_retries=0)
        with refused(openai.AuthenticationError, "API key"):
            stranger.chat.completions.create(messages=MESSAGES, **self.chats)
