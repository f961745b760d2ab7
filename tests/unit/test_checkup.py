"""The parts of `doctor`: how much is read, orders and rounding against a source, and the table of consequences."""

import io
import json
import os
import time

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.findings import Fault
from deepseek_fp4_plugin.checkpoint.planned_shard import layout
from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
from deepseek_fp4_plugin.checkpoint.reader import INDEX_NAME, CheckpointReader
from deepseek_fp4_plugin.checkup import order
from deepseek_fp4_plugin.checkup.consequences import CONSEQUENCES, RUNTIMES
from deepseek_fp4_plugin.checkup.diagnosis import diagnose
from deepseek_fp4_plugin.checkup.values import examine_values
from deepseek_fp4_plugin.models.deepseek_r1 import DEEPSEEK_R1
from deepseek_fp4_plugin.models.examination import examine
from deepseek_fp4_plugin.models.inventory import weights
from deepseek_fp4_plugin.numerics import e2m1, nvfp4, scale_layout
from deepseek_fp4_plugin.quantization.plan import Conversion, becomes_nvfp4, result_tensors
from tests.tiny import tiny_config


def test_every_fault_has_a_consequence_in_every_runtime():
    assert CONSEQUENCES.keys() == set(Fault)
    for consequence in CONSEQUENCES.values():
        assert all(getattr(consequence, field).strip() for field in RUNTIMES)


def rows(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(count, 256, generator=generator) * torch.linspace(0.1, 3, 256)).bfloat16()


def test_each_order_is_told_from_the_others():
    original = rows(128)
    healthy = nvfp4.quantize(original)
    tiled = scale_layout.to_tiled(healthy.scale).view(128, 16)
    cases = {
        None: healthy,
        Fault.NIBBLES: healthy._replace(packed=order.swap_nibbles(healthy.packed)),
        Fault.RECIPROCAL: healthy._replace(scale_2=1 / healthy.scale_2),
        Fault.TILED_SCALES: healthy._replace(scale=tiled),
        Fault.OTHER_VALUES: nvfp4.quantize(original.flip(0)),
    }
    for fault, stored in cases.items():
        assert order.explain(original, stored, order.untiled(stored.scale, 128, 16)) is fault


def test_wrong_rounding_is_told_from_codes_that_were_chosen():
    original = rows()
    healthy = nvfp4.quantize(original)
    assert order.compare_codes(original, healthy) == order.Codes(original.numel())
    codes = e2m1.unpack(healthy.packed)
    inward = torch.where((codes & 7 > 0) & (torch.arange(256) % 2 == 0), codes - 1, codes)
    found = order.compare_codes(original, healthy._replace(packed=e2m1.pack(inward)))
    assert found.differing > 300 and found.wrong == "towards zero"
    step = torch.where(
        codes & 7 > 0, torch.where(torch.arange(256) % 2 == 0, codes - 1, codes + (codes & 7 < 7)), codes
    )
    chosen = order.compare_codes(original, healthy._replace(packed=e2m1.pack(step)))
    assert chosen.differing > 300 and chosen.wrong is None  # as a recipe that compensates errors leaves them


def test_ties_that_went_to_the_odd_code():
    """2.5 lies between 2 and 3 and 2 is even; `<=` on the wrong side gives 3 (vLLM #41985)."""
    original = torch.full((2, 16), 2.5)
    original[:, 0] = 6.0
    original = original.bfloat16()
    one = torch.ones(2, 1).to(torch.float8_e4m3fn)
    right = nvfp4.NVFP4Tensor(
        nvfp4.encode_blocks(original.unflatten(-1, (-1, 16)), one, torch.ones(())), one, torch.ones(())
    )
    assert order.compare_codes(original, right).wrong is None
    codes = e2m1.unpack(right.packed)
    assert set(codes[0, 1:].tolist()) == {4}
    wrong = order.compare_codes(original, right._replace(packed=e2m1.pack(torch.where(codes == 4, 5, codes).byte())))
    assert wrong == order.Codes(32, 30, 30, 0) and wrong.wrong == "away from the even code where a value lies halfway"


def test_the_order_of_scales_shows_in_trained_weights_alone():
    generator = torch.Generator().manual_seed(0)

    def scales(structured: bool) -> torch.Tensor:
        rows, columns = torch.randn(256, 1, generator=generator), torch.randn(1, 16, generator=generator)
        noise = torch.randn(256, 16, generator=generator)
        return (40 * (0.2 * (noise + structured * (rows + columns))).exp()).to(torch.float8_e4m3fn)

    trained = [scales(True) for _ in range(8)]
    assert not order.looks_tiled(trained)
    assert order.looks_tiled([scale_layout.to_tiled(scale).view(256, 16) for scale in trained])
    assert not order.looks_tiled([scale_layout.to_tiled(scales(False)).view(256, 16) for _ in range(8)])
    assert not order.looks_tiled([scale_layout.to_tiled(trained[0]).view(256, 16)])  # one matrix is no evidence


def test_headers_and_at_most_a_hundredth_of_the_bytes_are_read(tiny_nvfp4, tiny_fp8, monkeypatch):
    """Counted where the operating system is asked, not by our own word."""
    read = 0
    plain = io.FileIO.readinto

    class Counted(io.FileIO):
        def readinto(self, buffer):
            nonlocal read
            count = plain(self, buffer)
            read += count or 0
            return count

    monkeypatch.setattr("deepseek_fp4_plugin.checkpoint.reader.io.FileIO", Counted)
    for folder in (tiny_nvfp4, tiny_fp8):
        read = 0
        found = diagnose(folder)
        total = sum(info.nbytes for info in found.examination.shards.tensors.values())
        assert found.spent == read <= 0.01 * total
        assert read > 0.003 * total
        read = 0
        assert diagnose(folder, everything=True).spent == read >= 0.9 * total


@pytest.fixture
def r1_shaped(tmp_path):
    """DeepSeek-R1 in NVFP4 as 163 shards with its real headers; the values are holes of the file system, all zero."""
    specs = []
    for weight in weights(DEEPSEEK_R1):
        dtype = torch.float32 if weight.name.endswith("bias") else torch.bfloat16
        specs += result_tensors(Conversion(weight, WeightFormat.PLAIN, becomes_nvfp4(weight, DEEPSEEK_R1, "v1")), dtype)
    shards = layout(specs, 2_640_000_000)
    assert 160 <= len(shards) <= 170
    index = {}
    for shard in shards:
        with open(tmp_path / shard.file, "wb") as file:
            file.write(shard.header)
            os.truncate(file.fileno(), shard.nbytes)
        index |= dict.fromkeys(shard.specs, shard.file)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": index}))
    config = tiny_config(**{name: getattr(DEEPSEEK_R1, name) for name in tiny_config() if hasattr(DEEPSEEK_R1, name)})
    config |= {"rope_scaling": None, "num_key_value_heads": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_all_of_r1_s_headers(r1_shaped):
    """400 GB, its headers and a sample of its values: tensors have their places, scales are the zeros they are."""
    start = time.process_time()
    examination = examine(r1_shaped)
    print(f"headers: {time.process_time() - start:.1f} s of one core, {len(examination.shards.tensors):,} tensors")
    assert not [finding for finding in examination.findings if finding.severity != "note"]
    assert examination.config is not None and len(examination.shards.tensors) > 180_000
    start = time.process_time()
    found = diagnose(r1_shaped)
    print(f"all: {time.process_time() - start:.1f} s of one core, {found.spent / 1e6:.0f} MB of values")
    counts = {finding.fault: finding.count for finding in found.findings}
    assert counts[Fault.INPUT_SCALE] == 44_727 and found.spent <= 256_000_000


def test_what_is_not_in_order_is_not_read(tiny_nvfp4):
    """A module whose tensors are of another size is told of from headers, and values of the others are looked at."""
    examination = examine(tiny_nvfp4)
    assert examination.config is not None
    reader = CheckpointReader(tiny_nvfp4)
    broken = next(name for name in reader.tensors if name.endswith("experts.0.up_proj.weight_scale"))
    reader.tensors[broken] = reader.tensors[broken]._replace(shape=(1, 1))
    found = examine_values(reader, examination.config, everything=True)
    # What these random weights have anyway: a tensor scale each, and an embedding of its own in the MTP layer.
    assert found.modules.keys() == {Fault.PAIR_SCALES, Fault.MTP_COPIES}
