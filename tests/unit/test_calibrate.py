"""Calibration: what is observed, that layer by layer equals the whole model, resuming, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.decoder import DeepseekV3DecoderLayer, RotaryAngles
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization import calibrate as calibrate_module
from deepseek_fp4_plugin.quantization.calibrate import calibrate, cold_experts, input_scales, zero_inputs
from deepseek_fp4_plugin.quantization.calibration_data import CalibrationData
from deepseek_fp4_plugin.quantization.observer import LayerAmax, LayerObserver
from deepseek_fp4_plugin.quantization.plan import make_plan
from tests.ranks import on_mesh


def parts(folder: Path):
    reader, config = CheckpointReader(folder), DeepseekV3Config.from_folder(folder)
    return reader, config, make_plan(reader, config, "v2")


def some_data(count: int = 6, length: int = 20) -> CalibrationData:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 320, (count, length), generator=generator).tolist()
    return CalibrationData([sample[: length - i] for i, sample in enumerate(ids)], "test")


def run(folder: Path, work: Path, data: CalibrationData, progress=lambda done, total: None) -> LayerAmax:
    work.mkdir(exist_ok=True)
    reader, config, plan = parts(folder)
    return calibrate(reader, config, plan, data, work, torch.device("cpu"), progress)


def test_layer_by_layer_equals_the_whole_model(tiny_fp8, tmp_path):
    data = some_data()
    found = run(tiny_fp8, tmp_path / "work", data)
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_fp8, backend="reference")
    observers = [LayerObserver(layer) for layer in model.model.layers]
    with torch.inference_mode():
        model(ForwardBatch.from_sequences(data.samples))
    expected = LayerAmax()
    for observer in observers:
        expected = expected.merge(observer.result())
    assert found == expected
    assert found.rows["model.layers.0.mlp.down_proj"] == data.num_tokens
    assert sum(found.rows.get(f"model.layers.1.mlp.experts.{e}.up_proj", 0) for e in range(16)) == 4 * data.num_tokens
    assert not list((tmp_path / "work").glob("*.bin"))


def test_many_batches_see_what_one_does(tiny_fp8, tmp_path, monkeypatch):
    whole = run(tiny_fp8, tmp_path / "a", some_data())
    monkeypatch.setattr(calibrate_module, "BATCH_TOKENS", 25)
    cut = run(tiny_fp8, tmp_path / "b", some_data())
    # The rounding of a product may depend on how many rows it has, and so may a token's choice of experts.
    assert cut.rows.keys() == whole.rows.keys()
    for name, amax in whole.amax.items():
        if ".experts." not in name:
            assert cut.amax[name] == pytest.approx(amax, rel=0.05), name


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3, 5])
def test_an_interrupted_calibration_continues_with_the_same_result(tiny_fp8, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(calibrate_module, "BATCH_TOKENS", 60)  # two batches a layer, three layers
    data = some_data()
    expected = run(tiny_fp8, tmp_path / "whole", data)
    seen = []

    def interrupt(done: int, total: int) -> None:
        assert total == 6
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_fp8, tmp_path / "work", data, interrupt)
    assert run(tiny_fp8, tmp_path / "work", data, lambda done, total: seen.append(done)) == expected
    assert min(seen) == stop_at // 2 * 2  # finished layers are not computed again


def test_ranks_merge_by_maximum():
    left = LayerAmax({"a": 1.0, "b": 5.0}, {"a": 3, "b": 1})
    right = LayerAmax({"a": 2.0, "c": 0.5}, {"a": 1, "c": 7})
    assert left.merge(right) == LayerAmax({"a": 2.0, "b": 5.0, "c": 0.5}, {"a": 4, "b": 1, "c": 7})
    assert LayerAmax.from_json(json.loads(json.dumps(left.to_json()))) == left


def test_two_expert_parallel_ranks_together_see_what_one_does(tiny_fp8):
    """Each names its own experts with their global numbers; both bring the same tokens."""
    _, config, _ = parts(tiny_fp8)
    batch = ForwardBatch.from_sequences(some_data().samples)
    hidden = torch.randn(batch.input_ids.shape[0], config.hidden_size).bfloat16()
    cos, sin = RotaryAngles(config)(batch.positions)

    def seen(mesh: Mesh) -> LayerAmax:
        layer = DeepseekV3DecoderLayer(1, config, mesh)
        with torch.inference_mode():
            layer.load(WeightSource(CheckpointReader(tiny_fp8), mesh=mesh, backend="reference"))
            observer = LayerObserver(layer)
            layer(hidden, cos, sin, replace(batch, dp_tokens=(len(hidden),) * mesh.dp.count), None)
        return observer.result()

    ranks = on_mesh("DP2/EP2", seen)
    experts = [{name for name in rank.amax if ".experts." in name} for rank in ranks]
    assert experts[0] and experts[1] and not experts[0] & experts[1]
    assert ranks[0].merge(ranks[1]).amax == seen(Mesh()).amax


def test_all_experts_of_a_layer_have_the_layers_scale():
    prefix = "model.layers.1.mlp.experts"
    found = LayerAmax(
        {f"{prefix}.0.up_proj": 2.0, f"{prefix}.5.up_proj": 26.88, f"{prefix}.5.down_proj": 1.0, "x.o_proj": 4.0}, {}
    )
    modules = [f"{prefix}.{e}.up_proj" for e in range(8)] + [f"{prefix}.3.down_proj", "x.o_proj"]
    scales = input_scales(found, modules)
    assert {scales[name].item() for name in modules[:8]} == {torch.tensor(26.88).div(2688).item()}
    assert scales[f"{prefix}.3.down_proj"].item() == torch.tensor(1.0).div(2688).item()
    assert scales["x.o_proj"].dtype == torch.float32 and scales["x.o_proj"].shape == ()
    assert cold_experts(LayerAmax({}, {modules[0]: 1}), modules) == modules[1:9]


def test_a_module_of_which_nothing_was_seen_is_refused():
    with pytest.raises(ValueError, match=r"no input of model\.layers\.0\.mlp\.up_proj; calibrate on more text"):
        input_scales(LayerAmax(), ["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize("amax", [0.0, 1e-45], ids=["zeros", "scale below the smallest FP32"])
def test_a_module_that_saw_only_zeros_has_the_documented_scale(amax):
    name, other = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    found = LayerAmax({name: amax, other: 2688.0}, {})
    assert {n: s.item() for n, s in input_scales(found, [name, other]).items()} == {name: 1.0, other: 1.0}
    assert zero_inputs(found, [name, other]) == [name]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_named(bad, tiny_fp8):
    _, config, _ = parts(tiny_fp8)
    observer = LayerObserver(layer := DeepseekV3DecoderLayer(0, config, Mesh()))
    layer.self_attn.o_proj.observer(torch.tensor([[1.0, 2.0]]))
    layer.self_attn.o_proj.observer(torch.tensor([[bad, 2.0]]))
    layer.self_attn.o_proj.observer(torch.tensor([[1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"input of model\.layers\.0\.self_attn\.o_proj became NaN or infinite"):
        observer.result()


def test_a_disk_that_fills_up_is_one_sentence(tiny_fp8, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibrate_module.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"hidden-0\.bin: No space left on device; free some space"):
        run(tiny_fp8, tmp_path / "work", some_data())


def stopped_after(folder: Path, work: Path, data: CalibrationData, layers: int) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == layers:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, work, data, interrupt)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = b"\x01" + data[len(data) // 2 :][1:].swapcase()
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_cut, _alter, Path.unlink])
@pytest.mark.parametrize("name", ["layer-000.json", "layer-001.json", "hidden-0.bin", "hidden-1.bin"])
def test_damaged_calibration_is_done_again(tiny_fp8, tmp_path, damage, name):
    """Stopped in the third layer, which reads hidden-0 and writes hidden-1, over the second's input."""
    data = some_data()
    expected = run(tiny_fp8, tmp_path / "whole", data)
    stopped_after(tiny_fp8, tmp_path / "work", data, 2)
    damage(tmp_path / "work" / name)
    seen: list[int] = []
    assert run(tiny_fp8, tmp_path / "work", data, lambda done, total: seen.append(done)) == expected
    assert min(seen) == (2 if name == "hidden-1.bin" else 0)


def test_a_lost_result_among_finished_ones_costs_no_more_than_it_must(tiny_fp8, tmp_path):
    data = some_data()
    expected = run(tiny_fp8, tmp_path / "work", data)
    (tmp_path / "work" / "layer-001.json").unlink()
    seen: list[int] = []
    assert run(tiny_fp8, tmp_path / "work", data, lambda done, total: seen.append(done)) == expected
    assert seen == [0, 1, 3]  # the hidden states are gone, so from the first on; the third layer is still known
