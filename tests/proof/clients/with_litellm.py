"""LiteLLM: completion as hosted_vllm and openai, responses, and Anthropic's form."""

import json

import litellm
from asked import ADD, ANSWER, KEY, LIMIT, QUESTION, THOUGHT, TOOL_QUESTION, Answer, is_sum, refused

MESSAGES = [{"role": "user", "content": QUESTION}]
litellm.suppress_debug_info = True


class Client:
    def __init__(self, url: str, model: str):
        self.url, self.model = url, model
        common = {"temperature": 0, "max_tokens": LIMIT, "api_key": KEY, "max_retries": 0}
        self.all = (
            {"model": f"hosted_vllm/{model}", "api_base": f"{url}/v1", **common},
            {"model": f"openai/{model}", "api_base": f"{url}/v1", **common},
            {"model": f"anthropic/{model}", "api_base": url, **common},
        )

    def chat(self) -> None:
        for fields in self.all:
            assert ANSWER in litellm.completion(messages=MESSAGES, **fields).choices[0].message.content
        response = litellm.responses(
            model=f"openai/{self.model}", api_base=f"{self.url}/v1", api_key=KEY, input=QUESTION, temperature=0,
            max_output_tokens=LIMIT,
        )  # fmt: skip
        assert ANSWER in response.output_text

    def streams(self) -> None:
        for fields in self.all:
            chunks = litellm.completion(messages=MESSAGES, stream=True, **fields)
            pieces = [piece for chunk in chunks if (piece := chunk.choices[0].delta.content)]
            assert len(pieces) > 3
            assert ANSWER in "".join(pieces)

    def tools(self) -> None:
        tools = [{"type": "function", "function": {"name": "add", "description": "Add two digits", "parameters": ADD}}]
        question = {"role": "user", "content": TOOL_QUESTION}
        for fields in self.all:
            held = {"tool_choice": "required", "parallel_tool_calls": False}
            message = litellm.completion(messages=[question], tools=tools, **held, **fields).choices[0].message
            (call,) = message.tool_calls
            assert is_sum(json.loads(call.function.arguments))
            turns = [question, message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
            after = litellm.completion(messages=turns, tools=tools, **fields).choices[0].message
            assert after.content or after.reasoning_content

    def structured_output(self) -> None:
        for fields in self.all:
            answer = litellm.completion(messages=MESSAGES, response_format=Answer, **fields)
            Answer.model_validate_json(answer.choices[0].message.content)

    def reasoning(self) -> None:
        for fields in self.all:
            message = litellm.completion(messages=MESSAGES, **fields).choices[0].message
            assert THOUGHT in message.reasoning_content
            assert THOUGHT not in message.content
        at_once = litellm.completion(messages=MESSAGES, reasoning_effort="none", **self.all[0])
        assert at_once.usage.completion_tokens_details.reasoning_tokens == 0

    def errors(self) -> None:
        for fields in self.all:
            provider = fields["model"].partition("/")[0]
            with refused(litellm.NotFoundError, "gpt"):
                litellm.completion(messages=MESSAGES, **{**fields, "model": f"{provider}/gpt"})
            with refused(litellm.BadRequestError, "temperature"):
                litellm.completion(messages=MESSAGES, **{**fields, "temperature": -1})
            with refused(litellm.AuthenticationError, "API key"):
                litellm.completion(messages=MESSAGES, **{**fields, "api_key": "wrong"})
