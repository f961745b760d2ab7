"""The CUDA kernels of latent attention and of the per-head products around it against the reference, on a GPU."""

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import ops, reference
from deepseek_fp4_plugin.kernels.cuda import attention
from deepseek_fp4_plugin.kernels.spans import Spans
from tests.parity.cuda_cases import BF16, DEVICE, ON_A_GPU, both, poisoned
from tests.parity.kernel_cases import TWO_STEPS, attention_case, error, random_part

pytestmark = ON_A_GPU


@pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda weight_format: weight_format.name)
@pytest.mark.parametrize(
    ("heads", "nope", "v", "latent"), [(3, 32, 48, 128), (16, 128, 128, 512), (5, 24, 7, 64), (2, 256, 40, 320)]
)
def test_per_head_products(heads, nope, v, latent, weight_format):
    """On both sides of the few tokens that have kernels; queries lie between others' values, which are NaN here."""
    ours, law = both([random_part(weight_format, heads * (nope + v), latent)])
    bound = 4 * TWO_STEPS if weight_format is WeightFormat.FP8_BLOCK else TWO_STEPS  # decoded values are rounded
    for tokens in (1, 5, 8, 9):
        q = poisoned(tokens * heads, nope).unflatten(0, (tokens, heads))
        attended = torch.randn(tokens, heads, latent, device=DEVICE).to(BF16)
        assert error(ops.absorb(q, ours), ops.absorb(q, law)) <= bound, tokens
        rope, angle = poisoned(tokens * heads, 32).unflatten(0, (tokens, heads)), torch.randn(tokens, 16, device=DEVICE)
        for own, expected in zip(
            ops.absorbed_queries(q, rope, ours, angle.cos(), angle.sin()),
            ops.absorbed_queries(q, rope, law, angle.cos(), angle.sin()),
            strict=True,
        ):
            assert error(own, expected) <= bound, tokens
        kv, norm = poisoned(tokens, latent + 32), torch.randn(latent, device=DEVICE).to(BF16)
        for dtype in (BF16, torch.float8_e4m3fn):
            slots = torch.randperm(32, device=DEVICE)[:tokens]
            caches = [torch.zeros(4, 8, latent + 32, device=DEVICE).to(dtype) for _ in range(2)]
            sides = [
                ops.absorb_and_store(q, rope, kv_b, angle.cos(), angle.sin(), cache, slots, kv, norm, 1e-6)
                for kv_b, cache in zip((ours, law), caches, strict=True)
            ]
            for own, expected in zip(*sides, strict=True):
                assert error(own, expected) <= bound, tokens
            assert error(*(cache.float() for cache in caches)) <= (TWO_STEPS if dtype is BF16 else 1 / 8), tokens
        values = ops.values_from_latent(attended, ours, v), ops.values_from_latent(attended, law, v)
        assert error(*values) <= bound, tokens


@pytest.mark.parametrize("cache_dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("queries", "contexts", "heads", "latent", "rope"),
    [
        ((1,), (1,), 16, 512, 64),
        ((1, 1, 1), (5, 32, 1513), 8, 128, 32),
        ((4, 1, 2), (9, 1600, 2), 16, 512, 64),
        ((1,) * 40, tuple(range(1, 401, 10)), 16, 512, 64),
        ((8, 3), (2025, 70), 128, 512, 64),
        ((4,) * 5, (4, 64, 65, 129, 700), 16, 512, 64),
        ((1, 1), (1, 1513), 128, 512, 64),
        ((3, 1, 2), (700, 70, 130), 17, 512, 64),  # rows that are no multiple of a block's
        ((2, 3), (65, 64), 5, 256, 32),
        ((2, 3), (25, 700), 4, 32, 16),  # no kernel for this width
    ],
)
def test_absorbed_attention(cache_dtype, queries, contexts, heads, latent, rope):
    """Any number of splits, poison behind every context and in every block that nobody has."""
    arguments, _ = attention_case(cache_dtype, queries, contexts, heads, latent, rope)
    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    expected = reference.absorbed_attention(*arguments)
    assert error(ops.absorbed_attention(*arguments), expected) <= 2 * TWO_STEPS  # probabilities are BF16 as well
    *tensors, max_query, max_context, scale = arguments
    assert error(ops.absorbed_attention(*tensors, max_query, 20 * max_context, scale), expected) <= 2 * TWO_STEPS
    if latent >= 128:
        cuts = [(1, 1), (2, 2), (4, 4), (8, 8), (3, 1), (8, 2), (12, 4), (16, 8), (64, 8)]
        if attention.on_matrix_unit(latent, rope, 0):
            cuts += [(splits, 1, True) for splits in (1, 2, 3, 7, 64)]
        for cut in cuts:
            own = attention.launch(*tensors, max_query, max_context, scale, attention.Cut(*cut))
            assert error(own, expected) <= 2 * TWO_STEPS, cut


@pytest.mark.parametrize("cache_dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("context", "heads", "latent", "rope"),
    [(1, 16, 512, 64), (1024, 16, 512, 64), (2100, 16, 512, 64), (320, 7, 128, 32), (700, 128, 512, 64)],
)
def test_values_of_parts_that_are_not_merged(cache_dtype, context, heads, latent, rope):
    """The same bits as attention and values by themselves; parts are empty where a context is far below its bound."""
    arguments, _ = attention_case(cache_dtype, (1,), (context,), heads, latent, rope)
    *tensors, max_query, max_context, scale = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)
    kv_b, _ = both([random_part(WeightFormat.PLAIN, heads * (24 + 40), latent)])
    for bound in (max_context, 3 * max_context, 100 * max_context):
        case = (*tensors, max_query, bound, scale)
        values = ops.attended_values(*case, kv_b, 40)
        assert values is not None
        assert torch.equal(values, ops.values_from_latent(ops.absorbed_attention(*case), kv_b, 40)), bound
    two = attention_case(cache_dtype, (1, 1), (context, context), heads, latent, rope)[0]
    assert ops.attended_values(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in two), kv_b, 40) is None


@pytest.mark.parametrize(("heads", "width", "value"), [(16, 192, 128), (8, 64, 32), (3, 40, 40), (2, 50, 24)])
def test_prompts_of_several_requests(heads, width, value):
    """Whole prompts, chunks behind others, a few tokens behind many; each gets the bits that it gets alone, whatever
    its neighbours hold."""
    queries, contexts = (1, 70, 9, 300, 64), (1, 70, 1400, 333, 64)
    spans = Spans.of(queries, contexts, DEVICE)
    q = torch.randn(sum(queries), heads, width, device=DEVICE).to(BF16)
    k, v = (torch.randn(sum(contexts), heads, d, device=DEVICE).to(BF16) for d in (width, value))
    scale = width**-0.5
    own = ops.expanded_attention(q, k, v, scale, spans)
    assert error(own, reference.expanded_attention(q, k, v, scale, spans)) <= 2 * TWO_STEPS
    rows = list(spans.rows())
    for (asking, seen), *counts in zip(rows, queries, contexts, strict=True):
        alone = Spans.of(*([count] for count in counts), DEVICE)
        assert torch.equal(ops.expanded_attention(q[asking], k[seen], v[seen], scale, alone), own[asking]), counts
    asking, seen = rows[2]
    k[seen] = v[seen] = float("nan")
    poisoned_one = ops.expanded_attention(q, k, v, scale, spans)
    assert poisoned_one[asking].isnan().all()
    assert torch.equal(poisoned_one[: asking.start], own[: asking.start])
    assert torch.equal(poisoned_one[asking.stop :], own[asking.stop :])


@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_store_entries(dtype):
    entries = (torch.randn(7, 24) * 10.0 ** torch.randint(-5, 5, (7, 1))).to(DEVICE, BF16)
    entries[0, :3] = torch.tensor([0.0, -0.0, 1e30])
    slots = torch.randperm(32, device=DEVICE)[:7]
    caches = [torch.zeros(4, 8, 24, device=DEVICE).to(dtype) for _ in range(2)]
    ops.store_entries(caches[0], slots, entries)
    reference.store_entries(caches[1], slots, entries)
    assert torch.equal(caches[0].view(torch.uint8), caches[1].view(torch.uint8))
