"""FP8 products of NVFP4 weights on a Hopper GPU against the law of numerics/fp8_rows.py.

Both sides multiply the same E4M3 numbers, so a dense product differs by the matrix unit's sums alone: they keep about
13 bits, which thousands of additions could turn into 2^-7 of the largest result. Hidden values that tip become a
neighbouring E4M3 number, which is up to an eighth away: there the mean is bounded.
"""

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cuda, ops
from deepseek_fp4_plugin.kernels.cuda import experts as cuda_experts
from deepseek_fp4_plugin.kernels.cuda import fp8
from deepseek_fp4_plugin.kernels.cuda.decode import decode
from deepseek_fp4_plugin.numerics import fp8_rows, nvfp4
from tests.parity.cuda_cases import BF16, DEVICE, ON_A_GPU, both, poisoned
from tests.parity.kernel_cases import TWO_STEPS, error, random_part

pytestmark = [
    *ON_A_GPU,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="FP8 products are Hopper's"
    ),
]
NVFP4 = WeightFormat.NVFP4


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def test_rounded_rows_are_exact():
    """Bit for bit: odd widths, rows that lie apart, zeros, magnitudes over 60 octaves, and what is not finite."""
    for width in (16, 272, 7168):
        x = poisoned(40, width)
        x *= 2.0 ** torch.randint(-60, 60, (40, 1), device=DEVICE)
        x[3] = 0
        x[4] = 2.0**-110
        numbers, scale = fp8.round_rows(x)
        expected, law = fp8_rows.quantize(x)
        assert torch.equal(numbers.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scale, law)
        for value in (float("inf"), float("nan")):
            x[7, 5] = value
            assert fp8.round_rows(x)[1].isnan().tolist() == [row == 7 for row in range(40)]


@pytest.mark.parametrize(("out", "width"), [(16, 16), (130, 1040), (264, 4112), (7168, 256)])
def test_decoded_weights_are_exact(out, width):
    for count in (1, 2):
        parts = [random_part(NVFP4, out, width, 3, scale_2=0.5**i) for i in range(count)]
        ours, _ = both(parts, "fp8")
        for expert in (None, 1):
            scale = torch.empty(3 if expert is None else 1, out * count, device=DEVICE)
            values = decode(ours.data, expert, out * count, width, scale)
            pick = slice(None) if expert is None else expert
            law = torch.cat([fp8_rows.rounded_weights(nvfp4.block_values(p.weight, p.scale)) for p in parts], 1)
            assert torch.equal(values.float() * fp8_rows.WEIGHT_SCALE, law[pick].to(DEVICE))
            factors = torch.cat([p.scale_2.unsqueeze(1).expand(3, out) for p in parts], 1)[pick]
            assert torch.equal(scale.view(factors.shape), factors.to(DEVICE) * fp8_rows.WEIGHT_SCALE)


@pytest.mark.parametrize(("out", "width"), [(16, 16), (144, 1040), (512, 7168), (7168, 256), (768, 18432)])
def test_linear(out, width):
    for parts in ([out], [out, out], [out, out + 16]):
        made = [random_part(NVFP4, n, width, scale_2=0.5**i) for i, n in enumerate(parts)]
        (ours, law), (plain, _) = both(made, "fp8"), both(made)
        for rows in (0, 1, 100, fp8.MANY_ROWS - 1, fp8.MANY_ROWS, fp8.MANY_ROWS + 77):
            x = poisoned(rows, width)
            y = ops.linear(x, ours)
            if rows < fp8.MANY_ROWS:
                assert torch.equal(y, ops.linear(x, plain))  # BF16 products, of the same bits
            else:
                assert error(y, ops.linear(x, law)) <= TWO_STEPS, (parts, rows)


def test_gated_mlp():
    hidden, inner = 1040, 272
    gate_up, down = [random_part(NVFP4, inner, hidden) for _ in range(2)], [random_part(NVFP4, hidden, inner)]
    (a, c), (b, d) = both(gate_up, "fp8"), both(down, "fp8")
    x = poisoned(fp8.MANY_ROWS + 5, hidden) * 0.1
    assert relative(ops.gated_mlp(x, a, b), ops.gated_mlp(x, c, d)) < 0.01


@pytest.mark.parametrize(("experts", "hidden", "inner", "k"), [(6, 272, 144, 3), (9, 1024, 256, 8), (40, 256, 128, 2)])
def test_experts(experts, hidden, inner, k):
    """Experts that are elsewhere, that nobody chose, that many chose; NaN in scratch memory; a graph gives the same."""
    gate_up = [random_part(NVFP4, inner, hidden, experts) for _ in range(2)]
    (a, c), (b, d) = both(gate_up, "fp8"), both([random_part(NVFP4, hidden, inner, experts)], "fp8")
    for tokens in (1, 150, 2500):
        ids = torch.stack([torch.randperm(experts - 1)[:k] for _ in range(tokens)])
        ids[:, 0] = torch.where(torch.rand(tokens) < 0.4, 2, ids[:, 0])  # one expert with many rows
        ids[torch.rand(tokens, k) < 0.3] = -1
        ids, weights, x = ids.to(DEVICE), torch.rand(tokens, k, device=DEVICE), poisoned(tokens, hidden) * 0.1
        torch.full((1 << 26,), float("nan"), dtype=BF16, device=DEVICE)  # what the allocator hands out next
        actual = cuda_experts.grouped_fp8(x, ids, weights, a, b)
        assert relative(actual, ops.experts_mlp(x, ids, weights, c, d)) < 0.01, tokens
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda_experts.grouped_fp8(x, ids, weights, a, b)
    graph.replay()
    assert torch.equal(captured, actual)


def test_experts_of_many_rows_are_chosen(monkeypatch):
    called = []
    monkeypatch.setattr(cuda.moe, "grouped_fp8", lambda x, *_: called.append(len(x)) or x)
    parts = [random_part(NVFP4, 32, 64, 2) for _ in range(2)]
    for activations in ("bf16", "fp8"):
        a, b = both(parts, activations)[0], both([random_part(NVFP4, 64, 32, 2)], activations)[0]
        for tokens in (64, 32 * fp8.MANY_EXPERT_ROWS):
            ids = torch.zeros(tokens, 1, dtype=torch.int64, device=DEVICE)
            ops.experts_mlp(poisoned(tokens, 64), ids, torch.ones(tokens, 1, device=DEVICE), a, b)
    assert called == [32 * fp8.MANY_EXPERT_ROWS]


def test_what_rounding_costs():
    """Normal inputs: the output's change is the rounding of inputs and weights, each about 2.5 %."""
    part = random_part(NVFP4, 512, 7168)
    ours, _ = both([part], "fp8")
    exact, _ = both([part])
    x = torch.randn(fp8.MANY_ROWS, 7168, device=DEVICE).to(BF16)
    assert 0.02 < relative(ops.linear(x, ours), ops.linear(x, exact)) < 0.045
