"""A process of its own that reads long requests, since JSON and its objects hold the interpreter, and so every stream.

What is refused, or asks for tokens alone, never enters the server's own process. Of what is generated come back the
prompt's token ids and the request without its prompt, which is short.
"""

import array
import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from pydantic import BaseModel

from deepseek_fp4_plugin.serving.api_errors import ApiError
from deepseek_fp4_plugin.serving.bodies import read_body, read_json, validated
from deepseek_fp4_plugin.serving.json_bytes import to_json
from deepseek_fp4_plugin.serving.messages_protocol import CountTokensRequest, MessagesRequest
from deepseek_fp4_plugin.serving.preparation import Preparation
from deepseek_fp4_plugin.serving.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from deepseek_fp4_plugin.serving.responses_protocol import ResponsesRequest

logger = logging.getLogger(__name__)

_NICENESS = 5  # streams come before requests that are not even read, which still go on


@dataclass
class Reading:
    """What became of a body. With none of them set it is right, and to be read by the server itself."""

    error: ApiError | None = None
    answer: bytes | None = None  # the whole of it
    prompts: list[bytes] | None = None  # token ids, of array type "q"
    rest: bytes = b""  # the body without its prompt
    conversation: bytes | None = None  # of a response, its messages as JSON


@dataclass
class Wanted:
    """A question of the process: the conversation that this response ended, or the ApiError that there is none."""

    response: str


class ReaderProcess:
    """Started at once and kept; started again when it was lost. Used from one event loop, closed at the end.

    conversation: that an earlier response ended, as JSON; asked from another thread. Raises ApiError.
    """

    def __init__(self, preparation: Preparation, conversation: Callable[[str], bytes]) -> None:
        self._preparation, self._conversation = preparation, conversation
        self._thread = ThreadPoolExecutor(1, "deepseek-fp4-reader")  # alone in using what follows
        self._process: Any = None
        self._connection: Connection | None = None
        self._thread.submit(self._start)

    async def read(self, body: bytes, model: type[BaseModel]) -> BaseModel:
        """The validated request; `ready` is what is prepared of it. Raises ApiError."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, body, model)

    def close(self) -> None:
        """End the process. Nothing may be read afterwards."""
        self._thread.submit(self._stop)
        self._thread.shutdown()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._preparation), daemon=True)
        self._process.start()
        theirs.close()

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()  # the process reads the end of it
            self._process.join()
            self._connection = None

    def _read(self, body: bytes, model: type[BaseModel]) -> BaseModel:
        try:
            if self._connection is None:
                self._start()
            assert self._connection is not None
            self._connection.send(model)
            self._connection.send_bytes(body)
            while isinstance(reading := self._connection.recv(), Wanted):
                self._connection.send(self._earlier(reading.response))
        except (EOFError, OSError):
            logger.error("the process that reads long requests was lost; it is started again")
            self._process.kill()
            self._stop()
            raise ApiError(503, "the process that read this request was lost and is started again; send it once more",
                           "ServiceUnavailableError", headers={"Retry-After": "1"}) from None  # fmt: skip
        if reading.error is not None:
            raise reading.error
        if reading.answer is not None:
            answered: Any = model.model_construct()
            answered._ready = reading.answer
            return answered
        if reading.prompts is None:
            return read_body(body, model)
        request: Any = read_body(reading.rest, model)
        request._ready = [array.array("q", ids).tolist() for ids in reading.prompts]
        if reading.conversation is not None:
            request._conversation = reading.conversation
        return request

    def _earlier(self, response: str) -> bytes | ApiError:
        try:
            return self._conversation(response)
        except ApiError as error:
            return error


# ---------------------------------------------------------------------------- in the process


def _serve(connection: Connection, preparation: Preparation) -> None:
    """Read one body after the other until the server is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server says when
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    gc.freeze()

    def conversation(response: str) -> bytes:
        connection.send(Wanted(response))
        answer = connection.recv()
        if isinstance(answer, ApiError):
            raise answer
        return answer

    with contextlib.suppress(EOFError, OSError):
        while True:
            model, body = connection.recv(), connection.recv_bytes()
            try:
                reading = read(preparation, body, model, conversation)
            except ApiError as error:
                reading = Reading(error)
            except Exception:
                logger.exception("a long request could not be read")
                reading = Reading(ApiError(500, "internal error; the server's log has it", "InternalServerError"))
            connection.send(reading)
            del body, reading


def read(
    preparation: Preparation, body: bytes, model: type[BaseModel], conversation: Callable[[str], bytes]
) -> Reading:
    """What becomes of a body. Raises ApiError for one that is refused."""
    value, known = read_json(body)
    request = validated(value, known, model)
    if isinstance(request, TokenizeRequest):
        return Reading(answer=to_json(preparation.tokenize(request)))
    if isinstance(request, DetokenizeRequest):
        return Reading(answer=to_json(preparation.detokenize(request)))
    if isinstance(request, CountTokensRequest) and not isinstance(request, MessagesRequest):
        return Reading(answer=to_json(preparation.count_tokens(request)))
    assert isinstance(request, CompletionRequest | ChatCompletionRequest | MessagesRequest | ResponsesRequest)
    preparation.check_model(request.model)
    rest: dict[str, Any]
    messages: list[dict[str, Any]] | None = None
    if isinstance(request, CompletionRequest):
        prompts, rest = preparation.completion(request), {"prompt": "-"}
        whole = request.echo  # its answer repeats the prompt
    elif isinstance(request, ChatCompletionRequest):
        prompts, whole = [preparation.chat(request)], False
        rest = {"messages": [{"role": _role(message.role for message in request.messages), "content": ""}]}
    elif isinstance(request, ResponsesRequest):
        before = b"[]" if request.previous_response_id is None else conversation(request.previous_response_id)
        ids, messages = preparation.response(request, before)
        prompts, whole = [ids], False
        rest = {"input": [{"role": _role(message["role"] for message in messages), "content": ""}]}
    else:
        prompts = [preparation.message(request)]
        rest, whole = {"messages": [{"role": "user", "content": ""}], "system": None}, False
    if whole or known is None:  # or it is JSON that only Python writes again as it was
        return Reading()
    return Reading(
        prompts=[array.array("q", ids).tobytes() for ids in prompts],
        rest=to_json({**value, **rest}),
        conversation=None if messages is None else to_json(messages),
    )


def _role(roles: Iterable[str]) -> str:
    """Of the one message that stands for all: a system's is noted by the server."""
    return "system" if any(role in ("system", "developer") for role in roles) else "user"
