"""Absorbed latent attention over the paged cache, split over the context, and the per-head products around it."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import decoded, reference
from deepseek_fp4_plugin.kernels.cuda.decode import decode
from deepseek_fp4_plugin.kernels.cuda.launcher import kernel, together
from deepseek_fp4_plugin.kernels.cuda.norm import store_latents
from deepseek_fp4_plugin.kernels.cuda.rotary import rotary
from deepseek_fp4_plugin.kernels.cuda.tiles import VALUE_SCALE
from deepseek_fp4_plugin.kernels.weights import PreparedWeight

_CHUNK = 64  # cached entries that a block has at a time
_ROWS = 64  # (query, head) of a block on Hopper's matrix unit
_CHUNK_TIME, _MERGE_TIME = 2.2, 1.65e-3  # microseconds there, of a chunk and of a row of a part, measured on an H200
_BLOCKS = 132  # as many splits as give every multiprocessor a block
_FEW_TOKENS, _NOPE = 8, 256  # of the products by head; values that absorb takes
_FEW_MERGED, _MOST_MERGED = 1, 32  # tokens, and parts of a context, that the launch of the values merges
_LATENTS, _ROPES = (128, 256, 384, 512), (32, 64)


def absorbed_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query: int,
    max_context: int,
    scale: float,
) -> Tensor:
    """See kernels/reference/attention.py. FP32 but for probabilities in BF16; widths without a kernel go to `decoded`.

    How the context is split follows from the host's bounds alone, so that graphs replay with any contexts below them.
    """
    if not _served(q_latent, q_rope, cache):
        return decoded.absorbed_attention(
            q_latent, q_rope, cache, block_tables, query_start, context_lens, max_query, max_context, scale
        )
    together(q_latent, q_rope, cache, block_tables, query_start, context_lens)
    if not cache.is_contiguous():
        raise ValueError(f"one layer's latent cache must be contiguous; strides are {cache.stride()}")
    y = launch(
        _aligned(q_latent),
        _aligned(q_rope),
        cache,
        _rows(block_tables),
        query_start.contiguous(),
        context_lens.contiguous(),
        max_query,
        max_context,
        scale,
    )
    assert isinstance(y, Tensor)
    return y


def attended_values(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query: int,
    max_context: int,
    scale: float,
    kv_b: PreparedWeight,
    v: int,
) -> Tensor | None:
    """See kernels/ops.py: of one token the launch of the values merges the parts of its context."""
    tokens = q_latent.shape[0]
    few = kv_b.format is not WeightFormat.NVFP4 and tokens <= _FEW_MERGED and _few_values(q_latent, kv_b, v)
    if not few or not _served(q_latent, q_rope, cache) or not cache.is_contiguous():
        return None
    together(q_latent, q_rope, cache, block_tables, query_start, context_lens, kv_b.data.values)
    rest = query_start.contiguous(), context_lens.contiguous(), max_query, max_context, scale
    attended = launch(_aligned(q_latent), _aligned(q_rope), cache, _rows(block_tables), *rest, merge=False)
    if isinstance(attended, Tensor):
        return _values(attended, kv_b, v)
    return _merged_values(*attended, tokens, kv_b, v)


def _served(q_latent: Tensor, q_rope: Tensor, cache: Tensor) -> bool:
    """Whether there is a kernel for these widths."""
    widths = q_latent.shape[2] in _LATENTS and q_rope.shape[2] in _ROPES
    return widths and cache.dtype in (torch.bfloat16, torch.float8_e4m3fn)


def _rows(tables: Tensor) -> Tensor:
    return tables if tables.stride(1) == 1 else tables.contiguous()


class Cut(NamedTuple):
    """splits: blocks of a context.  cluster: those that merge their parts in shared memory; divides splits.  wide: by
    mla_wgmma.cu, whose clusters are single blocks."""

    splits: int
    cluster: int
    wide: bool = False


def choose(chunks: int, others: int) -> Cut:
    """The cut of a context of at most so many chunks where `others` blocks would run at once unsplit."""
    splits = max(1, min(chunks, _BLOCKS // others))
    return Cut(splits, 2 if splits == 2 else 1)  # larger clusters were measured to be slower than a second launch


@functools.lru_cache(4096)  # contexts and requests are of many sizes
def choose_wide(chunks: int, others: int, rows: int) -> Cut:
    """The same for mla_wgmma.cu, where a part of all these rows is dear to write and to merge."""
    most = max(1, min(chunks, _BLOCKS // others))
    return Cut(min(range(1, most + 1), key=lambda n: -(-chunks // n) * _CHUNK_TIME + n * rows * _MERGE_TIME), 1, True)


def launch(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    tables: Tensor,
    starts: Tensor,
    contexts: Tensor,
    max_query: int,
    max_context: int,
    scale: float,
    cut: Cut | None = None,
    merge: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """The kernels on checked tensors; cut: of each context, or by the bounds.  merge: False leaves few parts
    of a context as they are, with the logarithms of their sums.
    """
    (tokens, heads, latent), rope, requests = q_latent.shape, q_rope.shape[2], contexts.shape[0]
    y = torch.empty(tokens, heads, latent, dtype=torch.bfloat16, device=q_latent.device)
    if not (tokens and requests):
        return y
    fp8, index = cache.dtype is torch.float8_e4m3fn, y.device.index
    tiles = 1 if max_query * heads <= 16 else 2
    chunks, blocks = -(-max_context // _CHUNK), -(-max_query * heads // (16 * tiles))
    wide_blocks = -(-max_query * heads // _ROWS)
    if cut is None:
        small = max_query * heads <= 16 and requests * chunks <= _BLOCKS  # blocks that begin beside other kernels'
        wide = on_matrix_unit(latent, rope, index) and not small
        cut = choose_wide(chunks, requests * wide_blocks, tokens * heads) if wide else choose(chunks, requests * blocks)
    splits, cluster, wide = cut
    merged = splits // cluster
    parts = torch.empty(merged if merged > 1 else 0, tokens * heads, latent, dtype=torch.float32, device=y.device)
    sums = torch.empty(merged, tokens * heads, dtype=torch.float32, device=y.device)
    arguments = (
        q_latent.data_ptr(),
        q_rope.data_ptr(),
        cache.data_ptr(),
        tables.data_ptr(),
        starts.data_ptr(),
        contexts.data_ptr(),
        y.data_ptr(),
        parts.data_ptr(),
        sums.data_ptr(),
        *q_latent.stride()[:2],
        *q_rope.stride()[:2],
        heads,
        cache.shape[1],
        tables.stride(0),
        splits,
        tokens * heads,
        scale * math.log2(math.e),
    )
    widths, grid = (("LATENT", latent), ("ROPE", rope)), (splits, wide_blocks if wide else blocks, requests)
    if wide:
        own = kernel("mla_wgmma.cu", "mla_wgmma", _LAYOUT, (*widths, ("FP8", int(fp8))), index)
        own(grid, 384, _WIDE_SHARED, *arguments)
    else:
        defines = (*widths, ("TILES", tiles), ("FP8", int(fp8)), ("CLUSTER", cluster))
        own = kernel("mla_decode.cu", "mla_decode", _LAYOUT, defines, index)
        own(grid, 256, _shared(latent + rope, tiles, fp8), *arguments, cluster=cluster)
    if merged > 1 and not merge and merged <= _MOST_MERGED:
        return parts, sums
    if merged > 1:
        whole = kernel("mla_merge.cu", "mla_merge", _LAYOUT, (*widths, ("CLUSTER", cluster)), index)
        whole((tokens * heads, 1, 1), latent, 0, *arguments)
    return y


@functools.cache
def on_matrix_unit(latent: int, rope: int, device: int) -> bool:
    """Whether mla_wgmma.cu serves these widths there: R1's, on Hopper."""
    return (latent, rope) == (512, 64) and torch.cuda.get_device_capability(device)[0] == 9


def store_entries(cache: Tensor, slots: Tensor, entries: Tensor) -> None:
    """See kernels/reference/attention.py; BF16 entries into a BF16 or FP8 cache here, others there."""
    fp8 = cache.dtype is torch.float8_e4m3fn
    served = entries.dtype is torch.bfloat16 and (fp8 or cache.dtype is torch.bfloat16) and entries.shape[1] % 2 == 0
    if not served or not cache.is_contiguous():
        return reference.store_entries(cache, slots, entries)
    together(cache, slots, entries)
    entries, slots = entries.contiguous(), slots.contiguous()
    kernel("small.cu", "store", "3P2i", (), cache.device.index)(
        (entries.shape[0], 1, 1),
        128,
        0,
        entries.data_ptr(),
        slots.data_ptr(),
        cache.data_ptr(),
        entries.shape[1],
        int(fp8),
    )


_LAYOUT = "9P9if"
_WIDE_SHARED = (3 * 9 + 1) * 64 * 128 + 1024  # queries, two chunks, probabilities; largest and sums, barriers


def _shared(width: int, tiles: int, fp8: bool) -> int:
    """Bytes: queries, two chunks of entries (and one decoded of FP8), two sets of scores."""
    row = width * 2 + 16
    return 16 * tiles * row + 2 * _CHUNK * (width + 16 if fp8 else row) + fp8 * _CHUNK * row + 2 * 16 * tiles * 68 * 4


def _aligned(q: Tensor) -> Tensor:
    """Rows that can be read 16 bytes at a time."""
    fits = q.stride(2) == 1 and q.stride(0) % 8 == 0 and q.stride(1) % 8 == 0 and q.data_ptr() % 16 == 0
    return q if fits else q.clone(memory_format=torch.contiguous_format)


def absorb(q_nope: Tensor, kv_b: PreparedWeight) -> Tensor:
    """See kernels/reference/attention.py; an NVFP4 kv_b is decoded on every call, no published checkpoint has one."""
    if kv_b.format is not WeightFormat.NVFP4:
        few = _few(q_nope, kv_b) and q_nope.shape[2] <= _NOPE
        return _absorb(q_nope, kv_b) if few else decoded.absorb(q_nope, kv_b)
    w_uk = _by_head(kv_b, q_nope.shape[1])[:, : q_nope.shape[2]]
    return _scaled(torch.einsum("thn,hnl->thl", q_nope, w_uk), kv_b)


def absorbed_queries(
    q_nope: Tensor, q_rope: Tensor, kv_b: PreparedWeight, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/attention.py; a launch for both where tokens are few."""
    if not _with_rope(q_nope, q_rope, kv_b):
        return absorb(q_nope, kv_b), rotary(q_rope, cos, sin)
    together(q_nope, q_rope, cos, sin)
    turned = torch.empty(q_rope.shape, dtype=torch.bfloat16, device=q_rope.device)
    return _absorb(q_nope, kv_b, (q_rope, cos.contiguous(), sin.contiguous(), turned)), turned


def absorb_and_store(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_b: PreparedWeight,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slots: Tensor,
    kv: Tensor,
    norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See kernels/reference/attention.py; a launch for both where tokens are few."""
    readable = kv.dtype is norm.dtype is torch.bfloat16 and _pairs(kv) and norm.data_ptr() % 4 == 0
    stored = (
        cache.dtype in (torch.bfloat16, torch.float8_e4m3fn) and cache.is_contiguous() and cache.data_ptr() % 4 == 0
    )
    same = norm.shape[0] == kv_b.in_features and kv.shape[1] == norm.shape[0] + q_rope.shape[2]
    if not (readable and stored and same and _with_rope(q_nope, q_rope, kv_b)):
        store_latents(cache, slots, kv, norm, eps, cos, sin)
        return absorbed_queries(q_nope, q_rope, kv_b, cos, sin)
    together(q_nope, q_rope, cos, sin, cache, slots, kv, norm)
    turned = torch.empty(q_rope.shape, dtype=torch.bfloat16, device=q_rope.device)
    latents = kv, norm, slots.contiguous(), cache, eps
    return _absorb(q_nope, kv_b, (q_rope, cos.contiguous(), sin.contiguous(), turned), latents), turned


def values_from_latent(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
    """See kernels/reference/attention.py."""
    if kv_b.format is not WeightFormat.NVFP4:
        few = _few_values(attended, kv_b, v) and attended.is_contiguous() and attended.data_ptr() % 16 == 0
        return _values(attended, kv_b, v) if few else decoded.values_from_latent(attended, kv_b, v)
    w_uv = _by_head(kv_b, attended.shape[1])[:, -v:]
    return _scaled(torch.einsum("thl,hvl->thv", attended, w_uv), kv_b)


def _few(x: Tensor, kv_b: PreparedWeight) -> bool:
    """Whether per_head.cu has these: few tokens, so that the library's launches are most of its time."""
    tokens, _, width = x.shape
    if x.dtype is not torch.bfloat16 or x.stride(2) != 1 or not kv_b.data.values.is_contiguous():
        return False
    return 0 < tokens <= _FEW_TOKENS and width <= 512 and kv_b.in_features % 64 == 0 and kv_b.in_features <= 512


def _few_values(latents: Tensor, kv_b: PreparedWeight, v: int) -> bool:
    """The same for the values of these latents, a head's last v rows."""
    _, heads, width = latents.shape
    return _few(latents, kv_b) and width == kv_b.in_features and heads * v <= kv_b.out_features


def _with_rope(q_nope: Tensor, q_rope: Tensor, kv_b: PreparedWeight) -> bool:
    """Whether the kernel absorbs the one and turns the other."""
    few = kv_b.format is not WeightFormat.NVFP4 and _few(q_nope, kv_b) and q_nope.shape[2] <= _NOPE
    return few and q_rope.dtype is torch.bfloat16 and q_rope.stride(1) % 2 == 0 and _pairs(q_rope)


def _pairs(x: Tensor) -> bool:
    """Whether neighbouring values can be read two at a time."""
    return x.stride(-1) == 1 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0


def _absorb(
    q_nope: Tensor,
    kv_b: PreparedWeight,
    rope: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    latents: tuple[Tensor, Tensor, Tensor, Tensor, float] | None = None,
) -> Tensor:
    """rope: what else is rotated in the launch, cos and sin, and where it goes.  latents: what is stored, the norm's
    weight, slots, cache, the norm's epsilon."""
    (tokens, heads, nope), latent = q_nope.shape, kv_b.in_features
    together(q_nope, kv_b.data.values)
    y = torch.empty(tokens, heads, latent, dtype=torch.bfloat16, device=q_nope.device)
    more = () if rope is None else rope
    kv, norm, slots, cache, eps = latents or (y, y, y, y, 0.0)
    kernel("per_head.cu", "absorb", "7P10i4P2if", (), y.device.index)(
        (latent // 64 + bool(more) + bool(latents), heads, 1),
        256,
        0,
        q_nope.data_ptr(),
        kv_b.data.values.data_ptr(),
        y.data_ptr(),
        *(tensor.data_ptr() for tensor in more or (y,) * 4),
        tokens,
        q_nope.stride(0),
        q_nope.stride(1),
        heads,
        kv_b.out_features // heads,
        nope,
        latent,
        *(more[0].stride()[:2] if more else (0, 0)),
        more[0].shape[2] // 2 if more else 0,
        *(tensor.data_ptr() for tensor in (kv, norm, slots, cache)),
        kv.stride(0),
        int(cache.dtype is torch.float8_e4m3fn),
        eps,
    )
    return y


def _values(attended: Tensor, kv_b: PreparedWeight, v: int) -> Tensor:
    tokens, heads, latent = attended.shape
    together(attended, kv_b.data.values)
    y = torch.empty(tokens, heads, v, dtype=torch.bfloat16, device=attended.device)
    kernel("per_head.cu", "values", "3P5i", (), y.device.index)(
        (-(-v // 16), heads, 1),
        256,
        0,
        attended.data_ptr(),
        kv_b.data.values.data_ptr(),
        y.data_ptr(),
        tokens,
        heads,
        kv_b.out_features // heads,
        v,
        latent,
    )
    return y


def _merged_values(parts: Tensor, sums: Tensor, tokens: int, kv_b: PreparedWeight, v: int) -> Tensor:
    splits, rows, latent = parts.shape
    heads = rows // tokens
    y = torch.empty(tokens, heads, v, dtype=torch.bfloat16, device=parts.device)
    kernel("per_head.cu", "merged_values", "4P5i", (), y.device.index)(
        (-(-v // 16), heads, tokens),
        256,
        0,
        parts.data_ptr(),
        sums.data_ptr(),
        kv_b.data.values.data_ptr(),
        y.data_ptr(),
        splits,
        heads,
        kv_b.out_features // heads,
        v,
        latent,
    )
    return y


def _by_head(kv_b: PreparedWeight, heads: int) -> Tensor:
    values = decode(kv_b.data, 0, kv_b.out_features, kv_b.in_features)
    return values.unflatten(0, (heads, -1))


def _scaled(y: Tensor, kv_b: PreparedWeight) -> Tensor:
    """One projection has one tensor scale. Values are off by a power of two, which costs no bits."""
    return (y.float() * (kv_b.data.scales[0][0] * VALUE_SCALE)).to(y.dtype)
