"""What is shown: tables on standard output, notes and progress on standard error, JSON in files."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

_WIDTH = 110  # of tables in a file or a pipe, where nobody's screen sets one
_LINE_SECONDS = 10.0  # between progress lines where there is no terminal

Report = Callable[[int, int], None]  # parts done, parts in all


def console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        file=stream, width=None if stream.isatty() else _WIDTH, highlight=False, markup=False, soft_wrap=False
    )


def note(text: str = "") -> None:
    """A line beside the result: on standard error, dim on a terminal."""
    click.echo(click.style(text, dim=True) if sys.stderr.isatty() else text, err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> Table:
    """A plain table, columns of numbers to the right; without names it has no heading."""
    result = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    result.box, result.pad_edge, result.padding = None, False, (0, 2, 0, 0)
    for index, name in enumerate(columns):
        numbers = bool(name and rows) and all(_is_number(row[index]) for row in rows)
        result.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        result.add_row(*(str(cell) for cell in row))
    return result


def _is_number(cell: Any) -> bool:
    """A number, perhaps with a unit."""
    return re.fullmatch(r"[-+]?[\d,.]+(x|%| [kMGT]?B)?", str(cell)) is not None


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of ten as disks are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def write_json(path: str, content: Any) -> None:
    """Write `content` to the file, whole or not at all; `-` prints it."""
    text = json.dumps(content, ensure_ascii=False, indent=2, default=str)
    if path == "-":
        click.echo(text)
        return
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None


def printable(text: str) -> str:
    """Generated text without control characters: a terminal would obey them."""
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with (stage, done, total): bars on a terminal, now and then a line elsewhere."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console(stderr=True), transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def report(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield report
        return
    lines: dict[str, _Lines] = {}
    yield lambda stage, done, total: lines.setdefault(stage, _Lines(stage))(done, total)


class Transfer:
    """Bytes read and written as lines or a status on standard error: how many, how fast, and how long still.

    The speed is that of this run so far, and the time left assumes that it stays so.
    """

    def __init__(self, description: str):
        self._description, self._began, self._last = description, time.monotonic(), -_LINE_SECONDS
        self._interval = 0.5 if sys.stderr.isatty() else _LINE_SECONDS

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last < self._interval:
            return
        self._last = now
        line = self.line(done, total, now - self._began)
        if sys.stderr.isatty():
            click.echo(f"\r{line:<{_WIDTH - 1}}", err=True, nl=done >= total)
        else:
            click.echo(line, err=True)

    def line(self, done: int, total: int, seconds: float) -> str:
        """What is said after so many seconds."""
        said = f"{self._description}: {size(done)} of {size(total)} read and written"
        if not done or seconds < 1:
            return said
        left = timedelta(seconds=int((total - done) * seconds / done))
        return f"{said}, {size(done / seconds)}/s" + (f", {left} left at this speed" if left else "")


@contextmanager
def progress(description: str) -> Iterator[Report]:
    """A function to call with (done, total): a bar on a terminal, now and then a line elsewhere."""
    with stages() as report:
        yield lambda done, total: report(description, done, total)


class _Lines:
    """Progress as lines: the first, one every ten seconds, the last."""

    def __init__(self, description: str):
        self._description, self._last, self._done = description, -_LINE_SECONDS, -1

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done != self._done and (done == total or now - self._last >= _LINE_SECONDS):
            click.echo(f"{self._description}: {done}/{total}", err=True)
            self._last, self._done = now, done


class Output:
    """Prints lines and tables; nothing where only JSON was asked for (`--json -`)."""

    def __init__(self, json_path: str | None = None):
        self._silent = json_path == "-"
        self._console = console()

    def __call__(self, what: str | Table) -> None:
        if self._silent:
            return
        if isinstance(what, str):
            click.echo(what)
        elif self._console.is_terminal:
            self._console.print(what)
        else:
            with self._console.capture() as captured:
                self._console.print(what)
            click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
