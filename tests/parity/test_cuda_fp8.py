"""FP8 products of NVFP4 weights on a Hopper GPU against the law of numerics/fp8_rows.py.

Both sides multiply the same E4M3 numbers, so a dense product differs by the matrix unit's sums alone: they keep about
13 bits, so that thousands of additions cost 0.2 to 0.4 % of a result in the mean. Hidden values that tip become a
neighbouring E4M3 number, which is up to an eighth away: there the mean is bounded.
"""

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import ops
from deepseek_fp4_plugin.kernels.cuda import experts_wgmma, fp8
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


@pytest.mark.parametrize(("out", "width"), [(16, 16), (144, 1040), (512, 7168), (7168, 256), (2064, 18432)])
def test_products(out, width):
    """Whatever `ops` would choose; parts of different tensor scales."""
    for parts in ([out], [out, out], [out, out + 16]):
        ours, law = both([random_part(NVFP4, n, width, scale_2=0.5**i) for i, n in enumerate(parts)], "fp8")
        for rows in (1, 100, 589):
            x = poisoned(rows, width)
            y, expected = fp8.product(x, ours, 0), ops.linear(x, law)
            assert error(y, expected) <= 2 * TWO_STEPS, (parts, rows)
            assert relative(y, expected) <= 0.006, (parts, rows)


def test_many_rows_by_a_large_weight_are_chosen():
    for out, width in ((fp8.LARGE, fp8.LARGE), (fp8.LARGE + 4, fp8.LARGE), (fp8.LARGE - 16, fp8.LARGE), (2048, 2032)):
        (ours, _), (plain, _) = both(part := [random_part(NVFP4, out, width)], "fp8"), both(part)
        for rows in (0, 1, fp8.MANY_ROWS - 1, fp8.MANY_ROWS):
            x = poisoned(rows, width)
            y, large = ops.linear(x, ours), (out, width) == (fp8.LARGE, fp8.LARGE)
            if large and rows == fp8.MANY_ROWS:
                assert torch.equal(y, fp8.product(x, ours, 0))
            else:
                assert torch.equal(y, ops.linear(x, plain)), (out, width, rows)


def test_gated_mlp():
    hidden, inner = fp8.LARGE, fp8.LARGE + 16
    gate_up, down = [random_part(NVFP4, inner, hidden) for _ in range(2)], [random_part(NVFP4, hidden, inner)]
    (a, c), (b, d) = both(gate_up, "fp8"), both(down, "fp8")
    x = poisoned(fp8.MANY_ROWS + 5, hidden) * 0.1
    assert relative(ops.gated_mlp(x, a, b), ops.gated_mlp(x, c, d)) < 0.02


@pytest.mark.parametrize(
    ("experts", "hidden", "inner", "k"), [(6, 272, 144, 3), (5, 16, 16, 2), (9, 1024, 256, 8), (300, 256, 128, 2)]
)
def test_experts(experts, hidden, inner, k):
    """Blocks of every number of columns; experts elsewhere, and that nobody chose; NaN beside rows and in scratch."""
    gate_up = [random_part(NVFP4, inner, hidden, experts) for _ in range(2)]
    (a, c), (b, d) = both(gate_up, "fp8"), both([random_part(NVFP4, hidden, inner, experts)], "fp8")
    for tokens in (1, 17, 150, 700, 2500):
        ids = torch.stack([torch.randperm(experts - 1)[:k] for _ in range(tokens)])
        ids[:, 0] = torch.where(torch.rand(tokens) < 0.4, 2, ids[:, 0])  # one expert with many rows
        ids[torch.rand(tokens, k) < 0.3] = -1
        ids, weights, x = ids.to(DEVICE), torch.rand(tokens, k, device=DEVICE), poisoned(tokens, hidden)
        x *= 0.1  # in place: its rows keep their distance
        torch.full((1 << 26,), float("nan"), dtype=BF16, device=DEVICE)  # what the allocator hands out next
        actual = experts_wgmma.by_blocks(x, ids, weights, a, b, experts_wgmma.FP8)
        assert relative(actual, ops.experts_mlp(x, ids, weights, c, d)) < 0.02, tokens
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts_wgmma.by_blocks(x, ids, weights, a, b, experts_wgmma.FP8)
    graph.replay()
    assert torch.equal(captured, actual)


def test_experts_of_many_rows_are_chosen():
    """Others stay BF16, bit for bit. As many experts as `expected_rows` takes a model of one choice a token to have."""
    gate_up, down = [random_part(NVFP4, 32, 64, 32) for _ in range(2)], [random_part(NVFP4, 64, 32, 32)]
    (a, _), (b, _), (c, _), (d, _) = both(gate_up, "fp8"), both(down, "fp8"), both(gate_up), both(down)
    for tokens in (1, 64, 32 * experts_wgmma.FP8_ROWS - 32, 32 * experts_wgmma.FP8_ROWS):
        ids = torch.randint(0, 32, (tokens, 1), device=DEVICE)
        weights, x = torch.rand(tokens, 1, device=DEVICE), poisoned(tokens, 64)
        y = ops.experts_mlp(x, ids, weights, a, b)
        if tokens < 32 * experts_wgmma.FP8_ROWS:
            assert torch.equal(y, ops.experts_mlp(x, ids, weights, c, d)), tokens
        else:
            assert torch.equal(y, experts_wgmma.by_blocks(x, ids, weights, a, b, experts_wgmma.FP8))


def test_what_rounding_costs():
    """Normal inputs: the output's change is the rounding of inputs and weights, each about 2.5 %."""
    part = random_part(NVFP4, 4096, 7168)
    ours, _ = both([part], "fp8")
    exact, _ = both([part])
    x = torch.randn(fp8.MANY_ROWS, 7168, device=DEVICE).to(BF16)
    assert 0.02 < relative(ops.linear(x, ours), ops.linear(x, exact)) < 0.045
