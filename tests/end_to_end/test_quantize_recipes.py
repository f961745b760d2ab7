"""Whole checkpoints under every recipe: the same tensors, other programs read them, a stopped run ends the same."""

from pathlib import Path

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.numerics import nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.quantization.recipes import RECIPES
from tests.stops import SETTINGS, contents, small  # noqa: F401 (fixture)

SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale")


@pytest.fixture(scope="module")
def made(small, tmp_path_factory) -> dict[str, Path]:  # noqa: F811
    folder = tmp_path_factory.mktemp("recipes")
    for name in RECIPES:
        quantize_checkpoint(small, folder / name, **{**SETTINGS, "recipe": name})
    return {name: folder / name for name in RECIPES}


def modules(reader: CheckpointReader) -> list[str]:
    return [name.removesuffix(".weight_scale") for name in reader.tensors if name.endswith(".weight_scale")]


def test_every_recipe_writes_the_same_names_dtypes_and_shapes(made):
    readers = {name: CheckpointReader(path) for name, path in made.items()}
    expected = {name: (i.dtype, i.shape) for name in readers["max"].tensors for i in [readers["max"].info(name)]}
    for reader in readers.values():
        assert {name: (i.dtype, i.shape) for name in reader.tensors for i in [reader.info(name)]} == expected


def test_only_quantized_tensors_differ(made):
    readers = {name: CheckpointReader(path) for name, path in made.items()}
    quantized = {f"{module}.{suffix}" for module in modules(readers["max"]) for suffix in SUFFIXES}
    for name in set(readers["max"].tensors) - quantized:
        assert all(torch.equal(reader.get(name), readers["max"].get(name)) for reader in readers.values()), name
    for name in ("four-over-six", "mse-sweep", "local-hessian", "gptq"):
        packed = [not torch.equal(readers[name].get(n), readers["max"].get(n)) for n in quantized if ".weight" in n]
        assert any(packed), name


def test_gate_and_up_share_their_tensor_scale_and_experts_their_input_scale(made):
    for path in made.values():
        reader = CheckpointReader(path)
        for module in modules(reader):
            if module.endswith("gate_proj"):
                up = module.replace("gate_proj", "up_proj")
                for suffix in ("weight_scale_2", "input_scale"):
                    assert reader.get(f"{module}.{suffix}") == reader.get(f"{up}.{suffix}") > 0
            if ".experts." in module and ".experts.0." not in module:
                first = ".experts.0.".join((module.split(".experts.")[0], module.rpartition(".")[2]))
                assert reader.get(f"{module}.input_scale") == reader.get(f"{first}.input_scale")


def test_the_card_says_how_inputs_were_seen_and_scaled(made):
    cards = {name: " ".join((path / "README.md").read_text(encoding="utf-8").split()) for name, path in made.items()}
    for name, card in cards.items():
        assert f"recipe `{name}`" in card
        assert ("through the source's own weights" in card) == (name not in ("local-hessian", "gptq"))
        assert ("8 times what the largest input needs" in card) == (name not in ("max", "four-over-six"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_modelopts_tensor_class_decodes_every_recipe_to_our_values(made):
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt 0.47.0: pip install -e .[test]")
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    for path in made.values():
        reader = CheckpointReader(path)
        for module in modules(reader):
            packed, scale, scale_2 = (reader.get(f"{module}.{suffix}") for suffix in SUFFIXES[:3])
            shape = torch.Size((packed.shape[0], packed.shape[1] * 2))
            theirs = NVFP4QTensor(shape, torch.float32, packed)
            theirs = theirs.dequantize(scale=scale, double_scale=scale_2, block_sizes={-1: 16})
            assert torch.equal(theirs, nvfp4.dequantize(NVFP4Tensor(packed, scale, scale_2)))


@pytest.mark.parametrize(("stage", "at"), [("calibrate", 1), ("convert", 20)])
def test_a_stopped_run_of_gptq_ends_with_the_same_bytes(small, made, tmp_path, stage, at):  # noqa: F811
    """Layers that were written before the stop are read again, since the next ones stand on them."""

    stopped: list[int] = []

    def stop(where: str, done: int, total: int) -> None:
        if where == stage and at <= done < total and not stopped:
            stopped.append(done)
            raise KeyboardInterrupt

    arguments = {**SETTINGS, "recipe": "gptq"}
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(small, tmp_path / "gptq", **arguments, progress=stop)
    quantize_checkpoint(small, tmp_path / "gptq", **arguments)
    assert contents(tmp_path / "gptq") == contents(made["gptq"])
