"""Runs on disk and the runner: nothing is lost or asked twice, private questions stay private."""

import asyncio
import json
import random
from pathlib import Path

import pytest

from deepseek_fp4_plugin.evaluation import report
from deepseek_fp4_plugin.evaluation.client import ClientError, Completion
from deepseek_fp4_plugin.evaluation.data import load_examples
from deepseek_fp4_plugin.evaluation.judge import Judge
from deepseek_fp4_plugin.evaluation.run import load, start
from deepseek_fp4_plugin.evaluation.runner import ask_all, regrade_run, sample_seed
from deepseek_fp4_plugin.evaluation.sandbox import Sandbox
from deepseek_fp4_plugin.evaluation.task import Settings, Tools
from deepseek_fp4_plugin.evaluation.tasks import TASKS
from tests import evaluation_rows

SETTINGS = Settings(repeats=3, max_tokens=50)


class Killed(Exception):
    pass


class Oracle:
    """Answers by the seed alone, `stop_after` calls at most; with `error` never."""

    name = "oracle"

    def __init__(self, stop_after: int | None = None, error: str = ""):
        self.calls, self.stop_after, self.error, self.most, self.now = 0, stop_after, error, 0, 0

    async def complete(self, messages, settings, seed):
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        if self.error:
            raise ClientError(self.error)
        if self.stop_after is not None and self.calls > self.stop_after:
            raise Killed
        letter = random.Random(seed).choice("ABCD")
        return Completion(
            f"<think>\nhm\n</think>\nAnswer: {letter}", random.Random(seed).choice(["stop", "length"]), 9, 7
        )


def run_gpqa(folder: Path, places, client, concurrency: int = 1) -> None:
    examples, digest = load_examples(TASKS["gpqa_diamond"], places["gpqa_diamond"])
    about = {"label": "oracle", "model": "oracle", "seed": 1, "tasks": {"gpqa_diamond": {"data_sha256": digest}}}
    run = start(folder, about)
    with Judge() as judge:
        tools = Tools(judge, Sandbox())
        asyncio.run(ask_all(run, TASKS["gpqa_diamond"], examples, client, tools, SETTINGS, 1, concurrency))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return evaluation_rows.write(tmp_path_factory.mktemp("rows"))


def test_killed_and_resumed_equals_uninterrupted(tmp_path, places):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_gpqa(whole, places, Oracle())
    rng, calls = random.Random(0), 0
    for _ in range(10):
        client = Oracle(stop_after=rng.randint(0, 3))
        with pytest.raises(ExceptionGroup):
            run_gpqa(resumed, places, client)
        calls += min(client.calls, client.stop_after)
        file = resumed / "gpqa_diamond.jsonl"
        if file.exists() and rng.random() < 0.5:  # what a crash leaves of a line
            with file.open("ab") as out:
                out.write(b'{"task": "gpqa_diamond", "id": "re')
    client = Oracle()
    run_gpqa(resumed, places, client)
    assert calls + client.calls == 36  # 12 questions, 3 repeats: none twice
    texts = [report.markdown(run := load(folder), report.results(run), times=False) for folder in (whole, resumed)]
    assert texts[0] == texts[1]
    assert load(whole).scores("gpqa_diamond") == load(resumed).scores("gpqa_diamond")


def test_concurrency_is_bounded_and_changes_nothing(tmp_path, places):
    one, many = Oracle(), Oracle()
    run_gpqa(tmp_path / "one", places, one)
    run_gpqa(tmp_path / "many", places, many, concurrency=5)
    assert one.most == 1 and many.most == 5
    assert load(tmp_path / "one").scores("gpqa_diamond") == load(tmp_path / "many").scores("gpqa_diamond")


def test_private_questions_are_never_in_plain_text(tmp_path, places):
    run_gpqa(tmp_path / "run", places, Oracle())
    text = (tmp_path / "run" / "gpqa_diamond.jsonl").read_text()
    assert "Invented question" not in text and "wrong 1" not in text and "Answer:" not in text
    assert load(tmp_path / "run").samples["gpqa_diamond"][0].texts[0].startswith("<think>")


def test_other_settings_are_refused(tmp_path, places):
    run_gpqa(tmp_path / "run", places, Oracle())
    with pytest.raises(ValueError, match="other settings"):
        start(tmp_path / "run", {"label": "oracle", "model": "oracle", "seed": 2, "tasks": {}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        start(tmp_path / "mine", {})
    with pytest.raises(ValueError, match="no evaluation run"):
        load(tmp_path / "nowhere")


def test_a_server_that_is_gone_stops_the_run_and_costs_nothing(tmp_path, places):
    client = Oracle(error="connection refused")
    with pytest.raises(ClientError, match="in a row"):
        run_gpqa(tmp_path / "run", places, client)
    assert client.calls == 10
    run_gpqa(tmp_path / "run", places, Oracle())
    assert not any(sample.error for sample in load(tmp_path / "run").samples["gpqa_diamond"])


def test_regrading_changes_grades_and_nothing_else(tmp_path, places):
    folder = tmp_path / "run"
    run_gpqa(folder, places, Oracle())
    examples, _ = load_examples(TASKS["gpqa_diamond"], places["gpqa_diamond"])
    before = load(folder)
    with Judge() as judge:
        assert regrade_run(folder, TASKS["gpqa_diamond"], examples, Tools(judge, Sandbox())) == (0, 36)
        assert load(folder).samples == before.samples
        turned = [type(e)(e.id, e.question, "A" if e.gold == "B" else "B", e.extra) for e in examples]
        changed, _ = regrade_run(folder, TASKS["gpqa_diamond"], turned, Tools(judge, Sandbox()))
    assert changed > 0


def test_seeds_do_not_depend_on_the_order():
    seeds = {sample_seed(0, "t", str(i), r) for i in range(100) for r in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(0, "t", "1", 0) != sample_seed(1, "t", "1", 0)


def test_report_against_another_run_and_into_the_card(tmp_path, places):
    run_gpqa(tmp_path / "ours", places, Oracle())
    run_gpqa(tmp_path / "theirs", places, Oracle())
    ours, theirs = load(tmp_path / "ours"), load(tmp_path / "theirs")
    rows = report.results(ours, theirs)
    text = report.markdown(ours, rows, theirs)
    assert (
        "CANNOT TELL: GPQA Diamond" in text
        and "the same on every question" in text
        and "| card: FP4 | 84.2 | 80 |" in text
    )
    page = report.page(ours, rows, theirs)
    assert "http" not in page.replace("http://www.w3.org", "") and "CANNOT TELL" in page
    card = tmp_path / "README.md"
    card.write_text("# Model\n\n## Evaluation\n\n| old |\n\n## Limitations\n\nNone.\n")
    report.fill_card(tmp_path, ours, rows, theirs)
    filled = card.read_text()
    assert (
        "| old |" not in filled
        and "| oracle | not measured |" in filled
        and filled.endswith("## Limitations\n\nNone.\n")
    )
    card.write_text("# Model\n")
    with pytest.raises(ValueError, match="## Evaluation"):
        report.fill_card(tmp_path, ours, rows, theirs)


def test_lines_are_json(tmp_path, places):
    run_gpqa(tmp_path / "run", places, Oracle())
    lines = (tmp_path / "run" / "gpqa_diamond.jsonl").read_text().splitlines()
    assert len(lines) == 36 and all(json.loads(line)["task"] == "gpqa_diamond" for line in lines)
