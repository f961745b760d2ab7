"""The report of a real run: what `quantize` leaves, and what a comparison with the source adds."""

import json
from pathlib import Path

import pytest
import torch

from deepseek_fp4_plugin.cli.evaluate import _divergences
from deepseek_fp4_plugin.evaluation.output_error import output_errors
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.quantization.report_page import DOCUMENT, PAGE

TEXT = "12 + 7 = 19. The sum of 3 and 4 is 7. " * 30


@pytest.fixture(scope="module")
def result(tiny_with_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "nvfp4"
    return folder, quantize_checkpoint(tiny_with_tokenizer, folder, calibration="builtin", samples=4, tokens=32)


def test_what_quantize_leaves(result):
    folder, report = result
    content = json.loads((folder / DOCUMENT).read_text())
    assert content["quantized_modules"] == len(content["modules"]["rows"]) == report.quantized_modules
    assert content["total"] == {"before": report.total.before, "after": report.total.after, "ratio": report.total.ratio}
    columns = content["modules"]["columns"]
    rows = [dict(zip(columns, row, strict=True)) for row in content["modules"]["rows"]]
    worst = min(rows, key=lambda row: row["sqnr_db"])
    assert worst["module"] == report.worst[0].module
    # 4 of 16 experts a token: the experts of a layer saw four times its tokens together.
    routed = [row for row in rows if row["layer"] == 1 and row["expert"] is not None]
    seen = sum(row["tokens"] for row in routed if row["module"].endswith("gate_proj"))
    assert seen == 4 * report.tokens
    assert "Not measured yet" in (folder / PAGE).read_text()


@torch.inference_mode()
def test_output_errors_are_those_of_single_modules(result, tiny_with_tokenizer):
    folder, _ = result
    reference, ids = DeepseekV3ForCausalLM.from_pretrained(tiny_with_tokenizer), [(5 * i * i) % 1000 for i in range(96)]
    found = {}
    for kind in ("bf16", "fp4"):
        model = DeepseekV3ForCausalLM.from_pretrained(folder, nvfp4_activations=kind)
        found[kind] = output_errors(reference, model, [ids])
        assert found[kind].keys() == {"dense MLP", "routed experts", "shared experts"}
        # Rounding to NVFP4 leaves about 1 % of a weight's energy, and so it does of a product with random inputs.
        assert all(0.3 < error < 5 for error in found[kind].values())
    assert all(found["fp4"][kind] > 1.3 * found["bf16"][kind] for kind in found["bf16"])
    assert output_errors(reference, reference, [ids]) == {}

    # By hand, the dense layer: its one MLP sees the normed output of its attention.
    seen = []
    mlp = reference.model.layers[0].mlp
    mlp.gate_up_proj.observer = seen.append
    reference(ForwardBatch.from_sequences([ids]))
    mlp.gate_up_proj.observer = None
    model = DeepseekV3ForCausalLM.from_pretrained(folder, nvfp4_activations="bf16")
    gate, up = mlp.gate_up_proj(seen[0]).chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    noise = signal = 0.0
    for name, x in (("gate_up_proj", seen[0]), ("down_proj", inner)):
        ours, theirs = (getattr(m.model.layers[0].mlp, name)(x).double() for m in (reference, model))
        noise, signal = noise + float((theirs - ours).square().sum()), signal + float(ours.square().sum())
    assert found["bf16"]["dense MLP"] == pytest.approx(100 * noise / signal, rel=0.02)
    assert all(part.observer is None for part in reference.modules() if hasattr(part, "observer"))


def test_a_comparison_joins_the_report(result, tiny_with_tokenizer, tmp_path, capsys):
    folder, _ = result
    text = tmp_path / "held_out.txt"
    text.write_text(TEXT)
    before = json.loads((folder / DOCUMENT).read_text())
    _divergences(str(tiny_with_tokenizer), str(folder), ("bf16", "fp4"), text)
    shown = capsys.readouterr().out
    assert f"{folder / PAGE}: the report has these figures now" in shown
    content = json.loads((folder / DOCUMENT).read_text())
    comparison = content.pop("comparison")
    assert content == {name: value for name, value in before.items() if name != "comparison"}
    assert comparison["text"] == "held_out.txt" and comparison["positions"] > 100
    assert [side["activations"] for side in comparison["sides"]] == ["bf16", "fp4"]
    page = (folder / PAGE).read_text()
    for side in comparison["sides"]:
        assert f"{side['kl']:.5f} ± {side['kl_half']:.5f}" in page and f"KL {side['kl']:.5f}" in shown
    assert "Not measured yet" not in page and page.count("output error,") == 2


def test_a_checkpoint_without_a_report_is_compared_all_the_same(tiny_with_tokenizer, tmp_path, capsys):
    text = tmp_path / "held_out.txt"
    text.write_text(TEXT)
    folder = Path(tiny_with_tokenizer)
    _divergences(str(folder), str(folder), ("bf16",), text)
    assert "KL 0.00000 ±" in capsys.readouterr().out
    assert not (folder / DOCUMENT).exists()
