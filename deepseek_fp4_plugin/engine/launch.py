"""Which executor a configuration asks for."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine.executor import Executor, InProcessExecutor
from deepseek_fp4_plugin.engine.launch_ray import start_on_ray
from deepseek_fp4_plugin.engine.launch_spawned import start_spawned
from deepseek_fp4_plugin.engine.launch_torchrun import start_under_torchrun
from deepseek_fp4_plugin.engine.worker import Progress, Worker
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.models.examination import examine
from deepseek_fp4_plugin.models.loading import read_shapes

_LAUNCHERS: dict[str, Callable[[EngineConfig, str | Path, torch.device, Progress | None], Executor]] = {
    "spawn": start_spawned,
    "ray": start_on_ray,
    "torchrun": start_under_torchrun,
}


def start_executor(
    config: EngineConfig, model: str, folder: Path, device: torch.device, progress: Progress | None
) -> Executor:
    """Load a model: in this process for one rank, else one process a rank, as `orchestrator_type` says.

    model: its name; ranks on other machines look it up themselves.  folder: what it is on this machine.
    Raises CheckpointError for a checkpoint that cannot be used, ValueError for what cannot run here, WorkerError for
    workers that could not be started.
    """
    how = config.orchestrator_type
    if how is None and config.tensor_parallel_size > 1:
        how = "torchrun" if torch.distributed.is_torchelastic_launched() else "spawn"
    if how is not None:
        if config.load_format == "dummy":
            read_shapes(folder)
        else:
            examine(folder).usable()  # says what is odd once, and refuses before any process starts
        return _LAUNCHERS[how](config, folder if how == "spawn" else model, device, progress)
    loaded = DeepseekV3ForCausalLM.from_pretrained(
        folder,
        dtype=config.dtype,
        device=device,
        nvfp4_activations=config.nvfp4_activations,
        progress=functools.partial(progress, "loading") if progress is not None else None,
        load_format=config.load_format,
    )
    return InProcessExecutor.of(Worker(config, loaded, progress=progress))
