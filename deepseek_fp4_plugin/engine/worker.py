"""Worker: one rank. Its slice of the model, its cache and its runner, and what the others must know of them."""

import functools
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine import kv_cache
from deepseek_fp4_plugin.engine.model_runner import ModelRunner
from deepseek_fp4_plugin.engine.recorded_steps import Sizes
from deepseek_fp4_plugin.engine.warm_up import kinds_of, prompts_of, sizes_of, warm_up
from deepseek_fp4_plugin.kernels import ops, select
from deepseek_fp4_plugin.kernels.weights import Case, PreparedRouter, PreparedWeight, WeightTensors
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM

# Called with what is being done, and parts done and in all: "loading", "measuring steps", "warming up".
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up was.  recordings: decode steps kept.  bytes: of a GPU's memory that steps need."""

    seconds: float
    recordings: int
    bytes: int


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
    kernels: tuple[str, ...] = ()  # which serve which weights, and why
    warm_up: WarmUp | None = None


class Worker:
    """The model must be loaded. Raises ValueError for drafts that it cannot make, and where a GPU's memory does not
    suffice.

    `facts.cache_blocks` is what this rank has room for; `allocate` takes what all ranks have, and makes the runner.
    ranks_here: ranks that share this machine's memory. Where there is a warm-up all ranks must do both together.
    """

    cache: Tensor
    runner: ModelRunner

    def __init__(
        self,
        config: EngineConfig,
        model: DeepseekV3ForCausalLM,
        ranks_here: int = 1,
        progress: Progress | None = None,
    ):
        shape, cache_config = model.config, config.kv_cache_config
        num_drafts = _num_drafts(config, model)
        layers = shape.num_hidden_layers + (1 if num_drafts else 0)
        dtype = kv_cache.resolve_dtype(cache_config.dtype, model)
        device = model.model.norm.weight.device
        block_size = cache_config.tokens_per_block
        max_seq_len = min(config.max_seq_len or shape.max_position_embeddings, shape.max_position_embeddings)
        token_bytes = kv_cache.bytes_per_token(shape, layers, dtype)
        self.model, self._config, self._progress = model, config, progress
        self._shape = shape, layers, block_size, dtype, device
        self._seconds, self._step_bytes = 0.0, 0  # of the warm-up
        self._warms = device.type == "cuda" if config.warm_up is None else config.warm_up
        held = list(_held(model))
        self.facts = WorkerFacts(
            shape,
            model.path,
            num_drafts,
            max_seq_len,
            0,
            block_size,
            device.type != "cpu",
            _weight_bytes(held),
            0,
            _kernels(held, device),
        )
        blocks = functools.partial(
            kv_cache.num_blocks,
            token_bytes,
            block_size,
            config.max_batch_size * (max_seq_len + num_drafts + block_size),
            device,
            cache_config.free_gpu_memory_fraction,
            cache_config.max_tokens,
            ranks_here,
        )
        count = blocks(self._measure() if self._warms and device.type == "cuda" else None)
        self.facts = replace(self.facts, cache_blocks=count, cache_bytes=count * block_size * token_bytes)

    def allocate(self, blocks: int) -> WarmUp | None:
        """Make the cache, and the runner that computes in it; what warming it up took, where that is done."""
        self.cache, self.runner = self._new(blocks)
        if self._config.moe_config.count_load:
            self.runner.expert_load = self.model.count_expert_load()
        if not self._warms:
            return None
        self._warm_up("warming up", self.runner)
        return WarmUp(self._seconds, len(self.runner.recorded.recordings), self._step_bytes)

    def _new(self, blocks: int) -> tuple[Tensor, ModelRunner]:
        shape, layers, block_size, dtype, device = self._shape
        drafts, batch = self.facts.num_drafts, self._config.max_batch_size
        cache = kv_cache.allocate(shape, layers, blocks + 1, block_size, dtype, device)  # one for the dummy
        runner = ModelRunner(
            self.model,
            cache,
            drafts,
            batch,
            -(-(self.facts.max_seq_len + 3 * drafts) // block_size),  # drafts of two steps, and the recurrence
            Sizes.of(self._config.cuda_graph_config, device, drafts, batch, self.model.mesh.dp.count),
        )
        return cache, runner

    def _measure(self) -> int:
        """Bytes of the GPU that are left for the cache beside what the largest steps need.

        They are run in a cache of one prompt, with which all that they took is given up again.
        """
        device, config = self._shape[-1], self._config
        torch.cuda.empty_cache()  # what loading has given back
        before = torch.cuda.mem_get_info(device)[0]
        longest = min(config.max_num_tokens, self.facts.max_seq_len) + 1 + 2 * self.facts.num_drafts
        tokens = min(longest, config.kv_cache_config.max_tokens or longest)  # the same on every rank
        cache, runner = self._new(max(1, tokens // self.facts.block_size))
        self._warm_up("measuring steps", runner, largest_only=True)
        torch.cuda.synchronize(device)
        free = torch.cuda.mem_get_info(device)[0] + cache.nbytes
        self._step_bytes = max(0, before - free)
        del cache, runner
        gc.collect()
        torch.cuda.empty_cache()
        return free

    def _warm_up(self, what: str, runner: ModelRunner, largest_only: bool = False) -> None:
        progress = functools.partial(self._progress, what) if self._progress is not None else None
        most = self._config.max_num_tokens
        sizes, prompts = sizes_of(runner, most), prompts_of(runner, most)
        if largest_only:
            sizes, prompts = sizes[:1], prompts[:1]
        began = time.perf_counter()
        # Before steps are measured: kernels that are loaded take memory, too. The second time they are there.
        ops.build_ahead([part for part in _held(self.model) if isinstance(part, PreparedWeight)], most)
        warm_up(runner, sizes, kinds_of(self._config.speculative_config), prompts, progress)
        self._seconds += time.perf_counter() - began


def _num_drafts(config: EngineConfig, model: DeepseekV3ForCausalLM) -> int:
    if config.speculative_config is None:
        return 0
    if model.mtp is None:
        raise ValueError("speculative_config asks for MTP, but this checkpoint has no MTP layer; leave it out")
    return config.speculative_config.num_nextn_predict_layers


def _weight_bytes(held: Sequence[Tensor | PreparedWeight]) -> int:
    """Of every storage once."""
    storages = [part.untyped_storage() for part in held if isinstance(part, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _kernels(held: Sequence[Tensor | PreparedWeight], device: torch.device) -> tuple[str, ...]:
    """Which kernels serve which weights, and why: a line each."""
    weights = {id(part): part for part in held if isinstance(part, PreparedWeight)}.values()
    kinds = Counter(
        (Case(device, weight.dtype, weight.format, weight.activations, weight.scale_columns), weight.backend)
        for weight in weights
    )
    lines = []
    for (case, backend), count in kinds.items():
        assert case.format is not None
        rounded = "" if case.activations == "bf16" else f" by {case.activations} activations"
        lines.append(f"{count} {case.format.name} weights{rounded}: {select.explain(case, backend)}")
    dtypes = {weight.dtype for weight in weights}
    return (*lines, *(f"attention, norms, routing: {select.explain(Case(device, dtype))}" for dtype in dtypes))


def _held(holder: Any) -> Iterator[Tensor | PreparedWeight]:
    """The prepared weights that a module holds, and all tensors, some of them several times."""
    if isinstance(holder, Tensor | PreparedWeight):
        yield holder
    if isinstance(holder, torch.nn.Module | PreparedWeight | PreparedRouter | WeightTensors):
        holder = list(vars(holder).values())
    elif isinstance(holder, dict):
        holder = list(holder.values())
    if isinstance(holder, list | tuple):
        for part in holder:
            yield from _held(part)
