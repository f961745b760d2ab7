"""Worker: one rank. Its slice of the model, its cache and its runner, and what the others must know of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine import kv_cache
from deepseek_fp4_plugin.engine.model_runner import ModelRunner
from deepseek_fp4_plugin.engine.recorded_steps import Sizes
from deepseek_fp4_plugin.kernels.weights import PreparedRouter, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM


@dataclass(frozen=True)
class WorkerFacts:
    """What schedulers and users need to know of a rank; plain and picklable."""

    model_config: DeepseekV3Config
    path: Path | None  # the checkpoint's folder
    num_drafts: int
    max_seq_len: int
    cache_blocks: int
    block_size: int
    asynchronous: bool  # steps are computed beside the host
    weight_bytes: int
    cache_bytes: int


class Worker:
    """The model must be loaded. Raises ValueError for drafts that it cannot make.

    `facts.cache_blocks` is what this rank has room for; `allocate` takes what all ranks have, and makes the runner.
    ranks_here: ranks that share this machine's memory.
    """

    cache: Tensor
    runner: ModelRunner

    def __init__(self, config: EngineConfig, model: DeepseekV3ForCausalLM, ranks_here: int = 1):
        shape, cache_config = model.config, config.kv_cache_config
        num_drafts = _num_drafts(config, model)
        layers = shape.num_hidden_layers + (1 if num_drafts else 0)
        dtype = kv_cache.resolve_dtype(cache_config.dtype, model)
        device = model.model.norm.weight.device
        block_size = cache_config.tokens_per_block
        max_seq_len = min(config.max_seq_len or shape.max_position_embeddings, shape.max_position_embeddings)
        blocks = kv_cache.num_blocks(
            kv_cache.bytes_per_token(shape, layers, dtype),
            block_size,
            config.max_batch_size * (max_seq_len + num_drafts + block_size),
            device,
            cache_config.free_gpu_memory_fraction,
            cache_config.max_tokens,
            ranks_here,
        )
        self.model, self._config = model, config
        self._shape = shape, layers, block_size, dtype, device
        self.facts = WorkerFacts(
            shape,
            model.path,
            num_drafts,
            max_seq_len,
            blocks,
            block_size,
            device.type != "cpu",
            sum(_storages(model).values()),
            blocks * block_size * kv_cache.bytes_per_token(shape, layers, dtype),
        )

    def allocate(self, blocks: int) -> None:
        """Make the cache, and the runner that computes in it."""
        shape, layers, block_size, dtype, device = self._shape
        drafts, batch = self.facts.num_drafts, self._config.max_batch_size
        self.cache = kv_cache.allocate(shape, layers, blocks + 1, block_size, dtype, device)  # one for the dummy
        self.runner = ModelRunner(
            self.model,
            self.cache,
            drafts,
            batch,
            -(-(self.facts.max_seq_len + 3 * drafts) // block_size),  # drafts of two steps, and the recurrence
            Sizes.of(self._config.cuda_graph_config, device, drafts, batch, self.model.mesh.dp.count),
        )
        if self._config.moe_config.count_load:
            self.runner.expert_load = self.model.count_expert_load()


def _num_drafts(config: EngineConfig, model: DeepseekV3ForCausalLM) -> int:
    if config.speculative_config is None:
        return 0
    if model.mtp is None:
        raise ValueError("speculative_config asks for MTP, but this checkpoint has no MTP layer; leave it out")
    return config.speculative_config.num_nextn_predict_layers


def _storages(holder: Any, found: dict[int, int] | None = None) -> dict[int, int]:
    """Bytes of each tensor storage that a module or a prepared weight holds, by address."""
    found = {} if found is None else found
    if isinstance(holder, torch.Tensor):
        storage = holder.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(holder, torch.nn.Module | PreparedWeight | PreparedRouter | WeightTensors):
        _storages(vars(holder), found)
    elif isinstance(holder, dict):
        _storages(list(holder.values()), found)
    elif isinstance(holder, list | tuple):
        for part in holder:
            _storages(part, found)
    return found
