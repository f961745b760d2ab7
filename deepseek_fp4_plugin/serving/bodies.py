"""Request bodies: bytes to validated objects, long ones beside the event loop."""

import json
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import orjson
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from deepseek_fp4_plugin.serving.api_errors import ApiError, bad_request, describe_validation
from deepseek_fp4_plugin.serving.aside import Aside
from deepseek_fp4_plugin.serving.request_parts import ALL_TEXT

SHORT_BODY = 16 << 10  # bytes; these are read sooner than another thread takes over


class RefusedBody(HTTPException):
    """Passes through FastAPI's reading of a body; `error` is the answer."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message)
        self.error = error


def read_json(body: bytes) -> tuple[Any, dict[str, Any] | None]:
    """The JSON value, and what is known of it. Raises ApiError 400."""
    try:
        return orjson.loads(body), ALL_TEXT
    except ValueError:  # more strict and less telling than Python's own
        pass
    try:
        return json.loads(body), None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg}") from None
    except RecursionError:
        raise bad_request("the body is not JSON that can be read: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise bad_request("the body is not JSON: it is not UTF-8") from None
    except ValueError as error:  # an integer of thousands of digits
        raise bad_request(f"the body is not JSON that can be read: {error}") from None


def read_body(body: bytes, model: type[BaseModel]) -> BaseModel:
    """The validated body. Raises ApiError 400."""
    return validated(*read_json(body), model)


def validated(value: Any, known: dict[str, Any] | None, model: type[BaseModel]) -> BaseModel:
    """Of a JSON value and what is known of it. Raises ApiError 400."""
    try:
        return model.model_validate(value, context=known)
    except ValidationError as error:
        message, param = describe_validation(error)
        raise bad_request(message, param) from None


class Reader(Protocol):
    """What reads long bodies in place of the server."""

    async def read(self, body: bytes, model: type[BaseModel]) -> BaseModel: ...


def body_route(aside: Aside, reader: Reader | None = None) -> type[APIRoute]:
    """The routes' class: a JSON body reaches FastAPI as the object that its handler asks for.

    reader: reads long bodies; without one a thread does.
    """

    class BodyRequest(Request):
        model: type[BaseModel]

        async def json(self) -> Any:
            body = await self.body()
            try:
                if len(body) <= SHORT_BODY:
                    return read_body(body, self.model)
                if reader is not None:
                    return await reader.read(body, self.model)
                return await aside.python(read_body, body, self.model)
            except ApiError as error:
                raise RefusedBody(error) from None

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler, field = super().get_route_handler(), self.body_field
            if field is None:
                return handler

            async def handle(request: Request) -> Response:
                own = BodyRequest(request.scope, request.receive)
                own.model = field.field_info.annotation  # type: ignore[assignment]
                return await handler(own)

            return handle

    return BodyRoute
