"""Answers in the form of OpenAI's /v1/responses, whole and streamed, and the memory of those that may go on."""

import threading
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from deepseek_fp4_plugin.llm import CompletionOutput, RequestOutput
from deepseek_fp4_plugin.serving.api_errors import ApiError
from deepseek_fp4_plugin.serving.blocks import Block, Blocks, Change
from deepseek_fp4_plugin.serving.generation import Answer
from deepseek_fp4_plugin.serving.json_bytes import to_json
from deepseek_fp4_plugin.serving.responses_protocol import FunctionTool, ResponsesRequest


@dataclass
class StoredResponse:
    """A response, and the conversation up to its end, a chat's messages without instructions; both as JSON."""

    name: str
    body: bytes
    conversation: bytes


class ResponseStore:
    """Finished responses by id, in memory only: the longest unused go first when they are too many or too large.

    Any thread.
    """

    def __init__(self, max_bytes: int = 64 << 20, max_count: int = 4096) -> None:
        self.max_bytes, self.max_count = max_bytes, max_count
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, response: StoredResponse) -> None:
        with self._lock:
            self._kept[response.name] = response
            self.bytes += _size(response)
            while self._kept and (self.bytes > self.max_bytes or len(self._kept) > self.max_count):
                self.bytes -= _size(self._kept.popitem(last=False)[1])

    def get(self, name: str, param: str | None = None) -> StoredResponse:
        """Raises ApiError 404 for one that is not kept."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        raise ApiError(404, f"no response {name[:100]!r} is kept here: it was made without store, was deleted, or "
                       "gave way to newer ones", "NotFoundError", param)  # fmt: skip

    def conversation(self, name: str) -> bytes:
        """What a response to be made goes on from. Raises ApiError 404."""
        return self.get(name, "previous_response_id").conversation

    def delete(self, name: str) -> None:
        """Raises ApiError 404."""
        self.get(name)
        with self._lock:
            if (response := self._kept.pop(name, None)) is not None:
                self.bytes -= _size(response)


def _size(response: StoredResponse) -> int:
    return len(response.body) + len(response.conversation)


class ResponsesAnswer(Answer):
    """One chat job as a response. A stream is a row of named, numbered events and has no [DONE]."""

    done = b""

    def __init__(
        self, *args: Any, asked: ResponsesRequest, conversation: bytes, store: ResponseStore, **kwargs: Any
    ) -> None:
        """conversation: that the answer ends, its messages as JSON."""
        super().__init__(*args, **kwargs)
        self.asked, self.conversation, self.store = asked, conversation, store
        self.id = f"resp_{uuid.uuid4().hex}"
        self._ids: list[str] = []  # of the output's items
        self._sequence = 0

    # ------------------------------------------------------------------ whole

    def _body(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        assert self.parser is not None
        parser, blocks, choice = self.parser(), Blocks(), outputs[0].outputs[0]
        blocks.feed(parser.feed(choice.text, last=True))
        return self._finished(blocks, choice, self._reasoning_tokens(choice.token_ids, parser))

    def _finished(self, blocks: Blocks, choice: CompletionOutput, reasoning_tokens: int) -> dict[str, Any]:
        """The whole response, which is kept where that was asked for."""
        cut = choice.finish_reason == "length"
        items = [self._item(block, "incomplete" if cut and block is blocks.all[-1] else "completed")
                 for block in blocks.all]  # fmt: skip
        usage = self.job.usage()
        body = self._response("incomplete" if cut else "completed", items) | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
                "total_tokens": usage["total_tokens"],
            },
        }
        if self.asked.store:
            conversation = self.conversation[:-1] + b"," + to_json(_turn(blocks.all)) + b"]"
            self.store.keep(StoredResponse(self.id, to_json(body), conversation))
        return body

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        asked, params = self.asked, self.job.request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "store": asked.store,
            "temperature": params.temperature,
            "text": {"format": _dumped(asked.text.format) if asked.text and asked.text.format else {"type": "text"}},
            "tool_choice": _dumped(asked.tool_choice) if asked.tool_choice is not None else "auto",
            "tools": [
                {"strict": None, "parameters": None, **_dumped(tool)}
                for tool in asked.tools or []
                if isinstance(tool, FunctionTool)
            ],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
        }

    def _item(self, block: Block, status: str, empty: bool = False) -> dict[str, Any]:
        """A block as an item of the output; `empty`: as it is when it begins."""
        while len(self._ids) <= block.index:
            self._ids.append(uuid.uuid4().hex)
        name, text = self._ids[block.index], "" if empty else block.text
        if block.kind == "call":
            return {"type": "function_call", "id": f"fc_{name}", "call_id": block.id, "name": block.name,
                    "arguments": text, "status": status}  # fmt: skip
        content = [] if empty else [_part(block, text)]
        if block.kind == "reasoning":
            return {"type": "reasoning", "id": f"rs_{name}", "summary": [], "content": content, "status": status}
        return {"type": "message", "id": f"msg_{name}", "role": "assistant", "content": content, "status": status}

    # ------------------------------------------------------------------ streamed

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return f"event: {kind}\ndata: ".encode() + to_json(data) + b"\n\n"

    async def _events(self) -> AsyncIterator[bytes]:
        started = self._response("in_progress", [])
        yield self._event("response.created", response=started) + self._event("response.in_progress", response=started)
        blocks, reasoning_tokens = Blocks(), 0
        async for delta, choice, parser in self._deltas():
            changes = blocks.feed(delta)
            reasoning_tokens = self._reasoning_tokens(choice.token_ids, parser)
            if choice.finish_reason is not None:
                changes += blocks.finish()
            cut = choice.finish_reason == "length"
            if events := [self._change(change, cut) for change in changes]:
                yield b"".join(events)
        body = self._finished(blocks, choice, reasoning_tokens)
        yield self._event(f"response.{body['status']}", response=body)

    def _change(self, change: Change, cut: bool) -> bytes:
        """The events of one change; `cut`: a block that closes now was cut off."""
        block = change.block
        place: dict[str, Any] = {"output_index": block.index}
        named = {**place, "item_id": self._item(block, "in_progress")["id"]}
        part = named | {"content_index": 0}
        kind = {"reasoning": "response.reasoning_text", "text": "response.output_text",
                "call": "response.function_call_arguments"}[block.kind]  # fmt: skip
        inside = named if block.kind == "call" else part
        extra: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        if change.what == "add":
            return self._event(f"{kind}.delta", **inside, delta=change.text, **extra)
        if change.what == "open":
            began = self._event(
                "response.output_item.added", **place, item=self._item(block, "in_progress", empty=True)
            )
            if block.kind == "call":
                return began
            return began + self._event("response.content_part.added", **part, part=_part(block, ""))
        name = "arguments" if block.kind == "call" else "text"
        closed = self._event(f"{kind}.done", **inside, **{name: block.text}, **extra,
                             **({"name": block.name} if block.kind == "call" else {}))  # fmt: skip
        if block.kind != "call":
            closed += self._event("response.content_part.done", **part, part=_part(block, block.text))
        item = self._item(block, "incomplete" if cut else "completed")
        return closed + self._event("response.output_item.done", **place, item=item)

    def _failure(self, error: ApiError) -> bytes:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        failed = self._response("failed", []) | {"error": {"code": code, "message": error.message}}
        return self._event("response.failed", response=failed)


def _dumped(value: Any) -> Any:
    return value if isinstance(value, str) else value.model_dump(by_alias=True, exclude_none=True)


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _turn(blocks: list[Block]) -> dict[str, Any]:
    """The answer as a turn of the conversation."""
    calls = [{"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.text}}
             for block in blocks if block.kind == "call"]  # fmt: skip
    text = "".join(block.text for block in blocks if block.kind == "text")
    turn: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
    return turn | ({"tool_calls": calls} if calls else {})
