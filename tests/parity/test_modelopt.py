"""Bit for bit nvidia-modelopt 0.47.0: rounding, scales, packing, and every quantized linear of whole checkpoints."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.hub import embedded_folder
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat, detect_format
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader, read_json
from deepseek_fp4_plugin.numerics import e2m1, nvfp4
from deepseek_fp4_plugin.numerics.error import first_mismatch
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.calibration_data import load_calibration
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.tokenizer import Tokenizer
from tests.tiny import tiny_config, write_checkpoint
from tests.unit.test_numerics import all_finite_bf16
from training.tokenizer import write_tokenizer

modelopt = pytest.importorskip("modelopt", reason="needs nvidia-modelopt 0.47.0: pip install -e .[test]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not modelopt.__version__.startswith("0.47.0"), reason=f"modelopt {modelopt.__version__} is not 0.47.0"
    ),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def theirs():
    """ModelOpt's NVFP4 tensor class; importing it takes seconds."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    return NVFP4QTensor


def by_modelopt(theirs, w: Tensor, scale_2: Tensor | None = None) -> NVFP4Tensor:
    data, scale, scale_2 = theirs.quantize(w.clone(), 16, weights_scaling_factor_2=scale_2)
    return NVFP4Tensor(data._quantized_data, scale, scale_2)


def assert_same_bits(expected: NVFP4Tensor, actual: NVFP4Tensor, where: str = "") -> None:
    for name, left, right in zip(NVFP4Tensor._fields, expected, actual, strict=True):
        assert (problem := first_mismatch(left, right)) is None, f"{where} {name}: {problem}"


def one_outlier(dtype: torch.dtype) -> Tensor:
    """Every other block's scale falls below the smallest subnormal of E4M3."""
    w = torch.randn(16, 128) * 1e-4
    w[3, 77] = 1000.0
    return w.to(dtype)


def ties(dtype: torch.dtype) -> Tensor:
    """Quotients that fall exactly on every midpoint, both signs: block scale and tensor scale are powers of two."""
    midpoints = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    values = torch.tensor([6.0, *midpoints, *[-m for m in midpoints], -6.0])
    rows = [values * 2.0**-k for k in range(9)]
    rows[0] = rows[0] * 448  # amax 2688: scale_2 is 1
    return torch.stack(rows).to(dtype)


def subnormal_scales(dtype: torch.dtype) -> Tensor:
    """Block scales across E4M3's whole range, ties between its subnormals among them; amax 2688, scale_2 is 1."""
    scales = torch.cat((torch.arange(1, 4096) * 2.0**-13, torch.tensor([448.0])))
    return (torch.linspace(-6, 6, 16) * scales.unsqueeze(1)).to(dtype)


def negative_zeros(dtype: torch.dtype) -> Tensor:
    w = torch.randn(4, 64)
    w[:, ::3] = -0.0
    w[:, 1::3] *= 1e-6  # negative numbers that round to zero keep their sign
    w[1, :16] = -0.0
    return w.to(dtype)


def extreme(dtype: torch.dtype) -> Tensor:
    """Smallest and largest finite magnitudes of the dtype side by side."""
    info = torch.finfo(dtype)
    return torch.tensor([info.max, info.smallest_normal, -info.max, 0.0] * 8).reshape(2, 16).to(dtype)


def tiny_values(dtype: torch.dtype) -> Tensor:
    """scale_2 itself is subnormal in FP32."""
    return torch.linspace(-1, 1, 64).reshape(2, 32).to(dtype) * 2.0**-120


TENSORS = {
    "normal": lambda dtype: torch.randn(64, 512).to(dtype),
    "one outlier": one_outlier,
    "ties": ties,
    "E4M3 subnormal scales": subnormal_scales,
    "negative zero": negative_zeros,
    "extreme": extreme,
    "scale_2 subnormal": tiny_values,
    "some zero blocks": lambda dtype: (
        (torch.randn(8, 16, 16) * (torch.arange(16) % 3 > 0).view(1, -1, 1)).flatten(1).to(dtype)
    ),
    "3-D experts": lambda dtype: (torch.randn(6, 32, 64) * torch.logspace(-3, 3, 6).view(-1, 1, 1)).to(dtype),
    "one row of one block": lambda dtype: torch.randn(1, 16).to(dtype),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS.keys())
def test_adversarial_tensors(theirs, make, dtype):
    w = make(dtype)
    assert torch.isfinite(w).all() and w.abs().max() > 0
    assert_same_bits(by_modelopt(theirs, w), nvfp4.quantize(w))


def test_many_random_tensors(theirs):
    """Heavy tails and all magnitudes, FP32 and BF16: single differing roundings of the scale formulas would show."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        tails = torch.distributions.StudentT(3.0).sample((32, 256))
        w = tails * 10 ** (torch.rand(32, 1, generator=generator) * 6 - 4)
        for dtype in (torch.bfloat16, torch.float32):
            assert_same_bits(by_modelopt(theirs, w.to(dtype)), nvfp4.quantize(w.to(dtype)))


def test_a_tensor_scale_from_elsewhere(theirs):
    """gate and up share the larger one's scale, so the smaller one's blocks do not reach 448; nor may they pass it."""
    w = torch.randn(16, 64).bfloat16()
    for factor in (7.0, 1.0, 0.3):
        scale_2 = nvfp4.tensor_scale(w.abs().amax()) * factor
        assert_same_bits(by_modelopt(theirs, w, scale_2), nvfp4.quantize(w, scale_2))


def test_stacked_experts_with_a_scale_each(theirs):
    w = torch.randn(4, 16, 64).bfloat16() * torch.tensor([1.0, 10.0, 0.1, 3.0]).view(-1, 1, 1).bfloat16()
    stacked = nvfp4.quantize(w, nvfp4.tensor_scale(w.abs().amax((1, 2))))
    for expert in range(4):
        single = NVFP4Tensor(stacked.packed[expert], stacked.scale[expert], stacked.scale_2[expert])
        assert_same_bits(by_modelopt(theirs, w[expert]), single, f"expert {expert}")


def test_e2m1_rounding_of_every_finite_bf16_value(theirs):
    x = all_finite_bf16()
    assert x.numel() == 2**16 - 2 * 2**7
    assert torch.equal(theirs._cast_fp4(x.float()), e2m1.encode(x))


def test_e2m1_rounding_around_every_fp32_midpoint(theirs):
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = torch.cat([midpoints.view(torch.int32) + step for step in range(-3, 4)]).view(torch.float32)
    x = torch.cat((near, -near, torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, -1e-45])))
    assert torch.equal(theirs._cast_fp4(x.clone()), e2m1.encode(x))


def quantized_modules(reader: CheckpointReader) -> Iterator[str]:
    for name in reader:
        if name.endswith(".weight_scale_2"):
            module = name.removesuffix(".weight_scale_2")
            assert detect_format(reader, module) is WeightFormat.NVFP4
            yield module


def bf16_source(reader: CheckpointReader, module: str) -> Tensor:
    """A source weight as DeepSeek's own weight_dequant computes it, written out again here."""
    weight = reader.get(f"{module}.weight")
    if weight.dtype == torch.bfloat16:
        return weight
    scale = reader.get(f"{module}.weight_scale_inv").repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (weight.float() * scale[: weight.shape[0], : weight.shape[1]]).bfloat16()


def assert_checkpoint_is_modelopts(theirs, source: Path, result: Path, expected_modules: int) -> None:
    before, after = CheckpointReader(source), CheckpointReader(result)
    modules = list(quantized_modules(after))
    assert len(modules) == expected_modules
    for module in modules:
        w = bf16_source(before, module)
        amax = w.abs().amax()
        head, _, projection = module.rpartition(".")
        if projection in ("gate_proj", "up_proj"):
            other = "up_proj" if projection == "gate_proj" else "gate_proj"
            amax = torch.maximum(amax, bf16_source(before, f"{head}.{other}").abs().amax())
        expected = by_modelopt(theirs, w, theirs.get_weights_scaling_factor_2(amax))
        actual = NVFP4Tensor(*(after.get(f"{module}.{part}") for part in ("weight", "weight_scale", "weight_scale_2")))
        assert_same_bits(expected, actual, module)


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_every_quantized_linear_of_the_tiny_model(theirs, tiny_with_tokenizer, tmp_path, layout):
    result = tmp_path / "nvfp4"
    quantize_checkpoint(tiny_with_tokenizer, result, calibration="builtin", samples=4, tokens=64, layout=layout)
    # one dense layer, two with 16 routed experts and a shared one, three projections each; v2: three o_proj
    assert_checkpoint_is_modelopts(theirs, tiny_with_tokenizer, result, 3 + 2 * 17 * 3 + (3 if layout == "v2" else 0))


def test_every_quantized_linear_of_r1_nano(theirs, tmp_path):
    if not (embedded_folder() / "config.json").is_file():
        pytest.skip("this checkout has no embedded r1_nano")
    result = tmp_path / "nvfp4"
    report = quantize_checkpoint("r1_nano", result, calibration="builtin", samples=2, tokens=64)
    assert_checkpoint_is_modelopts(theirs, embedded_folder(), result, report.quantized_modules)


def exported_by_modelopt(source: Path, folder: Path, samples: list[list[int]]) -> Path:
    """The same job by ModelOpt: transformers' model, its MLP-only configuration, its Hugging Face exporter."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with torch.inference_mode():
        model = mtq.quantize(model, mtq.NVFP4_MLP_ONLY_CFG, lambda m: m(torch.tensor(samples)))
        export_hf_checkpoint(model, export_dir=folder)
    return folder


def test_the_exporter_writes_the_same_checkpoint(tmp_path):
    """Names, dtypes, shapes and bits of every tensor of the main model, input scales to the rounding of two models."""
    pytest.importorskip("transformers")
    source = write_checkpoint(tmp_path / "bf16", tiny_config(vocab_size=1024), fp8=False)
    write_tokenizer(source)
    settings = {"samples": 8, "tokens": 128}
    quantize_checkpoint(source, tmp_path / "ours", calibration="builtin", **settings)
    data = load_calibration("builtin", Tokenizer.from_folder(source), vocab_size=1024, **settings)
    ours = CheckpointReader(tmp_path / "ours")
    theirs = CheckpointReader(exported_by_modelopt(source, tmp_path / "theirs", data.samples))

    main = [name for name in ours if not name.startswith("model.layers.3.")]  # it does not export the MTP layer
    assert sorted(theirs) == sorted(main)
    for name in main:
        if name.endswith(".input_scale"):
            torch.testing.assert_close(ours.get(name), theirs.get(name), rtol=0.02, atol=0)
        else:
            assert (problem := first_mismatch(theirs.get(name), ours.get(name))) is None, f"{name}: {problem}"

    written, expected = (read_json(tmp_path / side / "hf_quant_config.json") for side in ("ours", "theirs"))
    assert written["producer"] == expected["producer"]
    differing = {"exclude_modules", "kv_cache_quant_algo"}  # ours: the published list, and the cache dtype asked for
    assert {k: v for k, v in written["quantization"].items() if k not in differing} == {
        k: v for k, v in expected["quantization"].items() if k not in differing
    }
    section, theirs_section = (
        read_json(tmp_path / side / "config.json")["quantization_config"] for side in ("ours", "theirs")
    )
    assert section.pop("kv_cache_scheme") == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert {k: v for k, v in section.items() if k != "ignore"} == {
        k: v for k, v in theirs_section.items() if k != "ignore"
    }


# The rows of docs/format.md's table "Where others differ". 0.31.0 does not import beside this torch (its NVFP4 code is
# a closed library); its formulas, as that table gives them, are written out here.


def test_difference_tensor_scale(theirs):
    """0.31.0 divides by 6 and then by 448: up to one ulp away from the one division that 0.47.0 and we make."""
    amax = (1 + torch.arange(128) / 128).bfloat16()  # every BF16 significand
    ours = torch.stack([nvfp4.tensor_scale(a) for a in amax])
    assert torch.equal(ours, torch.stack([theirs.get_weights_scaling_factor_2(a) for a in amax]))
    old = amax.float() / 6.0 / 448.0
    apart = (ours.view(torch.int32) - old.view(torch.int32)).abs()
    assert apart.max() == 1 and 0 < (apart == 1).sum() < 128


def test_difference_block_scale_formula(theirs):
    """0.31.0 computes (block amax / 6) / scale_2: rarely the other side of a rounding of E4M3, then one step apart."""
    block_amax = torch.arange(0x3C00, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    bytes_apart = []
    for amax in (1 + torch.arange(128) / 128).bfloat16() * 4:
        scale_2 = nvfp4.tensor_scale(amax)
        ours = nvfp4.block_scales(block_amax, scale_2).view(torch.uint8)
        blocks = torch.nn.functional.pad(block_amax.unsqueeze(1), (0, 15))
        assert torch.equal(ours, by_modelopt(theirs, blocks, scale_2).scale.flatten().view(torch.uint8))
        old = ((block_amax.float() / 6.0) / scale_2).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
        bytes_apart.append((ours.int() - old.view(torch.uint8).int()).abs())
    apart = torch.cat(bytes_apart)
    assert apart.max() == 1 and (apart == 1).float().mean() < 0.01


def test_difference_small_block_scales(theirs):
    """0.31.0 lets a scale below 2^-10 become 0; 0.47.0 and we keep the smallest subnormal, byte 0x01."""
    w = torch.zeros(3, 16).bfloat16()
    w[0, 0], w[1, 0], w[2, 0] = 2688.0, 6 * 2.0**-10, 6 * 2.0**-14  # scale_2 is 1
    quantized = nvfp4.quantize(w)
    assert quantized.scale.view(torch.uint8).flatten().tolist() == [0x7E, 0x01, 0x01]
    assert_same_bits(by_modelopt(theirs, w), quantized)
    assert (w[:, :1].float().abs() / 6).to(torch.float8_e4m3fn).view(torch.uint8).flatten().tolist() == [0x7E, 0, 0]


def test_difference_all_zero_tensor(theirs):
    """0.47.0 divides 0 by 0: scales NaN, codes 7. We write scale 1.0 and codes 0, and it decodes to zero."""
    w = torch.zeros(2, 32).bfloat16()
    by_them = by_modelopt(theirs, w)
    assert torch.isnan(by_them.scale.float()).all()
    assert by_them.packed.unique().tolist() == [0x77]
    ours = nvfp4.quantize(w)
    assert ours.scale.view(torch.uint8).unique().tolist() == [0x38]
    assert ours.packed.unique().tolist() == [0] and ours.scale_2 == 0
    assert nvfp4.dequantize(ours).unique().tolist() == [0]


def test_difference_zero_block(theirs):
    """A zero block of a weight has scale 1.0 everywhere; a zero block of run-time activations has scale byte 0."""
    w = torch.randn(2, 32).bfloat16()
    w[:, 16:] = 0
    quantized = nvfp4.quantize(w)
    assert_same_bits(by_modelopt(theirs, w), quantized)
    assert quantized.scale.view(torch.uint8)[:, 1].tolist() == [0x38, 0x38]
    packed, scale = nvfp4.quantize_activation(w, quantized.scale_2)
    assert scale.view(torch.uint8)[:, 1].tolist() == [0, 0] and not packed[:, 8:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_difference_nan_and_infinity(theirs, bad):
    """0.47.0 writes codes whatever comes (NaN becomes 6.0); we refuse."""
    w = torch.ones(1, 16)
    w[0, 3] = bad
    by_modelopt(theirs, w)
    with pytest.raises(ValueError, match="cannot hold NaN or infinity"):
        nvfp4.quantize(w)


def test_difference_vanishing_tensor_scale(theirs):
    """FP32 below 2688 * 2^-150: scale_2 is zero. We treat the tensor as zero; 0.47.0 mixes NaN scales and codes 7."""
    w = torch.zeros(1, 32)
    w[0, 0] = 1e-43
    assert nvfp4.tensor_scale(w.abs().amax()) == 0
    assert torch.isnan(by_modelopt(theirs, w).scale.float()).any()
    assert nvfp4.dequantize(nvfp4.quantize(w)).unique().tolist() == [0]


def test_difference_width(theirs):
    """0.47.0 pads rows to whole blocks with zeros; we refuse (no DeepSeek weight needs it)."""
    w = torch.ones(2, 24)
    assert by_modelopt(theirs, w).scale.shape == (2, 2)
    with pytest.raises(ValueError, match=r"multiple of 16, got shape \[2, 24\]"):
        nvfp4.quantize(w)


def test_difference_order_of_dequantization(theirs):
    """Block scale times tensor scale first, as 0.47.0; kernels that go from left to right differ in the last bit."""
    w = torch.randn(64, 256).bfloat16()
    data, scale, scale_2 = theirs.quantize(w.clone(), 16)
    by_them = data.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    ours = nvfp4.dequantize(nvfp4.quantize(w))
    assert torch.equal(by_them.reshape(ours.shape), ours)  # as numbers: see minus zero
    left_to_right = nvfp4.block_values(data._quantized_data, scale) * scale_2
    assert not torch.equal(left_to_right, ours)
    torch.testing.assert_close(left_to_right, ours, rtol=3e-7, atol=0)


def test_difference_minus_zero(theirs):
    """Code 8 is stored alike; 0.47.0 decodes it to 0.0 and we to -0.0, the same number."""
    w = torch.tensor([[6.0, -0.1] * 8]).bfloat16()
    quantized = nvfp4.quantize(w)
    assert_same_bits(by_modelopt(theirs, w), quantized)
    assert e2m1.unpack(quantized.packed)[0, 1] == 8
    data, scale, scale_2 = theirs.quantize(w.clone(), 16)
    by_them = data.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    assert [torch.signbit(t.flatten()[1]).item() for t in (by_them, nvfp4.dequantize(quantized))] == [False, True]


def test_difference_run_time_activations():
    """Ours is the kernels' precise variant; their fast one and the weight formula round a few values otherwise."""
    x = torch.randn(512, 256).bfloat16()
    input_scale = nvfp4.tensor_scale(x.abs().amax() * 1.3)
    packed, scale = nvfp4.quantize_activation(x, input_scale)
    blocks = x.float().unflatten(-1, (-1, 16))
    amax, factor = blocks.abs().amax(-1), 1 / input_scale
    precise = (amax * (factor * torch.tensor(1 / 6))).to(torch.float8_e4m3fn)
    assert torch.equal(precise.view(torch.uint8), scale.view(torch.uint8))
    codes = e2m1.encode(blocks * (1 / (precise.float() * (1 / factor))).unsqueeze(-1)).flatten(-2)
    assert torch.equal(e2m1.pack(codes), packed)

    fast = (factor * (amax * torch.tensor(1 / 6))).to(torch.float8_e4m3fn)
    as_weight = nvfp4.quantize(x, input_scale)
    for other in (fast, as_weight.scale):
        apart = (other.view(torch.uint8).int() - scale.view(torch.uint8).int()).abs()
        assert apart.max() <= 1 and (apart == 1).float().mean() < 0.01
    differing = (e2m1.unpack(as_weight.packed).int() - codes.int()).abs()
    assert differing.max() <= 1 and (differing == 1).float().mean() < 0.01


def test_every_row_of_the_differences_has_its_test():
    """docs/format.md names the test that proves each row; the names are those of tests that exist."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "format.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    defined = set()
    for path in (root / "tests").rglob("test_*.py"):
        defined |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M))
    assert named <= defined, named - defined
    assert {name for name in globals() if name.startswith("test_difference_")} <= named
