"""`evaluate`: scores on benchmarks, a report with intervals, and a verdict against another run."""

import asyncio
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from deepseek_fp4_plugin import __version__
from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import Command, Group, ModelName, engine_config, engine_flags
from deepseek_fp4_plugin.config import did_you_mean

_PATH = click.Path(path_type=Path)
_BLOCK, _BLOCKS = 512, 256  # tokens of a text that are compared at once, and how many such blocks at most
_WATCHED = 4  # blocks on which each module's output is compared


@click.group(cls=Group, short_help="Score a model on benchmarks, and judge what FP4 costs.")
def evaluate() -> None:
    """Score a model on benchmarks, with honest intervals, and compare two runs question by question.

    \b
    Examples:
      deepseek-fp4 evaluate run ./R1-NVFP4 --out runs/nvfp4 --task math_500 --task aime_2024
      deepseek-fp4 evaluate run --url http://localhost:8000/v1 --out runs/served --task mmlu_pro
      deepseek-fp4 evaluate report runs/nvfp4 --against runs/fp8
      deepseek-fp4 evaluate regrade transcript.jsonl --task math_500
      deepseek-fp4 evaluate compare r1_nano ./r1_nano-NVFP4
    """


@evaluate.command(cls=Command, short_help="Ask a benchmark's questions.")
@click.argument("model", type=ModelName(), required=False)
@click.option("--url", help="An OpenAI-compatible server instead of a model (http://host:port/v1).")
@click.option("--served-model", help="The model's name at that server; left out, its first.")
@click.option("--task", "names", multiple=True, required=True, metavar="NAME", help="A benchmark; may be repeated.")
@click.option("--out", required=True, type=_PATH, help="Folder of the run; an unfinished one is gone on with.")
@click.option("--data", multiple=True, metavar="[TASK=]FILE", help="A task's rows, instead of the hub's.")
@click.option("--label", help="What the report calls this run; left out, the model's name.")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many questions of each task.")
@click.option("--repeats", type=click.IntRange(min=1), help="Samples of each question; left out, the task's own.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of an answer; left out, the task's own.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0: greedy. Left out: 0.6, top-p 0.95.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--concurrency", type=click.IntRange(min=1), default=32, show_default=True, help="Requests at once.")
@engine_flags
def run(
    model: str | None,
    url: str | None,
    served_model: str | None,
    names: Sequence[str],
    out: Path,
    data: Sequence[str],
    label: str | None,
    limit: int | None,
    repeats: int | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int,
    concurrency: int,
    **flags: Any,
) -> None:
    """Ask MODEL (or the server at --url) the questions of one or more tasks, grade the answers, and write a report.

    Tasks: mmlu_pro, gpqa_diamond, livecodebench, scicode, math_500, aime_2024, gsm8k, r1_nano, r1_nano_hard. Data come
    from the Hugging Face hub, or from a local file of the same rows. The API key is taken from OPENAI_API_KEY.
    """
    if (model is None) == (url is None):
        raise click.UsageError("give a MODEL or --url, one of the two")
    _require()
    from deepseek_fp4_plugin.evaluation.client import Client, HttpClient, LlmClient
    from deepseek_fp4_plugin.llm import LLM

    overrides = {"repeats": repeats, "max_tokens": max_tokens, "temperature": temperature}
    plans = _plans(names, data, limit, {k: v for k, v in overrides.items() if v is not None})
    about = {
        "version": __version__,
        "label": label or served_model or model or url,
        "model": served_model or model or url,
        "seed": seed,
        "tasks": {task.name: _told(examples, digest, settings, limit) for task, examples, digest, settings in plans},
    }
    client: Client
    if url is not None:
        client = HttpClient(url, served_model)
    else:
        assert model is not None
        flags.setdefault("max_batch_size", None)
        config = engine_config(model, {**flags, "max_batch_size": flags["max_batch_size"] or concurrency})
        with screen.stages() as progress:
            client = LlmClient(LLM(config=config, progress=progress))
    evaluate_tasks(client, plans, out, about, concurrency)


def _require() -> None:
    """ValueError where the packages of the eval extra are not installed."""
    missing = [name for name in ("scipy", "openai", "math_verify") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"evaluation needs {', '.join(missing)}; install the extra in the project's folder: pip install .[eval]"
        )


def _told(examples: Sequence[Any], digest: str, settings: Any, limit: int | None) -> dict[str, Any]:
    return {
        "questions": len(examples), "limit": limit, "data_sha256": digest, "repeats": settings.repeats,
        "max_tokens": settings.max_tokens, "temperature": settings.temperature, "top_p": settings.top_p,
    }  # fmt: skip


def _plans(names: Sequence[str], data: Sequence[str], limit: int | None, overrides: dict[str, Any]) -> list[Any]:
    """(task, examples, digest of the data, settings) of each task; every mistake is told before anything is asked."""
    from deepseek_fp4_plugin.evaluation.data import load_examples
    from deepseek_fp4_plugin.evaluation.tasks import TASKS

    places: dict[str, Path] = {}
    for entry in data:
        name, mark, path = entry.partition("=")
        if not mark and len(names) != 1:
            raise click.UsageError(f"--data {entry} does not say of which task it is; write --data TASK=FILE")
        places[name if mark else names[0]] = Path(path if mark else entry)
    for name in [*names, *places]:
        if name not in TASKS:
            raise click.UsageError(f"no task {name!r}{did_you_mean(name, TASKS)}; there are {', '.join(TASKS)}")
    plans = []
    for name in dict.fromkeys(names):
        examples, digest = load_examples(TASKS[name], places.get(name))
        plans.append((TASKS[name], examples[:limit], digest, replace(TASKS[name].settings, **overrides)))
    return plans


def evaluate_tasks(client: Any, plans: Sequence[Any], out: Path, about: dict[str, Any], concurrency: int) -> None:
    """Ask, then write report.md and report.html into the run's folder and show the table."""
    from deepseek_fp4_plugin.evaluation.client import ClientError
    from deepseek_fp4_plugin.evaluation.judge import Judge
    from deepseek_fp4_plugin.evaluation.run import start
    from deepseek_fp4_plugin.evaluation.runner import ask_all
    from deepseek_fp4_plugin.evaluation.sandbox import Sandbox, SandboxError
    from deepseek_fp4_plugin.evaluation.task import Tools

    the_run = start(out, about)
    with Judge() as judge:
        tools = Tools(judge, Sandbox())

        async def ask() -> None:
            try:
                for task, examples, _, settings in plans:
                    if task.name in ("livecodebench", "scicode"):
                        tools.sandbox.check()
                    with _Progress(task.title) as progress:
                        await ask_all(
                            the_run, task, examples, client, tools, settings, about["seed"], concurrency, progress
                        )
            finally:
                await client.aclose()

        try:
            asyncio.run(ask())
        except (ClientError, SandboxError) as error:
            raise ValueError(str(error)) from None
    write_reports(out, None, 1.0, None)


class _Progress:
    """Samples done, the running score and the time left; plain lines where there is no terminal."""

    def __init__(self, title: str):
        self.title, self._began, self._last, self._first = title, time.monotonic(), 0.0, 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._last and sys.stderr.isatty():
            click.echo(err=True)

    def __call__(self, done: int, total: int, right: int, parts: int) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not self._last:
            self._first = done
        elif now - self._last < (0.2 if terminal else 10.0) and done < total:
            return
        self._last = now
        left = (now - self._began) / max(1, done - self._first) * (total - done)
        score = f"{100 * right / parts:.1f} %" if parts else "-"
        line = f"{self.title}: {done} of {total} samples, {score} right so far, about {left:.0f} s left"
        click.echo(f"\r{line}\x1b[K" if terminal else line, nl=not terminal, err=True)


@evaluate.command(cls=Command, short_help="Show a run, alone or against another.")
@click.argument("folder", type=_PATH)
@click.option("--against", type=_PATH, help="Another run, of the source for example.")
@click.option(
    "--margin",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Points that may be lost.",
)
@click.option("--card", type=_PATH, help="A checkpoint folder whose model card gets the scores.")
def report(folder: Path, against: Path | None, margin: float, card: Path | None) -> None:
    """Write report.md and report.html of the run in FOLDER, and show the table and the verdict."""
    write_reports(folder, against, margin, card)


def write_reports(folder: Path, against: Path | None, margin: float, card: Path | None) -> None:
    _require()
    from deepseek_fp4_plugin.evaluation import report as reports
    from deepseek_fp4_plugin.evaluation.run import load

    ours = load(folder)
    theirs = None if against is None else load(against)
    rows = reports.results(ours, theirs, margin)
    (folder / "report.md").write_text(reports.markdown(ours, rows, theirs), encoding="utf-8")
    (folder / "report.html").write_text(reports.page(ours, rows, theirs), encoding="utf-8")
    if card is not None:
        reports.fill_card(card, ours, rows, theirs)
    out = screen.Output(None)
    cells = [
        [row.title, f"{row.estimate.mean:.1f} %", f"± {row.estimate.half:.1f}", row.estimate.questions, row.repeats,
         f"{row.truncated:.1f} %"]
        for row in rows
    ]  # fmt: skip
    out(screen.table(["task", "score", "95 %", "questions", "repeats", "cut off"], cells))
    for row in rows:
        if row.verdict:
            out(row.verdict)
    out(f"{folder / 'report.html'}")


@evaluate.command(cls=Command, short_help="Grade answers again, or somebody else's.")
@click.argument("file", type=_PATH)
@click.option("--task", "name", required=True, metavar="NAME")
@click.option("--data", type=_PATH, metavar="FILE", help="The task's rows: of a run, instead of the hub's.")
@click.option("--show", type=click.IntRange(min=0), default=20, show_default=True, help="Differing rows to list.")
def regrade(file: Path, name: str, data: Path | None, show: int) -> None:
    """Grade the answers in FILE without asking anybody: a run's folder, or a transcript made elsewhere (JSON lines).

    Where the transcript has a verdict of its own, rows that we judge otherwise are listed. A run's samples are written
    anew with their grades.
    """
    _require()
    from deepseek_fp4_plugin.evaluation.data import load_examples
    from deepseek_fp4_plugin.evaluation.judge import Judge
    from deepseek_fp4_plugin.evaluation.runner import regrade_run
    from deepseek_fp4_plugin.evaluation.sandbox import Sandbox
    from deepseek_fp4_plugin.evaluation.task import Tools
    from deepseek_fp4_plugin.evaluation.tasks import TASKS
    from deepseek_fp4_plugin.evaluation.transcripts import regrade as grade_again

    if name not in TASKS:
        raise click.UsageError(f"no task {name!r}{did_you_mean(name, TASKS)}; there are {', '.join(TASKS)}")
    out = screen.Output(None)
    with Judge() as judge:
        tools = Tools(judge, Sandbox())
        if file.is_dir():
            examples, _ = load_examples(TASKS[name], data)
            changed, samples = regrade_run(file, TASKS[name], examples, tools)
            out(f"{file}: {samples} samples graded again, {changed} have another grade now")
            return
        rows = grade_again(TASKS[name], file, tools)
    right = sum(row.grade.right for row in rows)
    out(f"{file.name}: {right} of {len(rows)} right, {100 * right / len(rows):.2f} %")
    judged = [row for row in rows if row.agrees is not None]
    differing = [row for row in judged if not row.agrees]
    if judged:
        out(f"published verdicts: {len(judged) - len(differing)} of {len(judged)} the same, "
            f"{100 * (1 - len(differing) / len(judged)):.2f} %")  # fmt: skip
    cells = [
        [
            row.answered.id,
            row.answered.published,
            str(row.answered.gold)[:40],
            str(row.grade.answer)[:40],
            row.grade.note,
        ]
        for row in differing[:show]
    ]
    if cells:
        out(screen.table(["id", "published", "gold", "found", "note"], cells))


@evaluate.command(cls=Command, short_help="What FP4 costs: a source and its NVFP4 checkpoint, side by side.")
@click.argument("source", type=ModelName())
@click.argument("quantized", type=ModelName())
@click.option("--task", "names", multiple=True, metavar="NAME", default=("r1_nano", "r1_nano_hard"), show_default=True)
@click.option("--out", required=True, type=_PATH, help="Folder of the runs: source, bf16, fp4.")
@click.option("--data", multiple=True, metavar="[TASK=]FILE", help="A task's rows, instead of the hub's.")
@click.option(
    "--activations",
    multiple=True,
    type=click.Choice(["bf16", "fp4", "fp8", "int8"]),
    default=("bf16", "fp4"),
    show_default=True,
)
@click.option("--limit", type=click.IntRange(min=1), help="Only so many questions of each task.")
@click.option("--repeats", type=click.IntRange(min=1), help="Samples of each question; left out, the task's own.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of an answer; left out, the task's own.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0: greedy. Left out: 0.6, top-p 0.95.")
@click.option(
    "--margin",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Points that may be lost.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--concurrency", type=click.IntRange(min=1), default=32, show_default=True, help="Requests at once.")
@click.option("--card", is_flag=True, help="Put the scores into QUANTIZED's model card.")
@click.option("--text", type=_PATH, help="A text file on which distributions are compared too (KL, top-1 agreement).")
def compare(
    source: str,
    quantized: str,
    names: Sequence[str],
    out: Path,
    data: Sequence[str],
    activations: Sequence[str],
    limit: int | None,
    repeats: int | None,
    max_tokens: int | None,
    temperature: float | None,
    margin: float,
    seed: int,
    concurrency: int,
    card: bool,
    text: Path | None,
) -> None:
    """Ask SOURCE and QUANTIZED the same questions with the same seeds, and judge the difference question by question.

    QUANTIZED is asked once for each kind of activations. An interrupted run goes on with the same command.
    """
    _require()
    from deepseek_fp4_plugin.config import EngineConfig
    from deepseek_fp4_plugin.evaluation.client import LlmClient
    from deepseek_fp4_plugin.llm import LLM

    overrides = {"repeats": repeats, "max_tokens": max_tokens, "temperature": temperature}
    sides = {"source": (source, "bf16"), **{kind: (quantized, kind) for kind in activations}}
    for side, (model, kind) in sides.items():
        plans = _plans(names, data, limit, {k: v for k, v in overrides.items() if v is not None})
        label = Path(model).name if side == "source" else f"{Path(model).name}, {kind} activations"
        told = {task.name: _told(examples, digest, settings, limit) for task, examples, digest, settings in plans}
        about = {"version": __version__, "label": label, "model": label, "seed": seed, "tasks": told}
        click.echo(f"{label}:")
        config = EngineConfig(model=model, nvfp4_activations=kind, max_batch_size=concurrency)
        evaluate_tasks(LlmClient(LLM(config=config)), plans, out / side, about, concurrency)
    for side in activations:
        click.echo("")
        write_reports(out / side, out / "source", margin, Path(quantized) if card and side == activations[-1] else None)
    if text is not None:
        _divergences(source, quantized, activations, text)


def _divergences(source: str, quantized: str, activations: Sequence[str], path: Path) -> None:
    """KL and top-1 agreement of each side with the source, over blocks of the text, and each kind of module's output
    error; they join the report that `quantize` left in the checkpoint's folder."""
    from deepseek_fp4_plugin.evaluation.divergence import divergence
    from deepseek_fp4_plugin.evaluation.output_error import output_errors
    from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
    from deepseek_fp4_plugin.quantization.report_page import DOCUMENT, add_comparison
    from deepseek_fp4_plugin.tokenizer import Tokenizer

    reference = DeepseekV3ForCausalLM.from_pretrained(source)
    assert reference.path is not None
    ids = Tokenizer.from_folder(reference.path).encode(path.read_text(encoding="utf-8"))
    texts = [ids[i : i + _BLOCK] for i in range(0, len(ids), _BLOCK)][:_BLOCKS]
    if not ids:
        raise ValueError(f"{path} holds no text")
    sides: list[dict[str, Any]] = []
    positions, folder = 0, None
    for kind in activations:
        model = DeepseekV3ForCausalLM.from_pretrained(quantized, nvfp4_activations=kind)
        with screen.progress(f"{path.name}, {kind}") as progress:
            d = divergence(reference, model, texts, progress)
        errors = output_errors(reference, model, texts[:_WATCHED])
        figures = {"kl": d.kl, "kl_half": d.kl_half, "agreement": d.agreement.mean, "agreement_half": d.agreement.half}
        sides.append({"activations": kind, **figures, "output_error": errors})
        positions, folder = d.positions, model.path
        click.echo(
            f"{path.name}, {kind} activations: KL {d.kl:.5f} ± {d.kl_half:.5f} nats, the same first token at "
            f"{d.agreement.mean:.2f} ± {d.agreement.half:.2f} % of {d.positions:,} positions"
        )
    if folder is not None and (folder / DOCUMENT).is_file():
        page = add_comparison(folder, {"text": path.name, "positions": positions, "sides": sides})
        click.echo(f"{page}: the report has these figures now")
