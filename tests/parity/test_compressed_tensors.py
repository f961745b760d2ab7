"""Weights that the compressed-tensors package packed, read here: the values that it gives itself."""

import pytest
import torch
from safetensors.torch import save_file

from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.kernels.reference.linear import dequantized
from deepseek_fp4_plugin.layers.weight_source import IN, OUT, Cut, WeightSource
from deepseek_fp4_plugin.parallel.mesh import WHOLE, Shard

quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
from compressed_tensors.compressors import NVFP4PackedCompressor, unpack_fp4_from_uint8  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam  # noqa: E402

OUTPUTS, INPUTS = 96, 320
CUTS = [Cut(OUT, WHOLE), *(Cut(axis, Shard(part, 2)) for axis in (OUT, IN) for part in range(2))]


def read(folder, tensors: dict[str, torch.Tensor], cut: Cut):
    save_file(
        {f"up_proj.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return WeightSource(CheckpointReader(folder))._parts("up_proj", OUTPUTS, INPUTS, cut)


def sliced(weight: torch.Tensor, cut: Cut) -> torch.Tensor:
    start, stop = cut.shard.bounds(weight.shape[cut.axis], "up_proj")
    return weight.narrow(cut.axis, start, stop - start)


@pytest.mark.parametrize("cut", CUTS)
def test_nvfp4(tmp_path, cut):
    weight = torch.randn(OUTPUTS, INPUTS).bfloat16()
    scheme = quantization.preset_name_to_scheme("NVFP4", ["Linear"])
    blocks = weight.unflatten(1, (-1, 16))
    global_scale = generate_gparam(weight.min(), weight.max())
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    packed = NVFP4PackedCompressor.compress(state, scheme)
    theirs = dequantize(
        unpack_fp4_from_uint8(packed["weight_packed"], OUTPUTS, INPUTS, torch.float32),
        packed["weight_scale"].float(),
        args=scheme.weights,
        global_scale=packed["weight_global_scale"],
        dtype=torch.float32,
    )
    packed["input_global_scale"] = torch.tensor([400.0])
    part = read(tmp_path, packed, cut)
    # They divide by the global scale, here its inverse multiplies: two roundings of FP32 apart.
    torch.testing.assert_close(dequantized(part), sliced(theirs, cut), rtol=2**-22, atol=0)
    assert part.input_scale == 1 / 400


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_fp8(tmp_path, strategy, cut):
    weight = torch.randn(OUTPUTS, INPUTS)
    structure = {"block_structure": [128, 128]} if strategy == "block" else {}
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy=strategy, **structure)
    scale = {"tensor": weight.abs().amax().reshape(1), "channel": weight.abs().amax(1, keepdim=True),
             "block": torch.rand(1, 3) + 3}[strategy] / 448  # fmt: skip
    stored = quantize(weight, scale, torch.zeros_like(scale), args, dtype=torch.float8_e4m3fn)
    theirs = dequantize(stored, scale, args=args, dtype=torch.float32)
    part = read(tmp_path, {"weight": stored, "weight_scale": scale}, cut)
    assert torch.equal(dequantized(part), sliced(theirs, cut))


def test_projections_with_scales_of_different_kinds_are_not_fused(tmp_path):
    values = torch.ones(128, 128).to(torch.float8_e4m3fn)
    scales = {"gate_proj": torch.ones(128, 1), "up_proj": torch.ones(())}
    tensors = {f"{name}.weight": values.clone() for name in scales}
    save_file(
        tensors | {f"{name}.weight_scale": scale for name, scale in scales.items()}, tmp_path / "model.safetensors"
    )
    source = WeightSource(CheckpointReader(tmp_path))
    with pytest.raises(ValueError, match="must share format, size of scale blocks"):
        source.linear(tuple(scales), (128, 128), 128, CUTS[0])
