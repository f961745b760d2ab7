"""Door: where workers that were started elsewhere connect to their front.

Each brings the key that its launcher told it (multiprocessing's challenge, HMAC), then says which rank it is.
"""

import contextlib
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import cast

from deepseek_fp4_plugin.engine.executor import WorkerError


@dataclass(frozen=True)
class Address:
    """What a worker must know to find its front."""

    host: str
    port: int
    key: bytes


@dataclass(frozen=True)
class Caller:
    """What a worker says of itself. `machine` and `process`: where it runs, for messages; the rest: see Member."""

    rank: int
    device: str
    ranks_here: int
    machine: str = ""
    process: int = 0


@dataclass(frozen=True)
class Arrival:
    """A worker that has come, and its two connections."""

    caller: Caller
    work: Connection
    beat: Connection


class Door:
    """host: this machine's address as the workers see it. A context manager; closing it keeps the connections."""

    def __init__(self, host: str):
        self._socket = socket.create_server((host, 0), backlog=1024)
        self.address = Address(host, self._socket.getsockname()[1], secrets.token_bytes(32))
        self._came: queue.SimpleQueue[tuple[Caller, str, Connection]] = queue.SimpleQueue()
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def __enter__(self) -> "Door":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()

    def arrivals(self, ranks: set[int], seconds: float, look: Callable[[], None] = lambda: None) -> list[Arrival]:
        """The workers of these ranks, by rank. Raises WorkerError naming those that have not come in time.

        look: called every second meanwhile; raises where waiting is of no use.
        """
        deadline = time.monotonic() + seconds
        found: dict[int, dict[str, Connection]] = {rank: {} for rank in ranks}
        callers: dict[int, Caller] = {}
        while any(len(pair) < 2 for pair in found.values()):
            try:
                caller, kind, connection = self._came.get(timeout=1)
            except queue.Empty:
                look()
                if time.monotonic() < deadline:
                    continue
                missing = sorted(rank for rank, pair in found.items() if len(pair) < 2)
                raise WorkerError(
                    f"rank {', '.join(map(str, missing))} did not connect to {self.address.host}:{self.address.port} "
                    f"within {seconds:.0f} s; is its process running, and can its machine reach this one?"
                ) from None
            if caller.rank in found:
                found[caller.rank][kind] = connection
                callers[caller.rank] = caller
        return [Arrival(callers[rank], found[rank]["work"], found[rank]["beat"]) for rank in sorted(ranks)]

    def _accept(self) -> None:
        while True:
            try:
                incoming, _ = self._socket.accept()
            except OSError:
                return  # closed
            incoming.setblocking(True)
            threading.Thread(target=self._greet, args=(incoming,), name="door", daemon=True).start()

    def _greet(self, incoming: socket.socket) -> None:
        """On a thread of its own: a stranger that says nothing keeps nobody waiting."""
        connection = Connection(incoming.detach())
        try:
            _send_at_once(connection)
            deliver_challenge(connection, self.address.key)
            answer_challenge(connection, self.address.key)
            self._came.put((*connection.recv(), connection))
        except Exception:  # whoever it was, it had not the key
            connection.close()


def knock(address: Address, caller: Caller) -> tuple[Connection, Connection]:
    """A worker's connections to its front: for work, and for the heartbeat."""
    pair = []
    for kind in ("work", "beat"):
        connection = cast(Connection, Client((address.host, address.port), "AF_INET", authkey=address.key))
        _send_at_once(connection)
        connection.send((replace(caller, machine=own_address(connection), process=os.getpid()), kind))
        pair.append(connection)
    return pair[0], pair[1]


def own_address(connection: Connection) -> str:
    """This end's IP address; of a pipe within the machine, the loopback's."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        return end.getsockname()[0] if end.family == socket.AF_INET else "127.0.0.1"


def _send_at_once(connection: Connection) -> None:
    """A plan larger than a packet is two writes, and the second must not wait for the first one's acknowledgement."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def hang_up(connection: Connection) -> None:
    """End a connection in both directions without closing its descriptor, which another thread may be waiting on."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
