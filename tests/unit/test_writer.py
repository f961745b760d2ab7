"""The writer where things go wrong: locks, links, damage, what is in the way, and failures of the last steps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import INDEX_NAME
from deepseek_fp4_plugin.checkpoint.sizes import size_text
from deepseek_fp4_plugin.checkpoint.writer import CheckpointWriter
from tests.unit.test_checkpoint import contents, some_tensors, specs, write_all


@pytest.fixture
def expected(tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    return contents(write_all(tmp_path_factory.mktemp("whole") / "c", list))


def unfinished(folder: Path) -> CheckpointWriter:
    """A writer whose every shard is closed."""
    tensors = some_tensors()
    writer = CheckpointWriter(folder, specs(tensors), {"job": 1}, 100)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return writer


def go_on(folder: Path) -> list[str]:
    """Continue `unfinished`; the names that had to be written again."""
    tensors = some_tensors()
    writer = CheckpointWriter(folder, specs(tensors), {"job": 1}, 100)
    needed = [name for name in tensors if writer.needs(name)]
    for name in needed:
        writer.write(name, tensors[name])
    writer.finish({"config.json": "{}"})
    return needed


# ---------------------------------------------------------------- locks


def test_a_running_job_is_never_called_removable(tmp_path):
    plan = specs(some_tensors())
    first = CheckpointWriter(tmp_path / "c", plan, {"source": "a"})
    with pytest.raises(CheckpointError, match=rf"being written by another run \(process {os.getpid()}") as error:
        CheckpointWriter(tmp_path / "c", plan, {"source": "b"})
    assert "different job; wait for it or stop it" in str(error.value) and "remove" not in str(error.value)
    first.close()
    with pytest.raises(CheckpointError, match=r"left by a different job \(other source; see .*job\.json\)"):
        CheckpointWriter(tmp_path / "c", plan, {"source": "b"})


def test_a_lock_dies_with_its_process(tmp_path):
    code = (
        "import sys, time\nfrom deepseek_fp4_plugin.checkpoint import writer\n"
        "held = writer.CheckpointWriter(sys.argv[1], [], {})\nprint('locked', flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "locked\n"
    with pytest.raises(CheckpointError, match=rf"being written by another run \(process {process.pid}"):
        CheckpointWriter(tmp_path / "c", [], {})
    process.kill()
    process.wait()
    process.stdout.close()
    CheckpointWriter(tmp_path / "c", [], {}).close()


# ---------------------------------------------------------------- the last steps


def put_file(destination: Path) -> None:
    destination.write_text("mine")


def put_folder(destination: Path) -> None:
    destination.mkdir()
    (destination / "notes.txt").write_text("mine")


def put_link(destination: Path) -> None:
    destination.symlink_to(destination.parent)


@pytest.mark.parametrize("put", [put_file, put_folder, put_link])
def test_what_is_put_at_the_destination_meanwhile_costs_no_work(tmp_path, expected, put):
    destination = tmp_path / "c"
    writer = unfinished(destination)
    put(destination)
    with pytest.raises(CheckpointError, match=r"waits in .*c\.incomplete; make room there and run again"):
        writer.finish({"config.json": "{}"})
    writer.close()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        go_on(destination)
    if destination.is_dir() and not destination.is_symlink():
        shutil.rmtree(destination)
    else:
        destination.unlink()
    assert go_on(destination) == []
    assert contents(destination) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("what", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("function", ["rename", "replace", "fsync"])
def test_a_finish_that_fails_is_repeated_without_its_work(tmp_path, expected, monkeypatch, what, function):
    writer = unfinished(tmp_path / "c")

    def fail(*arguments):
        raise what

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            writer.finish({"config.json": "{}"})
    writer.close()
    assert not (tmp_path / "c").exists()
    assert go_on(tmp_path / "c") == []
    assert contents(tmp_path / "c") == expected


def test_a_run_stopped_while_tidying_up_is_told_so(tmp_path, expected, monkeypatch):
    writer = unfinished(tmp_path / "c")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            writer.finish({"config.json": "{}"}, {"answer": 42})
    writer.close()
    assert (tmp_path / "c.incomplete").is_dir()
    tensors = some_tensors()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        CheckpointWriter(tmp_path / "c", specs(tensors), {"job": 2}, 100)
    again = CheckpointWriter(tmp_path / "c", specs(tensors), {"job": 1}, 100)
    assert again.finished == {"answer": 42} and not any(map(again.needs, tensors))
    again.finish({})
    assert contents(tmp_path / "c") == expected
    assert not (tmp_path / "c.incomplete").exists()


def test_a_result_that_was_removed_is_made_again(tmp_path, expected, monkeypatch):
    """The notes of a finished run beside an absent destination promise nothing."""
    writer = unfinished(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "_tidy", CheckpointWriter.close)
        writer.finish({"config.json": "{}"})
    shutil.rmtree(tmp_path / "c")
    assert sorted(go_on(tmp_path / "c")) == sorted(some_tensors())
    assert contents(tmp_path / "c") == expected


# ---------------------------------------------------------------- damage


def _flip(path: Path, at: int = -2) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda path: _flip(path, 20),
        lambda path: os.truncate(path, 30),
        lambda path: os.truncate(path, 10**4),
        Path.unlink,
    ],
    ids=["a bit", "a bit of the header", "cut", "longer", "removed"],
)
def test_a_damaged_shard_is_written_again_and_no_other(tmp_path, expected, damage):
    unfinished(tmp_path / "c").close()
    shard = sorted((tmp_path / "c.incomplete").glob("*.safetensors"))[2]
    lost = list(load_file(shard))
    damage(shard)
    assert sorted(go_on(tmp_path / "c")) == sorted(lost)
    assert contents(tmp_path / "c") == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines[:2], lines[2][:30]],
        lambda lines: [lines[0].replace(b'"checksums":{"t0":', b'"checksums":{"t0":1'), *lines[1:]],
        lambda lines: [],
        lambda lines: [b"\0" * sum(map(len, lines))],
        lambda lines: [b"5\n", b"[]\n", *lines, b"\xff\xfe\n"],
    ],
    ids=["cut", "altered", "empty", "zeros", "beside other lines"],
)
def test_damaged_notes_of_shards_cost_their_shards_only(tmp_path, expected, damage):
    unfinished(tmp_path / "c").close()
    notes = tmp_path / "c.incomplete" / "shards.jsonl"
    before = notes.read_bytes().splitlines(keepends=True)
    after = damage(before)
    notes.write_bytes(b"".join(after))
    written = go_on(tmp_path / "c")
    index = json.loads((tmp_path / "c" / INDEX_NAME).read_text())["weight_map"]
    assert len({index[name] for name in written}) == len(before) - sum(line in after for line in before)
    assert contents(tmp_path / "c") == expected


def test_a_damaged_job_is_no_traceback(tmp_path):
    unfinished(tmp_path / "c").close()
    for damaged in (b'{"job', b"\xff", b"5"):
        (tmp_path / "c.incomplete" / "job.json").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"job\.json is damaged"):
            go_on(tmp_path / "c")
    assert list((tmp_path / "c.incomplete").glob("*.safetensors"))


def test_a_shard_that_vanishes_while_it_is_written_is_no_shard_of_zeros(tmp_path):
    tensors = some_tensors()
    writer = CheckpointWriter(tmp_path / "c", specs(tensors), {}, 10**6)
    writer.write("t0", tensors["t0"])
    (tmp_path / "c.incomplete" / "model.safetensors.partial").unlink()
    with pytest.raises(CheckpointError, match=r"cannot write .*partial: No such file or directory; run again"):
        writer.write("t1", tensors["t1"])
    writer.close()


# ---------------------------------------------------------------- places


def test_a_destination_that_is_a_link(tmp_path, expected):
    """The work lies beside the folder that the link leads to, on its disk, and the link stays."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "empty").mkdir()
    for name in ("empty", "not there yet"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / "disk" / name)
        writer = unfinished(link)
        assert writer.folder == tmp_path / "disk" / f"{name}.incomplete"
        writer.finish({"config.json": "{}"})
        assert link.is_symlink() and contents(link) == contents(tmp_path / "disk" / name) == expected
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["empty", "not there yet"]
    (tmp_path / "nowhere").symlink_to(tmp_path / "no" / "such" / "disk")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("nowhere", "loop"):
        with pytest.raises(CheckpointError, match=rf"{name} is a link to .* leads nowhere; choose another folder"):
            unfinished(tmp_path / name)
    assert not (tmp_path / "no").exists()


def test_what_is_in_the_way_beside_the_destination(tmp_path, monkeypatch):
    (tmp_path / "c.incomplete").write_text("mine")
    with pytest.raises(CheckpointError, match=r"c\.incomplete, where the work would lie, is a file; move it"):
        unfinished(tmp_path / "c")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d.incomplete").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"d\.incomplete, where the work would lie, is a link; move it"):
        unfinished(tmp_path / "d")
    unfinished(tmp_path / "e").close()
    with pytest.raises(CheckpointError, match=r"lies in the unfinished checkpoint .*e\.incomplete"):
        unfinished(tmp_path / "e.incomplete" / "work" / "f")
    with pytest.raises(CheckpointError, match=r"(Not a directory|File exists); choose another folder"):
        unfinished(tmp_path / "c.incomplete" / "g")
    (tmp_path / "h").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "h")
    with pytest.raises(CheckpointError, match=r"h is where a disk is mounted; choose a folder on it"):
        unfinished(tmp_path / "h")
    assert (tmp_path / "c.incomplete").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_may_not_be_written_to(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="Permission denied; choose another folder"):
        unfinished(tmp_path / "locked" / "c")


def test_what_others_keep_in_the_unfinished_folder_is_theirs(tmp_path, expected):
    writer = unfinished(tmp_path / "c")
    (tmp_path / "c.incomplete" / "notes.txt").write_text("mine")
    writer.finish({"config.json": "{}"})
    assert [p.name for p in (tmp_path / "c.incomplete").iterdir()] == ["notes.txt"]
    assert contents(tmp_path / "c") == expected


def test_home_and_missing_folders_above(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_all(Path("~/new/folders/c"), list)
    assert (tmp_path / "new" / "folders" / "c" / "config.json").is_file()
    with pytest.raises(CheckpointError, match="~nobody-of-this-name/c: "):
        write_all(Path("~nobody-of-this-name/c"), list)


def test_sizes_have_the_unit_that_fits():
    assert [size_text(n) for n in (0, 999, 1000, 2_560_000, 4e9)] == ["0 B", "999 B", "1.0 kB", "2.6 MB", "4.0 GB"]
