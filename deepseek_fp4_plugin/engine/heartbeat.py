"""Heartbeat: how a front knows that its workers live, and a worker that its front does.

A connection of its own and a thread at each end, apart from computation: an honest step on a CPU may take longer than
any timeout, but the thread beside it answers all the same. A process that is gone closes the connection; one that is
stopped, or behind a cut link, falls silent.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import cast

INTERVAL = 0.5  # seconds between two beats
SILENCE = 6.0  # seconds without an answer after which a worker is given up
# A worker far away that has heard nothing for so long ends itself; one on this machine sees its front's end at once.
ORPHANED = 20.0
_ROOT_CAUSE = 0.5  # seconds in which a rank found dead explains what another rank complains of

_BEAT = b""


class Pulse:
    """A worker's end: answers beats, carries its last words, and ends the process when the front has gone.

    patience: seconds of silence after which the front counts as gone; None: only a closed connection does.
    """

    def __init__(self, connection: Connection, patience: float | None):
        self._connection, self._patience = connection, patience
        self._sending = threading.Lock()
        self._over = False
        connection.send_bytes(_BEAT)
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def fail(self, words: bytes) -> None:
        """Tell the front why this rank can go no further, and wait until it ends the group.

        Keeping the connections open until then leaves the other ranks waiting, not failing with an error of their own.
        """
        with self._sending:
            self._connection.send_bytes(words)
        threading.Event().wait()

    def rest(self) -> None:
        """The group is closed: the front may go."""
        self._over = True

    def _run(self) -> None:
        try:
            while self._connection.poll(self._patience):
                beat = self._connection.recv_bytes()
                with self._sending:
                    self._connection.send_bytes(beat)
        except (EOFError, OSError):
            pass
        if not self._over:
            os._exit(1)  # whatever the other threads wait for, nobody wants it any more


class Monitor:
    """The front's end: watches the beats of every rank, and tells of the first that is lost.

    lost(rank, words, silent): called once at most, from the monitor's thread.  words: what the rank said itself; None
    where it closed its connection, or fell silent.
    """

    def __init__(self, beats: Mapping[int, Connection], lost: Callable[[int, bytes | None, bool], None]):
        self._ranks = {beat: rank for rank, beat in beats.items()}
        self._lost = lost
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deepseek-fp4-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """What ends from now on is nobody's loss."""
        self._closed.set()

    def join(self) -> None:
        """Wait for the thread: at once when a worker has ended, after an interval at most."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        heard: dict[Connection, float] = {}  # of the workers that have started: they speak first
        answered: set[Connection] = set()
        while not self._closed.is_set():
            tick = time.monotonic()
            for beat in answered:
                with contextlib.suppress(OSError):  # a closed one is found below, behind its last words
                    beat.send_bytes(_BEAT)
            answered = set()
            for beat, words in self._listen(tick + INTERVAL):
                if words != _BEAT:
                    return self._tell(beat, words)
                heard[beat] = time.monotonic()
                answered.add(beat)
            now = time.monotonic()
            late = now - tick - 2 * INTERVAL
            if late > 0:  # this process itself was stopped for a while
                heard = {beat: when + late for beat, when in heard.items()}
            silent = [beat for beat, when in heard.items() if now - when > SILENCE]
            if silent:
                return self._tell(min(silent, key=heard.__getitem__), None, silent=True)

    def _listen(self, until: float) -> Iterator[tuple[Connection, bytes | None]]:
        """What comes until a time; None when a connection was closed."""
        open_ = list(self._ranks)
        while (rest := until - time.monotonic()) > 0 and not self._closed.is_set():
            for beat in cast("list[Connection]", wait(open_, rest)):
                try:
                    yield beat, beat.recv_bytes()
                except (EOFError, OSError):
                    open_.remove(beat)
                    yield beat, None

    def _tell(self, beat: Connection, words: bytes | None, silent: bool = False) -> None:
        if words is not None:  # a rank that died makes others complain of it: then it is the one to name
            for other, said in self._listen(time.monotonic() + _ROOT_CAUSE):
                if said is None:
                    beat, words = other, None
                    break
        if not self._closed.is_set():
            self._lost(self._ranks[beat], words, silent)
