"""A quantized checkpoint back to BF16 and FP8: the values that runtimes compute with, and files that others open."""

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.json_files import read_json
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.cli.app import run
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from deepseek_fp4_plugin.quantization import dequantize as module
from deepseek_fp4_plugin.quantization.dequantize import dequantize_checkpoint
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from tests.stops import SETTINGS, contents, small  # noqa: F401 (fixture)

UP, O_PROJ = "model.layers.1.mlp.experts.3.up_proj", "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def quantized(small, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("quantized") / "nvfp4"
    quantize_checkpoint(small, folder, **SETTINGS)
    return folder


def nvfp4_values(folder) -> torch.Tensor:
    reader = CheckpointReader(folder)
    parts = [reader.get(f"{UP}.{name}") for name in ("weight", "weight_scale", "weight_scale_2")]
    return nvfp4.dequantize(nvfp4.NVFP4Tensor(*parts))


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_the_values_are_those_of_the_runtime(quantized, tmp_path, monkeypatch, to):
    monkeypatch.setattr(module, "_PIECE", 128 * 64)  # several pieces a weight
    dequantize_checkpoint(quantized, tmp_path / "out", to=to, max_shard_bytes=150_000)
    reader, values = CheckpointReader(tmp_path / "out"), nvfp4_values(quantized)
    if to == "bf16":
        assert torch.equal(reader.get(f"{UP}.weight"), values.bfloat16())
        assert torch.equal(reader.get(f"{O_PROJ}.weight"), CheckpointReader(quantized).get(f"{O_PROJ}.weight"))
        assert not any(name.endswith("scale_inv") for name in reader)
    else:
        weight, scale_inv = fp8_block.quantize(values)
        assert torch.equal(reader.get(f"{UP}.weight").view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(reader.get(f"{UP}.weight_scale_inv"), scale_inv)
    section = read_json(tmp_path / "out" / "config.json").get("quantization_config")
    assert section is None if to == "bf16" else section["quant_method"] == "fp8"
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    batch = ForwardBatch.from_sequences([[5, 6, 7, 8, 9]])
    logits = []
    with torch.inference_mode():
        for folder in (quantized, tmp_path / "out"):
            model = DeepseekV3ForCausalLM.from_pretrained(folder, backend="reference")
            logits.append(model.compute_logits(model(batch)).float())
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert error < (0.02 if to == "bf16" else 0.2), error


def test_an_fp8_source_becomes_bf16_and_can_be_quantized_to_the_same_weights(small, quantized, tmp_path):  # noqa: F811
    dequantize_checkpoint(small, tmp_path / "bf16")
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "again", **SETTINGS)
    for name in CheckpointReader(quantized):
        ours, again = (CheckpointReader(folder).get(name) for folder in (quantized, tmp_path / "again"))
        if not name.endswith("input_scale"):  # products with BF16 weights round otherwise
            assert torch.equal(ours.reshape(-1).view(torch.uint8), again.reshape(-1).view(torch.uint8)), name


def test_a_stopped_run_goes_on_to_the_same_bytes(quantized, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dequantize_checkpoint(quantized, tmp_path / "out", max_shard_bytes=150_000, progress=stop)
    dequantize_checkpoint(quantized, tmp_path / "out", max_shard_bytes=150_000)
    dequantize_checkpoint(quantized, tmp_path / "whole", max_shard_bytes=150_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_cannot_be_done_is_one_sentence(quantized, tmp_path, capsys):
    dequantize_checkpoint(quantized, tmp_path / "bf16")
    with pytest.raises(CheckpointError, match="is not quantized; there is nothing to dequantize"):
        dequantize_checkpoint(tmp_path / "bf16", tmp_path / "out")
    with pytest.raises(ValueError, match="cannot dequantize to 'int4'; choose from bf16, fp8"):
        dequantize_checkpoint(quantized, tmp_path / "out", to="int4")
    with pytest.raises(CheckpointError, match="is NVFP4 already; quantize the FP8 or BF16 original instead"):
        quantize_checkpoint(quantized, tmp_path / "out", **SETTINGS)
    assert run(["dequantize", str(quantized), str(tmp_path / "fp8"), "--to", "fp8"]) == 0
    assert "became" in capsys.readouterr().out
