"""The paged latent cache: one tensor for every layer, [layers, blocks, block_size, latent + rope]."""

import psutil
import torch
from torch import Tensor

from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM

# Without an explicit size a CPU cache takes at most this share of the machine's memory, and at most this many bytes:
# it shares the machine with everything else. Its pages cost nothing until they are written.
_CPU_SHARE, _CPU_LIMIT = 1 / 8, 4 << 30


def resolve_dtype(choice: str, model: DeepseekV3ForCausalLM) -> torch.dtype:
    """auto: FP8 where the checkpoint says so and the model computes in BF16, else the model's own dtype."""
    own = model.model.embed_tokens.weight.dtype
    if choice == "auto":
        choice = "fp8" if model.quantization.kv_cache_quant_algo == "FP8" and own is torch.bfloat16 else "own"
    return {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "own": own}[choice]


def bytes_per_token(config: DeepseekV3Config, layers: int, dtype: torch.dtype) -> int:
    """One token's latents over all layers."""
    return layers * config.latent_dim * dtype.itemsize


def num_blocks(
    token_bytes: int,
    block_size: int,
    wanted_tokens: int,
    device: torch.device,
    free_memory_fraction: float = 0.9,
    max_tokens: int | None = None,
    ranks_here: int = 1,
    free_memory: int | None = None,
) -> int:
    """How many blocks to allocate.

    wanted_tokens: what the requests allowed at once could ever fill.  max_tokens: the caller's own limit.
    free_memory_fraction: share of the GPU memory left after loading; means nothing on a CPU.  free_memory: bytes of
    it, where steps were measured without what they need; None: what is free now.
    ranks_here: on a CPU, ranks that share the machine's memory.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] if free_memory is None else free_memory
        budget = int(free * free_memory_fraction)
    else:
        budget = int(min(_CPU_LIMIT, psutil.virtual_memory().total * _CPU_SHARE)) // ranks_here
    tokens = min(wanted_tokens, budget // token_bytes)
    if max_tokens is not None:
        tokens = min(max_tokens, tokens) if device.type == "cuda" else min(max_tokens, wanted_tokens)
    return max(1, tokens // block_size)


def allocate(
    config: DeepseekV3Config, layers: int, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The cache. Uninitialised: no kernel reads a slot that was not written."""
    return torch.empty(layers, blocks, block_size, config.latent_dim, dtype=dtype, device=device)
