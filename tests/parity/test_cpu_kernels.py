"""The CPU kernels' products against the reference, on every instruction-set path this processor has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.kernels import cpu, decoded, ops, reference
from deepseek_fp4_plugin.kernels.weights import WeightTensors
from deepseek_fp4_plugin.numerics import e2m1, fp8_block, int8, nvfp4
from tests.parity.kernel_cases import BF16, FORMAT_IDS, FORMATS, TWO_STEPS, both, error, random_part

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU extension is not built")


@pytest.mark.parametrize(("weight_format", "activations"), FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize(("out", "width"), [(1, 16), (7, 48), (64, 128), (67, 144), (130, 1040), (200, 4112)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 16, 17, 31, 33, 200])
def test_linear(path, weight_format, activations, out, width, rows):
    parts = [random_part(weight_format, n, width) for n in (out, out + 3)]
    native, law = both(parts, activations)
    x = torch.randn(rows, width).to(BF16)
    assert native.backend is cpu
    assert error(cpu.linear(x, native), reference.linear(x, law)) <= TWO_STEPS


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_linear_of_any_shape_alignment_and_scale(data):
    """Odd shapes, rows cut out of wider ones, weights at any address, poison around them, extreme scales."""
    draw = data.draw
    weight_format, activations = draw(st.sampled_from(FORMATS))
    blocks, out, rows = draw(st.integers(1, 40)), draw(st.integers(1, 90)), draw(st.integers(0, 40))
    # Scale blocks of FP8 and single values of BF16 may end anywhere; NVFP4 ends with a block.
    width = blocks * 16 - (0 if weight_format is WeightFormat.NVFP4 else draw(st.integers(0, 15)))
    exponent = draw(st.integers(-12, 8))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    scale = 2.0**exponent
    part = random_part(weight_format, out, width, scale_2=scale, input_scale=scale)
    shift = draw(st.integers(0, 70))
    part = WeightTensors(
        part.format,
        shifted(part.weight, shift * (2 if weight_format is WeightFormat.PLAIN else 1)),
        part.scale,
        part.scale_2,
        part.input_scale,
    )
    native, law = both([part], activations, scale)
    left, right = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    poisoned = torch.full((rows, left + width + right), float("nan"), dtype=BF16)
    poisoned[:, left : left + width] = torch.randn(rows, width) * scale
    x = poisoned[:, left : left + width]
    expected = reference.linear(x, law)
    for name in cpu.paths():
        with cpu.use_path(name):
            assert error(cpu.linear(x, native), expected) <= TWO_STEPS, name


def shifted(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy whose memory starts `offset` bytes into a larger one, filled with 0xff: NaN in every format here."""
    raw = tensor.contiguous().view(torch.uint8).flatten()
    memory = torch.full((offset + raw.numel() + 64,), 255, dtype=torch.uint8)
    memory[offset : offset + raw.numel()] = raw
    cut = memory[offset : offset + raw.numel()]
    if tensor.dtype is BF16:
        return cut.view(BF16).view(tensor.shape)
    return cut.view(tensor.dtype).view(tensor.shape)


def test_w4a4_integers_are_exact(path):
    """With unit scales a result is a sum of products of small integers over four: exact in FP32, so bit-equal."""
    for rows in (1, 3, 16, 17, 60):
        width, out = 784, 75
        packed = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8)
        ones = torch.ones(out, width // 16).to(torch.float8_e4m3fn)
        part = WeightTensors(WeightFormat.NVFP4, packed, ones, torch.tensor(1.0), torch.tensor(1.0))
        native, _ = both([part], "fp4", 1.0)
        x = e2m1.decode(torch.randint(0, 16, (rows, width), dtype=torch.uint8))
        x[:, ::16] = 6.0  # so that each block's scale is exactly 1
        values = e2m1.decode(e2m1.unpack(packed))
        exact = (2 * x).to(torch.int64) @ (2 * values).to(torch.int64).T
        assert torch.equal(cpu.linear(x.to(BF16), native), (exact.double() / 4).float().to(BF16))


@pytest.mark.parametrize("rows", [1, 2, 4, 33])
def test_w4a16_activations_are_exact(path, rows):
    """A weight of 1 gives back its activation, whatever lies beside it. AVX2 takes 24 bits a block where they are
    enough, so one row has blocks of every kind.
    """
    width = 656
    ones = torch.ones(width, width // 16).to(torch.float8_e4m3fn)
    unit = e2m1.pack(2 * torch.eye(width, dtype=torch.uint8))  # the code of 1 is 2
    native, _ = both([WeightTensors(WeightFormat.NVFP4, unit, ones, torch.tensor(1.0))], "bf16")
    x = torch.randn(rows, width)
    x[:, 128:256] *= 2.0 ** torch.randint(-60, 60, (rows, 128))
    x[0, :16], x[0, 16:32] = torch.arange(16.0) * 255, torch.arange(16.0) * -255  # 255: all significant bits
    x[0, 32:48], x[0, 64], x[0, 300] = 0, 2.0**-15, 1e-30
    x[-1, 384:512], x[-1, 520], x[-1, 640:] = 1e30, 1e38, 1e-30
    assert torch.equal(cpu.linear(x.to(BF16), native), x.to(BF16))


@pytest.mark.parametrize("width", [144, 4112])
def test_w4a16_of_any_spread(path, width):
    """Activations of which 24 bits a block hold all, some or none; alone and with others that are held otherwise."""
    native, law = both([random_part(WeightFormat.NVFP4, 70, width)], "bf16")
    x = torch.randn(12, width)
    x[3:6] *= 2.0 ** torch.randint(-30, 30, (3, width))
    x[6:, ::200] *= 2.0**-20
    x[8, 5], x[9, width - 1], x[10, 128] = float("inf"), float("nan"), float("-inf")
    x = x.to(BF16)
    whole = cpu.linear(x, native)
    assert whole[8:11].isfinite().sum() == 0
    finite = [0, 1, 2, 3, 4, 5, 6, 7, 11]
    for row in finite:
        assert error(whole[row : row + 1], reference.linear(x[row : row + 1], law)) <= TWO_STEPS
        assert torch.equal(cpu.linear(x[row : row + 1], native), whole[row : row + 1])
    assert torch.equal(cpu.linear(x[2:6], native), whole[2:6])


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_w4a8_activations_are_bit_equal(path, rows):
    """Each block's products with a single weight of 1 are its integers times its scale, which BF16 keeps apart."""
    width = 272
    ones = torch.ones(width, width // 16).to(torch.float8_e4m3fn)
    unit = e2m1.pack(2 * torch.eye(width, dtype=torch.uint8))  # the code of 1 is 2
    native, _ = both([WeightTensors(WeightFormat.NVFP4, unit, ones, torch.tensor(1.0))], "int8")
    for magnitude in (1e-33, 1e-30, 1e-3, 1.0, 1e30):
        x = torch.randn(rows, width).to(BF16) * magnitude
        x[0, 16:32], x[0, 37], x[0, 48:64] = 0, 127 * magnitude, torch.arange(16.0) * magnitude + 0.5 * magnitude
        x[0, 63] = 127 * magnitude  # ties
        assert torch.equal(cpu.linear(x, native), int8.values(*int8.quantize(x)).to(BF16))


def test_w4a8_sums_of_a_block_are_exact(path):
    """The largest that there can be, of either sign: nothing saturates."""
    width = 512
    for code in (7, 15):  # 6 and -6
        packed = torch.full((5, width // 2), code * 17, dtype=torch.uint8)
        part = WeightTensors(
            WeightFormat.NVFP4, packed, torch.ones(5, width // 16).to(torch.float8_e4m3fn), torch.tensor(1.0)
        )
        native, _ = both([part], "int8")
        for sign in (1.0, -1.0):
            x = torch.full((3, width), 127.0 * sign).to(BF16)
            exact = torch.full((3, 5), 127 * sign * width * e2m1.VALUES[code % 8] * (-1 if code > 7 else 1))
            assert torch.equal(cpu.linear(x, native), exact.to(BF16))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_w4a8_keeps_what_is_not_finite(path, value):
    native, _ = both([random_part(WeightFormat.NVFP4, 9, 288)], "int8")
    x = torch.randn(3, 288).to(BF16)
    x[1, 17] = value
    y = cpu.linear(x, native)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 2e-3, 1.0, 1e4])
def test_quantize_activation_is_bit_equal(path, scale):
    for magnitude in (1e-20, 1e-3, 1.0, 1e3, 1e30):
        x = (torch.randn(9, 160) * magnitude).to(BF16)
        x[0], x[1, 3], x[2, 5], x[3, :16], x[4, 20] = 0, float("inf"), -0.0, 1e-38, float("nan")
        x[5, :16] = torch.tensor(e2m1.VALUES) * scale * 1.25  # ties
        packed, scales = cpu.quantize_activation(x, torch.tensor(scale))
        expected_packed, expected_scales = nvfp4.quantize_activation(x, torch.tensor(scale))
        assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8))
        assert torch.equal(packed, expected_packed)


@pytest.mark.parametrize(("weight_format", "activations"), FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize(("tokens", "k"), [(0, 2), (1, 1), (1, 4), (5, 3), (70, 4)])
def test_experts(path, weight_format, activations, tokens, k):
    experts, hidden, inner = 6, 272, 144
    gate_up = [random_part(weight_format, inner, hidden, experts) for _ in range(2)]
    down = [random_part(weight_format, hidden, inner, experts)]
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]) if tokens else torch.empty(0, k).long()
    if tokens > 2:
        ids[1] = -1  # a token none of whose experts are here
        ids[:, 0] = torch.where(torch.arange(tokens) > 4, 2, ids[:, 0])  # one expert with many rows
        ids[2, -1] = -1
    weights, x = torch.rand(tokens, k), torch.randn(tokens, hidden).to(BF16) * 0.1
    # Intermediate roundings to BF16 (or FP4) may tip: compare with the same formula on the decoded backend, too.
    (a, b), (c, d) = both(gate_up, activations), both(down, activations)
    if activations == "fp4":  # a hidden value that tips moves by up to a quarter: bound the mean instead
        actual, expected = cpu.experts_mlp(x, ids, weights, a, c), reference.experts_mlp(x, ids, weights, b, d)
        if tokens:
            assert (actual - expected).float().norm() <= 0.02 * expected.float().norm()
        return
    assert error(cpu.experts_mlp(x, ids, weights, a, c), reference.experts_mlp(x, ids, weights, b, d)) <= 2 * TWO_STEPS


@pytest.mark.parametrize("rows", [1, 4, 11, 29])
def test_a_row_does_not_depend_on_its_company(path, rows):
    """Bit-equal alone and in a batch of up to 32 rows: what makes greedy decoding the same with and without drafts."""
    for weight_format, activations in FORMATS:
        for width in (400, 4112):  # the wider one is taken in several turns where there are many rows
            native, _ = both([random_part(weight_format, 70, width)], activations)
            x = torch.randn(16 if weight_format is WeightFormat.PLAIN else 32, width).to(BF16)
            assert torch.equal(cpu.linear(x, native)[:rows], cpu.linear(x[:rows], native))
        x = torch.randn(16, 400).to(BF16)
        gate_up, _ = both([random_part(weight_format, 48, 400, 4) for _ in range(2)], activations)
        down, _ = both([random_part(weight_format, 400, 48, 4)], activations)
        ids, weights = torch.randint(0, 4, (16, 2)), torch.rand(16, 2)
        whole = cpu.experts_mlp(x, ids, weights, gate_up, down)
        assert torch.equal(whole[:rows], cpu.experts_mlp(x[:rows], ids[:rows], weights[:rows], gate_up, down))


@pytest.mark.parametrize("block", [64, 128, 192, 512])
@pytest.mark.parametrize("height", [1, 128])
def test_fp8_scale_blocks_of_other_sizes(path, height, block):
    """A scale a row comes as blocks one row high. A width of 192 does not fit the 256 inputs that few rows are
    multiplied in: such a row is not cut into turns.
    """
    out, width = 40, 4000
    codes = random_part(WeightFormat.FP8_BLOCK, out, width).weight
    scale = torch.rand(-(-out // height), -(-width // block)) + 0.5
    part = WeightTensors(WeightFormat.FP8_BLOCK, codes, scale, fp8_block=(height, block))
    native, law = both([part], "bf16")
    assert native.backend is cpu
    x = torch.randn(16, width).to(BF16)
    whole = cpu.linear(x, native)
    assert error(whole, reference.linear(x, law)) <= TWO_STEPS
    for rows in (1, 3, 8):
        assert torch.equal(whole[:rows], cpu.linear(x[:rows], native))


@pytest.mark.parametrize("block", [128, 64])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 32, 40])
def test_fp8_codes_among_normal_ones(path, rows, block):
    """Every zero, subnormal and NaN code alone among normal numbers, which are decoded in a shorter way: activations
    that are zero but for one show a weight exactly. A NaN makes its output NaN, whatever meets it.
    """
    width = 656  # 2 chunks of 256, a scale block of 128, and 16
    codes = torch.randint(8, 127, (36, width)) | torch.randint(0, 2, (36, width)) << 7
    others = torch.cat([torch.arange(8), torch.arange(128, 136), torch.tensor([127, 255])])
    at = torch.randperm(width)[: len(others)]
    codes[torch.arange(len(others)), at] = others
    codes[20, torch.randperm(width)[:200]] = torch.randint(0, 8, (200,))
    scale = torch.rand(1, -(-width // block)) + 0.5
    part = WeightTensors(
        WeightFormat.FP8_BLOCK, codes.to(torch.uint8).view(torch.float8_e4m3fn), scale, fp8_block=(128, block)
    )
    native, law = both([part], "bf16")
    x = torch.zeros(rows, width, dtype=BF16)
    x[torch.arange(rows), torch.cat([at, torch.randperm(width)])[:rows]] = 1.5
    y = cpu.linear(x, native)
    assert native.backend is cpu and y[:, 16:18].isnan().all()
    torch.testing.assert_close(y, reference.linear(x, law), rtol=0, atol=0, equal_nan=True)
    q = torch.zeros(rows, 1, 30, dtype=BF16)  # one head of 30 rows, of 36
    q[torch.arange(rows), 0, torch.arange(rows) % 30] = 1.5
    absorbed = cpu.absorb(q, native)
    assert absorbed[:, 0, at[16:18]].isnan().all() and absorbed.isnan().sum() == 2 * rows
    torch.testing.assert_close(absorbed, reference.absorb(q, law), rtol=0, atol=0, equal_nan=True)


def test_experts_whose_halves_have_different_backends():
    """Cut over eight ranks, a small model's down projection may be too narrow for the kernels, its gate is not."""
    gate_up = [random_part(WeightFormat.NVFP4, 48, 64, 4) for _ in range(2)]
    down = [random_part(WeightFormat.NVFP4, 64, 48, 4)]
    cpu_device = torch.device("cpu")

    def prepared(parts, backend):
        return ops.prepare(parts, cpu_device, BF16, backend=backend)

    ids, weights, x = torch.tensor([[0, 3], [1, -1]]), torch.rand(2, 2), torch.randn(2, 64).to(BF16) * 0.1
    expected = reference.experts_mlp(x, ids, weights, prepared(gate_up, "decoded"), prepared(down, "decoded"))
    for first, second in (("cpu", "decoded"), ("decoded", "cpu")):
        mixed = ops.experts_mlp(x, ids, weights, prepared(gate_up, first), prepared(down, second))
        assert error(mixed, expected) <= 2 * TWO_STEPS


def test_what_has_no_kernel_is_decoded():
    part = random_part(WeightFormat.NVFP4, 8, 32)
    assert ops.prepare([part], torch.device("cpu"), torch.float32).backend is decoded
    codes, scale = fp8_block.quantize(torch.randn(128, 128))
    cut = WeightTensors(
        WeightFormat.FP8_BLOCK, codes[:, :16], scale.repeat_interleave(8, 1)[:, :1], fp8_block=(128, 16)
    )
    prepared = ops.prepare([cut], torch.device("cpu"), BF16)
    assert prepared.backend is decoded
    assert ops.linear(torch.randn(2, 16).to(BF16), prepared).shape == (2, 128)


def test_wrong_input_is_refused():
    native, _ = both([random_part(WeightFormat.NVFP4, 8, 32)], "bf16")
    with pytest.raises(ValueError, match="BF16"):
        cpu.linear(torch.randn(2, 32), native)
    with pytest.raises(ValueError, match="no kernel path"), cpu.use_path("sse9"):
        pass


@pytest.mark.parametrize("weight_dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("rows", "out", "width"), [(0, 5, 8), (1, 1, 1), (3, 37, 259), (16, 256, 512), (30, 8, 64)])
def test_plain_linear(path, weight_dtype, rows, out, width):
    x, weight = torch.randn(rows, width + 3).to(BF16)[:, 3:], torch.randn(out, width, dtype=weight_dtype)
    limit = TWO_STEPS if weight_dtype is BF16 else 1e-5
    assert error(cpu.plain_linear(x, weight), reference.plain_linear(x, weight)) <= limit


@pytest.mark.parametrize(("weight_format", "activations"), FORMATS[:3], ids=FORMAT_IDS[:3])
@pytest.mark.parametrize("rows", [1, 40])
def test_gated_mlp(path, weight_format, activations, rows):
    (a, b), (c, d) = (
        both([random_part(weight_format, out, width) for _ in range(parts)], activations)
        for parts, out, width in ((2, 80, 272), (1, 272, 80))
    )
    x = torch.randn(rows, 272).to(BF16) * 0.1
    assert error(cpu.gated_mlp(x, a, c), reference.gated_mlp(x, b, d)) <= 2 * TWO_STEPS


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_scale_that_is_nan_is_not_read_as_a_number(experts, byte):
    weight = torch.randint(0, 256, (experts, 32, 32), dtype=torch.uint8)
    scale = torch.full((experts, 32, 4), 0x38, dtype=torch.uint8)
    scale[-1, 5, 2] = byte
    parts = [WeightTensors(WeightFormat.NVFP4, weight, scale.view(torch.float8_e4m3fn), torch.ones(experts))]
    if experts == 1:
        parts = [WeightTensors(WeightFormat.NVFP4, weight[0], scale[0].view(torch.float8_e4m3fn), torch.tensor(1.0))]
    prepared = ops.prepare(parts, torch.device("cpu"), torch.bfloat16)
    for expert in range(experts):
        y = prepared.backend.linear(torch.ones(3, 64).bfloat16(), prepared, *([expert] if experts > 1 else []))
        assert y[:, 5].isnan().all() == (expert == experts - 1)
