"""Jobs beside each other and again, destinations and sources in odd places, weights that are zero."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import INDEX_NAME, CheckpointReader
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.quantization import quantize as quantize_module
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.quantization.report import QuantizationReport
from tests.stops import SETTINGS, contents, small  # noqa: F401 (fixture)
from tests.tiktoken_folder import BYTES, write_tiktoken

ROOT = Path(__file__).parents[2]


def quantize(source, destination, **changes) -> QuantizationReport:
    return quantize_checkpoint(source, destination, **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def expected(small, tmp_path_factory) -> tuple[dict[str, bytes], QuantizationReport]:  # noqa: F811
    folder = tmp_path_factory.mktemp("expected") / "out"
    report = quantize(small, folder)
    return contents(folder), report


def stop_at(stage: str, at: int):
    def interrupt(where: str, done: int, total: int) -> None:
        if where == stage and done >= at:
            raise KeyboardInterrupt

    return interrupt


def part_done(source: Path, destination: Path) -> Path:
    """The unfinished folder of a run that was stopped with some shards closed."""
    with pytest.raises(KeyboardInterrupt):
        quantize(source, destination, progress=stop_at("convert", 40))
    folder = destination.with_name(destination.name + ".incomplete")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


# ---------------------------------------------------------------- jobs


@pytest.mark.parametrize("changes", [{}, {"samples": 1}, {"layout": "v2"}])
def test_a_second_job_while_one_runs_is_told_to_wait(small, expected, tmp_path, changes):  # noqa: F811
    said = []

    def second(where: str, done: int, total: int) -> None:
        if where == "convert" and done == 20:
            with pytest.raises(CheckpointError, match="is being written by another run") as error:
                quantize(small, tmp_path / "out", **changes)
            said.append(str(error.value))

    quantize(small, tmp_path / "out", progress=second)
    assert len(said) == 1 and "wait for it or stop it" in said[0] and "remove" not in said[0]
    assert ("which does a different job" in said[0]) == bool(changes)
    assert contents(tmp_path / "out") == expected[0]


def test_another_source_is_told_which_choices_differ(small, tmp_path):  # noqa: F811
    part_done(small, tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(small, other)
    os.utime(next(other.glob("*.safetensors")), (1, 1))
    with pytest.raises(CheckpointError, match=r"left by a different job \(other layout, source; see"):
        quantize(other, tmp_path / "out", layout="v2")


def test_a_finished_run_that_was_stopped_while_tidying_up_gives_its_report(
    small, expected, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(small, tmp_path / "out")
    report = quantize(small, tmp_path / "out", progress=stop_at("calibrate", 0))  # which is not called
    assert report.to_json() == {**expected[1].to_json(), "destination": str(tmp_path / "out")}
    assert str(report) == str(expected[1])
    assert contents(tmp_path / "out") == expected[0] and [p.name for p in tmp_path.iterdir()] == ["out"]


def _cut_notes(folder: Path) -> None:
    notes = folder / "work" / "modules.jsonl"
    notes.write_bytes(notes.read_bytes()[:300])


def _cut_last_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "damage",
    [
        _cut_notes,
        lambda folder: (folder / "work" / "modules.jsonl").unlink(),
        lambda folder: shutil.rmtree(folder / "work"),
        lambda folder: [path.write_bytes(b"\0" * 100) for path in (folder / "work").iterdir()],
        lambda folder: (folder / "shards.jsonl").unlink(),
        _cut_last_shard,
        lambda folder: next(folder.glob("*.safetensors")).unlink(),
        lambda folder: shutil.copy(next(folder.glob("*.safetensors")), folder / "model-00009-of-00010.safetensors"),
    ],
    ids=[
        "notes cut",
        "no notes",
        "no work",
        "zeros",
        "no checksums",
        "shard cut",
        "shard gone",
        "shard of another name",
    ],
)
def test_what_is_damaged_between_runs_is_done_again(small, expected, tmp_path, damage):  # noqa: F811
    damage(part_done(small, tmp_path / "out"))
    report = quantize(small, tmp_path / "out")
    assert report.to_json() == {**expected[1].to_json(), "destination": str(tmp_path / "out")}
    assert contents(tmp_path / "out") == expected[0]


@pytest.mark.parametrize("changed", ["config.json", "shard"])
def test_a_source_that_changes_under_the_run(small, tmp_path, changed):  # noqa: F811
    source = tmp_path / "source"
    shutil.copytree(small, source)
    path = source / "config.json" if changed == "config.json" else next(source.glob("*.safetensors"))

    def change(where: str, done: int, total: int) -> None:
        if where == "convert" and done == 20:
            if changed == "config.json":
                path.write_bytes(path.read_bytes() + b" ")
            os.utime(path, (1, 1))

    with pytest.raises(CheckpointError, match="source changed while it was being read"):
        quantize(source, tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gone", ["source", "work"])
def test_folders_that_vanish_under_the_run(small, tmp_path, gone):  # noqa: F811
    source = tmp_path / "source"
    shutil.copytree(small, source)

    def remove(where: str, done: int, total: int) -> None:
        if where == "convert" and done == 20:
            shutil.rmtree(source if gone == "source" else tmp_path / "out.incomplete")

    with pytest.raises(CheckpointError) as error:
        quantize(source, tmp_path / "out", progress=remove)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_three_processes_of_one_command_at_once(small, expected, tmp_path):  # noqa: F811
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[3]))\n"
        "from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint\n"
        f"try: quantize_checkpoint(sys.argv[1], sys.argv[2], **{SETTINGS!r})\n"
        "except ValueError as error: sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", code, str(small), str(tmp_path / "out"), str(torch.get_num_threads())]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=300)[1] for process in processes]
    told = [text for process, text in zip(processes, said, strict=True) if process.returncode]
    assert len(told) < 3 and all("being written by another run" in t or "is not empty" in t for t in told), said
    assert contents(tmp_path / "out") == expected[0] and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_what_the_next_run_continues(small, expected, tmp_path, number):  # noqa: F811
    """Each to the program itself, with shards closed."""
    code = (
        "import signal, sys, time, torch; torch.set_num_threads(int(sys.argv[3]))\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # whoever runs the tests may ignore it, as nohup does
        "from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint\n"
        "def tell(stage, done, total):\n"
        "    if (stage, done) == ('convert', 40): print('there', flush=True); time.sleep(600)\n"
        f"quantize_checkpoint(sys.argv[1], sys.argv[2], **{SETTINGS!r}, progress=tell)\n"
    )
    command = [sys.executable, "-c", code, str(small), str(tmp_path / "out"), str(torch.get_num_threads())]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout and process.stdout.readline() == "there\n"
    process.send_signal(number)
    assert process.wait(60) == -number
    process.stdout.close()
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.incomplete").glob("*.safetensors"))
    quantize(small, tmp_path / "out")
    assert contents(tmp_path / "out") == expected[0]


def test_a_clock_that_goes_backwards_changes_nothing(small, expected, tmp_path, monkeypatch):  # noqa: F811
    part_done(small, tmp_path / "out")
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    for path in (tmp_path / "out.incomplete").rglob("*"):
        os.utime(path, (10**10, 10**10))
    quantize(small, tmp_path / "out")
    assert contents(tmp_path / "out") == expected[0]


# ---------------------------------------------------------------- places


def test_a_quoted_home(small, expected, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    report = quantize(small, "~/out")
    assert contents(tmp_path / "home" / "out") == expected[0] and report.destination == str(tmp_path / "home" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_a_destination_inside_the_source(small, expected, tmp_path):  # noqa: F811
    source = tmp_path / "source"
    shutil.copytree(small, source, copy_function=os.link)  # hard links: nothing may write through them
    before = contents(source)
    quantize(source, source / "out")
    result = contents(source / "out")
    assert {n: b for n, b in result.items() if n != "README.md"} == {
        n: b for n, b in expected[0].items() if n != "README.md"
    }
    assert {n: b for n, b in contents(source).items() if not n.startswith("out/")} == before == contents(small)


def test_a_source_where_the_work_would_lie(small, tmp_path):  # noqa: F811
    for place in ("out.incomplete", "out.incomplete/work/model"):
        source = tmp_path / place
        shutil.copytree(small, source)
        with pytest.raises(CheckpointError, match="where the work would lie; choose another destination"):
            quantize(source, tmp_path / "out")
        assert contents(source) == contents(small)
        shutil.rmtree(tmp_path / "out.incomplete")
    (tmp_path / "out").mkdir()
    shutil.copytree(small, tmp_path / "out" / "model")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize(tmp_path / "out" / "model", tmp_path / "out")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm as another file system")
@pytest.mark.parametrize("through", ["path", "link"])
def test_a_destination_on_another_disk(small, expected, tmp_path, through):  # noqa: F811
    disk = Path(f"/dev/shm/quantize-{os.getpid()}-{through}")
    disk.mkdir()
    try:
        destination = disk / "out"
        if through == "link":
            destination.mkdir()
            (tmp_path / "out").symlink_to(destination)
        quantize(small, tmp_path / "out" if through == "link" else destination)
        assert contents(destination) == expected[0] and [p.name for p in disk.iterdir()] == ["out"]
    finally:
        shutil.rmtree(disk)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model"])
def test_a_source_with_a_tokenizer_as_kimi_k2_and_moonlight_have(small, tmp_path, name):  # noqa: F811
    source, result = tmp_path / "source", tmp_path / "out"
    shutil.copytree(small, source)
    (source / "tokenizer.json").unlink()
    write_tiktoken(source, BYTES, name)
    quantize(source, result)
    for copied in (name, "tokenization_kimi.py", "tokenizer_config.json"):
        assert (result / copied).read_bytes() == (source / copied).read_bytes()
    with LLM(result) as llm:
        (answer,) = llm.generate(["12+7="], SamplingParams(max_tokens=3))
    assert answer.prompt_token_ids == list(b"12+7=")


@pytest.mark.parametrize("other", ["spiece.model", None])
def test_a_source_whose_tokenizer_has_another_form(small, tmp_path, other):  # noqa: F811
    """What is said must be possible to do."""
    source = tmp_path / "source"
    shutil.copytree(small, source)
    (source / "tokenizer.json").unlink()
    if other:
        (source / other).write_bytes(b"\n\x0e\n\x05<unk>")
    message = f"{other} is a form of tokenizer that is not read here; convert it" if other else "copy it from the orig"
    with pytest.raises(ValueError, match=message):
        quantize(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ---------------------------------------------------------------- zeros


def zeroed(source: Path, folder: Path, *parts: str) -> Path:
    """A copy whose weights with one of `parts` in their names are zero."""
    shutil.copytree(source, folder)
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX_NAME).unlink(missing_ok=True)
    chosen = [n for n in tensors if any(part in n for part in parts) and not n.endswith("weight_scale_inv")]
    assert chosen
    for name in chosen:
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


MLP, O_PROJ = "model.layers.0.mlp", "model.layers.0.self_attn.o_proj"
DENSE = [f"{MLP}.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("parts", "layout", "zeros"),
    [
        ([f"{MLP}.gate_proj"], "v1", [f"{MLP}.down_proj"]),
        ([f"{MLP}.up_proj"], "v1", [f"{MLP}.down_proj"]),
        ([f"{MLP}.down_proj"], "v1", []),
        (["layers.1.mlp.shared_experts"], "v1", ["model.layers.1.mlp.shared_experts.down_proj"]),
        (["layers.1.mlp.experts.3.gate_proj"], "v1", []),  # has the scale of its peers
        (["layers.1.mlp.gate.weight"], "v1", []),
        (["layers.0.post_attention_layernorm"], "v1", DENSE),
        (["layers.0.self_attn.kv_b_proj"], "v2", [O_PROJ]),
        (["layers.0.input_layernorm"], "v2", [O_PROJ]),
        (["layers.0."], "v2", [O_PROJ, *DENSE]),
        (["layers.2."], "v2", []),  # the MTP layer, which is not quantized
    ],
    ids=["gate", "up", "down", "shared expert", "an expert", "router", "norm", "values", "attention", "layer", "mtp"],
)  # fmt: skip
def test_projections_that_see_only_zeros(small, tmp_path, parts, layout, zeros):  # noqa: F811
    source = zeroed(small, tmp_path / "source", *parts)
    report = quantize(source, tmp_path / "out", layout=layout)
    assert sorted(report.zero_inputs) == sorted(zeros)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["zero_inputs"] == list(report.zero_inputs)
    reader = CheckpointReader(tmp_path / "out")
    for module in zeros:
        assert reader.get(f"{module}.input_scale").item() == 1.0
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("were all zero" in card) == ("that saw only zeros" in str(report)) == bool(zeros)
    assert all(f"`{module}`" in card for module in zeros) and "inf" not in card.split("## Usage")[0]
    for name in reader:
        if name.endswith("scale"):
            assert torch.isfinite(reader.get(name).float()).all()
    for activations in ("bf16", "fp4"):
        model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out", nvfp4_activations=activations)
        with torch.inference_mode():
            logits = model.compute_logits(model(ForwardBatch.from_sequences([[5, 6, 7]])))
        assert torch.isfinite(logits).all()


def test_a_model_that_is_all_zero(small, tmp_path):  # noqa: F811
    """Nothing to learn from it, and nothing to stop for: every weight is exact."""
    source = zeroed(small, tmp_path / "source", "embed_tokens", "layers.0.", "layers.1.")
    report = quantize(source, tmp_path / "out")
    assert len(report.zero_inputs) == report.quantized_modules
    assert "exact" in str(report) and "and 25 more" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_without_zeros_says_nothing_of_them(expected):
    assert expected[1].zero_inputs == () and b"all zero" not in expected[0]["README.md"]
    assert quantize_module.QuantizationReport.from_state(json.loads(json.dumps(expected[1].to_state()))) == expected[1]
