"""Long work beside the event loop, so that streams and /health go on meanwhile.

Python runs one thread at a time, and threads that want it take turns. Work that holds it (JSON, validation, templates)
is done by one thread, one piece after another: however much comes, the loop waits for a turn of one other thread.
Work of libraries that let go of it (tokenizing, grammars) has a few threads.
"""

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")

# Seconds until a thread that waits for its turn gets it. Python's own 5 ms would be paid again at every system call of
# the event loop and every operation of the engine.
TURN = 0.0005


class Aside:
    """The threads of one server. Methods are called on its event loop."""

    def __init__(self) -> None:
        self._python = ThreadPoolExecutor(1, "deepseek-fp4-prepare")
        self._native = ThreadPoolExecutor(4, "deepseek-fp4-tokenize")

    async def python(self, work: Callable[..., _T], *args: Any) -> _T:
        """Do Python's work."""
        return await asyncio.get_running_loop().run_in_executor(self._python, work, *args)

    async def native(self, work: Callable[..., _T], *args: Any) -> _T:
        """Do what is mostly done outside Python."""
        return await asyncio.get_running_loop().run_in_executor(self._native, work, *args)


def take_short_turns() -> None:
    """Let this process's threads take turns of TURN seconds."""
    sys.setswitchinterval(TURN)
