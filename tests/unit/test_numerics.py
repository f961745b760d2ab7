"""NVFP4, E2M1, FP8 blocks and the tiled scale layout."""

import pytest
import torch

from deepseek_fp4_plugin.numerics import e2m1, fp8_block, fp8_rows, int8, nvfp4, scale_layout


def all_finite_bf16() -> torch.Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    return values[torch.isfinite(values)]


def test_e2m1_rounds_every_bf16_value_to_the_nearest_code_with_ties_to_even():
    x = all_finite_bf16()
    distances = (x.abs().double().clamp(max=8).unsqueeze(1) - torch.tensor(e2m1.VALUES[:8], dtype=torch.float64)).abs()
    best = distances.min(1).values
    nearest = distances == best.unsqueeze(1)
    # Among equally near codes take the even one.
    preference = torch.where(nearest, torch.arange(8) % 2, 2)
    expected = preference.argmin(1).to(torch.uint8)
    assert torch.equal(e2m1.encode(x) & 7, expected)
    assert torch.equal(e2m1.encode(x) >> 3, (x < 0).to(torch.uint8))


def test_e2m1_special_values():
    x = torch.tensor([-0.0, -1e-30, float("inf"), float("-inf"), float("nan"), 5.0, 5.0001])
    assert e2m1.encode(x).tolist() == [0, 8, 7, 15, 7, 6, 7]


def test_pack_puts_the_even_element_in_the_low_nibble():
    assert e2m1.pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    with pytest.raises(ValueError, match="odd"):
        e2m1.pack(torch.zeros(3, dtype=torch.uint8))


def test_zero_tensor_gets_unit_scales_and_dequantizes_to_zero():
    q = nvfp4.quantize(torch.zeros(2, 32, dtype=torch.bfloat16))
    assert q.scale.view(torch.uint8).unique().tolist() == [0x38]
    assert nvfp4.dequantize(q).abs().max() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(bad):
    w = torch.ones(1, 16)
    w[0, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        nvfp4.quantize(w)


def test_block_values_are_exact_in_bf16():
    codes = torch.arange(16, dtype=torch.uint8)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed = e2m1.pack(codes).expand(126, 8)
    exact = nvfp4.block_values(packed, scales.unsqueeze(1))
    assert torch.equal(nvfp4.block_values(packed, scales.unsqueeze(1), torch.bfloat16).float(), exact)


def test_quantizing_nvfp4_values_again_changes_nothing():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    once = nvfp4.quantize(w)
    twice = nvfp4.quantize(nvfp4.dequantize(once), once.scale_2)
    assert torch.equal(nvfp4.dequantize(once), nvfp4.dequantize(twice))


def test_activation_rounding_keeps_a_zero_block_at_scale_zero():
    packed, scale = nvfp4.quantize_activation(torch.zeros(1, 16), torch.tensor(0.01))
    assert scale.view(torch.uint8).tolist() == [[0]]
    assert packed.sum() == 0


def test_int8_is_the_nearest_integer_of_each_block_with_ties_to_even():
    """Against FP64; where the FP32 quotient itself is a rounding away from a tie, either neighbour may be meant."""
    x = (torch.randn(300, 64) * torch.logspace(-20, 20, 300).unsqueeze(1)).to(torch.bfloat16)
    integers, scale = int8.quantize(x)
    blocks = x.double().unflatten(-1, (-1, 16))
    amax = blocks.abs().amax(-1, keepdim=True)
    quotients = blocks * 127 / amax
    off = (integers.double().unflatten(-1, (-1, 16)) - quotients).abs()
    assert off.max() <= 0.5 + 1e-4
    assert (integers.unflatten(-1, (-1, 16)).abs().amax(-1) == 127).all()
    assert torch.equal(scale, (amax.squeeze(-1).float() / 127))
    assert ((int8.values(integers, scale).double() - x.double()).unflatten(-1, (-1, 16)).abs() <= amax / 253).all()
    ties = torch.arange(-127.0, 128.0, 1.0)[:240] + 0.5
    held = torch.cat([ties.unflatten(0, (-1, 15)), torch.full((16, 1), 127.0)], 1)  # so that each block's scale is 1
    assert torch.equal(int8.quantize(held)[0], held.round().to(torch.int8))


def test_int8_of_nothing_and_of_what_is_no_number():
    x = torch.zeros(1, 80)
    x[0, 16:32], x[0, 33], x[0, 50], x[0, 66] = 1e-31, float("inf"), float("nan"), -0.5
    integers, scale = int8.quantize(x)
    assert integers.unique().tolist() == [-127, 0] and integers[0, 66] == -127
    assert scale[0, :2].tolist() == [0, 0] and scale[0, 2:4].isnan().all() and scale[0, 4] == torch.tensor(0.5) / 127


def test_fp8_rows_are_the_nearest_numbers_under_the_largest_scale():
    """Against FP64, number by number; where the FP32 quotient is a rounding away from a tie, either may be meant."""
    x = (torch.randn(300, 72) * torch.logspace(-20, 20, 300).unsqueeze(1)).to(torch.bfloat16)
    numbers, scale = fp8_rows.quantize(x)
    amax = x.double().abs().amax(-1, keepdim=True)
    assert torch.equal(scale, amax.squeeze(-1).float() / 448)
    assert (numbers.float().abs().amax(-1) == 448).all()
    legal = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    legal = legal[legal.isfinite()]
    quotients = x.double() * 448 / amax
    nearest = (quotients.unsqueeze(-1) - legal).abs().amin(-1)
    assert ((numbers.double() - quotients).abs() <= nearest * (1 + 1e-5) + 1e-6).all()
    assert (
        (fp8_rows.values(numbers, scale).double() - x.double()).abs() <= x.double().abs() / 15.9 + amax / 2**18
    ).all()


def test_fp8_rows_of_nothing_and_of_what_is_no_number():
    x = torch.zeros(5, 16)
    x[1, 3], x[2, 3], x[3, 3], x[4, 3] = 1e-31, float("inf"), float("nan"), -0.5
    numbers, scale = fp8_rows.quantize(x)
    assert numbers[:2].float().abs().max() == 0 and scale[:2].tolist() == [0, 0] and scale[2:4].isnan().all()
    assert numbers[4, 3] == -448 and scale[4] == torch.tensor(0.5) / 448


def test_fp8_keeps_nvfp4_weights_but_for_odd_multiples():
    """Every code under every block scale: four significant bits of up to six; powers of two times a scale are exact."""
    scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = e2m1.decode(torch.arange(16, dtype=torch.uint8))
    exact = scale.unsqueeze(1) * codes
    rounded = fp8_rows.rounded_weights(exact)
    normal = exact.abs() >= fp8_rows.WEIGHT_SCALE * 2.0**-6
    assert ((rounded - exact).abs() <= exact.abs() / 17)[normal].all()
    power = torch.isin(codes.abs(), torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0])).expand_as(exact)
    assert torch.equal(rounded[power & normal], exact[power & normal])
    assert (rounded - exact)[~normal].abs().max() == 0.125
    assert 0 < (rounded != exact)[normal & ~power].float().mean() < 1
    assert torch.equal(fp8_rows.rounded_weights(exact.bfloat16()), rounded.bfloat16())


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 5), (256, 448)])
def test_tiled_scales_round_trip_and_follow_the_documented_offset(shape):
    rows, k = shape
    scale = torch.randint(0, 120, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tiled = scale_layout.to_tiled(scale)
    assert torch.equal(scale_layout.from_tiled(tiled, rows, k).view(torch.uint8), scale.view(torch.uint8))
    m, c = rows - 1, k - 1
    offset = (m // 128) * -(-k // 4) * 512 + (c // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + c % 4
    assert tiled.view(torch.uint8)[offset] == scale.view(torch.uint8)[m, c]


def test_fp8_blocks_round_trip_on_ragged_shapes():
    w = torch.randn(130, 200, generator=torch.Generator().manual_seed(1))
    weight, scale = fp8_block.quantize(w)
    assert scale.shape == (2, 2)
    error = (fp8_block.dequantize(weight, scale, torch.float32) - w).norm() / w.norm()
    assert error < 0.04
    with pytest.raises(ValueError, match="blocks of 128"):
        fp8_block.dequantize(weight, scale[:1])
