"""Which executor a configuration asks for, and how its workers come to be."""

import os
from pathlib import Path

import torch

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine.executor import Executor, InProcessExecutor
from deepseek_fp4_plugin.engine.launch_spawned import spawn
from deepseek_fp4_plugin.engine.worker import Worker
from deepseek_fp4_plugin.engine.worker_group import Member, Progress, WorkerGroup
from deepseek_fp4_plugin.engine.worker_process import Assignment
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.models.examination import examine


def start_executor(config: EngineConfig, model: Path, device: torch.device, progress: Progress | None) -> Executor:
    """Load `model`'s folder: in this process for one rank, else one process a rank.

    Raises CheckpointError for a checkpoint that cannot be used, ValueError for what cannot run here.
    """
    if config.tensor_parallel_size == 1:
        loaded = DeepseekV3ForCausalLM.from_pretrained(
            model,
            dtype=config.dtype,
            device=device,
            nvfp4_activations=config.nvfp4_activations,
            progress=progress,
        )
        return InProcessExecutor.of(Worker(config, loaded))
    examine(model).usable()  # says what is odd once, and refuses before any process starts
    return _spawned(config, model, device, progress)


def _spawned(config: EngineConfig, model: Path, device: torch.device, progress: Progress | None) -> WorkerGroup:
    ranks = config.tensor_parallel_size
    devices = rank_devices(device, ranks)
    cores = len(os.sched_getaffinity(0))
    # The ranks meet at a store in this process; port 0 is a free one.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assignments = [
        Assignment(
            rank,
            ranks,
            ranks,
            model,
            config,
            devices[rank],
            ("127.0.0.1", store.port),
            answers=rank == 0 or config.enable_attention_dp,
        )
        for rank in range(ranks)
    ]
    members: list[Member] = []
    try:
        for _ in range(ranks):
            members.append(spawn(max(1, cores // ranks)))
    except OSError:
        for member in members:
            member.process.kill()
        raise
    return WorkerGroup(members, assignments, progress, release=lambda: _drop(store))


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
    if device.index is not None:
        raise ValueError(f"device={device} is one GPU and tensor_parallel_size={ranks} ranks need one each; say cuda")
    return [f"cuda:{index}" for index in range(ranks)]


def _drop(store: object) -> None:
    """The store lives as long as its group holds this."""
