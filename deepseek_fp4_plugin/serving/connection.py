"""What uvicorn leaves open: how long a request's head may take and how large it may be; streams for HTTP/1.0."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MAX_HEAD_BYTES = 64 << 10


class LimitedConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """One connection. Closed when a head is over MAX_HEAD_BYTES or not there `head_timeout` seconds after it began.

    A connection that never sends anything counts as beginning with its first request. uvicorn's own keep-alive limit
    closes idle ones later on; bodies are limited by middleware.BodyLimits.
    """

    head_timeout = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head_bytes, self._head_tail = 0, b""
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(self.head_timeout, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:  # a head, from its beginning or in the middle
            end = (self._head_tail + data).find(b"\r\n\r\n")
            size = self._head_bytes + (len(data) if end < 0 else end - len(self._head_tail))
            if size > MAX_HEAD_BYTES:
                self.transport.abort()
                return
            self._head_tail = (self._head_tail + data)[-3:]
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # the head was complete
            self._head_bytes, self._head_tail = 0, b""
            self._stop_timer()
            return
        self._head_bytes += len(data)
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout, self.transport.abort)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope["http_version"] == "1.0":
            self.cycle.send = _until_closed(self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _until_closed(cycle: Any) -> Callable[[Any], Awaitable[None]]:
    """`send` for a client of HTTP/1.0, which knows no chunks: a body without a length ends with the connection."""
    send, unsized = cycle.send, False

    async def send_plain(message: Any) -> None:
        nonlocal unsized
        if message["type"] == "http.response.start":
            unsized = not any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if unsized:
                cycle.chunked_encoding = False
        elif unsized:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_plain


def limited_connection(head_timeout: float) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn's `http` setting."""
    return type("LimitedConnection", (LimitedConnection,), {"head_timeout": head_timeout})
