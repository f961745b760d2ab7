"""What one rank keeps in memory: its slices of the weights in the layout of the kernels that multiply by them, byte for
byte what `engine/worker.py` allocates, and the cache.

    cpu     the checkpoint's bytes; FP8 whose scale blocks a slice cuts into fewer than 64 columns as BF16
    cuda    NVFP4 in tiles of 16 outputs by 128 inputs with a factor for each output; everything else as BF16, and large
            FP8 matrices that are no experts' besides as they are
"""

from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.inventory import Role, Weight, weights
from deepseek_fp4_plugin.models.ledger import CUT_MODULES, FormatOf
from deepseek_fp4_plugin.parallel.mesh import WHOLE, Mesh, Shard

Kernels = Literal["cpu", "cuda"]
OTHER = "tables"
_INNER = ("down_proj", "o_proj")  # cut along their inputs
_FP8_BLOCK, _FP8_COLUMNS, _GROUP, _SLAB, _SLAB_BYTES = 128, 64, 16, 128, 1152
_FP8_LARGE = 8 << 20  # weights of one product from which kernels/cuda/dense.py keeps FP8 too


class Slice(NamedTuple):
    """A rank's part of a matrix: [start, stop) of `size` along `axis`."""

    axis: int
    start: int
    stop: int
    size: int

    @property
    def fine(self) -> int:
        """The largest part of an FP8 block that divides its bounds."""
        if self.stop - self.start == self.size:
            return _FP8_BLOCK
        return next(s for s in (128, 64, 32, 16, 8, 4, 2, 1) if self.start % s == 0 == (self.stop - self.start) % s)


def resident_bytes(
    config: DeepseekV3Config, format_of: FormatOf, mesh: Mesh | None = None, kernels: Kernels = "cpu"
) -> dict[str, int]:
    """Bytes of the weights that a rank holds, by role; the MTP layer's included where the config has one."""
    held: dict[str, int] = {}
    mesh = mesh or Mesh()
    for role, size in _held(config, format_of, mesh, kernels):
        held[role] = held.get(role, 0) + size
    return held


def cache_bytes(config: DeepseekV3Config, blocks: int, block_size: int, value_bytes: int, drafts: bool) -> int:
    """The cache of so many blocks, and the block that recorded steps fill up with; drafts: with the MTP layer's."""
    return (blocks + 1) * block_size * token_bytes(config, value_bytes, drafts)


def token_bytes(config: DeepseekV3Config, value_bytes: int, drafts: bool) -> int:
    """One token's latents over all layers."""
    return (config.num_hidden_layers + int(drafts)) * config.latent_dim * value_bytes


def _held(config: DeepseekV3Config, format_of: FormatOf, mesh: Mesh, kernels: Kernels) -> Iterator[tuple[str, int]]:
    yield OTHER, 4 * (config.qk_rope_head_dim // 2)  # rotary frequencies
    for weight in weights(config):
        mtp = weight.layer is not None and weight.layer >= config.num_hidden_layers
        if weight.role is Role.ROUTER:
            matrix = weight.name.endswith(".weight")
            # CUDA kernels keep what the checkpoint has in BF16, and a counter.
            yield weight.role, 2 * prod(weight.shape) + 4 if matrix and kernels == "cuda" else 4 * prod(weight.shape)
            if matrix:
                yield OTHER, 8 * config.n_routed_experts  # where each expert is
        elif weight.role in (Role.EMBEDDING, Role.HEAD):
            if not mtp:  # the main model's are used for both
                yield weight.role, 2 * prod(weight.shape) // mesh.tp.count
        elif weight.role is Role.NORM or not weight.linear:
            yield weight.role, 2 * prod(weight.shape)
        elif weight.role is Role.ROUTED_EXPERT:
            yield from _experts(config, weight, format_of(weight), mesh, kernels)
        else:
            yield weight.role, _matrix(weight, format_of(weight), mesh.tp, kernels, 1)


def _experts(
    config: DeepseekV3Config, weight: Weight, form: WeightFormat, mesh: Mesh, kernels: Kernels
) -> Iterator[tuple[str, int]]:
    """A projection of all experts of a layer is one stack; it is counted with its first expert."""
    assert weight.layer is not None
    if ".experts.0." in weight.name:
        count = len(mesh.experts(weight.layer, config.n_routed_experts))
        yield weight.role, _matrix(weight, form, mesh.moe_tp, kernels, count)


def _matrix(weight: Weight, form: WeightFormat, shard: Shard, kernels: Kernels, experts: int) -> int:
    """Bytes of `experts` matrices of this shape cut alike, stacked where there are several."""
    name = weight.module.rpartition(".")[2]
    axis = int(name in _INNER)
    start, stop = (shard if name in CUT_MODULES else WHOLE).bounds(weight.shape[axis], weight.module)
    part = Slice(axis, start, stop, weight.shape[axis])
    rows, columns = (stop - start, weight.shape[1]) if axis == 0 else (weight.shape[0], stop - start)
    if form is WeightFormat.NVFP4 and kernels == "cuda":
        groups, slabs = -(-rows // _GROUP), -(-columns // _SLAB)
        return experts * (groups * slabs * _SLAB_BYTES + 4 * groups * _GROUP) + 4
    if form is WeightFormat.NVFP4:  # a tensor scale each, one input scale for the stack
        return experts * (rows * columns // 2 + rows * columns // 16 + 4) + 4
    narrow = part.axis == 1 and part.fine % _FP8_COLUMNS != 0
    if form is WeightFormat.PLAIN or kernels == "cuda" or narrow:
        fused = 2 if name in ("gate_proj", "up_proj") else 1
        twice = form is WeightFormat.FP8_BLOCK and weight.role is not Role.ROUTED_EXPERT and not narrow
        kept = rows * columns if twice and fused * rows * columns >= _FP8_LARGE else 0
        return 2 * experts * rows * columns + kept
    return experts * rows * columns + 4 * _fp8_scales(weight.shape, part, experts, weight.role is Role.ROUTED_EXPERT)


def _fp8_scales(shape: tuple[int, ...], part: Slice, experts: int, stacked: bool) -> int:
    """How many scales a slice keeps. A slice within blocks has a scale for each finer block; unless it is copied into a
    stack, those of its first and last whole block stay along."""
    blocks = [-(-size // _FP8_BLOCK) for size in shape]
    if part.stop - part.start == part.size:
        return experts * prod(blocks)
    if stacked or part.axis == 1:
        blocks[part.axis] = (part.stop - part.start) // part.fine
    else:
        whole = -(-part.stop // _FP8_BLOCK) - part.start // _FP8_BLOCK
        blocks[part.axis] = whole * (_FP8_BLOCK // part.fine)
    return experts * prod(blocks)
