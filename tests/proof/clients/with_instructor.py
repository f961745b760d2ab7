"""instructor over OpenAI's client, by tools and by response_format."""

import instructor
import openai
from asked import ANSWER, KEY, LIMIT, QUESTION, THOUGHT, TOOL_QUESTION, Answer, refused
from instructor.core import InstructorRetryException

MESSAGES = [{"role": "user", "content": QUESTION}]


class Client:
    def __init__(self, url: str, model: str):
        self.url = f"{url}/v1"
        self.asked = {"model": model, "temperature": 0, "max_tokens": LIMIT, "max_retries": 0}

    def client(self, mode=instructor.Mode.JSON_SCHEMA, key=KEY):
        return instructor.from_openai(openai.OpenAI(base_url=self.url, api_key=key, max_retries=0), mode=mode)

    def chat(self) -> None:
        answer = self.client().create(messages=MESSAGES, response_model=None, **self.asked)
        assert ANSWER in answer.choices[0].message.content

    def streams(self) -> None:
        parts = list(self.client().create_partial(messages=MESSAGES, response_model=Answer, **self.asked))
        assert len(parts) > 1
        assert parts[-1].digit in (1, 2, 3) and parts[-1].sure is not None

    def tools(self) -> None:
        for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
            sum_ = self.client(mode).create(
                messages=[{"role": "user", "content": TOOL_QUESTION}], response_model=Answer, **self.asked
            )
            assert isinstance(sum_, Answer)

    def structured_output(self) -> None:
        # Mode.JSON tells the model the schema and asks for any JSON object: it takes a cleverer model than r1_nano.
        assert isinstance(self.client().create(messages=MESSAGES, response_model=Answer, **self.asked), Answer)

    def reasoning(self) -> None:
        answer, raw = self.client().create_with_completion(messages=MESSAGES, response_model=Answer, **self.asked)
        assert isinstance(answer, Answer)
        assert THOUGHT in raw.choices[0].message.reasoning_content

    def errors(self) -> None:
        for said, fields, key in (
            ("gpt", {"model": "gpt"}, KEY),
            ("temperature", {"temperature": -1}, KEY),
            ("API key", {}, "wrong"),
        ):
            with refused(InstructorRetryException, said):
                self.client(key=key).create(messages=MESSAGES, response_model=Answer, **{**self.asked, **fields})
