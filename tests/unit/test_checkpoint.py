"""Reader and writer: what they refuse, and that bytes do not depend on order or interruptions."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_fp4_plugin.checkpoint import writer as writer_module
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.quant_config import (
    QuantConfig,
    WeightFormat,
    detect_format,
    nvfp4_config_section,
    nvfp4_quant_config,
)
from deepseek_fp4_plugin.checkpoint.reader import INDEX_NAME, CheckpointReader
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter, TensorSpec

DTYPES = (torch.bfloat16, torch.uint8, torch.float32, torch.float8_e4m3fn)


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": torch.randint(0, 100, (i + 1, 3), generator=generator, dtype=torch.uint8).to(torch.float32).to(dtype)
        for i, dtype in zip(range(12), itertools.cycle(DTYPES))
    }
    return tensors | {"scalar": torch.tensor(0.5), "empty": torch.zeros(0, 4)}


def specs(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_all(folder: Path, order, max_shard_bytes: int = 100) -> Path:
    tensors = some_tensors()
    writer = CheckpointWriter(folder, specs(tensors), {"job": 1}, max_shard_bytes)
    for name in order(tensors):
        writer.write(name, tensors[name])
    writer.finish({"config.json": "{}"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_written_is_read_back_by_us_and_by_safetensors(tmp_path):
    folder = write_all(tmp_path / "c", list)
    reader, index = CheckpointReader(folder), json.loads((folder / INDEX_NAME).read_text())
    assert set(index["weight_map"]) == set(some_tensors())
    assert len(set(index["weight_map"].values())) > 3
    for name, tensor in some_tensors().items():
        loaded = load_file(folder / index["weight_map"][name])[name]
        for found in (reader.get(name), loaded):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert torch.equal(reader.get_slice("t10", 0, 2, 5), some_tensors()["t10"][2:5])


def test_slices_along_every_axis(tmp_path):
    tensor = torch.randn(5, 6, 7).bfloat16()
    writer = CheckpointWriter(tmp_path / "c", specs({"first": tensor[0], "x": tensor}), {})
    writer.write("first", tensor[0])
    writer.write("x", tensor)
    writer.finish({})
    reader = CheckpointReader(tmp_path / "c")
    for axis in range(3):
        for start, stop in ((0, 0), (0, 5), (2, 4), (4, 5)):
            assert torch.equal(reader.get_slice("x", axis, start, stop), tensor.narrow(axis, start, stop - start))
    with pytest.raises(CheckpointError, match="no slice"):
        reader.get_slice("x", 2, 3, 8)


def test_a_shard_that_shrinks_while_it_is_open(tmp_path):
    folder = write_all(tmp_path / "c", list, 10**6)
    reader = CheckpointReader(folder)
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    last = max(reader, key=lambda name: reader.info(name).offset)
    with pytest.raises(CheckpointError, match=f"ends inside {last}"):
        reader.get(last)


def test_bytes_do_not_depend_on_the_order(tmp_path):
    assert contents(write_all(tmp_path / "a", list)) == contents(write_all(tmp_path / "b", lambda t: list(t)[::-1]))


def test_a_small_checkpoint_is_one_file_without_index(tmp_path):
    assert sorted(contents(write_all(tmp_path / "c", list, 10**6))) == ["config.json", "model.safetensors"]


def test_a_resumed_run_writes_the_same_bytes_and_only_what_is_missing(tmp_path):
    whole = contents(write_all(tmp_path / "whole", list))
    tensors = some_tensors()
    first = CheckpointWriter(tmp_path / "c", specs(tensors), {"job": 1}, 100)
    for name in list(tensors)[:8]:
        first.write(name, tensors[name])
    first.close()
    assert not (tmp_path / "c").exists()
    second = CheckpointWriter(tmp_path / "c", specs(tensors), {"job": 1}, 100)
    needed = [name for name in tensors if second.needs(name)]
    assert 0 < len(needed) < len(tensors)
    for name in needed:
        second.write(name, tensors[name])
    second.finish({"config.json": "{}"})
    assert contents(tmp_path / "c") == whole
    assert not (tmp_path / "c.incomplete").exists()


def test_a_destination_that_is_taken_is_refused(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "precious.txt").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        CheckpointWriter(tmp_path / "c", [], {})
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        CheckpointWriter(tmp_path / "file", [], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "file"]


def test_a_leftover_of_another_job_is_refused_and_kept(tmp_path):
    plan = specs(some_tensors())
    CheckpointWriter(tmp_path / "c", plan, {"recipe": "max"}).close()
    with pytest.raises(CheckpointError, match="left by a different job"):
        CheckpointWriter(tmp_path / "c", plan, {"recipe": "other"})
    (tmp_path / "c.incomplete" / "job.json").unlink()
    (tmp_path / "c.incomplete" / "model.safetensors").write_bytes(b"someone's")
    with pytest.raises(CheckpointError, match="unknown job"):
        CheckpointWriter(tmp_path / "c", plan, {"recipe": "max"})
    assert (tmp_path / "c.incomplete" / "model.safetensors").read_bytes() == b"someone's"


def test_two_writers_at_once_are_refused(tmp_path):
    plan = specs(some_tensors())
    first = CheckpointWriter(tmp_path / "c", plan, {})
    with pytest.raises(CheckpointError, match="being written by another run"):
        CheckpointWriter(tmp_path / "c", plan, {})
    first.close()
    CheckpointWriter(tmp_path / "c", plan, {}).close()


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 4\.0 GB and its disk has 10 B free"):
        CheckpointWriter(tmp_path / "c", [TensorSpec("t", torch.uint8, (4 * 10**9,))], {})
    with pytest.raises(CheckpointError, match=r"needs 1\.0 GB"):
        CheckpointWriter(tmp_path / "c", [], {}, work_bytes=10**9)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_sentence_and_can_be_continued(tmp_path, monkeypatch):
    tensors = some_tensors()
    writer = CheckpointWriter(tmp_path / "c", specs(tensors), {}, 10**6)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module.os, "fsync", full)
    *most, last = tensors
    for name in most:
        writer.write(name, tensors[name])
    with pytest.raises(CheckpointError, match="No space left on device; free some space and run again to continue"):
        writer.write(last, tensors[last])
    writer.close()
    monkeypatch.undo()
    assert not (tmp_path / "c").exists()
    again = CheckpointWriter(tmp_path / "c", specs(tensors), {}, 10**6)
    for name, tensor in tensors.items():
        again.write(name, tensor)
    again.finish({"config.json": "{}"})
    assert contents(tmp_path / "c") == contents(write_all(tmp_path / "other", list, 10**6))


def test_a_tensor_unlike_its_plan_or_never_written_is_named(tmp_path):
    tensors = some_tensors()
    writer = CheckpointWriter(tmp_path / "c", specs(tensors), {}, 100)
    with pytest.raises(CheckpointError, match="t3 is torch"):
        writer.write("t3", torch.zeros(4, 3, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="never written, first"):
        writer.finish({})
    assert not (tmp_path / "c").exists()


def test_missing_and_truncated_shards_are_named(tmp_path):
    folder = write_all(tmp_path / "c", list)
    shard = sorted(folder.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is damaged or truncated"):
        CheckpointReader(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of its \d shards, first {shard.name}"):
        CheckpointReader(folder)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        CheckpointReader(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        CheckpointReader(tmp_path)
    folder = write_all(tmp_path / "c", list)
    (folder / INDEX_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        CheckpointReader(folder)


def test_an_index_that_promises_more_than_the_shards_hold(tmp_path):
    folder = write_all(tmp_path / "c", list)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="says ghost is in"):
        CheckpointReader(folder)


def test_tensors_missing_from_the_index_are_found(tmp_path):
    """As in published NVFP4 checkpoints, whose indexes omit the scales."""
    folder = write_all(tmp_path / "c", list)
    index = json.loads((folder / INDEX_NAME).read_text())
    shards = list(index["weight_map"].values())
    name = next(name for name, shard in index["weight_map"].items() if shards.count(shard) > 1)
    del index["weight_map"][name]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert torch.equal(CheckpointReader(folder).get(name).float(), some_tensors()[name].float())


def test_quantization_files_are_read_in_both_forms(tmp_path):
    written = nvfp4_quant_config(["model.layers.0.self_attn*", "lm_head"], "FP8")
    assert set(written["quantization"]) == {"quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"}
    from_section = QuantConfig.from_folder(tmp_path, {"quantization_config": nvfp4_config_section(written)})
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(written))
    from_file = QuantConfig.from_folder(tmp_path, {})
    assert from_file == from_section == QuantConfig("NVFP4", "FP8", ("lm_head", "model.layers.0.self_attn*"))
    bf16 = nvfp4_config_section(nvfp4_quant_config([], None))
    assert QuantConfig.from_folder("absent", {"quantization_config": bf16}).kv_cache_quant_algo is None


def test_exclusion_by_name_wildcard_parent_and_pattern():
    config = QuantConfig(exclude_modules=("lm_head", "model.layers.1.self_attn*", "model.layers.2", r"re:.*\.q_a_proj"))
    assert config.excludes("lm_head") and config.excludes("model.layers.1.self_attn.o_proj")
    assert config.excludes("model.layers.2.mlp.gate_proj") and config.excludes("model.layers.7.self_attn.q_a_proj")
    assert not config.excludes("model.layers.1.mlp.gate_proj") and not config.excludes("LM_HEAD")


def test_formats_are_told_from_tensors(tiny_fp8):
    reader = CheckpointReader(tiny_fp8)
    assert detect_format(reader, "model.layers.0.mlp.up_proj") is WeightFormat.FP8_BLOCK
    assert detect_format(reader, "lm_head") is WeightFormat.PLAIN
