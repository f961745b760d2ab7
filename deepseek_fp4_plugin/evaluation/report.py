"""What a run showed: a table in the model card's form, intervals, a verdict against another run; Markdown and HTML."""

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2

from deepseek_fp4_plugin.evaluation import statistics as st
from deepseek_fp4_plugin.evaluation.run import Run
from deepseek_fp4_plugin.evaluation.tasks import TASKS

CARD_TASKS = ("mmlu_pro", "gpqa_diamond", "livecodebench", "scicode", "math_500", "aime_2024")
_LISTED = 40  # flipped questions named


@dataclass(frozen=True)
class TaskResult:
    """One task of a run.  length: mean tokens of an answer.  against: paired with another run, where there is one."""

    name: str
    title: str
    estimate: st.Estimate
    repeats: int
    truncated: float  # share of samples, in percent
    unanswered: int
    length: float
    tokens: int
    seconds: float
    card: tuple[float, float] | None
    against: st.Comparison | None = None
    verdict: str = ""


def results(run: Run, other: Run | None = None, margin: float = 1.0) -> list[TaskResult]:
    """Tasks that have samples, in the card's order. ValueError when there is none."""
    found = []
    for name, task in TASKS.items():
        samples = run.samples.get(name)
        if not samples:
            continue
        against, verdict = None, ""
        if other is not None and other.samples.get(name):
            against = st.compare(run.scores(name), other.scores(name))
            verdict = st.verdict(task.title, against, margin, run.about["label"], other.about["label"])
        found.append(
            TaskResult(
                name,
                task.title,
                st.estimate(run.scores(name)),
                max(sample.repeat for sample in samples) + 1,
                100 * sum(sample.truncated for sample in samples) / len(samples),
                sum(bool(sample.error) for sample in samples),
                sum(sample.completion_tokens for sample in samples) / len(samples),
                sum(sample.completion_tokens for sample in samples),
                sum(sample.seconds for sample in samples),
                task.card,
                against,
                verdict,
            )
        )
    if not found:
        raise ValueError(f"{run.folder} holds no sample yet")
    return found


def markdown(run: Run, rows: list[TaskResult], other: Run | None = None, times: bool = True) -> str:
    """The report as Markdown. times: whether seconds are said, which alone differ between equal runs."""
    lines = [f"# Evaluation of {run.about['label']}", "", _how(run), ""]
    lines += [card_table(run, rows, other), "", "## Each task", ""]
    head = ["task", "score", "95 % interval", "questions", "repeats", "cut off", "tokens an answer", "tokens in all"]
    lines += _table(head + (["seconds"] if times else []), [_row(row, times) for row in rows])
    unanswered = [f"{row.title}: {row.unanswered}" for row in rows if row.unanswered]
    if unanswered:
        lines += ["", f"Without an answer, counted as wrong: {', '.join(unanswered)}."]
    if other is not None:
        lines += ["", f"## Against {other.about['label']}", ""]
        compared = [row for row in rows if row.against is not None]
        lines += [f"- {row.verdict}" for row in compared] or ["The runs have no task in common."]
        lines += ["", *_table(*_paired(compared))] if compared else []
        for row in compared:
            lines += ["", *_flips(row)]
    if _limited(run):
        lines += ["", "Run on a part of the questions (`--limit`): not comparable with published scores."]
    return "\n".join(lines) + "\n"


def card_table(run: Run, rows: list[TaskResult], other: Run | None = None) -> str:
    """The model card's table: its own figures, then these."""
    by_name = {row.name: row for row in rows}
    lines = [
        f"| Precision | {' | '.join(TASKS[name].title for name in CARD_TASKS)} |",
        "|---|" + "---|" * len(CARD_TASKS),
    ]
    for index, label in enumerate(("card: FP8", "card: FP4")):
        lines.append(
            f"| {label} | {' | '.join(f'{(TASKS[n].card or (math.nan,) * 2)[index]:g}' for n in CARD_TASKS)} |"
        )
    if other is not None:
        theirs = {row.name: row for row in results(other)}
        lines.append(f"| {other.about['label']} | {' | '.join(_score(theirs.get(name)) for name in CARD_TASKS)} |")
    lines.append(f"| {run.about['label']} | {' | '.join(_score(by_name.get(name)) for name in CARD_TASKS)} |")
    return "\n".join(lines)


def _score(row: TaskResult | None) -> str:
    return "not measured" if row is None else f"{row.estimate.mean:.1f} ± {row.estimate.half:.1f}"


def _how(run: Run) -> str:
    about = run.about
    return (
        f"Model: {about['model']}. Seed {about['seed']}. No system prompt; reasoning removed before grading. Scores "
        "are percent right, averaged over repeats; intervals are over questions (repeats of one are not independent)."
    )


def _limited(run: Run) -> bool:
    return any(task.get("limit") for task in run.about["tasks"].values())


def _row(row: TaskResult, times: bool) -> list[str]:
    e = row.estimate
    cells = [
        row.title, f"{e.mean:.1f}", f"{max(0.0, e.low):.1f} to {min(100.0, e.high):.1f}", f"{e.questions:,}",
        str(row.repeats), f"{row.truncated:.1f} %", f"{row.length:.0f}", f"{row.tokens:,}",
    ]  # fmt: skip
    return [*cells, f"{row.seconds:.0f}"] if times else cells


def _paired(rows: list[TaskResult]) -> tuple[list[str], list[list[str]]]:
    head = ["task", "difference", "95 % interval", "correlation", "would show", "to show 1 point"]
    lines = []
    for row in rows:
        c = row.against
        assert c is not None
        d, needed = c.difference, st.repeats_for(c, 1.0) if c.within else None
        shows = st.detectable(c) or 100 * st.unseen(d.questions)
        many = f"{st.questions_for(c, 1.0):,} questions" if needed is None else f"{needed} repeats"
        correlation = "" if math.isnan(c.correlation) else f"{c.correlation:.2f}"
        lines.append([row.title, f"{d.mean:+.1f}", f"{d.low:+.1f} to {d.high:+.1f}", correlation, f"{shows:.1f}", many])
    return head, lines


def _flips(row: TaskResult) -> list[str]:
    assert row.against is not None
    lines = []
    for what, questions in (("better", row.against.gained), ("worse", row.against.lost)):
        if questions:
            named = ", ".join(f"`{q}`" for q in questions[:_LISTED])
            rest = f" and {len(questions) - _LISTED} more" if len(questions) > _LISTED else ""
            lines.append(
                f"{row.title}, {what} on {len(questions)} question{'' if len(questions) == 1 else 's'}: {named}{rest}."
            )
    return lines or [f"{row.title}: the same on every question."]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def page(run: Run, rows: list[TaskResult], other: Run | None = None) -> str:
    """The report as one self-contained HTML page."""
    source = (files(__package__) / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    compared = [row for row in rows if row.against is not None]
    paired_head, paired_rows = _paired(compared)
    return environment.from_string(source).render(
        run=run.about,
        other=None if other is None else other.about,
        how=_how(run),
        rows=rows,
        cells=[_row(row, True) for row in rows],
        compared=compared,
        paired_head=paired_head,
        paired_rows=paired_rows,
        flips=[line.replace("`", "") for row in compared for line in _flips(row)],
        any_card=any(row.card for row in rows),
        limited=_limited(run),
        scale=_scale(compared),
    )


def _scale(compared: list[TaskResult]) -> float:
    """Half the width of the difference axis, in points."""
    ends = [
        abs(x) for row in compared if row.against for x in (row.against.difference.low, row.against.difference.high)
    ]
    return max(2.0, *ends) if ends else 2.0


def fill_card(path: Path, run: Run, rows: list[TaskResult], other: Run | None) -> None:
    """Put the measured scores into the evaluation table of a model card that `quantize` wrote.

    path: the checkpoint's folder.  other: the source's run. ValueError where the card has no such table.
    """
    card = path / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
    except OSError:
        raise ValueError(f"{card} cannot be read; --card names the folder that quantize wrote") from None
    head, mark, rest = text.partition("## Evaluation\n")
    _, next_mark, tail = rest.partition("\n## ")
    if not mark or not next_mark:
        raise ValueError(f"{card} has no section `## Evaluation`; --card fills the card that quantize wrote")
    body = f"\n{card_table(run, rows, other)}\n"
    verdicts = [f"- {row.verdict}" for row in rows if row.verdict]
    body += ("\n" + "\n".join(verdicts) + "\n") if verdicts else ""
    extra = [row for row in rows if row.name not in CARD_TASKS]
    if extra:
        body += (
            "\n"
            + "\n".join(_table(["task", "score", "95 % interval", "questions"], [_row(r, False)[:4] for r in extra]))
            + "\n"
        )
    part = card.with_name("README.md.part")
    part.write_text(head + mark + body + next_mark + tail, encoding="utf-8")
    part.replace(card)
