"""Workers as child processes on this machine."""

import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import torch

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine.worker import Progress
from deepseek_fp4_plugin.engine.worker_group import Member, WorkerGroup

_PROGRAM = "from deepseek_fp4_plugin.engine.worker_process import main; main()"
_LAST_STEP = 10.0  # seconds that a worker gets to finish the step it is in when its group is closed


class Child:
    """A worker process of ours."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def __str__(self) -> str:
        return f"process {self._process.pid}"

    def fate(self) -> str:
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def kill(self) -> None:
        self._process.kill()

    def join(self) -> None:
        try:
            self._process.wait(_LAST_STEP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_spawned(
    config: EngineConfig, model: str | Path, device: torch.device, progress: Progress | None
) -> WorkerGroup:
    """One child a rank. Raises ValueError when there are fewer GPUs than ranks."""
    ranks = config.tensor_parallel_size
    devices = rank_devices(device, ranks)
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    members: list[Member] = []
    try:
        for own in devices:
            members.append(spawn(threads, own, ranks))
    except OSError:
        for member in members:
            member.process.kill()
        raise
    return WorkerGroup(members, config, model, "127.0.0.1", progress)


def rank_devices(device: torch.device, ranks: int) -> list[str]:
    """The device of each rank on one machine: the CPU for all, or a GPU each.

    Raises ValueError when there are fewer GPUs than ranks.
    """
    if device.type == "cpu":
        return ["cpu"] * ranks
    gpus = torch.cuda.device_count()
    if ranks > gpus:
        raise ValueError(
            f"tensor_parallel_size={ranks} needs a GPU for each rank, and this machine has {gpus}; "
            "lower it, or add machines with Ray"
        )
    if device.index is not None and ranks > 1:
        raise ValueError(f"device={device} is one GPU and tensor_parallel_size={ranks} ranks need one each; say cuda")
    return [f"cuda:{index}" for index in range(ranks)]


def spawn(threads: int, device: str, ranks_here: int) -> Member:
    """Start a worker that computes with so many threads, and waits for its assignment.

    A plain new interpreter, not multiprocessing's: the caller's main module is never imported again, so that a script
    needs no `if __name__ == "__main__"`. It has a session of its own: signals to the terminal's processes are not its.
    """
    (work, its_work), (beat, its_beat) = Pipe(), Pipe()
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(its_work.fileno()), str(its_beat.fileno())],
        pass_fds=(its_work.fileno(), its_beat.fileno()),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=2,  # standard output is the front's
        start_new_session=True,
    )
    its_work.close()
    its_beat.close()
    return Member(Child(process), cast(Connection, work), cast(Connection, beat), device, ranks_here)
