"""The CPU kernels between the products against the reference, on every instruction-set path this processor has."""

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cpu, decoded, ops, reference
from tests.parity.kernel_cases import BF16, TWO_STEPS, attention_case, both, error, random_part

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU extension is not built")


@pytest.mark.parametrize("cache_dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("queries", "contexts", "heads", "latent", "rope"),
    [
        ((1,), (1,), 4, 32, 16),
        ((1, 1, 1), (5, 32, 513), 3, 64, 8),
        ((4, 1, 2), (9, 1600, 2), 16, 512, 64),
        ((2, 3), (1025, 700), 5, 40, 10),  # latent no multiple of a vector
    ],
)
def test_absorbed_attention(path, cache_dtype, queries, contexts, heads, latent, rope):
    arguments, _ = attention_case(cache_dtype, queries, contexts, heads, latent, rope)
    expected = reference.absorbed_attention(*arguments)
    assert error(cpu.absorbed_attention(*arguments), expected) <= 2 * TWO_STEPS  # probabilities are BF16 as well


def test_attention_of_a_query_ignores_drafts_behind_it_and_other_requests(path):
    arguments, q = attention_case(BF16, (4, 2), (600, 70), 8, 64, 16)
    whole = cpu.absorbed_attention(*arguments)
    _, _, cache, tables, _, _, _, _, scale = arguments
    for row, context in enumerate((597, 598, 599, 600)):
        one = q[row : row + 1]
        alone = cpu.absorbed_attention(
            one[..., :64],
            one[..., 64:],
            cache,
            tables[:1],
            torch.tensor([0, 1]),
            torch.tensor([context]),
            1,
            context,
            scale,
        )
        assert torch.equal(whole[row : row + 1], alone)


def test_small_operations(path):
    for shape in ((3, 7), (1, 128), (40, 1536), (2, 3, 24)):
        x, weight = torch.randn(shape).to(BF16), torch.randn(shape[-1]).to(BF16)
        assert error(cpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)) <= TWO_STEPS
        y, normed = cpu.add_rms_norm(x, weight.expand(shape).contiguous(), weight, 1e-6)
        assert torch.equal(y, weight + x) and torch.equal(normed, cpu.rms_norm(y, weight, 1e-6))
        hidden, other = (torch.randn(shape).to(BF16) for _ in range(2))
        sums = cpu.add_rms_norm(x, hidden, weight, 1e-6, other)
        expected = reference.add_rms_norm(x, hidden, weight, 1e-6, other)
        assert torch.equal(sums[0], hidden + (x + other)) and torch.equal(sums[0], expected[0])
        assert error(sums[1], expected[1]) <= TWO_STEPS
    wide = torch.randn(5, 90).to(BF16)
    assert (
        error(
            cpu.rms_norm(wide[:, 3:53], weight[:1].expand(50).contiguous(), 1e-6),
            reference.rms_norm(wide[:, 3:53], weight[:1].expand(50), 1e-6),
        )
        <= TWO_STEPS
    )
    x, angle = torch.randn(6, 5, 40).to(BF16), torch.randn(6, 8)
    cut = x[..., 20:36]
    assert (
        error(cpu.rotary(cut, angle.cos(), angle.sin()), reference.rotary(cut, angle.cos(), angle.sin())) <= TWO_STEPS
    )


@pytest.mark.parametrize(
    ("experts", "k", "groups", "kept"), [(16, 4, 8, 4), (256, 8, 8, 4), (10, 3, 1, 1), (12, 12, 3, 3)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_route(path, experts, k, groups, kept, normalize):
    logits, bias = torch.randn(33, experts) * 3, torch.randn(experts) * 0.1
    ids, weights = cpu.route(logits, bias, k, groups, kept, normalize, 2.5)
    expected_ids, expected_weights = reference.route(logits, bias, k, groups, kept, normalize, 2.5)
    order, expected_order = ids.argsort(-1), expected_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), expected_ids.gather(1, expected_order))
    assert (weights.gather(1, order) - expected_weights.gather(1, expected_order)).abs().max() < 1e-5


@pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda f: f.name)
@pytest.mark.parametrize("tokens", [1, 2, 5, 9, 20])
@pytest.mark.parametrize(
    ("nope", "latent", "v"),
    [(16, 32, 16), (128, 512, 128), (192, 272, 64), (7, 48, 11), (5, 304, 4), (32, 128, 32), (24, 448, 8)],
)
def test_per_head_products(path, weight_format, tokens, nope, latent, v):
    heads = 3
    part = random_part(weight_format, heads * (nope + v), latent)
    kv_b, expected = both([part], "bf16")
    q = torch.randn(tokens, heads, nope + 5).to(BF16)[..., :nope]
    absorbed = cpu.absorb(q, kv_b)
    assert error(absorbed, reference.absorb(q, expected)) <= TWO_STEPS
    attended = torch.randn(tokens, heads, latent).to(BF16)
    values = cpu.values_from_latent(attended, kv_b, v)
    assert error(values, reference.values_from_latent(attended, expected, v)) <= TWO_STEPS
    for rows in (1, min(tokens, 4)):
        assert torch.equal(values[:rows], cpu.values_from_latent(attended[:rows], kv_b, v))
        assert torch.equal(absorbed[:rows], cpu.absorb(q[:rows], kv_b))
    decoded_weight = ops.prepare([part], torch.device("cpu"), BF16, backend="decoded")
    assert error(decoded.absorb(q, decoded_weight), absorbed) <= 2 * TWO_STEPS
    assert error(decoded.values_from_latent(attended, decoded_weight, v), values) <= 2 * TWO_STEPS


def test_embedding_and_angles(path):
    weight, ids = torch.randn(11, 24).to(BF16), torch.tensor([10, 0, 3, 3])
    assert torch.equal(cpu.embedding(ids, weight), weight[ids])
    with pytest.raises(IndexError, match="token id -1"):
        cpu.embedding(torch.tensor([-1]), weight)
    positions, frequencies = torch.tensor([0, 1, 4095, 163839]), 10000.0 ** -(torch.arange(32) / 32)
    for native, expected in zip(
        cpu.cos_sin(positions, frequencies, 0.7), reference.cos_sin(positions, frequencies, 0.7), strict=True
    ):
        assert (native - expected).abs().max() <= 2.0**-23


@pytest.mark.parametrize("n", [1, 5, 16, 100, 1029])
def test_argmax(path, n):
    logits = (torch.randn(20, n) * 2).round().to(BF16)  # many ties
    logits[3] = -torch.inf
    logits[4, n // 2] = logits[5, -1] = torch.nan
    expected = torch.tensor([row.index(max(row)) for row in logits.nan_to_num(1e9).tolist()])
    assert torch.equal(cpu.argmax(logits), expected)


@pytest.mark.parametrize(("requests", "width"), [(0, 1), (1, 1), (5, 4)])
def test_step_inputs(path, requests, width):
    slots, starts = torch.randperm(9)[:requests], torch.randint(0, 6 * 32 - width + 1, (9,))
    tokens, tables = torch.randint(0, 1 << 40, (9, width)), torch.randint(0, 1 << 40, (9, 8))
    arguments = (slots, starts, tokens, tables, 6, 32)
    for own, expected in zip(cpu.step_inputs(*arguments), reference.step_inputs(*arguments), strict=True):
        assert torch.equal(own, expected)
    if requests:
        starts[slots[-1]] = 6 * 32 - width + 1
        with pytest.raises(IndexError, match="the first position is"):
            cpu.step_inputs(*arguments)
        with pytest.raises(IndexError, match="the slot is 9"):
            cpu.step_inputs(torch.tensor([9]), *arguments[1:])


def test_add_and_concat(path):
    x, y = torch.randn(3, 37).to(BF16), torch.randn(3, 37).to(BF16)
    assert torch.equal(cpu.add(x, y), x + y)
    assert torch.equal(cpu.concat(x, y[:, :5].contiguous()), torch.cat((x, y[:, :5]), -1))


def test_latent_entries(path):
    kv, weight, angle = torch.randn(5, 56).to(BF16), torch.randn(40).to(BF16), torch.randn(5, 8)
    arguments = (kv, weight, 1e-6, angle.cos(), angle.sin())
    assert error(cpu.latent_entries(*arguments), reference.latent_entries(*arguments)) <= TWO_STEPS


@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_store_entries(path, dtype):
    entries = (torch.randn(7, 24) * 10.0 ** torch.randint(-5, 5, (7, 1))).to(BF16)
    entries[0, :3] = torch.tensor([0.0, -0.0, 1e30])
    slots = torch.randperm(32)[:7]
    caches = [torch.zeros(4, 8, 24, dtype=torch.float32).to(dtype) for _ in range(2)]
    cpu.store_entries(caches[0], slots, entries)
    reference.store_entries(caches[1], slots, entries)
    assert torch.equal(caches[0].view(torch.uint8), caches[1].view(torch.uint8))
