"""Grading against published verdicts, row by row, on public transcripts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_fp4_plugin.evaluation.judge import Judge
from deepseek_fp4_plugin.evaluation.sandbox import Sandbox
from deepseek_fp4_plugin.evaluation.task import Tools
from deepseek_fp4_plugin.evaluation.tasks import TASKS
from deepseek_fp4_plugin.evaluation.transcripts import Regraded, regrade

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the public transcripts (../shared/data) are not here")


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    with Judge() as judge:
        yield Tools(judge, Sandbox())


def rows(task: str, path: str, tools: Tools) -> list[Regraded]:
    return regrade(TASKS[task], DATA / path, tools)


@pytest.mark.parametrize(
    ("task", "path", "agreement"),
    [
        ("math_500", "math500/transcripts/Qwen2.5-Math-7B.even.jsonl.gz", 0.98),
        ("math_500", "math500/transcripts/Qwen2.5-14B-Instruct.even.jsonl.gz", 0.98),
        ("math_500", "math500/transcripts/Sky-T1-math-correct-5K-27B.even.jsonl.gz", 0.93),
        ("aime_2024", "aime2024/transcripts/Qwen2.5-Math-7B.sample5.jsonl.gz", 1.0),
        ("aime_2024", "aime2024/transcripts/Qwen2.5-14B-Instruct.sample5.jsonl.gz", 1.0),
        ("aime_2024", "aime2024/transcripts/Sky-T1-math-correct-5K-32B-ckpt140.sample5.jsonl.gz", 1.0),
        ("gpqa_diamond", "gpqa_diamond/r1_distill_llama_70b_letters.even.jsonl.gz", 1.0),
    ],
)
def test_verdicts(task, path, agreement, tools):
    found = rows(task, path, tools)
    assert sum(row.agrees for row in found) >= agreement * len(found)


@pytest.mark.parametrize(
    ("task", "path", "agreement"),
    [
        ("mmlu_pro", "mmlu_pro/transcripts/gemini-1.5-pro-002.even.jsonl.gz", 1.0),
        ("mmlu_pro", "mmlu_pro/transcripts/merged-2026-02.even.jsonl.gz", 1.0),
        ("mmlu_pro", "mmlu_pro/transcripts/DeepSeek-Coder-V2.even.jsonl.gz", 0.985),
        ("livecodebench", "livecodebench/transcripts/o1-preview-2024-09-12.even.jsonl.gz", 0.99),
    ],
)
def test_extraction(task, path, agreement, tools):
    found = rows(task, path, tools)
    same = sum(row.grade.answer == row.answered.extracted for row in found)
    assert same >= agreement * len(found)


@pytest.mark.parametrize(
    ("path", "percent"),
    [
        ("gsm8k/transcripts/Meta-Llama-3.1-8B-Instruct.even.jsonl.gz", 85.0),
        ("gsm8k/transcripts/deepseek-v2.5-0908.even.jsonl.gz", 91.97),
    ],
)
def test_gsm8k_scores(path, percent, tools):
    found = rows("gsm8k", path, tools)
    assert abs(100 * sum(row.grade.right for row in found) / len(found) - percent) <= 0.2
