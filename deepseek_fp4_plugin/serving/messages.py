"""Answers in the form of Anthropic's /v1/messages, whole and streamed."""

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from deepseek_fp4_plugin.llm import CompletionOutput, RequestOutput
from deepseek_fp4_plugin.serving.api_errors import ApiError
from deepseek_fp4_plugin.serving.blocks import Block, Blocks, Change
from deepseek_fp4_plugin.serving.generation import Answer
from deepseek_fp4_plugin.serving.json_bytes import to_json
from deepseek_fp4_plugin.serving.messages_protocol import error_body
from deepseek_fp4_plugin.serving.streaming import ChoiceParser


class MessagesAnswer(Answer):
    """One chat job as a message. A stream is a row of named events and has no [DONE]."""

    done = b""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.id = f"msg_{uuid.uuid4().hex}"

    def _body(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        assert self.parser is not None
        parser, blocks, choice = self.parser(), Blocks(), outputs[0].outputs[0]
        blocks.feed(parser.feed(choice.text, last=True))
        return (
            self._message([_whole(block) for block in blocks.all]) | _ending(choice, parser) | {"usage": self._usage()}
        )

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
                "stop_reason": None, "stop_sequence": None}  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts prompt tokens found in the cache apart."""
        usage = self.job.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {"input_tokens": usage["prompt_tokens"] - cached, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": cached, "output_tokens": usage["completion_tokens"]}  # fmt: skip

    async def _events(self) -> AsyncIterator[bytes]:
        blocks, started = Blocks(), False
        async for delta, choice, parser in self._deltas():
            events = []
            if not started:
                started = True
                events.append(_event("message_start", message=self._message([]) | {"usage": self._usage()}))
            changes = blocks.feed(delta)
            if choice.finish_reason is not None:
                changes += blocks.finish()
            events += [_change(change) for change in changes]
            if choice.finish_reason is not None:
                events.append(_event("message_delta", delta=_ending(choice, parser), usage=self._usage()))
                events.append(_event("message_stop"))
            if events:
                yield b"".join(events)

    def _error_body(self, error: ApiError) -> dict[str, Any]:
        return error_body(error)

    def _failure(self, error: ApiError) -> bytes:
        return b"event: error\ndata: " + to_json(error_body(error)) + b"\n\n"


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + to_json({"type": kind, **fields}) + b"\n\n"


def _ending(choice: CompletionOutput, parser: ChoiceParser) -> dict[str, Any]:
    """Why the message ended, in Anthropic's words."""
    sequence = choice.stop_reason if isinstance(choice.stop_reason, str) else None
    if choice.finish_reason == "length":
        reason = "max_tokens"
    elif parser.has_calls:
        reason = "tool_use"
    else:
        reason = "stop_sequence" if sequence is not None else "end_turn"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _empty(block: Block) -> dict[str, Any]:
    """A block as it is when it begins."""
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if block.kind == "call":
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}
    return {"type": "text", "text": ""}


def _whole(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return _empty(block) | {"input": _input(block.text)}
    return _empty(block) | {"thinking" if block.kind == "reasoning" else "text": block.text}


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object; those that are none, for they were cut, under the key that Anthropic advises."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}


def _change(change: Change) -> bytes:
    block = change.block
    if change.what == "open":
        return _event("content_block_start", index=block.index, content_block=_empty(block))
    if change.what == "close":
        return _event("content_block_stop", index=block.index)
    delta = {"reasoning": {"type": "thinking_delta", "thinking": change.text},
             "text": {"type": "text_delta", "text": change.text},
             "call": {"type": "input_json_delta", "partial_json": change.text}}[block.kind]  # fmt: skip
    return _event("content_block_delta", index=block.index, delta=delta)
