"""Recipes beside nvidia-modelopt 0.47.0's own configurations, and `max` beside frozen results of 0.31.0."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_fp4_plugin.numerics import nvfp4
from deepseek_fp4_plugin.numerics.error import first_mismatch
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.recipe import InputStatistics, block_diagonal
from deepseek_fp4_plugin.quantization.recipes import RECIPES, four_over_six, max_modelopt_0_31
from deepseek_fp4_plugin.quantization.recipes.gptq import Gptq
from deepseek_fp4_plugin.quantization.recipes.hessian import output_errors
from deepseek_fp4_plugin.quantization.recipes.local_hessian import LocalHessian
from tests.unit.test_recipes import correlated_inputs, heavy_tailed

FROZEN = json.loads((Path(__file__).parent / "modelopt_0_31_0.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def calibrated():
    """ModelOpt's calibration of one weight; importing it takes seconds."""
    modelopt = pytest.importorskip("modelopt", reason="needs nvidia-modelopt 0.47.0: pip install -e .[test]")
    if not modelopt.__version__.startswith("0.47.0"):
        pytest.skip(f"modelopt {modelopt.__version__} is not 0.47.0")
    from tests.modelopt_calibration import calibrated

    return calibrated


def assert_same_bits(expected: NVFP4Tensor, actual: NVFP4Tensor) -> None:
    for name, left, right in zip(NVFP4Tensor._fields, expected, actual, strict=True):
        assert (problem := first_mismatch(left, right)) is None, f"{name}: {problem}"


def weights() -> Tensor:
    w = heavy_tailed(96, 128)
    w[3, 32:48] = 0
    w[5] *= 1e-4  # scales below the smallest
    w[7, :16] = w.abs().max() * 2
    return w


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_four_over_six_writes_the_bits_of_modelopts_configuration(calibrated, dtype):
    w = weights().to(dtype)
    theirs = calibrated(w, torch.randn(64, 128).to(dtype), "NVFP4_FOUR_OVER_SIX_CFG")
    assert_same_bits(theirs, four_over_six.quantize(w, w.abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mse_sweep_is_as_good_as_modelopts_sweep_of_all_codes(calibrated):
    w = weights()
    theirs = calibrated(w, torch.randn(64, 128), "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG")
    (ours,) = RECIPES["mse-sweep"].solve([w], None)
    assert torch.equal(ours.tensor.scale_2, theirs.scale_2)
    noise = float((nvfp4.dequantize(theirs) - w).square().sum())
    assert ours.rounding.noise <= 1.005 * noise


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_recipes_that_see_inputs_beat_modelopts_local_hessian_with_few_tokens(calibrated):
    """An expert with 24 tokens; its layer's other experts saw 2,000 of the same kind."""
    w, x = heavy_tailed(96, 128), correlated_inputs(4096, 128)
    few, layer, fresh = x[:24], x[24:2048], x[2048:]
    theirs = calibrated(w, few, "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG")
    theirs = output_errors(nvfp4.dequantize(theirs) - w, fresh).mean()
    a = 128 / (128 + len(few))
    hessian = (1 - a) * few.T @ few / len(few) + a * layer.T @ layer / len(layer)
    blocks = (1 - a) * block_diagonal(few) / len(few) + a * block_diagonal(layer) / len(layer)
    for recipe, moments, bound in ((LocalHessian(), blocks, 0.95), (Gptq(), hessian, 0.7)):
        (found,) = recipe.solve([w], InputStatistics(len(few), moments, layer[:4]))
        assert output_errors(nvfp4.dequantize(found.tensor) - w, fresh).mean() < bound * theirs


@pytest.mark.parametrize("case", FROZEN, ids=lambda case: case["why"])
def test_0_31_0_arithmetic_gives_the_frozen_bits(case):
    def tensor(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(case[name]), dtype=dtype).reshape(shape)

    rows, cols = case["shape"]
    w = tensor("weight", torch.bfloat16, rows, cols)
    expected = NVFP4Tensor(
        tensor("packed", torch.uint8, rows, cols // 2),
        tensor("weight_scale", torch.float8_e4m3fn, rows, cols // 16),
        tensor("weight_scale_2", torch.float32),
    )
    (solution,) = max_modelopt_0_31.MaxModelOpt031().solve([w], None)
    assert_same_bits(expected, solution.tensor)


def test_the_frozen_cases_tell_0_31_0_from_0_47_0():
    different = set()
    for case in FROZEN:
        w = torch.frombuffer(bytearray.fromhex(case["weight"]), dtype=torch.bfloat16).reshape(case["shape"])
        ours = nvfp4.quantize(w)
        for name, value in (("weight_scale_2", ours.scale_2), ("weight_scale", ours.scale), ("packed", ours.packed)):
            if bytes(value.reshape(-1).view(torch.uint8).tolist()).hex() != case[name]:
                different.add(name)
    assert different == {"weight_scale_2", "weight_scale", "packed"}
