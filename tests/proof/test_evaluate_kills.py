"""A run killed ten times at random and gone on with reports what an uninterrupted one does, but for times."""

import random
import subprocess
from pathlib import Path

import pytest

from deepseek_fp4_plugin.evaluation import report
from deepseek_fp4_plugin.evaluation.run import load
from tests.end_to_end.server_process import Server

pytestmark = pytest.mark.proof
QUESTIONS, KILLS = 60, 10


def start(folder: Path) -> subprocess.Popen:
    command = [*Server.program(), "evaluate", "run", "r1_nano", "--task", "r1_nano_hard", "--limit", str(QUESTIONS),
               "--concurrency", "1", "--out", str(folder)]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def answered(folder: Path) -> int:
    file = folder / "r1_nano_hard.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_ten_kills(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(600) == 0
    rng = random.Random(0)
    for kill in range(KILLS):
        process, before = start(killed), answered(killed)
        goal = before + rng.randint(1, 4)
        while answered(killed) < goal and process.poll() is None:
            try:
                process.wait(rng.random() * 0.05)
            except subprocess.TimeoutExpired:
                continue
        process.kill()
        process.wait()
        print(f"kill {kill + 1}: {answered(killed)} of {QUESTIONS} answers are kept")
    assert answered(killed) < QUESTIONS  # the kills came during the run
    assert start(killed).wait(600) == 0
    texts = [report.markdown(run := load(folder), report.results(run), times=False) for folder in (whole, killed)]
    assert texts[0] == texts[1]
    lines = [[(s.id, s.repeat, s.texts, s.grades) for s in load(f).samples["r1_nano_hard"]] for f in (whole, killed)]
    assert lines[0] == lines[1] and len(lines[0]) == QUESTIONS  # nothing lost, nothing twice
