"""Around every route: request ids and the access log, API keys, and limits on bodies. Plain ASGI, no buffering."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from deepseek_fp4_plugin.serving.api_errors import ApiError
from deepseek_fp4_plugin.serving.json_bytes import to_json
from deepseek_fp4_plugin.serving.messages_protocol import error_form
from deepseek_fp4_plugin.serving.metrics import Metrics
from deepseek_fp4_plugin.serving.streaming import event

access_log = logging.getLogger("deepseek_fp4_plugin.access")
logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.\-]{1,128}")


def header(scope: dict[str, Any], name: bytes) -> str | None:
    """The first header of that (lower-case) name."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def send_error(send: Any, error: ApiError, form: Callable[[ApiError], Any] = ApiError.body) -> None:
    """Answer with an error body."""
    body = to_json(form(error))
    extra = [(k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items()]
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *extra]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class AccessLog:
    """Gives each request an id (the client's X-Request-Id where it is a plain one) and logs one JSON line at its end.

    Handlers add facts to `scope["state"]["log"]`. No prompt and no answer is logged.
    """

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        given = header(scope, b"x-request-id") or ""
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(log=facts, request_id=request_id)

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server ends without waiting for this answer
            failure = ApiError(503, "the request was cancelled because the server is shutting down",
                               "ServiceUnavailableError")  # fmt: skip
            with contextlib.suppress(Exception):
                await asyncio.wait_for(_last_words(send_with_id, failure, started=bool(status)), 1.0)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:
                raise  # too late for an answer: the server closes the connection, which a client sees
            await send_error(send_with_id, ApiError(500, "internal error; the server's log has it under the request id",
                                                    "InternalServerError"))  # fmt: skip
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self.metrics.responses.labels(scope["method"], route, str(status)).inc()
            client = scope.get("client")
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "request_id": request_id,
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.perf_counter() - began, 4),
                **facts,
            }
            access_log.info("%s", json.dumps(line))


async def _last_words(send: Any, error: ApiError, started: bool) -> None:
    """Tell a client that nothing more comes, in a stream as its last event."""
    if not started:
        await send_error(send, error)
    else:
        await send({"type": "http.response.body", "body": event(error.body()), "more_body": False})


class ApiKeys:
    """401 everywhere but /health and /ping unless the request brings one of the keys.

    As a bearer token; as the password of basic authentication, which lets a browser open the playground; or in the
    header of Anthropic's clients (x-api-key) or of Azure's (api-key).
    """

    def __init__(self, app: Any, keys: tuple[str, ...]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def _admits(self, scope: Any) -> bool:
        scheme, _, value = (header(scope, b"authorization") or "").partition(" ")
        key = header(scope, b"x-api-key") or header(scope, b"api-key") or ""
        if scheme.lower() == "bearer":
            key = value.strip()
        elif scheme.lower() == "basic":
            try:
                key = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                key = ""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, each in constant time: neither which nor how much of it matched shows.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] in ("/health", "/ping") or self._admits(scope):
            await self.app(scope, receive, send)
            return
        challenge = 'Basic realm="deepseek-fp4"' if scope["path"] in ("/", "/docs") else "Bearer"
        error = ApiError(401, "this server wants an API key: send `Authorization: Bearer KEY`", "AuthenticationError",
                         code="invalid_api_key", headers={"WWW-Authenticate": challenge})  # fmt: skip
        await send_error(send, error, error_form(scope["path"]))


class BodyLimits:
    """413 for a body over the limit, 408 for one that does not arrive; the body is then replayed to the routes."""

    def __init__(self, app: Any, max_bytes: int, timeout: float) -> None:
        self.app, self.max_bytes, self.timeout = app, max_bytes, timeout

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self.timeout)
        except ApiError as error:
            await send_error(send, error, error_form(scope["path"]))
            return
        except TimeoutError:
            await send_error(send, ApiError(408, f"the body did not arrive within {self.timeout:g} s",
                                            headers={"Connection": "close"}), error_form(scope["path"]))  # fmt: skip
            return
        if body is None:  # gone while sending
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Any, receive: Any) -> bytes | None:
        too_large = ApiError(413, f"the body is over {self.max_bytes} bytes, the limit of this server",
                             headers={"Connection": "close"})  # fmt: skip
        length = header(scope, b"content-length")
        if length is not None and length.isdigit() and int(length) > self.max_bytes:
            raise too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_bytes:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)


def _replay(body: bytes, receive: Any) -> Callable[[], Any]:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Any:
        return waiting.pop() if waiting else await receive()

    return replayed
