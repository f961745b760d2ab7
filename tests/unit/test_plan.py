"""The plan's table against R1's published counts, and what the plan refuses from headers alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.quant_config import QuantConfig
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_r1 import DEEPSEEK_R1
from deepseek_fp4_plugin.models.inventory import Role, weights
from deepseek_fp4_plugin.quantization.plan import becomes_nvfp4, excluded_modules, make_plan
from deepseek_fp4_plugin.quantization.report import planned_sizes
from tests.tiny import CONFIG, tiny_config, write_checkpoint


def test_r1_has_the_published_parameters_and_sizes():
    """The census of DeepSeek-R1: 657.65e9 of 684.49e9 weights quantized, 688.6 GB before, 423.6 or 413.3 GB after."""
    count = {True: 0, False: 0}
    for weight in weights(DEEPSEEK_R1):
        size = 1
        for axis in weight.shape:
            size *= axis
        count[becomes_nvfp4(weight, DEEPSEEK_R1, "v1")] += size
    assert sum(count.values()) == 684_489_845_504
    assert round(count[True] / 1e9, 2) == 657.65
    v1, v2 = planned_sizes(DEEPSEEK_R1, "v1"), planned_sizes(DEEPSEEK_R1, "v2")
    assert (round(v1.before / 1e9, 1), round(v1.after / 1e9, 1), round(v2.after / 1e9, 1)) == (688.6, 423.6, 413.3)
    assert round(v1.ratio, 2) == 1.63


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_the_exclude_list_names_exactly_the_linears_that_stay(layout):
    """Every linear of every role is either NVFP4 or matched by the list, and none is both."""
    listed = QuantConfig(exclude_modules=tuple(excluded_modules(DEEPSEEK_R1, layout)))
    for weight in weights(DEEPSEEK_R1):
        if weight.linear or weight.role is Role.HEAD:
            assert listed.excludes(weight.module) != becomes_nvfp4(weight, DEEPSEEK_R1, layout), weight.name
    assert listed.excludes("model.layers.61")
    assert not listed.excludes("model.layers.6.mlp.gate_proj")


def test_the_exclude_lists_have_the_published_length():
    """62 wildcards and 245 names, and the MTP layer, which the published ones do not name."""
    v1, v2 = excluded_modules(DEEPSEEK_R1, "v1"), excluded_modules(DEEPSEEK_R1, "v2")
    assert len(v1) == 62 + 1 and "model.layers.61*" in v1 and v1 == sorted(v1)
    assert len(v2) == 245 + 1 and "model.layers.61*" in v2
    without = dataclasses.replace(DEEPSEEK_R1, num_nextn_predict_layers=0)
    assert len(excluded_modules(without, "v1")) == 62


def plan_of(folder: Path, layout: str = "v1"):
    return make_plan(CheckpointReader(folder), DeepseekV3Config.from_folder(folder), layout)


def test_a_plan_covers_every_weight_once_and_pairs_gate_with_up(tiny_fp8):
    plan = plan_of(tiny_fp8)
    planned = [c.weight.name for unit in plan.units for c in unit.conversions]
    assert planned == [weight.name for weight in weights(DeepseekV3Config.from_dict(CONFIG))]
    pairs = [unit for unit in plan.units if len(unit.conversions) == 2]
    assert len(pairs) == 1 + 2 * 17 + 17  # dense, two MoE layers, the MTP layer
    for unit in pairs:
        gate, up = (c.weight.module for c in unit.conversions)
        assert gate.removesuffix("gate_proj") == up.removesuffix("up_proj")
    written = [spec.name for spec in plan.tensors]
    assert len(written) == len(set(written))
    assert not [n for n in written if n.startswith("model.layers.3.") and not n.endswith(("weight", "bias"))]


def test_q_lora_rank_null_and_no_mtp(tmp_path):
    folder = write_checkpoint(tmp_path / "m", tiny_config(q_lora_rank=None, num_nextn_predict_layers=0))
    plan = plan_of(folder, "v2")
    assert "model.layers.0.self_attn.q_proj" in plan.exclude_modules
    assert not [name for name in plan.exclude_modules if "q_a_proj" in name or name.startswith("model.layers.3")]


@pytest.fixture
def broken(tiny_fp8, tmp_path):
    """A copy of the tiny checkpoint in one file, and a function that edits its tensors."""
    folder = tmp_path / "broken"
    folder.mkdir()
    tensors = {}
    for shard in sorted(tiny_fp8.glob("*.safetensors")):
        tensors |= load_file(shard)
    shutil.copy(tiny_fp8 / "config.json", folder)

    def write(edit) -> Path:
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write


UP = "model.layers.1.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{UP}.weight"), rf"no tensor {UP}\.weight"),
        (lambda t: t.pop(f"{UP}.weight_scale_inv"), rf"{UP}\.weight_scale_inv is missing"),
        (lambda t: t.update({f"{UP}.weight": torch.zeros(128, 64).to(torch.float8_e4m3fn)}), r"\[128, 64\].*\[128, 1"),
        (lambda t: t.update({f"{UP}.weight_scale_inv": torch.ones(2, 1)}), r"scale_inv.*\[2, 1\].*\[1, 1\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64).bfloat16()}), r"model\.norm\.weight.*\[64\]"),
        (lambda t: t.update({"model.layers.9.x.weight": torch.ones(1)}), r"no place for, first model\.layers\.9\.x"),
        (lambda t: t.update({"model.norm.weight": torch.ones(128, dtype=torch.int32)}), r"model\.norm\.weight.*int32"),
    ],
    ids=["missing", "no scale", "shape", "scale shape", "norm shape", "unknown tensor", "dtype"],
)
def test_a_source_that_does_not_fit_is_named(broken, edit, message):
    with pytest.raises(CheckpointError, match=message) as error:
        plan_of(broken(edit))
    assert "\n" not in str(error.value)


def test_an_nvfp4_source_is_refused(broken):
    def edit(tensors):
        tensors.pop(f"{UP}.weight_scale_inv")
        tensors[f"{UP}.weight"] = torch.zeros(128, 64, dtype=torch.uint8)
        tensors[f"{UP}.weight_scale"] = torch.ones(128, 8).to(torch.float8_e4m3fn)
        tensors[f"{UP}.weight_scale_2"] = torch.ones(())

    with pytest.raises(CheckpointError, match="NVFP4 already"):
        plan_of(broken(edit))


def test_a_width_that_is_not_whole_blocks_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "m", tiny_config(moe_intermediate_size=120))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight .* 120 inputs"):
        plan_of(folder)


def test_unknown_layout(tiny_fp8):
    with pytest.raises(ValueError, match="'v3' is unknown; choose from v1, v2"):
        plan_of(tiny_fp8, "v3")


def test_another_architecture_is_refused(tiny_fp8, tmp_path):
    config = json.loads((tiny_fp8 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["X"], "model_type": "llama"}))
    with pytest.raises(CheckpointError, match="names architecture X"):
        DeepseekV3Config.from_folder(tmp_path)
