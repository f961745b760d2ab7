"""Conversion: chunks, shared scales, what is kept, what is refused."""

import math
import shutil

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter
from deepseek_fp4_plugin.kernels.reference import convert as reference_module
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from deepseek_fp4_plugin.numerics.error import first_mismatch, sqnr_db
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.quantization.convert import convert
from deepseek_fp4_plugin.quantization.plan import make_plan
from deepseek_fp4_plugin.quantization.recipe import Rounding
from deepseek_fp4_plugin.quantization.recipes import RECIPES
from deepseek_fp4_plugin.quantization.report import Bytes, sizes, sqnr_by_class
from tests.tiny import write_checkpoint


class Interrupted(Exception):
    pass


def convert_to(source, folder, layout="v1", progress=lambda done, total: None):
    """Everything but the small files, with input scales of 1, 2, 3, ..."""
    reader, config = CheckpointReader(source), DeepseekV3Config.from_folder(source)
    plan = make_plan(reader, config, layout)
    modules = [c.weight.module for unit in plan.units for c in unit.conversions if c.nvfp4]
    scales = {module: torch.tensor(float(i + 1)) for i, module in enumerate(modules)}
    writer = CheckpointWriter(folder, plan.tensors, {}, 200_000)
    try:
        roundings = convert(reader, writer, plan, RECIPES["max"], scales, torch.device("cpu"), progress)
        writer.finish({"config.json": (source / "config.json").read_bytes()})
    finally:
        writer.close()
    return plan, config, roundings, scales


@pytest.fixture(scope="module")
def converted(tiny_fp8, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "nvfp4"
    return folder, *convert_to(tiny_fp8, folder)


def test_chunks_of_rows_equal_the_whole(monkeypatch):
    w = torch.randn(300, 64).bfloat16()
    monkeypatch.setattr(reference_module, "_CHUNK", 64 * 5)
    scale_2 = nvfp4.tensor_scale(w.abs().amax())
    quantized, signal, noise = reference_module.convert_weight(w, None, (128, 128), scale_2)
    for expected, actual in zip(nvfp4.quantize(w), quantized, strict=True):
        assert first_mismatch(expected, actual) is None
    assert 10 * math.log10(signal / noise) == pytest.approx(sqnr_db(w, nvfp4.dequantize(quantized)))
    assert reference_module.weight_amax(w, None, (128, 128)) == w.abs().max()


def test_an_all_zero_weight_is_exact():
    (solution,) = RECIPES["max"].solve([torch.zeros(4, 32).bfloat16()], None)
    assert solution.tensor.scale.view(torch.uint8).unique().tolist() == [0x38] and solution.tensor.packed.sum() == 0
    assert solution.rounding == Rounding(0.0, 0.0, 0.0)


def weight_of(reader, module) -> torch.Tensor:
    return fp8_block.dequantize(reader.get(f"{module}.weight"), reader.get(f"{module}.weight_scale_inv"))


def test_gate_and_up_share_a_scale_and_every_weight_decodes_to_its_source(tiny_fp8, converted):
    folder, plan, _, roundings, scales = converted
    before, after = CheckpointReader(tiny_fp8), CheckpointReader(folder)
    checked = 0
    for unit in plan.units:
        modules = [c.weight.module for c in unit.conversions if c.nvfp4]
        if not modules:
            continue
        expected = nvfp4.tensor_scale(torch.stack([weight_of(before, m).abs().amax() for m in modules]).amax())
        for module in modules:
            assert after.get(f"{module}.weight_scale_2") == expected
            assert after.get(f"{module}.input_scale") == scales[module]
            stored = NVFP4Tensor(*(after.get(f"{module}.{s}") for s in ("weight", "weight_scale", "weight_scale_2")))
            assert sqnr_db(weight_of(before, module), nvfp4.dequantize(stored)) > 18
            checked += 1
    assert checked == len(roundings) == len(scales) == 3 + 2 * 17 * 3


def test_what_is_kept_is_kept_exactly(tiny_fp8, converted):
    """FP8 attention and MTP weights in BF16, all else byte for byte, the correction bias FP32."""
    folder, plan, *_ = converted
    before, after = CheckpointReader(tiny_fp8), CheckpointReader(folder)
    dtypes = set()
    for conversion in (c for unit in plan.units for c in unit.conversions if not c.nvfp4):
        name, module = conversion.weight.name, conversion.weight.module
        expected = weight_of(before, module) if conversion.weight.linear else before.get(name)
        assert first_mismatch(expected, after.get(name)) is None, name
        assert f"{module}.weight_scale" not in after and f"{module}.input_scale" not in after
        dtypes.add(after.info(name).dtype)
    assert dtypes == {torch.bfloat16, torch.float32}
    assert after.info("model.layers.1.mlp.gate.e_score_correction_bias").dtype == torch.float32
    assert not [name for name in after if "weight_scale_inv" in name or "pre_quant" in name]


def test_a_bf16_source_gives_the_bits_of_its_own_weights(tmp_path):
    source = write_checkpoint(tmp_path / "bf16", fp8=False)
    convert_to(source, tmp_path / "nvfp4", "v2")
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "nvfp4")
    module = "model.layers.2.self_attn.o_proj"
    expected = nvfp4.quantize(before.get(f"{module}.weight"))
    assert first_mismatch(expected.packed, after.get(f"{module}.weight")) is None
    assert first_mismatch(expected.scale, after.get(f"{module}.weight_scale")) is None
    name = "model.layers.2.self_attn.q_a_proj.weight"
    assert first_mismatch(before.get(name), after.get(name)) is None


@pytest.mark.parametrize("stop_at", [1, 40, 79, 120])
def test_an_interrupted_conversion_continues_with_the_same_bytes_and_report(tiny_fp8, converted, tmp_path, stop_at):
    folder, *_, roundings, _ = converted

    def interrupt(done: int, total: int) -> None:
        if done == stop_at:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert_to(tiny_fp8, tmp_path / "c", progress=interrupt)
    notes = tmp_path / "c.incomplete" / "work" / "modules.jsonl"
    if notes.exists():  # as if killed while writing a line
        notes.write_text(notes.read_text() + '{"module": "model.la')
    *_, again, _ = convert_to(tiny_fp8, tmp_path / "c")
    assert again == roundings
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda notes: notes.write_bytes(notes.read_bytes()[:300]),
        lambda notes: notes.write_bytes(b"\0" * 4096),
        lambda notes: notes.write_bytes(notes.read_bytes().replace(b"e", b"3").replace(b".", b"1")),
        lambda notes: notes.write_bytes(b'5\n"x"\n{"content":1}\n' + notes.read_bytes()),
        lambda notes: notes.unlink(),
        lambda notes: shutil.rmtree(notes.parent),
    ],
    ids=["cut", "zeros", "altered", "beside other lines", "removed", "removed with its folder"],
)
def test_lost_notes_are_found_again(tiny_fp8, converted, tmp_path, damage):
    """As a power loss leaves them. Shards that are closed are not written again."""
    folder, *_, roundings, _ = converted

    def interrupt(done: int, total: int) -> None:
        if done == 79:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert_to(tiny_fp8, tmp_path / "c", progress=interrupt)
    closed = {p.name: p.stat().st_ino for p in (tmp_path / "c.incomplete").glob("*.safetensors")}
    damage(tmp_path / "c.incomplete" / "work" / "modules.jsonl")
    *_, again, _ = convert_to(tiny_fp8, tmp_path / "c")
    assert again == roundings and len(closed) > 3
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()
    }
    assert {name: (tmp_path / "c" / name).stat().st_ino for name in closed} == closed


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.experts.7.down_proj.weight", "model.layers.3.eh_proj.weight"])
def test_nan_and_infinity_are_refused_by_name(tmp_path, monkeypatch, name, bad):
    source = write_checkpoint(tmp_path / "bf16", fp8=False)
    original = CheckpointReader.get

    def poisoned(self, wanted):
        tensor = original(self, wanted)
        if wanted == name:
            tensor = tensor.clone()
            tensor[3, 5] = bad
        return tensor

    monkeypatch.setattr(CheckpointReader, "get", poisoned)
    with pytest.raises(CheckpointError, match=rf"{name} in .* holds NaN or infinity"):
        convert_to(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_are_those_of_the_files(tiny_fp8, converted):
    folder, plan, config, *_ = converted
    found = sizes(CheckpointReader(tiny_fp8), config, plan)
    total = Bytes(sum(b.before for b in found.values()), sum(b.after for b in found.values()))
    payload = [sum(info.nbytes for info in CheckpointReader(f).tensors.values()) for f in (tiny_fp8, folder)]
    assert list(total) == payload
    experts = found["routed experts"]
    assert experts.before == 2 * 16 * 3 * (128 * 128 + 4)
    assert experts.after == 2 * 16 * 3 * (128 * 64 + 128 * 8 + 4 + 4)


def test_errors_by_class_add_energies_and_list_the_worst(converted):
    _, plan, config, roundings, _ = converted
    by_class, worst = sqnr_by_class(plan, config, roundings)
    dense = [roundings[f"model.layers.0.mlp.{p}_proj"] for p in ("gate", "up", "down")]
    expected = 10 * math.log10(sum(r.signal for r in dense) / sum(r.noise for r in dense))
    assert by_class["dense MLP"] == pytest.approx(expected)
    assert set(by_class) == {"dense MLP", "routed experts", "shared experts"}
    all_modules = sorted(10 * math.log10(r.signal / r.noise) for r in roundings.values())
    assert [m.sqnr_db for m in worst] == pytest.approx(all_modules[:5])
