"""Ranks for tests: threads of this process, or processes that stay and run one function after the other."""

import os
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from deepseek_fp4_plugin.parallel.collectives import ALONE, Group, ProcessGroup, connect
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.parallel.placement import ExpertPlacement

# Of the tiny model's three layers with experts, the MTP module's included: two hot experts, four redundant slots.
PLACED = ExpertPlacement.balanced({layer: [90, 60, *[5] * 14] for layer in (1, 2, 3)}, 4, 20)
MAPPINGS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_parallel_size": 2},
    "TP4": {"tensor_parallel_size": 4},
    "TP2/EP2": {"tensor_parallel_size": 2, "moe_expert_parallel_size": 2},
    "TP4/EP4": {"tensor_parallel_size": 4, "moe_expert_parallel_size": 4},
    "TP4/EP2": {"tensor_parallel_size": 4, "moe_expert_parallel_size": 2},
    "DP2": {"tensor_parallel_size": 2, "enable_attention_dp": True},
    "DP2/EP2": {"tensor_parallel_size": 2, "moe_expert_parallel_size": 2, "enable_attention_dp": True},
    "DP4": {"tensor_parallel_size": 4, "enable_attention_dp": True},
    "DP4/EP2": {"tensor_parallel_size": 4, "moe_expert_parallel_size": 2, "enable_attention_dp": True},
    "DP4/EP4": {"tensor_parallel_size": 4, "moe_expert_parallel_size": 4, "enable_attention_dp": True},
    "TP4/EP4 placed": {"tensor_parallel_size": 4, "moe_expert_parallel_size": 4, "placement": PLACED},
}


class ThreadGroup(ProcessGroup):
    """The same collectives, exchanged through this process's memory."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list):
        self.rank, self.size, self.barrier, self.slots = rank, size, barrier, slots

    def _exchange(self, output, given, output_sizes, given_sizes):
        if not (output.numel() or given.numel()):
            return
        self.slots[self.rank] = given.split(given_sizes)
        self.barrier.wait()
        for rank, part in enumerate(output.split(output_sizes)):
            part.copy_(self.slots[rank][self.rank])
        self.barrier.wait()


def in_threads(size: int, function: Callable[[Group], Any]) -> list[Any]:
    """function(group) on every rank at once; the results, or the first rank's error."""
    if size == 1:
        return [function(ALONE)]
    num_threads = torch.get_num_threads()
    barrier, slots = threading.Barrier(size, timeout=60), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            results[rank] = function(ThreadGroup(rank, size, barrier, slots))
        except BaseException as error:
            errors[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(num_threads)
    raised = [error for error in errors if error is not None]
    for error in raised:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not raised, "the ranks did not make the same collective calls"
    return results


def on_mesh(mapping: str, function: Callable[[Mesh], Any]) -> list[Any]:
    """function(mesh) on every rank of MAPPINGS[mapping], in threads."""
    sizes = MAPPINGS[mapping]
    return in_threads(sizes["tensor_parallel_size"], lambda group: function(Mesh(group.rank, **sizes, group=group)))


class Processes:
    """Ranks in processes of their own, joined by gloo, one thread each: they stay, and run one function after the
    other. Pieces of the first so many of them are groups as well."""

    def __init__(self, size: int, folder: Path):
        spawn = torch.multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, size, f"file://{folder}/meeting", theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, mapping: str, function: Callable[..., Any], *given: Any) -> list[Any]:
        """function(mesh, *given) on every rank of MAPPINGS[mapping]; the results, or the first rank's error."""
        for pipe in self.pipes:
            pipe.send((MAPPINGS[mapping], function, given))
        answers = [pipe.recv() for pipe in self.pipes]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers[: MAPPINGS[mapping]["tensor_parallel_size"]]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()


def _serve(rank: int, size: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    world = connect(rank, size, meeting)
    groups = {size: world}
    for part in range(2, size):
        members = dist.new_group(list(range(part)))
        if rank < part:
            groups[part] = ProcessGroup(members)
    while True:
        try:
            sizes, function, given = pipe.recv()
        except EOFError:
            os._exit(0)  # the test has ended; the other ranks may be gone already
        try:
            ranks = sizes["tensor_parallel_size"]
            answer = function(Mesh(rank, **sizes, group=groups[ranks]), *given) if rank < ranks else None
        except Exception as error:
            answer = RuntimeError(f"rank {rank}: {''.join(traceback.format_exception(error))}")
        pipe.send(answer)
