"""How much is in memory at once: portions under a cap, and the cap itself.

What a step holds follows from the model's shapes. The portions are chosen so that the sum stays below the cap, and a
cap below the smallest portions is refused before anything is read. Besides, the kernel is asked to hold the process to
it (RLIMIT_DATA: all private writable memory, resident or not), so that a wrong estimate is an error, not a larger bill.
"""

import resource
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from deepseek_fp4_plugin.checkpoint.sizes import size_text
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.quantization.recipe import Needs

_BATCHES = (8192, 4096, 2048, 1024, 512, 256)
# Libraries, the plan, journals, what the allocator keeps: a constant, so that a resumed run comes to the same portions.
_OWN = 800 * 10**6


class Portions(NamedTuple):
    """batch_tokens: through attention at once.  span_tokens: in memory while a layer's experts pass.

    experts: routed experts in memory at once.  convert: bytes of weights between reading and writing.
    """

    batch_tokens: int
    span_tokens: int
    experts: int
    convert: int = 2**29


def portions(
    config: DeepseekV3Config, max_memory: int, longest: int, source_bytes: float, solving: float = 0
) -> Portions:
    """The portions that stay below `max_memory` bytes of this process's resident memory.

    longest: tokens of the longest sample, 0 where none pass.  source_bytes: of a weight in the source, 1 in FP8.
    solving: what a recipe holds besides, see `solving_bytes`.
    Raises ValueError saying how much the model needs at least.
    """
    free = max_memory - _OWN - solving
    widest = max(config.intermediate_size, config.moe_intermediate_size) * config.hidden_size
    convert = 2 * widest * (source_bytes + 1)  # gate and up of the widest MLP, before and after
    fixed, each = _attention(config, source_bytes)
    batches = [size for size in _BATCHES if size >= longest and fixed + size * each <= free * 0.6]
    expert = 3 * config.moe_intermediate_size * config.hidden_size * source_bytes
    decoded = 8 * config.moe_intermediate_size * config.hidden_size  # of one projection, FP32, and its product
    group = int((free * 0.4 - decoded) // expert) if expert else 1
    token = 12 * config.hidden_size
    if convert > free * 0.8 or (longest and (not batches or group < 1)):
        least = convert / 0.8
        if longest:
            least = max(least, (fixed + max(longest, _BATCHES[-1]) * each) / 0.6, (decoded + expert) / 0.4)
        raise ValueError(
            f"--max-memory {size_text(max_memory)} is too little for this model: "
            f"it takes {size_text(least + _OWN + solving)} at least"
        )
    batch = batches[0] if longest else _BATCHES[-1]
    span = max(batch, int(free * 0.4 // token))
    return Portions(batch, span, max(1, min(group, config.n_routed_experts or 1)), int(min(free * 0.8, 2**29)))


def solving_bytes(config: DeepseekV3Config, needs: Needs, tokens: int) -> float:
    """What a layer's solver holds: every sample's rows, and the matrices of the widest projection that it solves."""
    if needs is Needs.NOTHING:
        return 0
    dense = config.intermediate_size if config.first_k_dense_replace else 0
    widest = max(config.hidden_size, dense, config.moe_intermediate_size)
    chosen = config.num_experts_per_tok or 0
    rows = tokens * (12 * config.hidden_size + max(2 * chosen * config.moe_intermediate_size, 6 * dense))
    weights = 6 * 4 * 2 * config.hidden_size * max(dense, config.moe_intermediate_size)
    return rows + weights + (5 * 4 * widest**2 if needs is Needs.HESSIAN else 0)


def _attention(config: DeepseekV3Config, source_bytes: float) -> tuple[float, float]:
    """Bytes that attention, or a dense MLP, takes in the reference backend: once, and for each token of a batch."""
    heads, nope, rope, v = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    output = heads * v * config.hidden_size
    dense = config.intermediate_size * config.hidden_size
    fixed = max(output * (source_bytes * 2 + 4), dense * (3 * source_bytes + 4))
    attention = heads * ((nope + rope) * 14 + (nope + v) * 12 + v * 8) + config.hidden_size * 20
    return fixed, max(attention, config.intermediate_size * 20 + config.hidden_size * 20)


def peak() -> int:
    """The most bytes that were resident at once since the process began, by the kernel's account (VmHWM)."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"this system's /proc/self/status does not say {field}")


@contextmanager
def capped(max_memory: int | None):
    """Have the kernel refuse memory beyond `max_memory` while the block runs."""
    if max_memory is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (max_memory if hard < 0 else min(max_memory, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
