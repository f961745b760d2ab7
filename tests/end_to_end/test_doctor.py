"""`doctor` on planted faults: each is named, and its mended copy is the healthy checkpoint again."""

import json
from pathlib import Path

import pytest
import torch

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkup.consequences import Mending, mending
from deepseek_fp4_plugin.checkup.diagnosis import diagnose
from deepseek_fp4_plugin.checkup.repair import repair
from deepseek_fp4_plugin.cli.app import run
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.quantization.recipes import RECIPES
from tests.planted import FAULTS, load, planted
from tests.tiny import tiny_config, write_checkpoint
from training.tokenizer import write_tokenizer

CONFIG = tiny_config(vocab_size=1024, hidden_size=256, moe_intermediate_size=128)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Wide enough for the tensor cores' order to have no padding."""
    folder = write_checkpoint(tmp_path_factory.mktemp("doctor") / "fp8", CONFIG)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def healthy(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "nvfp4"
    quantize_checkpoint(source, folder, calibration="builtin", samples=4, tokens=64)
    return folder


def next_tokens(folder: Path, activations: str = "bf16") -> list[int]:
    """The likeliest next token at each of 64 places, and of greedy steps from there."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder, nvfp4_activations=activations)
    ids = [(7 * i * i + 3) % 1000 for i in range(64)]
    with torch.inference_mode():
        chosen = model.compute_logits(model(ForwardBatch.from_sequences([ids]))).argmax(-1).tolist()
        for _ in range(4):
            ids.append(chosen[-1])
            chosen.append(int(model.compute_logits(model(ForwardBatch.from_sequences([ids])))[-1].argmax()))
    return chosen


@pytest.fixture(scope="module")
def right(healthy) -> dict[str, list[int]]:
    return {kind: next_tokens(healthy, kind) for kind in ("bf16", "fp4")}


def test_nothing_is_found_on_healthy_checkpoints(source, healthy):
    for folder, original in ((source, None), (healthy, None), (healthy, source), (source, source)):
        found = diagnose(folder, original)
        assert [str(finding) for finding in found.findings] == []
    assert found.values is not None and diagnose(healthy, source).values.judged > 100


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_nothing_is_found_on_what_a_recipe_makes(recipe, layout, source, tmp_path):
    choices = {"calibration": "builtin", "samples": 4, "tokens": 64}
    quantize_checkpoint(source, tmp_path / "out", recipe=recipe, layout=layout, **choices)
    for original in (None, source):
        assert [str(finding) for finding in diagnose(tmp_path / "out", original).findings] == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_and_mended(name, source, healthy, right, tmp_path):
    case = FAULTS[name]
    folder = planted(name, healthy, tmp_path / "planted")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    original = source if case.source else None
    sampled = diagnose(folder, original)
    assert case.fault in {finding.fault for finding in sampled.findings}, [str(f) for f in sampled.findings]
    found = diagnose(folder, original, everything=True)
    assert {f.fault for f in sampled.findings} == {f.fault for f in found.findings}
    assert mending(case.fault) in (Mending.YES, Mending.SOURCE)

    repair(found, tmp_path / "mended", max_shard_bytes=10**6)
    assert [str(finding) for finding in diagnose(tmp_path / "mended", original).findings] == []
    kind = "fp4" if case.fp4 else "bf16"
    assert next_tokens(tmp_path / "mended", kind) == right[kind]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if case.exact:
        ours, theirs = load(tmp_path / "mended"), load(healthy)
        assert ours.keys() == theirs.keys()
        wrong = [n for n in ours if not torch.equal(*(t[n].reshape(-1).view(torch.uint8) for t in (ours, theirs)))]
        assert wrong == []


@pytest.mark.parametrize("name", [name for name, case in FAULTS.items() if mending(case.fault) is Mending.SOURCE])
def test_what_only_the_source_can_mend_is_refused_without(name, healthy, tmp_path):
    folder = planted(name, healthy, tmp_path / "planted")
    found = diagnose(folder)
    if FAULTS[name].fault not in {finding.fault for finding in found.findings}:
        pytest.skip("cannot be seen without the source, and says so nowhere")
    with pytest.raises(CheckpointError, match="--source"):
        repair(found, tmp_path / "mended")
    assert not (tmp_path / "mended").exists() and not (tmp_path / "mended.incomplete").exists()


def test_the_command_says_what_each_runtime_makes_of_it_and_mends(healthy, tmp_path, capsys):
    folder = planted("gate and up differ", healthy, tmp_path / "planted")
    assert run(["doctor", str(folder), "--json", str(tmp_path / "found.json")]) == 1
    shown = capsys.readouterr().out
    assert "WARNING: model.layers.1.mlp.experts.3.up_proj.weight_scale_2" in shown
    assert "vLLM:          takes gate's for both" in shown and "repair:        yes" in shown
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["findings"][0]["runtimes"]["deepseek-fp4"] == "each is used for its own: right"
    assert content["bytes_read"] <= 0.01 * content["bytes"]
    assert run(["doctor", str(folder), "--repair", str(tmp_path / "mended")]) == 0
    assert "nothing is wrong with it" in capsys.readouterr().out
    assert run(["doctor", str(tmp_path / "mended"), "--repair", str(tmp_path / "again")]) == 0
    assert "nothing to mend" in capsys.readouterr().out and not (tmp_path / "again").exists()


def test_flags_that_need_a_checkpoint(capsys):
    assert run(["doctor", "--full"]) == 2
    assert "are about a CHECKPOINT" in capsys.readouterr().err
    assert run(["doctor", "/nowhere"]) == 1
    assert "is not a folder here; doctor looks at local checkpoints" in capsys.readouterr().err
