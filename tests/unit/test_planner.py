"""The planner against published figures, against hand arithmetic, and against what the engine allocates."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from deepseek_fp4_plugin.cli.app import run
from deepseek_fp4_plugin.config import EngineConfig
from deepseek_fp4_plugin.engine.worker import Worker
from deepseek_fp4_plugin.models.deepseek_r1 import DEEPSEEK_R1
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.models.ledger import Step, decode_step, draft_step, seconds
from deepseek_fp4_plugin.models.residency import cache_bytes, resident_bytes
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.planner.machines import machine
from deepseek_fp4_plugin.planner.plan import ACCEPTED, measurements, plan
from deepseek_fp4_plugin.quantization.plan import layout_format
from tests.ranks import MAPPINGS, Processes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def on_b200() -> dict:
    return plan(DEEPSEEK_R1, machine("8xB200"), context=1024)


def way(content: dict, name: str) -> dict:
    return next(way for way in content["mappings"] if way["name"] == name)


def test_r1_s_checkpoints(on_b200):
    """Hugging Face lists 688.6 GB for the FP8 one, and 393.6 B elements for the successor of the FP4 one."""
    sizes, elements = on_b200["checkpoint_bytes"], on_b200["checkpoint_elements"]
    assert sizes.keys() == {"fp8", "nvfp4_v1", "nvfp4_v2"}
    assert abs(sizes["fp8"] / 688.6e9 - 1) < 0.002
    assert abs(elements["nvfp4_v2"] / 393.6e9 - 1) < 0.001
    assert abs(sizes["nvfp4_v1"] / 423.6e9 - 1) < 0.002 and abs(sizes["nvfp4_v2"] / 413.3e9 - 1) < 0.002
    assert abs(elements["fp8"] / 684.53e9 - 1) < 0.0001  # 684,489,845,504 weights, and their scales


def test_the_batch_one_ledger(on_b200):
    """38.5 GB a token: attention 22.8, routed experts 11.5, shared 1.4, dense 0.7, head 1.9, router 0.2; v2 28.2."""
    lines = {line["module"]: line["bytes"] / 1e9 for line in on_b200["batch_one"]}
    cache = lines.pop("latent cache")
    assert abs(sum(lines.values()) / 38.5 - 1) < 0.01 and cache < 0.05
    expected = {"attention": 22.8, "routed experts": 11.5, "head": 1.9, "shared experts": 1.4, "dense MLP": 0.7}
    for module, size in expected.items():
        assert abs(lines[module] - size) < 0.051, module
    v2 = plan(DEEPSEEK_R1, machine("8xB200"), "v2", context=1024)["batch_one"]
    assert abs(sum(line["bytes"] for line in v2 if line["module"] != "latent cache") / 28.2e9 - 1) < 0.01


@pytest.mark.parametrize(("name", "roof"), [("8xB200", 1663), ("8xH200", 998), ("1xH200", 125)])
def test_the_bandwidth_roof_of_one_request(name, roof):
    """The whole model's bytes over all devices' bandwidth, as worked out by hand."""
    found = machine(name)
    lines = decode_step(DEEPSEEK_R1, layout_format(DEEPSEEK_R1, "v1"), Step(context=0))
    assert abs(found.devices * found.bandwidth / sum(line.bytes for line in lines) / roof - 1) < 0.01


def test_what_fits(on_b200):
    assert all(way["fits"] for way in on_b200["mappings"])
    assert plan(DEEPSEEK_R1, machine("1xH200"))["latency"] is None
    h100 = plan(DEEPSEEK_R1, machine("8xH100-80GB"))
    assert (
        way(h100, "TP8/EP2")["cache_tokens_per_rank"] > 600_000 > 50_000 > way(h100, "DP8/EP8")["cache_tokens_per_rank"]
    )
    assert h100["latency"].startswith("TP8") and on_b200["throughput"] == "DP8/EP8"
    fp8 = plan(DEEPSEEK_R1, machine("8xH200"), "fp8", kv_cache="bf16")
    assert not any(way["fits"] for way in fp8["mappings"])  # here FP8 weights are BF16 on a GPU


def test_a_step_is_the_ledger_s(on_b200):
    """The plan adds no arithmetic of its own but tokens a step."""
    b200, form = machine("8xB200"), layout_format(DEEPSEEK_R1, "v1")
    steps = {step["drafts"]: step for step in way(on_b200, "TP8/EP2")["latency"]["steps"]}
    mesh = Mesh(tensor_parallel_size=8, moe_expert_parallel_size=2)
    for drafts, step in steps.items():
        took = seconds(decode_step(DEEPSEEK_R1, form, Step(1, 1 + drafts, 1024, 1), mesh), 8e12, 2250e12)
        took += drafts * seconds(draft_step(DEEPSEEK_R1, form, Step(1, 1, 1024, 1), mesh), 8e12, 2250e12)
        assert step["milliseconds"] == pytest.approx(1e3 * took)
        assert step["tokens_per_second"] == pytest.approx(ACCEPTED[drafts] / took)
    assert b200.devices == 8 and steps.keys() == ACCEPTED.keys()


def test_the_mtp_layer_s_step():
    """One layer of 62, without the embedding's and the head's copies: attention, 8 experts, shared, router, head."""
    form = layout_format(DEEPSEEK_R1, "v1")
    lines = {line.role: line for line in draft_step(DEEPSEEK_R1, form, Step(context=0))}
    assert lines["attention"].bytes == 2 * 187_105_280
    assert lines["routed experts"].bytes == pytest.approx(8 * 3 * 2 * 7168 * 2048)
    assert lines["head"].bytes == 2 * 129280 * 7168
    assert lines["MTP projection"].bytes == 2 * 7168 * 14336


def test_measured_shares_are_the_performance_page_s():
    """The data file and docs/performance.md are one table: each figure is the last of its column."""
    text = (ROOT / "docs" / "performance.md").read_text()
    table = text[text.index("## One rank of the whole R1") :]
    lines = itertools.takewhile(lambda line: line.startswith("|"), table[table.index("\n|") + 1 :].splitlines())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    head, roofline = rows[0], next(row for row in rows if row[0].startswith("roofline"))
    for step in measurements()["steps"]:
        name = f"batch {step['batch']}" + (f", {step['drafts']} drafts" if step["drafts"] else "")
        column = head.index(name)
        assert float(roofline[column]) == step["roofline_ms"]
        assert f"{step['measured_ms']:g}" == [row[column] for row in rows if row[column]][-1], name
    found = plan(DEEPSEEK_R1, machine("8xH200"))
    assert len(way(found, "TP8/EP2")["measured"]) == 5 and way(found, "TP8")["measured"] == []


def test_machines():
    assert machine("8xb200")[:4] == ("8xB200", 8, 180e9, 8e12)
    assert machine("H200").devices == 1
    given = machine("4x96GB:3.3TB/s:800TFLOPS")
    assert given[1:] == (4, 96e9, 3.3e12, 800e12, "cuda")
    assert machine("cpu:64GB:80GB/s:2TFLOPS")[1:] == (1, 64e9, 80e9, 2e12, "cpu")
    here = machine("cpu")
    assert here.kernels == "cpu" and here.bandwidth > 1e8 and here.flops > 1e8
    for wrong in ("8xB20", "0xB200", "", "B200x8", "4x0GB:1TB/s:1TFLOPS", "96GB:3TB/s"):
        with pytest.raises(ValueError, match="machine"):
            machine(wrong)


# ---------------------------------------------------------------- what the engine allocates


def allocated(mesh: Mesh, folder: str, drafts: int) -> tuple[int, int, int]:
    """Bytes of a rank's weights and of its cache as it lies in memory, and its blocks."""
    torch.set_num_threads(1)
    settings = {"max_batch_size": 2, "max_seq_len": 256, "kv_cache_config": {"max_tokens": 1024, "dtype": "fp8"}}
    if drafts:
        settings["speculative_config"] = {"decoding_type": "MTP", "num_nextn_predict_layers": drafts}
    config = EngineConfig.from_kwargs(folder, **settings)
    worker = Worker(config, DeepseekV3ForCausalLM.from_pretrained(folder, mesh=mesh, nvfp4_activations="bf16"))
    worker.allocate(worker.facts.cache_blocks)
    return worker.facts.weight_bytes, worker.cache.untyped_storage().nbytes(), worker.facts.cache_blocks


def planned(sizes: dict, folder: str, layout: str, blocks: int, drafts: int) -> tuple[int, int]:
    config = DeepseekV3ForCausalLM.from_pretrained(folder).config
    held = resident_bytes(config, layout_format(config, layout), Mesh(**sizes))
    return sum(held.values()), cache_bytes(config, blocks, 32, 1, bool(drafts))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    ranks = Processes(4, tmp_path_factory.mktemp("planner"))
    yield ranks
    ranks.close()


@pytest.mark.parametrize("drafts", [0, 2])
def test_one_rank_allocates_what_is_planned(drafts):
    weight_bytes, cache, blocks = allocated(Mesh(), "r1_nano", drafts)
    assert (weight_bytes, cache) == planned({}, "r1_nano", "fp8", blocks, drafts)


@pytest.mark.parametrize("mapping", ["TP4", "TP4/EP2", "TP4/EP4", "DP4/EP4", "TP2"])
def test_four_gloo_ranks_allocate_what_is_planned(four, mapping):
    found = four.run(mapping, allocated, "r1_nano", 2)
    assert len(found) == MAPPINGS[mapping]["tensor_parallel_size"]
    for rank, (weight_bytes, cache, blocks) in enumerate(found):
        sizes = {**MAPPINGS[mapping], "rank": rank}
        assert (weight_bytes, cache) == planned(sizes, "r1_nano", "fp8", blocks, 2)


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path, capsys):
    assert run(["plan", "r1_nano", "cpu:8GB:40GB/s:1TFLOPS", "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    assert "r1_nano (the checkpoint's own) on" in shown and "For latency: one device." in shown
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["checkpoint_bytes"].keys() == {"fp8", "nvfp4_v1", "nvfp4_v2"}
    stored = sum(path.stat().st_size for path in (ROOT / "deepseek_fp4_plugin/assets/r1_nano").glob("*.safetensors"))
    assert abs(content["checkpoint_bytes"]["fp8"] / stored - 1) < 0.01  # beside the headers
    assert content["mappings"][0]["weights_per_rank"] == allocated(Mesh(), "r1_nano", 0)[0]
    assert run(["plan", "DeepSeek-R1", "8xB200", "--layout", "v2", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "v2"
    (tmp_path / "config.json").write_text((ROOT / "deepseek_fp4_plugin/assets/r1_nano/config.json").read_text())
    assert run(["plan", str(tmp_path / "config.json"), "2x80GB:3TB/s:900TFLOPS"]) == 0
    assert "config.json (v1) on 2x80GB:3TB/s:900TFLOPS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "8xB200"], "is no config.json and no folder here; plan also knows r1_nano and DeepSeek-R1"),
        (["DeepSeek-R1", "8xB20"], "no machine '8xB20'; did you mean 'B200'? There are"),
        (["DeepSeek-R1", "7xB200"], "cannot be cut over 7 devices"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert run(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err
