"""Odd and damaged checkpoints through `quantize`, `generate` and `inspect`: the right bits, or one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_fp4_plugin.checkpoint.quant_config import QuantConfig
from deepseek_fp4_plugin.checkpoint.reader import INDEX_NAME, CheckpointReader
from deepseek_fp4_plugin.checkup.diagnosis import diagnose
from deepseek_fp4_plugin.cli.app import run
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.numerics import fp8_block
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint

SETTINGS = {"calibration": "builtin", "samples": 4, "tokens": 32}
FLAGS = ["--calibration", "builtin", "--samples", "4", "--tokens", "32"]
EXPERT = "model.layers.1.mlp.experts.3.up_proj"
Tensors = dict[str, torch.Tensor]


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def changed(source: Path, folder: Path, edit=None, **config) -> Path:
    """A copy in one file, with tensors and config.json's fields changed (... removes a field)."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX_NAME))
    tensors = tensors_of(source)
    if edit:
        edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return folder


@pytest.fixture(scope="module")
def source(tiny_with_tokenizer) -> Path:
    return tiny_with_tokenizer


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "nvfp4"
    quantize_checkpoint(source, folder, **SETTINGS)
    return folder


def same_tensors(first: Path, second: Path) -> bool:
    ours, theirs = tensors_of(first), tensors_of(second)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8))
        for name in ours
    )


def logits(folder: Path) -> torch.Tensor:
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.inference_mode():
        return model.compute_logits(model(ForwardBatch.from_sequences([list(range(40))])))


def all_say(capsys, folder: Path, message: str, commands=("quantize", "generate", "inspect")) -> None:
    """Each command says it; those that need the weights end with status 1 and that one sentence."""
    for command in commands:
        arguments = {
            "quantize": [str(folder), str(folder.parent / "out"), *FLAGS],
            "generate": [str(folder), "12+7=", "--max-new-tokens", "4"],
            "inspect": [str(folder)],
        }[command]
        status = run([command, *arguments])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        assert message in shown.out + shown.err, (command, shown)
        if command != "inspect":
            lines = [line for line in shown.err.splitlines() if not line.startswith("loading")]
            assert status == 1 and len(lines) == 1, (command, shown)
    assert not (folder.parent / "out").exists() and not list(folder.parent.glob("out.*"))


# ---------------------------------------------------------------- read right


@pytest.fixture(scope="module")
def powers_of_two(source, tmp_path_factory) -> Path:
    """The FP8 source with its scales rounded up to powers of two, in FP32, and what becomes of it."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name] = torch.exp2(tensors[name].log2().ceil())

    place = tmp_path_factory.mktemp("powers")
    quantize_checkpoint(changed(source, place / "fp32", edit), place / "nvfp4", **SETTINGS)
    return place


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=["U8", "F8_E8M0"])
def test_exponent_scales_are_the_numbers_they_stand_for(powers_of_two, tmp_path, dtype):
    """Bit for bit what the same scales in FP32 give, quantized and run."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name] = (tensors[name].log2() + 127).to(torch.uint8).view(dtype)

    folder = changed(powers_of_two / "fp32", tmp_path / "exponents", edit)
    quantize_checkpoint(folder, tmp_path / "nvfp4", **SETTINGS)
    assert same_tensors(tmp_path / "nvfp4", powers_of_two / "nvfp4")
    assert torch.equal(logits(folder), logits(powers_of_two / "fp32"))


def test_an_fp8_head_embedding_and_router_are_decoded(source, tmp_path):
    """The engine reads them unquantized; stored in FP8 they are not taken for numbers."""
    names = ["lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]

    def edit(tensors: Tensors) -> None:
        for name in names:
            weight, scale = fp8_block.quantize(tensors[f"{name}.weight"])
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = weight, scale

    def decode(tensors: Tensors) -> None:
        for name in names:
            tensors[f"{name}.weight"] = fp8_block.dequantize(
                *fp8_block.quantize(tensors[f"{name}.weight"]), torch.float32
            )

    fp8, plain = changed(source, tmp_path / "fp8", edit), changed(source, tmp_path / "plain", decode)
    assert torch.equal(logits(fp8), logits(plain))


def test_tensor_scales_of_shape_one(quantized, tmp_path, capsys):
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("weight_scale_2", "input_scale"))]:
            tensors[name] = tensors[name].reshape(1)

    folder = changed(quantized, tmp_path / "ones", edit)
    assert torch.equal(logits(folder), logits(quantized))
    for flags in ([], ["--nvfp4-activations", "fp4"]):
        assert run(["generate", str(folder), "12+7=", "--max-new-tokens", "4", *flags]) == 0
        found = capsys.readouterr().out
        assert run(["generate", str(quantized), "12+7=", "--max-new-tokens", "4", *flags]) == 0
        assert capsys.readouterr().out == found
    assert run(["inspect", str(folder)]) == 0


def test_shards_in_a_subfolder(source, quantized, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(source, folder)
    index = json.loads((folder / INDEX_NAME).read_text())
    (folder / "sub").mkdir()
    for shard in sorted(set(index["weight_map"].values()))[1:]:
        (folder / shard).rename(folder / "sub" / shard)
        index["weight_map"] = {k: f"sub/{v}" if v == shard else v for k, v in index["weight_map"].items()}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert torch.equal(logits(folder), logits(source))
    quantize_checkpoint(folder, tmp_path / "out", **SETTINGS)
    assert same_tensors(tmp_path / "out", quantized)
    assert run(["inspect", str(folder)]) == 0 and "error" not in capsys.readouterr().out.lower()


def test_the_copy_that_the_index_names_is_quantized(source, tmp_path, caplog):
    folder, name = tmp_path / "overlaid", "model.layers.1.self_attn.o_proj"
    shutil.copytree(source, folder)
    held = [f"{name}.weight", f"{name}.weight_scale_inv"]
    zeros = {tensor: torch.zeros_like(tensors_of(source)[tensor]) for tensor in held}
    save_file(zeros, folder / "abliterated.safetensors")  # sorts before the shards
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"].update(dict.fromkeys(held, "abliterated.safetensors"))
    (folder / INDEX_NAME).write_text(json.dumps(index))
    quantize_checkpoint(folder, tmp_path / "out", **SETTINGS)
    assert not CheckpointReader(tmp_path / "out").get(f"{name}.weight").any()
    assert "is read from abliterated.safetensors, as model.safetensors.index.json says; the copy in" in caplog.text


# ---------------------------------------------------------------- MTP and what is dropped


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def without_mtp(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.3.")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("edit", "count", "message", "kept"),
    [
        (without_mtp, 1, "counts 1 MTP layer (num_nextn_predict_layers), but no tensor of model.layers.3 is here", 0),
        (None, 0, "tensors of model.layers.3", 0),
        (None, ..., "does not say num_nextn_predict_layers; model.layers.3 is taken as the MTP layer", 1),
    ],
    ids=["tensors gone", "not counted", "key absent"],
)
def test_config_card_lists_and_tensors_agree_on_the_mtp_layer(source, tmp_path, caplog, edit, count, message, kept):
    folder = changed(source, tmp_path / "source", edit, num_nextn_predict_layers=count)
    result = tmp_path / "out"
    quantize_checkpoint(folder, result, **SETTINGS)
    assert message in caplog.text
    assert config_of(result)["num_nextn_predict_layers"] == kept
    assert any(name.startswith("model.layers.3.") for name in CheckpointReader(result)) is bool(kept)
    assert QuantConfig.from_folder(result, {}).excludes("model.layers.3") is bool(kept)
    card = (result / "README.md").read_text()
    assert ("the MTP layer included" in card) is bool(kept)
    assert ("with a multi-token-prediction layer" in card) is bool(kept)
    assert ("without a multi-token-prediction layer" in card) is not bool(kept)
    caplog.clear()
    assert (DeepseekV3ForCausalLM.from_pretrained(result).mtp is not None) is bool(kept)
    assert caplog.text == ""  # what was written agrees with itself


def test_an_mtp_file_that_the_index_does_not_name_is_said(source, tmp_path, caplog):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    tensors, index = tensors_of(source), json.loads((folder / INDEX_NAME).read_text())
    mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")}
    for shard in set(index["weight_map"].values()):
        held = {n: t for n, t in load_file(folder / shard).items() if n not in mtp}
        save_file(held, folder / shard) if held else (folder / shard).unlink()
    save_file(mtp, folder / "mtp.safetensors")
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if name not in mtp}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    quantize_checkpoint(folder, tmp_path / "out", **SETTINGS)
    assert f"mtp.safetensors is not named by {INDEX_NAME} and not used: it holds {len(mtp)} tensors" in caplog.text
    assert "but no tensor of model.layers.3 is here" in caplog.text
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0


def test_what_a_result_is_without_is_said(source, tmp_path, caplog):
    def edit(tensors: Tensors) -> None:
        for layer in range(4):
            name = f"model.layers.{layer}.self_attn"
            tensors[f"{name}.k_scale"], tensors[f"{name}.v_scale"] = torch.ones(()), torch.ones(())
            tensors[f"{name}.rotary_emb.inv_freq"] = torch.ones(8)

    folder = changed(source, tmp_path / "source", edit)
    quantize_checkpoint(folder, tmp_path / "out", **SETTINGS)
    assert "k_scale in" in caplog.text and "a scale of the K/V cache" in caplog.text
    assert "(7 more like it), and the result is without" in caplog.text
    assert "inv_freq in" in caplog.text and "(3 more like it), and the result is without" in caplog.text
    caplog.clear()
    DeepseekV3ForCausalLM.from_pretrained(folder)
    assert caplog.text == ""


def test_fields_that_are_not_known_are_said_once(source, tmp_path, caplog):
    folder = changed(source, tmp_path / "odd", use_qk_norm=True)
    DeepseekV3ForCausalLM.from_pretrained(folder)
    assert caplog.text.count("does not know and does not use: use_qk_norm") == 1


# ---------------------------------------------------------------- other programs' forms


def as_compressed_tensors(tensors: Tensors) -> None:
    names = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
    for name in list(tensors):
        module, _, suffix = name.rpartition(".")
        if suffix in names:
            tensors[f"{module}.{names[suffix]}"] = 1 / tensors.pop(name).reshape(1)
        elif tensors[name].dtype == torch.uint8:
            tensors[f"{module}.weight_packed"] = tensors.pop(name)


def test_compressed_tensors_nvfp4_is_read_and_named(quantized, tmp_path, capsys):
    ignore = config_of(quantized)["quantization_config"]["ignore"]
    section = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ignore}
    folder = changed(quantized, tmp_path / "packed", as_compressed_tensors, quantization_config=section)
    (folder / "hf_quant_config.json").unlink()
    assert torch.allclose(logits(folder), logits(quantized), atol=1e-4)  # 1 / (1 / x) may be the next number
    for activations in ("bf16", "fp4"):
        assert run(["generate", str(folder), "12+7=", "--max-new-tokens", "4", "--nvfp4-activations", activations]) == 0
    content = inspected(folder, capsys)
    assert content["quantization"]["algorithm"] == "NVFP4"
    (experts,) = (row for row in content["modules"] if row["module"] == "routed experts")
    assert experts["format"] == "nvfp4 packed"
    assert set(experts["scales"]) == {"weight_scale", "weight_global_scale", "input_global_scale"}
    assert content["findings"] == content["missing"] == content["other tensors"] == []
    all_say(capsys, folder, "is NVFP4 already (compressed-tensors' weight_packed)", commands=["quantize"])
    assert [str(finding) for finding in diagnose(folder).findings] == []


def inspected(folder: Path, capsys) -> dict:
    capsys.readouterr()
    assert run(["inspect", str(folder), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


FP8_SCALES = {
    "tensor": lambda weight, scale: scale.mean(),
    "row": lambda weight, scale: torch.rand(weight.shape[0], 1).bfloat16() * 0.01,
    "block": lambda weight, scale: scale,
}


@pytest.mark.parametrize("grain", FP8_SCALES)
def test_fp8_with_weight_scale(source, tmp_path, capsys, grain):
    """Quantized and run as the plain weights that the scales stand for."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            weight = name.removesuffix("_scale_inv")
            tensors[f"{weight}_scale"] = FP8_SCALES[grain](tensors[weight], tensors.pop(name))
            tensors[name.replace("weight_scale_inv", "input_scale")] = torch.ones(())

    folder = changed(source, tmp_path / "fp8", edit, quantization_config={"quant_method": "compressed-tensors"})
    plain = changed(folder, tmp_path / "plain", decode, quantization_config=...)
    assert torch.allclose(logits(folder), logits(plain), atol=1e-3)
    for checkpoint in (folder, plain):
        quantize_checkpoint(checkpoint, tmp_path / f"out-{checkpoint.name}", **SETTINGS)
    ours, theirs = tensors_of(tmp_path / "out-fp8"), tensors_of(tmp_path / "out-plain")
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith("input_scale"):  # measured on activations
            assert torch.equal(bits(ours[name]), bits(theirs[name].to(ours[name].dtype))), name
    (experts,) = (row for row in inspected(folder, capsys)["modules"] if row["module"] == "routed experts")
    assert experts["format"] == f"fp8 by {grain}" and "weight_scale" in experts["scales"]
    against = diagnose(tmp_path / "out-fp8", source=folder, everything=True)
    assert [str(finding) for finding in against.findings] == [] and against.values.judged > 100


def decode(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        weight, scale = name.removesuffix("_scale"), tensors.pop(name).float()
        del tensors[name.replace("weight_scale", "input_scale")]
        if scale.ndim == 2 and scale.shape[0] != tensors[weight].shape[0]:
            scale = fp8_block.expand_scale(scale, *tensors[weight].shape)
        tensors[weight] = tensors[weight].float() * scale


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


# ---------------------------------------------------------------- refused, in the same words everywhere


@pytest.mark.parametrize(
    ("edit", "config", "message"),
    [
        (None, {"n_group": 0}, "config.json: n_group is 0, expected an integer above 0"),
        (None, {"moe_layer_freq": 0}, "config.json: moe_layer_freq is 0, expected an integer above 0"),
        (None, {"rope_scaling": [40]}, "config.json: rope_scaling is [40], expected an object or null"),
        (
            None,
            {"num_nextn_predict_layers": 2},
            "num_nextn_predict_layers is 2, and this program computes one MTP layer",
        ),
        (None, {"quantization_config": {"kv_cache_scheme": "fp8"}}, 'quantization_config.kv_cache_scheme is "fp8"'),
        (
            None,
            {"quantization_config": {"weight_block_size": [64, 64]}},
            "quantization_config.weight_block_size is [64, 64]",
        ),
        (
            lambda t: t.update({f"{EXPERT}.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)}),
            {},
            f"{EXPERT}.weight_scale_inv in",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_all(source, tmp_path, capsys, edit, config, message):
    all_say(capsys, changed(source, tmp_path / "odd", edit, **config), message)


def test_a_negative_scale_is_refused_where_it_is_read(source, tmp_path, capsys):
    def edit(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.weight_scale_inv"] = -tensors[f"{EXPERT}.weight_scale_inv"]

    folder = changed(source, tmp_path / "odd", edit)
    message = f"{EXPERT}.weight_scale_inv in {folder} holds a negative number, which no scale can be"
    all_say(capsys, folder, message, ["generate"])
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(folder, tmp_path / "result", **SETTINGS)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_said_at_load(source, tmp_path, caplog, value):
    def edit(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.weight_scale_inv"][0, 0] = value

    DeepseekV3ForCausalLM.from_pretrained(changed(source, tmp_path / "odd", edit))
    assert f"{EXPERT}.weight_scale_inv in" in caplog.text and "holds NaN or infinity" in caplog.text


def test_shards_outside_the_folder(source, tmp_path, capsys):
    folder = tmp_path / "odd"
    shutil.copytree(source, folder)
    index = json.loads((folder / INDEX_NAME).read_text())
    first = min(index["weight_map"])
    index["weight_map"][first] = "../" + index["weight_map"][first]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    all_say(
        capsys, folder, f'weight_map gives "{index["weight_map"][first]}" for {first}, expected the path of a shard'
    )


@pytest.mark.parametrize("content", [{"quantization": None}, {"quantization": {"exclude_modules": 3}}])
def test_hf_quant_config_of_another_form(quantized, tmp_path, capsys, content):
    folder = changed(quantized, tmp_path / "odd")
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    all_say(capsys, folder, "hf_quant_config.json: quantization")


def test_inspect_lists_everything_as_json(source, tmp_path, capsys):
    def edit(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.weight_scale_inv"] = torch.ones(1, 1, dtype=torch.int32)
        del tensors["model.norm.weight"]

    folder = changed(source, tmp_path / "odd", edit, use_qk_norm=True)
    assert run(["inspect", str(folder), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [entry["severity"] for entry in found] == ["error", "error", "warning"]
    assert [entry["subject"] for entry in found] == [f"{EXPERT}.weight_scale_inv", "model.norm.weight", "use_qk_norm"]
