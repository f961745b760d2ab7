"""Workers that torchrun has started: the caller's program runs once a rank, on as many machines as it likes.

Rank 0 is the front and goes on with the program; what it computes, a child of it does, so that a step that hangs never
holds the front. The others are workers from where they ask for the model to where the front closes it, and then exit.
"""

import json
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine.door import Address, Caller, Door, knock
from deepseek_fp4_plugin.engine.heartbeat import ORPHANED
from deepseek_fp4_plugin.engine.launch_spawned import spawn
from deepseek_fp4_plugin.engine.worker import Progress
from deepseek_fp4_plugin.engine.worker_group import Member, WorkerGroup
from deepseek_fp4_plugin.engine.worker_process import serve_rank

_ARRIVING = 300.0  # seconds for all processes to ask for the model
_KEY = "deepseek_fp4_plugin/front"


@dataclass(frozen=True)
class Place:
    """What torchrun says of a process."""

    rank: int
    ranks: int
    local_rank: int
    ranks_here: int
    host: str
    port: int
    has_store: bool  # torchrun keeps the store, not rank 0

    @classmethod
    def from_environment(cls) -> "Place":
        """Raises ValueError where torchrun did not start this process."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        missing = [name for name in (*names, "MASTER_ADDR") if name not in os.environ]
        if missing:
            raise ValueError(
                f"orchestrator_type=torchrun, but {missing[0]} is not set; start the program with torchrun"
            )
        rank, ranks, local_rank, ranks_here, port = (int(os.environ[name]) for name in names)
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, ranks, local_rank, ranks_here, os.environ["MASTER_ADDR"], port, agent)


class Companion:
    """A worker that torchrun started, and torchrun ends: its connections are all that its front can close."""

    def __init__(self, caller: Caller):
        self._place = f"process {caller.process} on {caller.machine}"

    def __str__(self) -> str:
        return self._place

    def fate(self) -> str:
        return "has ended"

    def kill(self) -> None:
        pass

    def join(self) -> None:
        pass


def start_under_torchrun(
    config: EngineConfig, model: str | Path, device: torch.device, progress: Progress | None
) -> WorkerGroup:
    """The group, on rank 0; the others serve it and leave by SystemExit when it is closed.

    Raises ValueError when torchrun started another number of ranks, or for a second model in one program.
    """
    place = Place.from_environment()
    if place.ranks != config.tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size}, but torchrun started {place.ranks} processes; "
            "the two must agree"
        )
    own = Caller(place.rank, "cpu" if device.type == "cpu" else f"cuda:{place.local_rank}", place.ranks_here)
    first = place.rank == 0
    store = TCPStore(
        place.host,
        place.port,
        is_master=first and not place.has_store,
        wait_for_workers=False,
        timeout=timedelta(seconds=_ARRIVING),
    )
    if not first:
        host, port, key = json.loads(store.get(_KEY))
        serve_rank(*knock(Address(host, port, bytes.fromhex(key)), own), ORPHANED)
        sys.exit(0)
    if store.check([_KEY]):
        raise ValueError("under torchrun a program has one model: its other processes served the first and have left")
    with Door(place.host) as door:
        address = door.address
        store.set(_KEY, json.dumps([address.host, address.port, address.key.hex()]))
        arrivals = door.arrivals(set(range(1, place.ranks)), _ARRIVING)
    here = spawn(max(1, len(os.sched_getaffinity(0)) // place.ranks_here), own.device, own.ranks_here)
    members = [here, *(Member.of(arrival, Companion(arrival.caller)) for arrival in arrivals)]
    return WorkerGroup(members, config, model, place.host, progress)
