"""When an event loop's readers are woken: after every step, or, where they are many, less often and all at once.

A piece of a stream costs the interpreter the same whether it holds one token or three, and takes it from the engine.
"""

import asyncio
from collections.abc import Hashable, Iterable
from typing import Protocol

LONGEST = 0.05  # seconds that a piece is held back at the most


class Reader(Protocol):
    """What can be woken; `urgent`: at once, for its first piece or its last."""

    @property
    def urgent(self) -> bool: ...

    def wake(self) -> None: ...

    def __hash__(self) -> int: ...


class Wakes:
    """The readers of one event loop, on whose thread all of this runs.

    rate: pieces a second of all readers together, so that n of them are woken every n / rate seconds (LONGEST at the
    most); None: whenever there is something.
    """

    def __init__(self, rate: float | None = None) -> None:
        self._rate = rate
        self._held: dict[Hashable, Reader] = {}  # in order, each once
        self._next = 0.0  # the loop's time from which others may be woken
        self._timer: asyncio.TimerHandle | None = None

    def add(self, readers: Iterable[Reader]) -> None:
        """There is something for these."""
        for reader in readers:
            if self._rate is None or reader.urgent:
                self._held.pop(reader, None)
                reader.wake()
            else:
                self._held[reader] = reader
        if self._held and self._timer is None:
            loop = asyncio.get_running_loop()
            if loop.time() >= self._next:
                self._wake_all(loop)
            else:
                self._timer = loop.call_at(self._next, self._wake_all, loop)

    def _wake_all(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._rate is not None
        self._timer = None
        self._next = loop.time() + min(LONGEST, len(self._held) / self._rate)
        held, self._held = self._held, {}
        for reader in held.values():
            reader.wake()
