"""The model card's own snippets run as they stand, but for imports and the model's path."""

import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CARD = Path(__file__).with_name("card_snippets.txt")


def run(name: str) -> list[str]:
    result = subprocess.run([sys.executable, f"examples/{name}"], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def changed_lines(snippet: str, name: str) -> list[str]:
    """Lines of the example that the card's snippet does not have."""
    example = (ROOT / "examples" / name).read_text(encoding="utf-8")
    difference = difflib.ndiff(snippet.strip().splitlines(), example.strip().splitlines())
    return [line[2:] for line in difference if line.startswith("+ ") and line[2:].strip()]


def card_snippet(words: str) -> str:
    blocks = re.findall(r"```\w*\n(.*?)```", CARD.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(block for block in blocks if words in block)


@pytest.mark.slow
def test_two_ranks():
    lines = run("two_ranks.py")
    assert len(lines) == 2
    assert lines[0].startswith("What is 7 + 8? '<think>")


@pytest.mark.proof
def test_llm_api_sample():
    """Eight ranks, each with requests of its own."""
    lines = run("llm_api.py")
    assert len(lines) == 4
    assert lines[0].startswith("Prompt: 'Hello, my name is', Generated text: '")


@pytest.mark.slow
def test_closing_snippet():
    lines = run("from_pretrained.py")
    assert lines[-1] == "此 README 文件仅作为 deepseek-r1-fp4 模型的示例说明。实际使用请参照主插件文档。"
    assert len(lines) >= 2


def test_llm_api_sample_is_the_cards():
    for line in changed_lines(card_snippet("enable_attention_dp=True"), "llm_api.py"):
        assert line.startswith("from deepseek_fp4_plugin import ") or 'LLM(model="r1_nano", tensor_par' in line


def test_closing_snippet_is_the_cards():
    snippet = "\n".join(line.removeprefix("# ") for line in card_snippet("your_model_path").splitlines())
    for line in changed_lines(snippet.replace("# 示例", "示例"), "from_pretrained.py"):
        assert "import" in line or 'from_pretrained("r1_nano")' in line or line.startswith("# 示例")
