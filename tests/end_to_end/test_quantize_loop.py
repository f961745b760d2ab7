"""The quantizer's loop: work shared by processes, commits within a shard, portions under a cap, kept calibrations."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_fp4_plugin.checkpoint import writer as writer_module
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.models.deepseek_r1 import DEEPSEEK_R1
from deepseek_fp4_plugin.quantization import quantize as quantize_module
from deepseek_fp4_plugin.quantization.memory import Portions, portions, portions_on_gpu, solving_bytes
from deepseek_fp4_plugin.quantization.overlap import overlapped
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.quantization.recipe import Needs, block_diagonal
from deepseek_fp4_plugin.quantization.recipes.max import Max
from deepseek_fp4_plugin.quantization.rows import Rows
from deepseek_fp4_plugin.quantization.solve import Moments
from tests.stops import SETTINGS, contents, small  # noqa: F401 (fixture)

ROOT = Path(__file__).parents[2]
# A run in a process of its own, with commits after a few tensors; `stop`: it kills itself after so many units.
CODE = """
import os, signal, sys, torch
torch.set_num_threads(int(sys.argv[3]))
from deepseek_fp4_plugin.checkpoint import writer
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
writer.COMMIT_BYTES = 30_000
def tell(stage, done, total):
    if stage == "convert" and done == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
quantize_checkpoint(sys.argv[1], sys.argv[2], **{settings!r}, share=True, progress=tell)
"""


SOLVED = {"samples": 6, "tokens": 32}


class CountedCalls:
    """`Rows.append`, which notes where the rows lie."""

    def __init__(self, append):
        self.append, self.folders = append, set()

    def __get__(self, rows, owner):
        self.folders.add(rows.folder)
        return lambda some: self.append(rows, some)


def quantize(source, destination, **changes):
    return quantize_checkpoint(source, destination, **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def expected(small, tmp_path_factory) -> dict[str, bytes]:  # noqa: F811
    folder = tmp_path_factory.mktemp("expected") / "out"
    quantize(small, folder, save_calibration=folder.parent / "kept.json")
    return contents(folder) | {"kept.json": (folder.parent / "kept.json").read_bytes()}


def checkpoint_of(expected: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in expected.items() if name != "kept.json"}


def start(source: Path, destination: Path, stop: int = -1) -> subprocess.Popen:
    code = CODE.replace("{settings!r}", repr(SETTINGS))
    arguments = [str(source), str(destination), str(torch.get_num_threads()), str(stop)]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_three_processes_share_a_job_and_one_of_them_is_killed(small, expected, tmp_path):  # noqa: F811
    stops = (9, -1, -1)
    processes = [start(small, tmp_path / "out", stop) for stop in stops]
    said = [process.communicate(timeout=600)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes[0] in (0, -signal.SIGKILL) and codes[1:] == [0, 0], said
    assert contents(tmp_path / "out") == checkpoint_of(expected) and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_shared_job_that_all_left_is_finished_by_one(small, expected, tmp_path):  # noqa: F811
    for stop in (7, 11):
        process = start(small, tmp_path / "out", stop)
        assert process.communicate(timeout=600) and process.returncode == -signal.SIGKILL
    quantize(small, tmp_path / "out")  # alone: nobody shares with it
    assert contents(tmp_path / "out") == checkpoint_of(expected) and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_who_does_not_share_is_told_of_those_who_do(small, tmp_path):  # noqa: F811
    said = []

    def second(where: str, done: int, total: int) -> None:
        if where == "convert" and done == 5 and not said:
            with pytest.raises(CheckpointError, match="is being written by another run") as error:
                quantize(small, tmp_path / "out")
            said.append(str(error.value))

    quantize(small, tmp_path / "out", share=True, progress=second)
    assert len(said) == 1


def test_what_was_committed_of_a_shard_is_not_made_again(small, expected, tmp_path, monkeypatch):  # noqa: F811
    """One shard of everything: without commits a stopped run would begin it again."""
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 30_000)
    solved = []
    original = Max.solve_source
    monkeypatch.setattr(Max, "solve_source", lambda self, weights: solved.append(1) or original(self, weights))
    quantize(small, tmp_path / "whole" / "out", max_shard_bytes=10**9)
    whole, solved[:] = len(solved), []

    def stop(where: str, done: int, total: int) -> None:
        if where == "convert" and done == total * 3 // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(small, tmp_path / "out", max_shard_bytes=10**9, progress=stop)
    before, solved[:] = len(solved), []
    assert not list((tmp_path / "out.incomplete").glob("*.safetensors"))
    partial = next((tmp_path / "out.incomplete").glob("*.safetensors.partial"))
    quantize(small, tmp_path / "out", max_shard_bytes=10**9)
    assert len(solved) <= whole - before + 4 < whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["cut", "altered", "gone"])
def test_committed_tensors_that_are_damaged_are_made_again(small, tmp_path, monkeypatch, damage):  # noqa: F811
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 30_000)

    def stop(where: str, done: int, total: int) -> None:
        if where == "convert" and done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(small, tmp_path / "out", max_shard_bytes=10**9, progress=stop)
    partial = next((tmp_path / "out.incomplete").glob("*.safetensors.partial"))
    data = bytearray(partial.read_bytes())
    data[len(data) // 3] ^= 1
    {"cut": lambda: partial.write_bytes(data[: len(data) // 3]), "altered": lambda: partial.write_bytes(data)}.get(
        damage, partial.unlink
    )()
    quantize(small, tmp_path / "out", max_shard_bytes=10**9)
    quantize(small, tmp_path / "whole" / "out", max_shard_bytes=10**9)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("experts", [1, 3])
def test_experts_in_groups_and_spans_change_no_byte(small, expected, tmp_path, monkeypatch, experts):  # noqa: F811
    chosen = Portions(quantize_module.BATCH_TOKENS, 10**6, experts, 1)
    monkeypatch.setattr(quantize_module, "portions", lambda *arguments: chosen)
    quantize(small, tmp_path / "out", max_memory=10**12)
    assert contents(tmp_path / "out") == checkpoint_of(expected)


def test_a_cap_below_what_a_model_needs_is_refused_before_anything_is_read(small, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"--max-memory 100.0 MB is too little for this model: it takes .* at least"):
        quantize(small, tmp_path / "out", max_memory=10**8)
    assert not list(tmp_path.iterdir())


def test_memory_beyond_the_cap_is_refused_by_the_kernel_in_one_sentence(small, expected, tmp_path):  # noqa: F811
    """A solver that takes more than was planned: the run ends, and goes on with a larger cap."""
    cap = 3 * 10**9

    def hungry(self, weights):
        torch.empty(cap, dtype=torch.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Max, "solve_source", hungry)
        with pytest.raises(CheckpointError, match=r"--max-memory 3\.0 GB was reached; give it more and run again"):
            quantize(small, tmp_path / "out", max_memory=cap)
    quantize(small, tmp_path / "out", max_memory=2 * cap)
    assert contents(tmp_path / "out") == checkpoint_of(expected)


@pytest.mark.parametrize("needs", list(Needs))
def test_every_recipe_fits_r1_into_four_gigabytes(needs):
    """With the default number of tokens; where they do not fit beside a solver's matrices they lie in files."""
    r1, tokens = DEEPSEEK_R1, 512 * 512
    solving = solving_bytes(r1, needs)
    chosen = portions(r1, 4 * 10**9, 512, 1, solving, tokens)
    assert chosen.spill == (needs is not Needs.NOTHING) and chosen.experts > 8 and not chosen.keep
    roomy = portions(r1, 64 * 10**9, 512, 1, solving, tokens)
    assert not roomy.spill and roomy.keep and roomy.span_tokens > chosen.span_tokens
    with pytest.raises(ValueError, match="is too little for this model: it takes"):
        portions(r1, 2 * 10**9, 512, 1, solving, tokens)


def test_a_gpu_keeps_the_experts_that_the_host_reads_in_groups():
    chosen = portions_on_gpu(DEEPSEEK_R1, 4 * 10**9, 80 * 10**9, 512, 1)
    assert chosen.keep and chosen.experts < 32 and chosen.batch_tokens == quantize_module.BATCH_TOKENS
    less = portions_on_gpu(DEEPSEEK_R1, None, 16 * 10**9, 512, 1)
    assert not less.keep and less.experts < 256


@pytest.mark.parametrize(("recipe", "layout"), [("local-hessian", "v1"), ("gptq", "v2")])
def test_rows_in_files_change_no_byte(small, tmp_path, monkeypatch, recipe, layout):  # noqa: F811
    choices = {**SOLVED, "recipe": recipe, "layout": layout}
    quantize(small, tmp_path / "whole" / "out", **choices)
    chosen = Portions(quantize_module.BATCH_TOKENS, 10**6, 3, 1, spill=True)
    monkeypatch.setattr(quantize_module, "portions", lambda *arguments: chosen)
    monkeypatch.setattr(Rows, "append", counted := CountedCalls(Rows.append))
    quantize(small, tmp_path / "out", **choices, max_memory=10**12)
    assert counted.folders == {tmp_path / "out.incomplete" / "work"}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


@pytest.mark.parametrize("recipe", ["max", "local-hessian"])
def test_bytes_moved_add_up_to_what_is_read_and_written(small, tmp_path, recipe):  # noqa: F811
    seen = []
    quantize(small, tmp_path / "out", **SOLVED, recipe=recipe, moved=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1]
    files = sum(path.stat().st_size for folder in (small, tmp_path / "out") for path in folder.glob("*.safetensors"))
    assert 0.85 * files < seen[-1][1] < files  # headers and FP8 scales are left out


@pytest.mark.parametrize("spilled", [False, True])
def test_rows_are_read_as_they_were_written(tmp_path, spilled):
    rows, extra = torch.randn(9, 4), torch.randn(3, 4)
    found = Rows(9, 4, torch.float32, torch.device("cpu"), tmp_path if spilled else None)
    found.append(rows[:5])
    found.append(rows[5:])
    assert torch.equal(found.read(2, 20), rows[2:])
    some = torch.tensor([7, 0, 3])
    found.add(some, extra)
    assert torch.equal(found.pick(some), rows[some] + extra)
    assert not list(tmp_path.iterdir())


def test_rows_for_which_the_disk_has_no_room(tmp_path, monkeypatch):
    found = Rows(9, 4, torch.float32, torch.device("cpu"), tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        found.append(torch.zeros(1, 4))


# ---------------------------------------------------------------- kept calibrations


def test_a_kept_calibration_gives_the_same_checkpoint_without_a_forward(small, expected, tmp_path):  # noqa: F811
    kept = tmp_path / "kept.json"
    kept.write_bytes(expected["kept.json"])
    stages = set()
    quantize(small, tmp_path / "out", calibration=kept, progress=lambda stage, done, total: stages.add(stage))
    assert stages == {"convert"} and contents(tmp_path / "out") == checkpoint_of(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(hidden_size=128), "the calibration of another model"),
        (lambda c: c.pop("amax"), "is not a calibration that --save-calibration wrote"),
        (lambda c: c["amax"].update({"model.layers.0.mlp.up_proj": -1}), "is not a calibration"),
        (lambda c: c["amax"].clear(), "calibration saw no input of"),
    ],
)
def test_a_kept_calibration_that_does_not_fit_is_refused(small, expected, tmp_path, change, message):  # noqa: F811
    content = json.loads(expected["kept.json"])
    change(content)
    (tmp_path / "kept.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        quantize(small, tmp_path / "out", calibration=tmp_path / "kept.json")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- reading, computing and writing at once


def test_jobs_come_in_their_order_and_within_the_budget():
    held = most = 0
    stored = []

    def load(job: int) -> int:
        nonlocal held, most
        held += job
        most = max(most, held)
        return job

    def store(job: int, result: int) -> None:
        nonlocal held
        held -= job
        stored.append((job, result))

    jobs = [3, 1, 4, 1, 5, 9, 2, 6, 30, 5, 3, 5]
    done = list(overlapped(jobs, load, lambda job, loaded: loaded * 2, store, lambda job: job, 10))
    assert done == jobs and stored == [(job, 2 * job) for job in jobs]
    assert most <= 30  # the one job above the budget is alone


@pytest.mark.parametrize("step", ["load", "work", "store"])
def test_an_error_comes_in_its_turn_and_nothing_behind_it_is_stored(step):
    stored = []

    def fails(where: str, job: int) -> int:
        if where == step and job == 5:
            raise ValueError("five")
        return job

    run = overlapped(
        range(1, 10),
        lambda job: fails("load", job),
        lambda job, loaded: fails("work", job),
        lambda job, result: stored.append(fails("store", job)),
        lambda job: 1,
        3,
    )
    with pytest.raises(ValueError, match="five"):
        list(run)
    assert stored == [1, 2, 3, 4]


# ---------------------------------------------------------------- layers solved from their own inputs


@pytest.mark.parametrize(("recipe", "layout"), [("local-hessian", "v1"), ("gptq", "v2")])
def test_a_layer_solved_from_its_inputs_goes_on_after_a_stop(small, tmp_path, recipe, layout):  # noqa: F811
    """Same names, dtypes and shapes as of `max`; the same bytes after a stop between its layers."""

    def stop(where: str, done: int, total: int) -> None:
        if where == "calibrate" and done == 1:
            raise KeyboardInterrupt

    choices = {**SOLVED, "recipe": recipe, "layout": layout}
    report = quantize(small, tmp_path / "whole" / "out", **choices)
    with pytest.raises(KeyboardInterrupt):
        quantize(small, tmp_path / "out", **choices, progress=stop)
    assert list((tmp_path / "out.incomplete" / "work").glob("layer-000.json"))
    assert str(quantize(small, tmp_path / "out", **choices)).splitlines() == str(report).splitlines()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")
    quantize(small, tmp_path / "max", **SOLVED, layout=layout)
    ours, theirs = CheckpointReader(tmp_path / "out"), CheckpointReader(tmp_path / "max")
    assert {n: (i.dtype, i.shape) for n, i in ours.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in theirs.tensors.items()
    }
    changed = [name for name in ours if not torch.equal(_bytes(ours.get(name)), _bytes(theirs.get(name)))]
    assert changed and all(
        name.endswith(("weight", "weight_scale", "weight_scale_2", "input_scale")) for name in changed
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_what_was_solved_and_is_damaged_is_solved_again(small, tmp_path):  # noqa: F811
    choices = {**SOLVED, "recipe": "local-hessian"}

    def stop(where: str, done: int, total: int) -> None:
        if where == "convert" and done == total - 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(small, tmp_path / "out", **choices, progress=stop)
    shard = sorted((tmp_path / "out.incomplete").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    quantize(small, tmp_path / "out", **choices)
    quantize(small, tmp_path / "whole" / "out", **choices)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_a_solver_sees_each_row_once_and_holds_every_fifth_token_out():
    rows = torch.randn(103, 32)
    held = torch.arange(103) % 5 == 4
    for needs, expected in (
        (Needs.HESSIAN, rows[~held].T @ rows[~held] / 83),
        (Needs.BLOCK_HESSIAN, block_diagonal(rows[~held]) / 83),
    ):
        moments = Moments(32, needs, torch.device("cpu"))
        for start in range(0, 103, 20):
            moments.add(rows[start : start + 20], held[start : start + 20])
        found = moments.statistics()
        assert found.tokens == 83 and torch.equal(found.held_out, rows[held])
        torch.testing.assert_close(found.hessian, expected)
        mean = torch.ones_like(expected)
        torch.testing.assert_close(moments.statistics(mean).hessian, expected * (1 - 32 / 115) + 32 / 115)


def test_what_a_solver_cannot_do_is_refused_before_the_work(small, expected, tmp_path):  # noqa: F811
    (tmp_path / "kept.json").write_bytes(expected["kept.json"])
    with pytest.raises(ValueError, match="gptq needs more of the inputs than a kept calibration holds"):
        quantize(small, tmp_path / "out", recipe="gptq", calibration=tmp_path / "kept.json")
    with pytest.raises(ValueError, match="which cannot be shared"):
        quantize(small, tmp_path / "out", recipe="local-hessian", share=True)
    with pytest.raises(ValueError, match=r"arithmetic modelopt-0\.31\.0 is of recipe max"):
        quantize(small, tmp_path / "out", recipe="gptq", arithmetic="modelopt-0.31.0")
    with pytest.raises(ValueError, match=r"choose from modelopt-0\.47\.0, modelopt-0\.31\.0"):
        quantize(small, tmp_path / "out", arithmetic="modelopt-0.32.0")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_max_in_the_arithmetic_of_an_older_release(small, expected, tmp_path):  # noqa: F811
    quantize(small, tmp_path / "out", arithmetic="modelopt-0.31.0")
    assert b"max (modelopt-0.31.0)" in (tmp_path / "out" / "README.md").read_bytes()
    assert contents(tmp_path / "out").keys() == checkpoint_of(expected).keys()
