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
from deepseek_fp4_plugin.quantization.recipe import MAX_HELD_OUT, WEIGHTS_AT_ONCE, Needs

BATCH_TOKENS = 8192  # a layer's weights are decoded once a batch; attention's queries of R1 take 0.4 GB for so many
_BATCHES = (BATCH_TOKENS, 4096, 2048, 1024, 512, 256)
# Libraries, the plan, journals, what the allocator keeps: a constant, so that a resumed run comes to the same portions.
_OWN = 800 * 10**6
EXPERT_ROWS = 2048  # rows that an expert computes at once


class Portions(NamedTuple):
    """batch_tokens: through attention at once.  span_tokens: in memory while a layer's experts pass.

    experts: routed experts read at once.  convert: bytes of weights between reading and writing.
    keep: a layer's experts stay in memory, for all spans.  spill: rows that a solver comes back to lie in files.
    """

    batch_tokens: int
    span_tokens: int
    experts: int
    convert: int = 2**29
    keep: bool = False
    spill: bool = False

    @property
    def block_tokens(self) -> int:
        """Tokens whose rows an expert computes together. A span is of whole blocks, whatever its size."""
        return BATCH_TOKENS if self.span_tokens >= BATCH_TOKENS else self.batch_tokens


class Solving(NamedTuple):
    """What a solver holds: while it solves, of each token, and while attention passes."""

    matrices: float = 0
    token: float = 0
    attention: float = 0


def portions(
    config: DeepseekV3Config,
    max_memory: int,
    longest: int,
    source_bytes: float,
    solving: Solving = Solving(),  # noqa: B008
    tokens: int = 0,
) -> Portions:
    """The portions that stay below `max_memory` bytes of this process's resident memory.

    longest: tokens of the longest sample, 0 where none pass.  source_bytes: of a weight in the source, 1 in FP8.
    tokens: of all samples.  Raises ValueError saying how much the model needs at least.
    """
    room = max_memory - _OWN - solving.attention
    widest = max(config.intermediate_size, config.moe_intermediate_size) * config.hidden_size
    fixed, each = _attention(config, source_bytes)
    sizes = [size for size in _BATCHES if size >= longest] or [longest]
    expert = 3 * config.moe_intermediate_size * config.hidden_size * source_bytes
    decoded = 16 * config.moe_intermediate_size * config.hidden_size  # one expert in FP32, and a projection in FP8
    decoded += EXPERT_ROWS * 16 * (config.moe_intermediate_size + config.hidden_size) if expert else 0
    least = 2 * widest * (source_bytes + 1) / 0.8  # gate and up of the widest MLP, before and after
    if longest:
        least = max(least, (fixed + sizes[-1] * each) / 0.6, (decoded + expert) / 0.4)
    least = max(least, solving.matrices - solving.attention)
    if room < least:
        needed = size_text(least + solving.attention + _OWN)
        raise ValueError(
            f"--max-memory {size_text(max_memory)} is too little for this model: it takes {needed} at least"
        )
    rows = solving.token * tokens
    spill = least + rows > room
    free = room if spill else room - rows
    batch = next(size for size in sizes if fixed + size * each <= free * 0.6) if longest else sizes[-1]
    span = max(batch, int(free * 0.4 // (12 * config.hidden_size)))
    count = config.n_routed_experts or 1
    group = int((free * 0.4 - decoded) // expert) if expert else 1
    return Portions(batch, span, max(1, min(group, count)), int(min(free * 0.8, 2**29)), group >= count, spill)


def portions_on_gpu(
    config: DeepseekV3Config,
    max_memory: int | None,
    gpu_memory: int,
    longest: int,
    source_bytes: float,
    solving: Solving = Solving(),  # noqa: B008
    tokens: int = 0,
) -> Portions:
    """The portions for a GPU of `gpu_memory` bytes, of which a tenth is left alone; the host holds what is on its way.

    The host's cap bounds the experts that are read at once; on the GPU they stay, for all spans, if they take half.
    """
    there = portions(config, int(gpu_memory * 0.9), longest, source_bytes, solving, tokens)
    expert = 3 * config.moe_intermediate_size * config.hidden_size * source_bytes
    count = config.n_routed_experts or 1
    host = (max_memory or 8 * 10**9) - _OWN
    group = max(1, min(count, int(host * 0.2 // expert) if expert else 1))
    keep = expert * count <= gpu_memory * 0.4
    group = group if keep else min(group, there.experts)
    return there._replace(experts=group, keep=keep, convert=int(min(host * 0.4, 2**29)))


def solving_bytes(config: DeepseekV3Config, needs: Needs, attention: bool = False) -> Solving:
    """What a layer's solver holds: the widest second moments, a weight, its results; and of each token its rows."""
    if needs is Needs.NOTHING:
        return Solving()
    hidden = config.hidden_size
    dense = config.intermediate_size if config.first_k_dense_replace else 0
    shared = config.moe_intermediate_size * (config.n_shared_experts or 0)
    inner = max(dense, shared, config.moe_intermediate_size)
    attended = config.num_attention_heads * config.v_head_dim if attention else 0

    def moments(width: int) -> float:
        return 4 * width * width if needs is Needs.HESSIAN else 64 * width

    held_out = 4 * MAX_HELD_OUT
    gate_up = 15 * inner * hidden + 3 * moments(hidden) + held_out * hidden  # FP32 weights, both results, the source's
    down = 8 * inner * hidden + moments(inner) + held_out * inner
    output = 8 * attended * hidden + moments(attended) + held_out * attended
    matrices = max(gate_up, down, output) + 12 * 4 * WEIGHTS_AT_ONCE
    return Solving(matrices, 10 * hidden + max(2 * dense, 4 * shared), moments(attended))


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
