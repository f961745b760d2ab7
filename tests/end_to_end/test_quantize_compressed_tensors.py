"""`quantize --format compressed-tensors`: the bits of the ModelOpt format, read by the package and here."""

import pytest
import torch

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import INDEX_NAME, CheckpointReader, read_json
from deepseek_fp4_plugin.cli.app import run
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.examination import examine
from deepseek_fp4_plugin.models.inventory import weights
from deepseek_fp4_plugin.numerics import nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.dequantize import dequantize_checkpoint
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from tests.stops import SETTINGS, contents, small  # noqa: F401 (fixture)

FORM = {**SETTINGS, "format": "compressed-tensors"}


@pytest.fixture(scope="module")
def pair(small, tmp_path_factory):  # noqa: F811
    """The same weights in ModelOpt's format and in that of compressed-tensors."""
    folder = tmp_path_factory.mktemp("formats")
    quantize_checkpoint(small, folder / "modelopt", **SETTINGS)
    quantize_checkpoint(small, folder / "compressed", **FORM)
    return folder / "modelopt", folder / "compressed"


def stored(folder) -> dict[str, torch.Tensor]:
    """The tensors under the names that the files give them."""
    from safetensors.torch import load_file

    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def nvfp4_modules(tensors) -> list[str]:
    return [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]


def test_the_same_bits_under_other_names(pair):
    ours, theirs = map(stored, pair)
    modules = nvfp4_modules(theirs)
    assert len(modules) == sum(name.endswith(".weight_scale_2") for name in ours) > 20
    for module in modules:
        assert torch.equal(theirs.pop(f"{module}.weight_packed"), ours.pop(f"{module}.weight"))
        scale, expected = theirs.pop(f"{module}.weight_scale"), ours.pop(f"{module}.weight_scale")
        assert torch.equal(scale.view(torch.uint8), expected.view(torch.uint8))
        for name, own in (("weight_global_scale", "weight_scale_2"), ("input_global_scale", "input_scale")):
            inverse = theirs.pop(f"{module}.{name}")
            assert inverse.shape == (1,) and inverse == 1 / ours.pop(f"{module}.{own}")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_index_and_config(pair):
    folder = pair[1]
    assert read_json(folder / INDEX_NAME)["weight_map"].keys() == stored(folder).keys()
    assert not (folder / "hf_quant_config.json").exists()
    section = read_json(folder / "config.json")["quantization_config"]
    assert section["quant_method"] == "compressed-tensors" and section["format"] == "nvfp4-pack-quantized"
    assert "nvfp4-pack-quantized" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_package_reads_the_config_as_its_own_preset(pair):
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.utils.match import match_name

    folder = pair[1]
    read = quantization.QuantizationConfig.model_validate(read_json(folder / "config.json")["quantization_config"])
    scheme, preset = read.config_groups["group_0"], quantization.preset_name_to_scheme("NVFP4", ["Linear"])
    assert (scheme.weights, scheme.input_activations) == (preset.weights, preset.input_activations)
    assert read.quantization_status == "compressed" and read.kv_cache_scheme.num_bits == 8
    four_bit = set(nvfp4_modules(stored(folder)))
    for weight in weights(DeepseekV3Config.from_folder(folder)):
        ignored = any(match_name(weight.module, pattern) for pattern in read.ignore)
        if weight.linear or weight.module.endswith((".gate", "head")):
            assert ignored != (weight.module in four_bit), weight.name


@pytest.mark.slow
def test_the_package_decodes_to_our_values(pair):
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import NVFP4PackedCompressor

    scheme, tensors = quantization.preset_name_to_scheme("NVFP4", ["Linear"]), stored(pair[1])
    reader, modelopt = map(CheckpointReader, reversed(pair))
    suffixes = ("weight", "weight_scale", "weight_scale_2")
    for module in nvfp4_modules(tensors):
        state = {name: tensors[f"{module}.{name}"] for name in ("weight_packed", "weight_scale", "weight_global_scale")}
        theirs = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
        for source in (reader, modelopt):
            ours = nvfp4.dequantize(NVFP4Tensor(*(source.get(f"{module}.{suffix}") for suffix in suffixes)))
            assert torch.equal(theirs, ours.to(theirs.dtype)), module


def test_it_is_read_generated_from_and_taken_back(pair, tmp_path, capsys):
    modelopt, compressed = pair
    assert [finding.sentence for finding in examine(compressed).findings] == [
        finding.sentence.replace(str(modelopt), str(compressed)) for finding in examine(modelopt).findings
    ]
    assert run(["inspect", str(compressed)]) == 0
    assert "NVFP4" in capsys.readouterr().out
    prompts, greedy = [[5, 6, 7, 8], [300, 2]], SamplingParams(temperature=0.0, max_tokens=8)
    ids = []
    for folder in pair:
        with LLM(str(folder)) as llm:
            ids.append([output.outputs[0].token_ids for output in llm.generate(prompts, greedy)])
    assert ids[0] == ids[1]
    for folder in pair:
        dequantize_checkpoint(folder, tmp_path / f"back-{folder.name}")
    back = [stored(tmp_path / f"back-{folder.name}") for folder in pair]
    assert back[0].keys() == back[1].keys()
    assert all(torch.equal(back[0][name], back[1][name]) for name in back[0])
    with pytest.raises(CheckpointError, match="NVFP4 already"):
        quantize_checkpoint(compressed, tmp_path / "again", **SETTINGS)


def test_a_stopped_run_ends_with_the_same_bytes(small, tmp_path):  # noqa: F811
    """gptq computes layers with the weights it wrote; they must be the same whether they come from memory or disk."""
    stopped: list[int] = []

    def stop(where: str, done: int, total: int) -> None:
        if where == "convert" and done >= 20 and not stopped:
            stopped.append(done)
            raise KeyboardInterrupt

    arguments = {**FORM, "recipe": "gptq"}
    quantize_checkpoint(small, tmp_path / "whole", **arguments)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(small, tmp_path / "stopped" / "whole", **arguments, progress=stop)
    quantize_checkpoint(small, tmp_path / "stopped" / "whole", **arguments)
    assert contents(tmp_path / "stopped" / "whole") == contents(tmp_path / "whole")


def test_an_unknown_format_is_refused(small, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="format 'gguf' is unknown; choose from modelopt, compressed-tensors"):
        quantize_checkpoint(small, tmp_path / "out", **{**SETTINGS, "format": "gguf"})
