"""A source's weight to NVFP4 natively: every bit of plain torch's, on every instruction set."""

import pytest
import torch

from deepseek_fp4_plugin.kernels import cpu, reference
from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from deepseek_fp4_plugin.numerics.error import first_mismatch

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the native extension")
BLOCK = (128, 128)


def sources(rows: int, cols: int, scale: float) -> list:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * scale
    w[0, :64], w[1, 16:32] = 0, 1e-30
    w[2, 3] = -0.0
    return [fp8_block.quantize(w), (w.bfloat16(), None), (w, None)]


@pytest.mark.parametrize("scale", [1e-38, 1e-6, 1.0, 1e4, 1e37])
@pytest.mark.parametrize("shape", [(300, 272), (5, 16), (128, 1024)])
def test_every_bit_is_plain_torchs(path, shape, scale):
    for weight, scale_inv in sources(*shape, scale):
        amax = reference.weight_amax(weight, scale_inv, BLOCK)
        assert cpu.weight_amax(weight, scale_inv, BLOCK) == amax
        scale_2 = nvfp4.tensor_scale(amax)
        expected, signal, noise = reference.convert_weight(weight, scale_inv, BLOCK, scale_2)
        actual, *energies = cpu.convert_weight(weight, scale_inv, BLOCK, scale_2)
        assert first_mismatch(expected.packed, actual.packed) is None
        assert first_mismatch(expected.scale, actual.scale) is None
        assert energies == pytest.approx([signal, noise], rel=1e-6, abs=1e-70)


def test_every_code_of_a_byte_meets_every_rounding(path):
    """All E4M3 codes under many tensor scales: ties, saturation, subnormal block scales."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    weight = codes[torch.randperm(256 * 64, generator=torch.Generator().manual_seed(0)) % 256].view(64, 256)
    weight = weight.view(torch.float8_e4m3fn)
    for exponent in range(-30, 12, 3):
        scale_inv = torch.full((1, 2), 1.37)
        scale_2 = torch.tensor(1.1 * 2.0**exponent)
        expected = reference.convert_weight(weight, scale_inv, BLOCK, scale_2)[0]
        actual = cpu.convert_weight(weight, scale_inv, BLOCK, scale_2)[0]
        assert torch.equal(expected.packed, actual.packed)
        assert torch.equal(expected.scale.view(torch.uint8), actual.scale.view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen(path, bad):
    w = torch.ones(200, 160)
    weight, scale_inv = fp8_block.quantize(w)
    w[150, 130] = bad
    assert cpu.weight_amax(w.bfloat16(), None, BLOCK).isnan() and reference.weight_amax(w, None, BLOCK).isnan()
    broken = scale_inv.clone()
    broken[1, 1] = bad
    assert cpu.weight_amax(weight, broken, BLOCK).isnan() and reference.weight_amax(weight, broken, BLOCK).isnan()
    raw = weight.view(torch.uint8).clone()
    raw[3, 4] = 0xFF
    assert cpu.weight_amax(raw.view(torch.float8_e4m3fn), scale_inv, BLOCK).isnan()


def test_threads_change_nothing(path):
    weight, scale_inv = fp8_block.quantize(torch.randn(256, 512))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.convert_weight(weight, scale_inv, BLOCK, torch.tensor(0.001)))
    finally:
        torch.set_num_threads(before)
    for tensor, *energies in results[1:]:
        assert torch.equal(tensor.packed, results[0][0].packed) and energies == list(results[0][1:])


def test_what_the_kernel_does_not_serve_goes_to_plain_torch(path):
    """Blocks of FP8 scales that NVFP4's would cut through."""
    weight = torch.randn(16, 48).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(2, 6)
    scale_2 = torch.tensor(0.01)
    expected, actual = (b.convert_weight(weight, scale_inv, (8, 8), scale_2)[0] for b in (reference, cpu))
    assert torch.equal(expected.packed, actual.packed)
