"""Bit for bit nvidia-modelopt 0.47.0: rounding, scales, packing, and every quantized linear of whole checkpoints."""

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
