"""The report beside a quantized checkpoint: its document, its page, and what a comparison adds."""

import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.quantization.report import Bytes, ModuleError, ModuleFigures, QuantizationReport
from deepseek_fp4_plugin.quantization.report_page import (
    DOCUMENT,
    PAGE,
    add_comparison,
    document,
    heat_maps,
    page,
    report_files,
)

LAYERS, EXPERTS = 3, 5
COMPARISON = {
    "text": "held_out.txt",
    "positions": 1234,
    "sides": [
        {
            "activations": kind,
            "kl": 0.01234,
            "kl_half": 0.001,
            "agreement": 97.5,
            "agreement_half": 0.5,
            "output_error": {"routed experts": error},
        }
        for kind, error in (("bf16", 0.87), ("fp4", 1.93))
    ],
}


def figures(layers: int = LAYERS, experts: int = EXPERTS) -> tuple[ModuleFigures, ...]:
    return tuple(
        ModuleFigures(
            f"model.layers.{layer}.mlp.experts.{expert}.{projection}",
            "routed experts",
            layer,
            expert,
            20 + 0.1 * expert - 0.01 * layer,
            0.5,
            (layer * experts + expert) * 7,
        )
        for layer in range(layers)
        for expert in range(experts)
        for projection in ("gate_proj", "up_proj", "down_proj")
    )


def make(modules: tuple[ModuleFigures, ...] | None = None, source: str = "<b>&R1") -> QuantizationReport:
    modules = figures() if modules is None else modules
    worst = sorted(modules, key=lambda m: m.sqnr_db)[:5]
    return QuantizationReport(
        source, "/somewhere/out", "max", "v1", "fp8", "some text", 8, 4096,
        {"routed experts": Bytes(2000, 1100), "MTP layer": Bytes(100, 180)},
        {"routed experts": 20.2}, tuple(ModuleError(m.module, m.sqnr_db) for m in worst), modules, len(modules), 1,
        (), Bytes(10, 6),
    )  # fmt: skip


class Reader(HTMLParser):
    """Refuses what is not closed in order, and notes what a screen reader and a network would meet."""

    VOID = frozenset(["meta", "link", "img", "path", "br"])

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == ["html"], "the page is not closed"

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag == "html":
            return
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.seen if name == tag]


@pytest.fixture(scope="module")
def text() -> str:
    return page({**document(make()), "comparison": COMPARISON})


def test_the_page_needs_nothing_from_elsewhere(text):
    reader = Reader(text.replace("</html>", ""))
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & {tag for tag, _ in reader.seen}
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert not any(name in attributes for _, attributes in reader.seen for name in ("src", "href", "srcset"))


def test_a_screen_reader_gets_everything(text):
    """Headings without a jump, a caption and named rows and columns in every table, a table for every drawing."""
    reader = Reader(text.replace("</html>", ""))
    levels = [int(tag[1]) for tag, _ in reader.seen if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(reader.all("table")) == len(reader.all("caption")) == 8
    assert all("scope" in attributes for attributes in reader.all("th"))
    drawings, ids = reader.all("svg"), {a.get("id") for _, a in reader.seen}
    assert len(drawings) == 4
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert {drawing["aria-labelledby"], drawing["aria-describedby"]} <= ids
    assert reader.all("html")[0]["lang"] == "en" and len(reader.all("main")) == 1


def test_names_are_text_and_never_markup(text):
    assert "<b>&R1" not in text and "&lt;b&gt;&amp;R1" in text


def test_what_was_measured_is_said(text):
    said = " ".join(" ".join(Reader(text.replace("</html>", "")).text).split())
    assert "2.1 kB became 1.3 kB, 1.64 times smaller" in said
    assert "0.01234 ± 0.00100" in said and "97.50 ± 0.50 %" in said and "1,234 positions" in said
    assert "0.87 %" in said and "1.9 %" in said
    assert "model.layers.2.mlp.experts.0.gate_proj" in said
    assert "Not measured yet" in page(document(make()))


def test_a_heat_map_has_every_expert_once_in_the_colour_of_its_value():
    maps = heat_maps([m._asdict() for m in figures()])
    assert [m.title.split()[-2] for m in maps[:3]] == ["gate_proj,", "up_proj,", "down_proj,"]
    for found in maps:
        areas = {}
        for step, path in found.paths.items():
            for _, y, width in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v", path):
                layer = round(float(y) / found.cell[1])
                areas[layer, step] = areas.get((layer, step), 0) + round(float(width) / found.cell[0])
        assert sum(areas.values()) == LAYERS * EXPERTS
        assert set(found.paths) <= {key.step for key in found.legend}
    tokens = maps[3]
    assert tokens.legend[0].label == "no token" and 0 in tokens.paths  # layer 0, expert 0
    assert tokens.rows[0] == ("0", "0", "0", "14", "28", "4", "1")
    assert maps[0].paths[7].startswith("M0 ")  # the lowest SQNR is the darkest
    assert 1 in maps[0].paths


@pytest.mark.parametrize("tokens", [[0] * 5, [3] * 5, [0, 1, 1, 1, 1], [1, 2, 3, 4, 100000], [0, 0, 0, 0, 9]], ids=str)
@pytest.mark.parametrize("sqnr", [[20.0] * 5, [None] * 5, [20.0, None, 19.0, 21.0, 20.0], [-3.0, 0, 1, 2, 3]], ids=str)
def test_maps_of_odd_values(tokens, sqnr):
    modules = [
        {"module": f"x.experts.{i}.gate_proj", "layer": 1, "expert": i, "sqnr_db": s, "tokens": t}
        for i, (s, t) in enumerate(zip(sqnr, tokens, strict=True))
    ]
    for found in heat_maps(modules):
        assert set(found.paths) <= set(range(8))
        assert all(key.step in range(8) for key in found.legend)
        assert {len(row) for row in found.rows} == {len(found.head)}


def test_the_document_has_every_module_and_is_the_same_for_the_same_run(tmp_path):
    report = make(source=str(tmp_path))
    first, second = (
        report_files(report),
        report_files(QuantizationReport.from_state(json.loads(json.dumps(report.to_state())))),
    )
    assert first == second
    content = json.loads(first[DOCUMENT])
    assert len(content["modules"]["rows"]) == LAYERS * EXPERTS * 3 == content["quantized_modules"]
    assert content["source"] == tmp_path.name and content["destination"] == "out"  # no path of the machine
    assert first[PAGE] == page(content)


def test_r1_s_page_stays_small():
    text = page(document(make(figures(58, 256))))
    assert len(text) < 2_000_000 and len(heat_maps([m._asdict() for m in figures(58, 256)])[0].rows) == 58


def test_a_comparison_joins_the_report(tmp_path):
    for name, content in report_files(make()).items():
        (tmp_path / name).write_text(content)
    assert add_comparison(tmp_path, COMPARISON) == tmp_path / PAGE
    assert "0.01234" in (tmp_path / PAGE).read_text()
    assert json.loads((tmp_path / DOCUMENT).read_text())["comparison"] == COMPARISON
    before = json.loads(report_files(make())[DOCUMENT])
    assert json.loads((tmp_path / DOCUMENT).read_text()) == {**before, "comparison": COMPARISON}


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="what quantize leaves"):
        add_comparison(tmp_path, COMPARISON)
    (tmp_path / DOCUMENT).write_text("{}")
    with pytest.raises(CheckpointError, match="is not a report of quantize"):
        add_comparison(tmp_path, COMPARISON)
