"""Smoothing through the norms: exact before rounding, listed, the same after a stop, and understood by who compares."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_fp4_plugin.checkpoint.findings import Fault
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkup.diagnosis import diagnose
from deepseek_fp4_plugin.checkup.repair import repair
from deepseek_fp4_plugin.evaluation.output_error import output_errors
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from deepseek_fp4_plugin.quantization.dequantize import dequantize_checkpoint
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.quantization.smoothing import MANIFEST, read_smoothing
from tests.stops import SETTINGS, contents, small_source

NORM = "post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def loud(tmp_path_factory) -> Path:
    """A source with loud channels before its MLPs."""
    folder = small_source(tmp_path_factory.mktemp("smooth") / "source")
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith(NORM):
                tensors[name][::5] *= 24
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def made(loud, tmp_path_factory) -> dict[tuple[str, bool], Path]:
    folder = tmp_path_factory.mktemp("smoothed")
    found = {(recipe, smooth): folder / f"{recipe}-{smooth}" for recipe in ("max", "gptq") for smooth in (False, True)}
    for (recipe, smooth), path in found.items():
        quantize_checkpoint(loud, path, **SETTINGS, recipe=recipe, smooth=smooth)
    return found


def source_weight(reader: CheckpointReader, module: str) -> torch.Tensor:
    weight = reader.get(f"{module}.weight")
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    return fp8_block.dequantize(weight, reader.get(f"{module}.weight_scale_inv"), torch.bfloat16)


@pytest.mark.parametrize("recipe", ["max", "gptq"])
def test_edits_are_powers_of_two_and_all_listed(loud, made, recipe):
    source, plain, smooth = (CheckpointReader(f) for f in (loud, made[recipe, False], made[recipe, True]))
    layers = json.loads((made[recipe, True] / MANIFEST).read_text())["layers"]
    assert [layer["divided"] for layer in layers] == [f"model.layers.{i}.{NORM}" for i in (0, 1)]
    listed = set()
    for layer in layers:
        exponents = torch.tensor(layer["exponents"])
        assert (exponents[::5] > 0).all() and exponents.abs().max() <= 8
        assert torch.equal(smooth.get(layer["divided"]), source.get(layer["divided"]) / torch.exp2(exponents))
        listed.add(layer["divided"])
        for name in layer["multiplied"]:
            listed |= {name.replace("*", str(e)) for e in range(8)} if "*" in name else {name}
            if name.endswith(".gate.weight"):
                assert torch.equal(smooth.get(name), source.get(name) * torch.exp2(exponents))
    kept = [name for name in plain.tensors if ".mlp." not in name or name.endswith((".gate.weight", "bias"))]
    assert {name for name in kept if not torch.equal(plain.get(name), smooth.get(name))} <= listed
    weights = {
        f"{name.removesuffix('.weight_scale')}.weight" for name in smooth.tensors if name.endswith(".weight_scale")
    }
    assert {name for name in weights if not name.endswith("down_proj.weight")} == listed - set(kept)
    assert not (made[recipe, False] / MANIFEST).exists()


def test_max_rounds_the_weights_as_they_became(loud, made):
    source, result = CheckpointReader(loud), CheckpointReader(made["max", True])
    smoothing = read_smoothing(made["max", True])
    for expert in ("model.layers.0.mlp", "model.layers.1.mlp.experts.3", "model.layers.1.mlp.shared_experts"):
        pair = [smoothing.applied(m, source_weight(source, m)) for m in (f"{expert}.gate_proj", f"{expert}.up_proj")]
        scale = nvfp4.tensor_scale(torch.stack([w.abs().amax() for w in pair]).amax())
        for name, weight in zip(("gate_proj", "up_proj"), pair, strict=True):
            expected = nvfp4.quantize(weight, scale)
            assert torch.equal(result.get(f"{expert}.{name}.weight"), expected.packed)
            assert torch.equal(
                result.get(f"{expert}.{name}.weight_scale").view(torch.uint8), expected.scale.view(torch.uint8)
            )


def test_input_scales_are_those_of_smoothed_inputs(made):
    """A loud channel is loud no more, so that the largest input is smaller."""
    for recipe in ("max", "gptq"):
        plain, smooth = (CheckpointReader(made[recipe, s]) for s in (False, True))
        for layer, part in ((0, "mlp"), (1, "mlp.experts.0"), (1, "mlp.shared_experts")):
            name = f"model.layers.{layer}.{part}.gate_proj.input_scale"
            assert 0.1 * plain.get(name) < smooth.get(name) < 0.7 * plain.get(name)
            assert torch.equal(smooth.get(name), smooth.get(name.replace("gate_proj", "up_proj")))
    both = [CheckpointReader(made[r, True]).get("model.layers.0.mlp.gate_proj.input_scale") for r in ("max", "gptq")]
    assert both[1] == 8 * both[0]  # dense layer 0 sees the same inputs under either


def test_before_rounding_the_model_is_the_sources_to_the_bit(loud, made, tmp_path):
    """The source in BF16, and the same edited as the manifest says."""
    dequantize_checkpoint(loud, tmp_path / "plain", to="bf16")
    shutil.copytree(tmp_path / "plain", tmp_path / "smooth")
    smoothing = read_smoothing(made["max", True])
    for shard in (tmp_path / "smooth").glob("*.safetensors"):
        tensors = load_file(shard)
        edited = {name: smoothing.applied(name.removesuffix(".weight"), tensors[name]) for name in tensors}
        save_file(edited, shard, metadata={"format": "pt"})
    ids = torch.randint(1024, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = []
    with torch.inference_mode():
        for name in ("plain", "smooth"):
            model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / name)
            logits.append(model(ForwardBatch.from_sequences([ids], torch.device("cpu"))))
    assert torch.equal(*logits)


def test_loud_channels_cost_less_where_inputs_are_rounded(loud, made):
    reference = DeepseekV3ForCausalLM.from_pretrained(loud)
    ids = torch.randint(1024, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    errors = {}
    for smooth in (False, True):
        model = DeepseekV3ForCausalLM.from_pretrained(made["max", smooth], nvfp4_activations="fp4")
        errors[smooth] = output_errors(reference, model, [ids])
    for kind in ("dense MLP", "routed experts", "shared experts"):
        assert errors[True][kind] < errors[False][kind]


def test_the_doctor_compares_with_the_smoothed_source(loud, made, tmp_path):
    for recipe in ("max", "gptq"):
        diagnosis = diagnose(made[recipe, True], loud, everything=True)
        assert diagnosis.findings == () and diagnosis.values is not None and diagnosis.values.judged > 20


def test_the_doctor_mends_it_from_the_smoothed_source(loud, made, tmp_path):
    """What is written anew is rounded from the source's weight as smoothing edited it, so the bytes come back."""
    sick, healthy = tmp_path / "sick", made["max", True]
    shutil.copytree(healthy, sick)
    up, gate = "model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.5.gate_proj"
    for shard in sick.glob("*.safetensors"):
        held = load_file(shard)
        for name, wrong in ((f"{up}.weight_scale_2", torch.nan), (f"{gate}.weight", 0)):
            if name in held:
                held[name] = torch.full_like(held[name], wrong)
        save_file(held, shard, metadata={"format": "pt"})
    found = diagnose(sick, loud, everything=True)
    assert {up} == found.modules(Fault.TENSOR_SCALE) and {gate} == found.modules(Fault.OTHER_VALUES)
    repair(found, tmp_path / "mended")
    ours, theirs = CheckpointReader(tmp_path / "mended"), CheckpointReader(healthy)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in theirs.tensors:
        assert torch.equal(*(r.get(name).reshape(-1).view(torch.uint8) for r in (ours, theirs))), name
    assert (tmp_path / "mended" / MANIFEST).read_bytes() == (healthy / MANIFEST).read_bytes()
    assert diagnose(tmp_path / "mended", loud, everything=True).findings == ()


@pytest.mark.parametrize("recipe", ["max", "gptq"])
@pytest.mark.parametrize(("stage", "at"), [("calibrate", 1), ("convert", 20)])
def test_a_stopped_run_ends_with_the_same_bytes(loud, made, tmp_path, recipe, stage, at):
    stopped: list[int] = []

    def stop(where: str, done: int, total: int) -> None:
        if where == stage and at <= done < total and not stopped:
            stopped.append(done)
            raise KeyboardInterrupt

    target = tmp_path / made[recipe, True].name
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(loud, target, **SETTINGS, recipe=recipe, smooth=True, progress=stop)
    quantize_checkpoint(loud, target, **SETTINGS, recipe=recipe, smooth=True)
    assert contents(target) == contents(made[recipe, True])


def test_what_smoothing_cannot_do_is_said(loud, tmp_path):
    with pytest.raises(ValueError, match="--smooth looks at every channel of the inputs; give --calibration a text"):
        quantize_checkpoint(loud, tmp_path / "out", **{**SETTINGS, "calibration": "none"}, smooth=True)
    with pytest.raises(ValueError, match="leave --save-calibration out"):
        quantize_checkpoint(loud, tmp_path / "out", **SETTINGS, smooth=True, save_calibration=tmp_path / "kept.json")
    assert not (tmp_path / "out").exists()
