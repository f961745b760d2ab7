"""`deepseek-fp4 evaluate`, as a user runs it: all six tasks against our server, and the embedded model."""

import json
import subprocess
from pathlib import Path

import pytest

from deepseek_fp4_plugin.evaluation.run import load
from deepseek_fp4_plugin.evaluation.tasks import TASKS
from tests import evaluation_rows
from tests.end_to_end.server_process import Server, running_server
from tests.unit.test_evaluation_tasks import needs_bubblewrap

SIX = ("mmlu_pro", "gpqa_diamond", "livecodebench", "scicode", "math_500", "aime_2024")


def evaluate(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [*Server.program(), "evaluate", *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def test_six_tasks_against_the_server(tmp_path):
    needs_bubblewrap()
    places = evaluation_rows.write(tmp_path)
    with running_server(tmp_path, "--reasoning_parser", "deepseek-r1", "--max_batch_size", "8") as server:
        arguments = [part for name in SIX for part in ("--task", name, "--data", f"{name}={places[name]}")]
        shown = evaluate("run", "--url", f"{server.url}/v1", *arguments, "--limit", "1", "--repeats", "2",
                         "--max-tokens", "48", "--out", "run", cwd=tmp_path)  # fmt: skip
    run = load(tmp_path / "run")
    for name in SIX:
        samples = run.samples[name]
        assert len(samples) == 2 and not any(sample.error for sample in samples)
        assert all(sample.completion_tokens > 0 for sample in samples)
        assert TASKS[name].title in shown.stdout
    assert len(run.samples["scicode"][0].texts) == 2  # one turn a step
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| card: FP8 | 85 | 81 | 77 | 40 | 98 | 89 |" in report and "not comparable" in report
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert all(len(task["data_sha256"]) == 64 for task in about["tasks"].values())
    assert evaluate(
        "regrade", "run", "--task", "math_500", "--data", str(places["math_500"]), cwd=tmp_path
    ).stdout.count("0 have another grade")


def test_source_against_itself_is_accepted_nowhere_without_data(tmp_path):
    """FP8 against FP8: the same answers, and still no certainty from ten questions."""
    arguments = ["compare", "r1_nano", "r1_nano", "--task", "r1_nano", "--limit", "10", "--activations", "bf16",
                 "--out", "runs"]  # fmt: skip
    first = evaluate(*arguments, "--max-tokens", "300", cwd=tmp_path).stdout
    assert "CANNOT TELL" in first and "+0.0 points" in first
    before = (tmp_path / "runs" / "bf16" / "report.md").read_text()
    again = evaluate(*arguments, "--max-tokens", "300", cwd=tmp_path)  # all is there: nothing is asked
    assert (tmp_path / "runs" / "bf16" / "report.md").read_text() == before and "CANNOT TELL" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "r1_nano", "--task", "math500", "--out", "x"], "did you mean 'math_500'"),
        (["run", "--task", "math_500", "--out", "x"], "give a MODEL or --url"),
        (["run", "r1_nano", "--task", "aime_2024", "--data", "no.jsonl", "--out", "x"], "no.jsonl is not a file"),
        (["report", "nowhere"], "holds no evaluation run"),
        (["regrade", "nowhere.jsonl", "--task", "math_500"], "cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path, arguments, sentence, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = evaluate(*arguments, cwd=tmp_path, check=False)
    assert result.returncode in (1, 2) and sentence in result.stderr and "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("deepseek-fp4:")]) == 1


def test_a_server_that_is_not_there_and_a_key_that_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-user")
    result = evaluate("run", "--url", "http://127.0.0.1:9/v1", "--served-model", "m", "--task", "r1_nano", "--limit",
                      "1", "--out", "run", cwd=tmp_path, check=False)  # fmt: skip
    assert result.returncode == 1 and "127.0.0.1:9/v1: Connection error" in result.stderr
    assert "Traceback" not in result.stderr and "sk-secret" not in result.stdout + result.stderr
    assert all("sk-secret" not in path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file())
