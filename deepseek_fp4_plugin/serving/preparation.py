"""What becomes of a request before the engine sees it: its prompt's tokens, or the answer where tokens are all it asks.

Needs the tokenizer and no model, so that another process can do it for long requests (reader_process.py).
"""

import json
from typing import Any

from deepseek_fp4_plugin.engine.request import RequestError, check_length
from deepseek_fp4_plugin.serving import messages_protocol, protocol, responses_protocol
from deepseek_fp4_plugin.serving.api_errors import ApiError, bad_request
from deepseek_fp4_plugin.serving.chat_prompt import ChatPrompt, tools_of
from deepseek_fp4_plugin.serving.logprobs import TokenTexts
from deepseek_fp4_plugin.serving.messages_protocol import CountTokensRequest
from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest, CompletionRequest, as_chat
from deepseek_fp4_plugin.serving.responses_protocol import ResponsesRequest, as_messages
from deepseek_fp4_plugin.tokenizer import IncrementalDetokenizer, Tokenizer


class Preparation:
    """names: the served model's.  limit: tokens that a prompt and its answer may have together."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None,
        tool_parser: str | None,
        names: tuple[str, ...],
        vocab_size: int,
        limit: int,
    ) -> None:
        self.tokenizer, self.tool_parser, self.names = tokenizer, tool_parser, tuple(names)
        self.vocab_size, self.limit = vocab_size, limit
        self.prompts = ChatPrompt(tokenizer, chat_template)
        self.texts = TokenTexts(tokenizer)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for another model; None is the one there is."""
        if name is not None and name not in self.names:
            served = " or ".join(repr(known) for known in self.names)
            raise ApiError(404, f"model: this server has no model {name[:200]!r}, it serves {served}", "NotFoundError",
                           "model", "model_not_found")  # fmt: skip

    # ------------------------------------------------------------------ prompts

    def completion(self, request: CompletionRequest) -> list[list[int]]:
        """The tokens of its prompts. Raises ApiError for one that does not fit."""
        given: Any = request.prompt
        prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        return [self._fitting(prompt, request.add_special_tokens, request.truncate_prompt_tokens) for prompt in prompts]

    def chat(self, request: ChatCompletionRequest) -> list[int]:
        """The tokens of its prompt. Raises ApiError for one that does not fit."""
        tools, _ = tools_of(request, self.tool_parser)
        text = self.prompts.render(request.messages, tools, request.add_generation_prompt,
                                   request.chat_template_kwargs, request.reasoning_effort)  # fmt: skip
        return self._fitting(text, request.add_special_tokens, request.truncate_prompt_tokens)

    def message(self, request: CountTokensRequest) -> list[int]:
        """The tokens of a message's prompt, of any length where they are only counted."""
        try:
            chat = as_chat(messages_protocol.chat_fields(request))
            if isinstance(request, messages_protocol.MessagesRequest):
                return self.chat(chat)
            tools, _ = tools_of(chat, self.tool_parser)
            text = self.prompts.render(chat.messages, tools, effort=chat.reasoning_effort)
        except ApiError as error:
            raise error.renamed(messages_protocol.CHAT_NAMES) from None
        return self.tokenizer.encode(text, add_special_tokens=False)

    def response(self, request: ResponsesRequest, before: bytes) -> tuple[list[int], list[dict[str, Any]]]:
        """The tokens of its prompt, and its conversation: the one before, as JSON, and its input."""
        messages = json.loads(before)
        messages += as_messages(request.input, messages)
        try:
            return self.chat(as_chat(responses_protocol.chat_fields(request, messages))), messages
        except ApiError as error:
            raise error.renamed(responses_protocol.CHAT_NAMES) from None

    def _fitting(self, prompt: str | list[int], add_special_tokens: bool, truncate: int | None) -> list[int]:
        try:
            if truncate is None:
                check_length(self.tokenizer, prompt, self.limit)
            if isinstance(prompt, str):
                prompt = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
                if truncate is None:
                    check_length(self.tokenizer, prompt, self.limit)
        except (RequestError, ValueError) as error:
            raise bad_request(str(error)) from None
        return prompt if truncate is None else prompt[-truncate:]

    # ------------------------------------------------------------------ tokens

    def count_tokens(self, request: CountTokensRequest) -> dict[str, Any]:
        """Of the prompt that a message would have."""
        self.check_model(request.model)
        return {"input_tokens": len(self.message(request))}

    def tokenize(self, request: protocol.TokenizeRequest) -> dict[str, Any]:
        self.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise bad_request("give either prompt or messages")
        if request.messages is not None:
            text = self.prompts.render(request.messages, None, request.add_generation_prompt)
            ids = self.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
        else:
            assert request.prompt is not None
            ids = self.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)
        answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": self.limit}
        if request.return_token_strs:
            answer["token_strs"] = [self.texts.text(token) for token in ids]
        return answer

    def detokenize(self, request: protocol.DetokenizeRequest) -> dict[str, Any]:
        self.check_model(request.model)
        for token in request.tokens:
            if token >= self.vocab_size:
                raise bad_request(f"tokens: {token} is outside the vocabulary of {self.vocab_size}", "tokens")
        # Piece by piece: the library's own decoding holds the interpreter from the first token to the last.
        detokenizer = IncrementalDetokenizer(self.tokenizer, request.skip_special_tokens)
        tokens = request.tokens
        pieces = [detokenizer.add(tokens[begin : begin + 4096]) for begin in range(0, len(tokens), 4096)]
        return {"prompt": "".join(pieces) + detokenizer.flush()}
