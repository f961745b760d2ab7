"""The quantizer at R1's exact layer shapes: a memory cap that holds, and one digest however the work was done."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAP = 4 * 10**9
NEEDED = 40 * 10**9  # source, output, copy


def measured(folder: Path, *arguments: str) -> list[dict]:
    """What benchmarks/quantize_layers.py found; it fails where two outputs differ."""
    command = [sys.executable, "-m", "benchmarks.quantize_layers", str(folder), "--json", str(folder / "found.json")]
    subprocess.run([*command, "--repeats", "1", *arguments], cwd=ROOT, check=True)
    return json.loads((folder / "found.json").read_text())["rows"]


@pytest.mark.slow
def test_small_layers_give_one_digest_in_one_go_killed_and_shared(tmp_path):
    rows = {row["what"]: row for row in measured(tmp_path, "--small", "--kills", "3", "--max-memory", "2GB")}
    assert rows["killed"]["deaths"] and rows.keys() >= {"conversion", "shared by two", "calibration"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json"]


@pytest.mark.proof
def test_layers_of_r1_stay_below_four_gigabytes(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of disk, and {free / 1e9:.0f} are free")
    rows = {row["what"]: row for row in measured(tmp_path, "--kills", "20", "--max-memory", "4GB")}
    print("\n" + "\n".join(map(str, rows.values())))
    assert max(row["peak"] for row in rows.values() if "peak" in row) < CAP
    assert rows["killed"]["deaths"] == 20
