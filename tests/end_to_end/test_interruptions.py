"""A quantization that is stopped ends with the same bytes when it is run again: a sample of the proof's stops."""

import pytest

from deepseek_fp4_plugin.checkpoint import writer as writer_module
from tests import stops
from tests.stops import Stop, small  # noqa: F401 (fixture)


@pytest.mark.slow
def test_stops_at_the_moments_that_matter(small, tmp_path):  # noqa: F811
    done, expected = stops.steps(small, tmp_path / "first")
    last_rename = done.index("rename checkpoint")
    shard = done.index("replace model-00004-of-00010.safetensors.partial")
    tidying = done.index("unlink shards.jsonl")
    layer = done.index("replace layer-001.json.partial")
    moments = [
        *(Stop(last_rename, kind) for kind in stops.KINDS),
        *(Stop(step, "power loss") for step in (layer, shard, shard + 1, last_rename + 1, tidying, len(done) - 1)),
        *(Stop(step, "kill") for step in (shard - 1, last_rename + 1, tidying, len(done) - 1)),
        *(Stop(step, "no space") for step in (shard - 2, last_rename + 1)),
    ]
    ended = stops.prove(small, tmp_path, moments, expected)
    assert sum(ended.values()) == len(moments)


def test_the_disk_of_these_tests_loses_what_was_not_synced(tmp_path):
    """So that the proofs cannot pass because nothing was lost."""
    import os
    import random

    from tests.power_loss import Disk

    (tmp_path / "root").mkdir()
    kept, lost = set(), set()
    disk = Disk(tmp_path / "root", lambda step, what: None)
    with disk.watched():
        with open(tmp_path / "root" / "synced", "wb") as file:
            file.write(b"1" * 4096)
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(tmp_path / "root", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        with open(tmp_path / "root" / "unsynced", "wb") as file:
            file.write(b"2" * 4096)
        os.rename(tmp_path / "root" / "synced", tmp_path / "root" / "renamed")
        for seed in range(40):
            left = tmp_path / str(seed)
            disk.left_after_power_loss(left, random.Random(seed))
            kept |= {path.name for path in left.iterdir()}
            lost |= {"synced", "unsynced", "renamed"} - {path.name for path in left.iterdir()}
            for path in left.iterdir():
                data = path.read_bytes()
                assert path.name == "unsynced" or data == b"1" * 4096
                if path.name == "unsynced" and data != b"2" * 4096:
                    lost.add("bytes")
    assert kept == {"synced", "unsynced", "renamed"} and lost == {"synced", "unsynced", "renamed", "bytes"}


@pytest.mark.slow
def test_stops_between_the_commits_of_a_shard(small, tmp_path, monkeypatch):  # noqa: F811
    """Tensors of shards that are not closed: committed ones are found again, and only as they were written."""
    monkeypatch.setattr(writer_module, "COMMIT_BYTES", 40_000)
    done, expected = stops.steps(small, tmp_path / "first")
    syncs = [step for step, what in enumerate(done) if what.startswith("fsync model-") and what.endswith(".partial")]
    commits = [step for step in syncs if not any("replace model-" in what for what in done[step : step + 6])]
    assert len(commits) > 4  # besides those that close a shard
    early, late = commits[1], commits[-2]
    moments = [Stop(step, kind) for step in (early, early + 1, late + 2) for kind in stops.KINDS]
    moments += [Stop(step, "power loss") for step in (early - 1, early + 3, late + 5)]
    ended = stops.prove(small, tmp_path, moments, expected)
    assert sum(ended.values()) == len(moments)
