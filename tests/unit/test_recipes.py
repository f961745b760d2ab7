"""Recipes on tensors alone: every result is valid NVFP4 and no worse than what it set out to beat."""

import pytest
import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics import e2m1, nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.recipe import InputStatistics, Recipe, Solution, block_diagonal
from deepseek_fp4_plugin.quantization.recipes import RECIPES, gptq, mse_sweep
from deepseek_fp4_plugin.quantization.recipes.gptq import Gptq, confirmed
from deepseek_fp4_plugin.quantization.recipes.hessian import diagonal_blocks, output_errors
from deepseek_fp4_plugin.quantization.recipes.local_hessian import LocalHessian
from deepseek_fp4_plugin.quantization.recipes.scale_search import max_codes, search, shared_scale

WITH_DATA = (RECIPES["local-hessian"], RECIPES["gptq"])
ALL = tuple(RECIPES.values())


def heavy_tailed(*shape: int) -> Tensor:
    return torch.distributions.StudentT(4.0).sample(shape) * 0.02


def correlated_inputs(rows: int, cols: int) -> Tensor:
    """Few directions carry most of the energy, and some channels are large, as in a trained model."""
    mix = torch.linalg.qr(torch.randn(cols, cols))[0] * (torch.arange(cols) + 1.0) ** -0.7
    x = torch.randn(rows, cols) @ mix.T
    x[:, :: cols // 4] *= 8
    return x


def statistics(x: Tensor, recipe: Recipe, held_out: int = 64) -> InputStatistics:
    rows = x[held_out:]
    hessian = block_diagonal(rows) if isinstance(recipe, LocalHessian) else rows.T @ rows
    return InputStatistics(rows.shape[0], hessian / rows.shape[0], x[:held_out])


def solve(recipe: Recipe, weights: list[Tensor], x: Tensor, held_out: int = 64) -> list[Solution]:
    inputs = statistics(x, recipe, held_out) if recipe in WITH_DATA else None
    return recipe.solve([w.to(recipe.weight_dtype) for w in weights], inputs)


def squared_error(w: Tensor, q: NVFP4Tensor) -> Tensor:
    """Of every block of 16."""
    return (nvfp4.dequantize(q) - w).square().unflatten(-1, (-1, 16)).sum(-1)


def test_rounding_to_values_is_decoding_what_was_encoded():
    x = torch.cat([torch.linspace(-9, 9, 36_001), torch.randn(10_000) * 3, torch.tensor([1e-30, -1e-30, 0.0, 1e30])])
    for midpoint in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):
        tie = torch.tensor(midpoint)
        x = torch.cat([x, torch.stack([tie, -tie, tie.nextafter(tie * 2), tie.nextafter(tie * 0)])])
    assert torch.equal(e2m1.round_to_values(x), e2m1.decode(e2m1.encode(x)))


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_every_recipe_writes_valid_nvfp4_of_one_tensor_scale(recipe):
    gate, up = heavy_tailed(48, 64), heavy_tailed(32, 64) * 3
    gate[5, 16:32] = 0
    found = solve(recipe, [gate, up], correlated_inputs(256, 64))
    for w, solution in zip((gate, up), found, strict=True):
        packed, scale, scale_2 = solution.tensor
        assert (packed.dtype, packed.shape) == (torch.uint8, (w.shape[0], 32))
        assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (w.shape[0], 4))
        assert (scale_2.dtype, scale_2.shape) == (torch.float32, ())
        codes = scale.view(torch.uint8)
        assert ((codes >= 1) & (codes <= 126)).all(), "a scale that is zero, negative or NaN"
        noise = (nvfp4.dequantize(solution.tensor) - w.to(recipe.weight_dtype).float()).square().sum()
        assert solution.rounding.noise == pytest.approx(float(noise), rel=1e-4)
    assert torch.equal(found[0].tensor.scale_2, found[1].tensor.scale_2)
    zeros = nvfp4.dequantize(found[0].tensor)[5, 16:32]
    assert recipe.name == "gptq" or not zeros.any()  # gptq may use them to make up for others' errors


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_the_same_arguments_give_the_same_bits_and_stay_as_they_are(recipe):
    w, x = heavy_tailed(32, 64), correlated_inputs(128, 64)
    before = w.clone(), x.clone()
    first, second = (solve(recipe, [w], x)[0].tensor for _ in range(2))
    assert torch.equal(first.packed, second.packed)
    assert torch.equal(first.scale.view(torch.uint8), second.scale.view(torch.uint8))
    assert torch.equal(w, before[0]) and torch.equal(x, before[1])


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_a_weight_of_zeros_stays_one(recipe):
    for inputs in (correlated_inputs(128, 64), torch.zeros(128, 64)):
        (solution,) = solve(recipe, [torch.zeros(16, 64)], inputs)
        assert not nvfp4.dequantize(solution.tensor).any()
        assert not solution.tensor.scale.float().isnan().any()


def test_mse_sweep_is_in_no_block_worse_than_max():
    w = torch.cat([heavy_tailed(64, 128), torch.randn(64, 128)])
    scale_2 = shared_scale([w])
    ours = squared_error(w, search(w, scale_2, mse_sweep.OFFSETS))
    largest = squared_error(w, nvfp4.quantize(w, scale_2))
    assert (ours <= largest * (1 + 1e-6)).all()
    assert ours.sum() < 0.8 * largest.sum()


def test_mse_sweep_finds_what_all_codes_find():
    w = torch.cat([heavy_tailed(64, 128), torch.randn(64, 128)])
    scale_2 = shared_scale([w])
    window, everything = (squared_error(w, search(w, scale_2, r)).sum() for r in (mse_sweep.OFFSETS, range(-125, 126)))
    assert len(mse_sweep.OFFSETS) * 12 <= 126
    assert everything <= window <= 1.005 * everything


def test_a_weight_on_the_grid_keeps_its_values():
    codes = torch.randint(0, 16, (16, 64), dtype=torch.uint8)
    codes[:, ::16] = 7
    grid = NVFP4Tensor(e2m1.pack(codes), (torch.rand(16, 4) * 400 + 40).to(torch.float8_e4m3fn), torch.tensor(0.5))
    w = nvfp4.dequantize(grid)
    w[0, 0] = 6 * 448 * 0.5  # so that the tensor scale is found again
    for found in (search(w, shared_scale([w]), mse_sweep.OFFSETS), nvfp4.quantize(w)):
        assert torch.equal(nvfp4.dequantize(found)[1:], w[1:])


def test_local_hessian_is_in_no_block_worse_than_max_in_its_own_measure():
    w, x = heavy_tailed(64, 128), correlated_inputs(512, 128)
    blocks = block_diagonal(x) / len(x)
    (solution,) = LocalHessian().solve([w], InputStatistics(len(x), blocks, x[:0]))

    def loss(q: NVFP4Tensor) -> Tensor:
        error = (nvfp4.dequantize(q) - w).unflatten(-1, (-1, 16))
        return torch.einsum("rbi,bij,rbj->rb", error, blocks, error)

    ours, largest = loss(solution.tensor), loss(nvfp4.quantize(w))
    assert (ours <= largest * (1 + 1e-4) + 1e-12).all()
    assert ours.sum() < 0.8 * largest.sum()


def test_the_diagonal_blocks_of_a_hessian_are_the_block_hessian():
    x = torch.randn(40, 64)
    torch.testing.assert_close(diagonal_blocks(x.T @ x), block_diagonal(x), rtol=1e-5, atol=1e-4)


def test_recipes_that_know_the_inputs_make_less_output_error_on_inputs_they_did_not_see():
    w, x = heavy_tailed(128, 128), correlated_inputs(2048, 128)
    x, fresh = x[:1024], x[1024:]
    error = {}
    for recipe in (RECIPES["max"], RECIPES["mse-sweep"], *WITH_DATA):
        (solution,) = solve(recipe, [w], x)
        error[recipe.name] = output_errors(nvfp4.dequantize(solution.tensor) - w, fresh).mean() ** 0.5
    assert error["mse-sweep"] < 0.95 * error["max"]
    assert error["local-hessian"] < 0.9 * error["mse-sweep"]
    assert error["gptq"] < 0.85 * error["local-hessian"]


def test_gptq_with_uncorrelated_inputs_is_the_mse_sweep():
    """No column can make up for another's error, and every column counts the same."""
    w = heavy_tailed(32, 64)
    scale_2 = shared_scale([w])
    found, expected = gptq.quantize(w, scale_2, torch.eye(64)), search(w, scale_2, mse_sweep.OFFSETS)
    assert torch.equal(nvfp4.dequantize(found), nvfp4.dequantize(expected))


def test_gptq_of_stacked_experts_is_each_on_its_own():
    w = torch.stack([heavy_tailed(32, 64), torch.randn(32, 64), torch.zeros(32, 64)])
    x = torch.stack([correlated_inputs(200, 64) * (i + 1) for i in range(3)])
    x[1, :, 7] = 0  # an input that is always zero
    hessian = x.mT @ x / 200
    scale_2 = nvfp4.tensor_scale(w.abs().amax((1, 2)))
    stacked = gptq.quantize(w, scale_2, hessian)
    for i in range(3):
        alone = gptq.quantize(w[i], scale_2[i], hessian[i])
        assert (stacked.packed[i] != alone.packed).float().mean() < 0.01  # sums of products in another order
        assert (stacked.scale[i].view(torch.uint8) != alone.scale.view(torch.uint8)).float().mean() < 0.01


def test_gptq_takes_local_hessian_where_held_out_inputs_do_not_confirm_it():
    """Each projection is judged on its own: the rows held out of one Hessian go where it says that errors are free."""
    w, x = [heavy_tailed(48, 64), heavy_tailed(48, 64)], correlated_inputs(512, 64)
    hessian = x.T @ x / 512
    rare = torch.linalg.eigh(hessian).eigenvectors[:, :4].T
    for held_out, choice in ((x[:64], "gptq"), (rare, "local-hessian"), (x[:0], "local-hessian")):
        found = Gptq().solve(w, InputStatistics(512, hessian, held_out))
        assert [solution.choice for solution in found] == [choice, choice]
    safe = LocalHessian().solve(w, InputStatistics(512, diagonal_blocks(hessian), x[:0]))
    assert all(torch.equal(a.tensor.packed, b.tensor.packed) for a, b in zip(found, safe, strict=True))


def test_gptq_must_win_by_more_than_chance():
    """Rows on which both rounding errors are alike on average say nothing, however many; a clear gain says enough."""
    w, rows = torch.zeros(1, 16), torch.zeros(40, 16)
    packed = torch.zeros(1, 8, dtype=torch.uint8)
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    first, second = packed.clone(), packed.clone()
    first[0, 0], second[0, 0] = 0x02, 0x20  # weights 1 in column 0, in column 1
    safe, bold = (NVFP4Tensor(values, one, torch.ones(())) for values in (first, second))
    rows[::2, 0] = rows[1::2, 1] = 1.0
    assert not confirmed(w, safe, bold, rows)
    rows[1, 1] = 0.9  # a gain, and far within its standard error
    assert not confirmed(w, safe, bold, rows)
    rows[1::2, 1] = 0.1
    assert confirmed(w, safe, bold, rows)
    rows[:, 0] = rows[:, 1] = 1.0
    rows[:, 1] = 0.9  # every row the same gain of 19 %
    assert confirmed(w, safe, bold, rows) and not confirmed(w, safe, bold, rows[:1])
    rows[:, 1] = 0.5
    assert confirmed(w, safe, bold, rows[:1])


def test_gptq_refuses_moments_that_are_not_finite():
    hessian = torch.eye(64)
    hessian[3, 3] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        gptq.quantize(torch.randn(16, 64), torch.tensor(0.1), hessian)


def test_input_scales_of_searched_recipes_are_a_power_of_two_above_max():
    amax = torch.tensor(3.7)
    for recipe in ALL:
        factor = float(recipe.input_scale(amax) / RECIPES["max"].input_scale(amax))
        assert factor == (8.0 if recipe.name in ("mse-sweep", "local-hessian", "gptq") else 1.0)


def test_a_roomy_input_scale_rounds_inputs_as_the_tight_one_does():
    x = torch.randn(64, 128) * torch.logspace(-2, 1, 64).unsqueeze(1)
    tight, roomy = (recipe.input_scale(x.abs().max()) for recipe in (RECIPES["max"], RECIPES["mse-sweep"]))
    first, second = (
        nvfp4.dequantize(NVFP4Tensor(*nvfp4.quantize_activation(x, scale), scale)) for scale in (tight, roomy)
    )
    assert torch.equal(first, second)


def test_max_codes_are_those_of_max():
    w = heavy_tailed(8, 64)
    quantized = nvfp4.quantize(w)
    found = max_codes(w.unflatten(-1, (-1, 16)), quantized.scale_2)
    assert torch.equal(found.to(torch.uint8), quantized.scale.view(torch.uint8))
