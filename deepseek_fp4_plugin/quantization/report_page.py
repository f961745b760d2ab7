"""The report that lies beside the weights: one JSON document, and the same as one self-contained HTML page.

The page is made of the document alone, so that whoever measures more of a checkpoint (`evaluate compare`) adds it to
the document and writes both again. No script, no font, no picture from elsewhere; heat maps are drawings with a table
beside each.
"""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from deepseek_fp4_plugin import __version__
from deepseek_fp4_plugin.checkpoint.durable import write_file
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.json_files import read_json
from deepseek_fp4_plugin.checkpoint.sizes import size_text
from deepseek_fp4_plugin.quantization.report import MTP, QuantizationReport

DOCUMENT, PAGE = "quantization_report.json", "quantization_report.html"
LISTED = 20  # modules of the largest error that the page names
_COLUMNS = ("module", "kind", "layer", "expert", "sqnr_db", "amax", "tokens")
_STEPS = 7  # colours of a heat map
_WIDTH = 720  # of a heat map, in the drawing's units


class Cell(NamedTuple):
    row: int
    column: int
    value: float | None


class Legend(NamedTuple):
    """One colour of a heat map. step: 0 is "nothing seen"."""

    step: int
    label: str


class HeatMap(NamedTuple):
    """paths: step -> SVG path of its cells.  rows: of the table that says the same."""

    title: str
    caption: str
    width: float
    height: float
    cell: tuple[float, float]
    paths: dict[int, str]
    legend: list[Legend]
    layers: list[int]
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def document(report: QuantizationReport) -> dict[str, Any]:
    """Everything that is known of a run, as plain JSON values: the same run gives the same document."""
    content = report.to_json()
    content["destination"] = Path(report.destination).name  # a report is written to be published
    content["source"] = Path(report.source).name if Path(report.source).is_dir() else report.source
    rows = [[_plain(getattr(module, name)) for name in _COLUMNS] for module in report.modules]
    return {"version": __version__, **content, "modules": {"columns": list(_COLUMNS), "rows": rows}, "comparison": None}


def report_files(report: QuantizationReport) -> dict[str, str | bytes]:
    """Name -> content of the two files."""
    content = document(report)
    return {DOCUMENT: _text(content), PAGE: page(content)}


def add_comparison(folder: Path, comparison: Mapping[str, Any]) -> Path:
    """Put what a comparison with the source measured into a checkpoint's report; returns the page's path.

    Raises CheckpointError where the folder has no report of `quantize`.
    """
    try:
        content = read_json(folder / DOCUMENT)
    except CheckpointError as problem:
        raise CheckpointError(f"{problem}; the report is what quantize leaves in a checkpoint's folder") from None
    if not isinstance(content.get("modules"), dict) or not isinstance(content.get("size"), dict):
        raise CheckpointError(f"{folder / DOCUMENT} is not a report of quantize; quantize again to have one")
    content["comparison"] = dict(comparison)
    text = page(content)
    write_file(folder / DOCUMENT, _text(content))
    write_file(folder / PAGE, text)
    return folder / PAGE


def page(content: Mapping[str, Any]) -> str:
    """The document as HTML."""
    source = (files(__package__) / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    modules = [dict(zip(content["modules"]["columns"], row, strict=True)) for row in content["modules"]["rows"]]
    worst = sorted(modules, key=lambda m: (math.inf if m["sqnr_db"] is None else m["sqnr_db"], m["module"]))
    return environment.from_string(source).render(
        r=content,
        mtp=MTP,
        size=size_text,
        share=error_share,
        db=_db,
        maps=heat_maps(modules),
        worst=worst[:LISTED],
        overall=_overall(content, modules),
        experts=sum(m["expert"] is not None for m in modules),
        comparison=content.get("comparison"),
    )


def error_share(decibels: float | None) -> str:
    """The error's energy in percent of the weight's, as a person reads it."""
    return "0 %" if decibels is None else f"{100 * 10 ** (-decibels / 10):.2g} %"


def heat_maps(modules: Sequence[Mapping[str, Any]]) -> list[HeatMap]:
    """Layer by expert: the error of each projection, then the tokens that calibration sent to each expert."""
    routed = [m for m in modules if m["expert"] is not None]
    found = []
    values = [m["sqnr_db"] for m in routed if m["sqnr_db"] is not None]
    low, high = min(values, default=0.0), max(values, default=0.0)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        cells = [Cell(m["layer"], m["expert"], m["sqnr_db"]) for m in routed if m["module"].endswith(f".{projection}")]
        if cells and values:
            caption = "Each square is an expert; what stands out from the page lost more. All three maps have one key."
            found.append(_map(f"SQNR of every expert's {projection}, dB", caption, cells, _even(low, high), 2, ""))
    counts = [Cell(m["layer"], m["expert"], m["tokens"]) for m in routed if m["module"].endswith(".gate_proj")]
    if counts:
        seen = [cell.value for cell in counts if cell.value] or [1.0]
        caption = "How often the router chose each expert while activations were measured."
        if any(cell.value == 0 for cell in counts):
            caption += " Outlined squares saw no token; they have the activation scale of the layer's other experts."
        steps = _powers(min(seen), max(seen))
        found.append(_map("Calibration tokens of every expert", caption, counts, steps, 0, "no token"))
    return found


def _map(title: str, caption: str, cells: list[Cell], bounds: list[float], digits: int, none: str) -> HeatMap:
    """bounds: lower end of the first step, then upper ends of all.  none: what a value of 0 means, if a case apart."""
    layers = sorted({cell.row for cell in cells})
    count = max(cell.column for cell in cells) + 1
    width = _WIDTH / count
    height = max(8.0, min(width, 22.0))
    low_is_dark = not none
    by_step: dict[int, list[tuple[int, int]]] = {}
    for cell in sorted(cells):
        step = _step(cell.value, bounds, bool(none), low_is_dark)
        by_step.setdefault(step, []).append((layers.index(cell.row), cell.column))
    paths = {step: _path(places, width, height) for step, places in sorted(by_step.items())}
    return HeatMap(
        title,
        caption,
        _WIDTH,
        height * len(layers),
        (width, height),
        paths,
        _legend(cells, bounds, digits, none, low_is_dark),
        layers,
        ("layer", "lowest", "of expert", "median", "highest", "of expert", *((none,) if none else ())),
        [_table_row(layer, [cell for cell in cells if cell.row == layer], digits, bool(none)) for layer in layers],
    )


def _step(value: float | None, bounds: list[float], zero_apart: bool, low_is_dark: bool) -> int:
    if value is None:  # exact
        return 1
    if zero_apart and value == 0:
        return 0
    return _colour(sum(value > bound for bound in bounds[1:-1]), len(bounds) - 1, low_is_dark)


def _colour(index: int, steps: int, low_is_dark: bool) -> int:
    """Of the so-manieth step; the darkest is always used."""
    return _STEPS - index if low_is_dark else _STEPS - (steps - 1 - index)


def _path(places: list[tuple[int, int]], width: float, height: float) -> str:
    """Rectangles, neighbours of a row as one."""
    parts: list[list[int]] = []  # row, first column, columns
    for row, column in places:
        if parts and parts[-1][0] == row and parts[-1][1] + parts[-1][2] == column:
            parts[-1][2] += 1
        else:
            parts.append([row, column, 1])
    return "".join(f"M{c * width:g} {r * height:g}h{n * width:g}v{height:g}h{-n * width:g}z" for r, c, n in parts)


def _legend(cells: list[Cell], bounds: list[float], digits: int, none: str, low_is_dark: bool) -> list[Legend]:
    found = [Legend(0, none)] if none and any(cell.value == 0 for cell in cells) else []
    for index, (low, high) in enumerate(itertools.pairwise(bounds)):
        start = low + 1 if none and index else low  # counts are whole numbers
        label = f"{start:,.{digits}f} to {high:,.{digits}f}" if start < high else f"{high:,.{digits}f}"
        found.append(Legend(_colour(index, len(bounds) - 1, low_is_dark), label))
    return found


def _even(low: float, high: float) -> list[float]:
    """Bounds of steps of one width."""
    return [low + (high - low) * i / _STEPS for i in range(_STEPS + 1)] if high - low > 1e-6 else [low, high]


def _powers(low: float, high: float) -> list[float]:
    """Whole bounds that grow by a factor: an expert of R1 sees hundreds of times more than another."""
    ends = {float(round(low * (high / low) ** (i / _STEPS))) for i in range(1, _STEPS)}
    return [low, *sorted(end for end in ends if low < end < high), high]


def _table_row(layer: int, cells: list[Cell], digits: int, count_zero: bool) -> tuple[str, ...]:
    known = sorted((cell.value, cell.column) for cell in cells if cell.value is not None)
    if not known:
        return (str(layer), "exact", "", "exact", "exact", "")
    (low, first), (high, last) = known[0], known[-1]
    median = statistics.median(value for value, _ in known)
    shown = tuple(f"{value:,.{digits}f}" for value in (low, median, high))
    zero = (str(sum(value == 0 for value, _ in known)),) if count_zero else ()
    return (str(layer), shown[0], str(first), shown[1], shown[2], str(last), *zero)


def _overall(content: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the first sentences say."""
    known = sorted(m["sqnr_db"] for m in modules if m["sqnr_db"] is not None)
    return {
        "before": size_text(content["total"]["before"]),
        "after": size_text(content["total"]["after"]),
        "ratio": f"{content['total']['ratio']:.2f}",
        "median": statistics.median(known) if known else None,
        "lowest": known[0] if known else None,
    }


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _text(content: Mapping[str, Any]) -> str:
    """JSON with a module a line: 45,000 of them stay readable and comparable."""
    head = {name: value for name, value in content.items() if name != "modules"}
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in content["modules"]["rows"])
    modules = f'{{"columns": {json.dumps(content["modules"]["columns"])}, "rows": [\n{rows}\n ]}}'
    text = json.dumps(head, indent=1, ensure_ascii=False)
    return text[: text.rindex("\n")] + f',\n "modules": {modules}\n}}\n'
