"""benchmarks/deployment.py on a CPU: the card's command and its API sample over two ranks with random weights."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "deployment.py"


def test_dry_run(tmp_path):
    given = ["--tiny", "--tp_size", "2", "--ep_size", "2", "--pieces", "card", "sample", "--users", "2"]
    given += ["--input", "32", "--output", "64", "--seconds", "0.5", "--settle", "0", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *given, "--json", str(tmp_path / "rows.json")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "card: loaded in" in done.stdout and "sample: loaded in" in done.stdout
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["piece"], row["users"]) == ("card", 2)
    assert row["first token, ms"] > 0
