"""Limits on what uvicorn leaves open: how long a client may take to send a request's head, and how large it may be."""

import asyncio
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
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = self.loop.call_later(self.head_timeout, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # the head was complete
            self._head_bytes = 0
            self._stop_timer()
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def limited_connection(head_timeout: float) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn's `http` setting."""
    return type("LimitedConnection", (LimitedConnection,), {"head_timeout": head_timeout})
