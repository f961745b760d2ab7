"""The command line: what it prints, what it answers to mistakes, how it ends."""

import ast
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from deepseek_fp4_plugin.checkpoint.hub import embedded_folder
from deepseek_fp4_plugin.cli.app import app, run
from deepseek_fp4_plugin.cli.demo import _solve
from deepseek_fp4_plugin.cli.flags import Command, engine_config, engine_flags, field_flags
from deepseek_fp4_plugin.cli.screen import Output, Transfer
from deepseek_fp4_plugin.llm import LLM, SamplingParams
from tests.tiny import tiny_config, write_checkpoint

PROGRAM = [sys.executable, "-c", "from deepseek_fp4_plugin.cli import main; main()"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny random model with the embedded model's tokenizer."""
    if not (embedded_folder() / "tokenizer.json").is_file():
        pytest.skip("the embedded model is not there")
    folder = write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", tiny_config(vocab_size=1024))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(embedded_folder() / name, folder)
    return str(folder)


def mistake(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and the one line on standard error."""
    status = run(arguments)
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith(("loading", "note:"))]
    assert shown.out == "" and len(lines) == 1, shown
    return status, lines[0]


# ---------------------------------------------------------------- help and usage


@pytest.mark.parametrize("command", ["", *app.commands])
def test_help_pages(capsys, command: str) -> None:
    assert run([command, "--help"] if command else ["--help"]) == 0
    text = capsys.readouterr().out
    assert "deepseek-fp4 " in text and max(map(len, text.splitlines())) <= 110
    if command:
        assert "Examples:" in text
    else:
        assert all(f"  {name} " in text for name in app.commands)


def test_no_command_shows_the_help(capsys) -> None:
    assert run([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_version(capsys) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("deepseek-fp4, version ")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["generate", "r1_nano", "hi", "--max-new-tokns", "8"], 2, "--max-new-tokns; did you mean '--max-new-tokens'"),
        (["generate", "r1_nano", "hi", "--temprature=1"], 2, "did you mean '--temperature'"),
        (["quantize", "a", "b", "--kv_cach", "fp8"], 2, "did you mean '--kv-cache'"),
        (["genrate", "r1_nano"], 2, "no command 'genrate'; did you mean 'generate'"),
        (["quantize", "r1_nano"], 2, "missing argument 'DESTINATION'"),
        (["quantize", "r1_nano", "x", "--layout", "v3"], 2, "'v3' is not one of 'v1', 'v2'"),
        (["quantize", "r1_nano", "x", "--max-shard-size", "big"], 2, "'big' is not a size"),
        (["quantize", "r1_nano", "x", "--json", "no-such-folder/x.json"], 2, "no-such-folder is not a folder"),
        (["generate", "r1_nano", "hi", "--relaxed"], 2, "give --mtp as well"),
        (["generate", "./no-such-model", "hi"], 1, "no-such-model is neither a folder nor a Hugging Face id"),
        (["chat", "./no-such-model"], 1, "is neither a folder nor a Hugging Face id"),
        (["inspect", "./no-such-model"], 1, "is not a folder here"),
        (["generate", "r1_nano", "hi", "--device", "tpu"], 1, "device='tpu' must be auto, cpu, cuda or cuda:0"),
        (["generate", "r1_nano", "hi", "--temperature", "-1"], 1, "temperature=-1.0 must be at least 0"),
        (["generate", "r1_nano", "hi", "--max-new-tokens", "0"], 1, "max_tokens=0 must be at least 1"),
        (["generate", "r1_nano", "hi", "--config", "no-such.yaml"], 1, "no-such.yaml cannot be read"),
        (["generate", "r1_nano", "--prompt-file", "no-such.txt"], 1, "no-such.txt cannot be read"),
    ],
)  # fmt: skip
def test_mistakes(capsys, arguments: list[str], status: int, message: str) -> None:
    found, line = mistake(capsys, *arguments)
    assert found == status and message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_cuda_where_there_is_none(capsys, tmp_path, command: str) -> None:
    status, line = mistake(capsys, command, "r1_nano", str(tmp_path / "out"), "--device", "cuda")
    assert status == 1 and "cuda" in line and "--device cpu" in line
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- generate and chat


def test_generate_is_what_the_llm_gives(capsys, model) -> None:
    with LLM(model) as llm:
        expected = llm.generate("Hello", SamplingParams(max_tokens=12)).text
    assert run(["generate", model, "Hello", "--max_new_tokens", "12"]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected + "\n"
    assert "12 tokens in" in shown.err


def test_generate_several_with_drafts_as_json(capsys, model, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    (tmp_path / "args.yaml").write_text("use_cuda_graph: true\nspeculative_config: {num_nextn_predict_layers: 1}\n")
    arguments = ["generate", model, "zero", "--prompt-file", str(tmp_path / "prompts.txt"), "--max-tokens", "9"]
    assert run([*arguments, "--json", str(tmp_path / "plain.json")]) == 0
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert [entry["prompt"] for entry in plain] == ["zero", "one", "two"]
    shown = capsys.readouterr().out
    assert all(f"> {entry['prompt']}\n{entry['text']}\n" in shown for entry in plain)
    config = ["--config", str(tmp_path / "args.yaml"), "--num_nextn_predict_layers", "2", "--dtype", "float32"]
    assert run([*arguments, *config, "--json", "-"]) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert [len(entry["token_ids"]) for entry in drafted] == [9, 9, 9]
    assert all(entry["drafted"] > entry["steps"] for entry in drafted)  # two a step: the flag won over the file
    assert all(entry["drafted"] == 0 for entry in plain)


def test_generate_from_standard_input_through_the_chat_template(capsys, model, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert run(["generate", model, "--chat", "--max-new-tokens", "3", "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)[0]
    assert record["prompt"] == "hello" and record["prompt_tokens"] == len("hello") + 3  # bos, user, assistant


def test_a_chats_answer_ends_by_itself_or_says_where_it_was_cut(capsys, model) -> None:
    assert run(["generate", model, "--chat", "hi", "--ignore-eos", "--max-seq-len", "90"]) == 0
    shown = capsys.readouterr().err  # 5 of the prompt
    assert "85 tokens in" in shown and "cut where the context was full; --max-seq-len" in shown
    assert run(["generate", model, "--chat", "hi", "--ignore-eos", "--max-new-tokens", "7"]) == 0
    assert "the answer was cut after 7 tokens; --max-new-tokens takes more" in capsys.readouterr().err
    assert run(["generate", model, "hi", "ho", "--ignore-eos"]) == 0
    assert "2 of 2 answers were cut after 64 tokens" in capsys.readouterr().err


def test_a_context_longer_than_the_models_own_is_named(caplog, model) -> None:
    with LLM(model, max_seq_len=10**9) as llm:
        longest = llm.model_config.max_position_embeddings
    assert f"max_seq_len=1000000000 ignored: the model's own is {longest}, and that is used" in caplog.messages
    caplog.clear()
    with LLM(model, max_seq_len=longest):
        pass
    assert not any("max_seq_len" in message for message in caplog.messages)


def test_an_answer_that_ended_is_not_called_cut(capsys) -> None:
    assert run(["generate", "r1_nano", "--chat", "What is 2 + 3?", "--max-seq-len", "2048", "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)[0]["finish_reason"] == "stop" and "cut" not in shown.err


def test_chat_takes_a_line_a_turn(capsys, model, monkeypatch) -> None:
    seen: list[list[dict[str, str]]] = []

    def record(self, messages, **arguments):
        seen.append([dict(message) for message in messages])
        return self.encode(messages[-1]["content"])

    monkeypatch.setattr("deepseek_fp4_plugin.tokenizer.Tokenizer.encode_chat", record)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\nsecond\n/reset\nthird\n/nonsense\n/exit\nnever\n"))
    assert run(["chat", model, "--max-new-tokens", "4", "--seed", "1", "--system", "Be brief.", "--math"]) == 0
    shown = capsys.readouterr()
    assert [len(messages) for messages in seen] == [2, 4, 2]
    assert seen[0][0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in seen[1]] == ["system", "user", "assistant", "user"]
    assert (
        seen[2][1]["content"].startswith("third\nPlease reason step by step") and "\\boxed{}" in seen[2][1]["content"]
    )
    assert shown.err.count("4 tokens in") == 3 and "no command /nonsense" in shown.err


def test_chat_marks_thinking_however_it_is_cut(capsys) -> None:
    from deepseek_fp4_plugin.cli.chat import Conversation

    conversation = Conversation(None, None, False, [])  # type: ignore[arg-type]
    conversation._terminal, thought = True, False
    for reasoning, content in (("add", ""), (" it", ""), ("", ""), ("", "7"), ("", "!")):
        thought = conversation._show(reasoning, content, thought)
    assert capsys.readouterr().out == "add it\n\n7!"  # click drops colours where there is no terminal


def test_control_characters_never_reach_a_terminal() -> None:
    from deepseek_fp4_plugin.cli.screen import printable

    assert printable("a\x1b[2J\x07\n\tb\x9b几") == "a\ufffd[2J\ufffd\n\tb\ufffd几"


# ---------------------------------------------------------------- inspect and doctor


def test_inspect_counts_every_byte(capsys, tiny_fp8, tmp_path) -> None:
    assert run(["inspect", str(tiny_fp8), "--json", str(tmp_path / "x.json")]) == 0
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "x.json").read_text())
    assert sum(entry["bytes"] for entry in content["modules"]) == content["bytes"]
    assert content["missing"] == content["other tensors"] == []
    experts = next(entry for entry in content["modules"] if entry["module"] == "routed experts")
    # 2 MoE layers of 16 experts with 3 matrices of 128 x 128 in one FP8 block each
    assert experts["format"] == "fp8_block" and experts["modules"] == experts["scales"]["weight_scale_inv"] == 96
    assert experts["parameters"] == 96 * 128 * 128 and experts["bytes"] == 96 * (128 * 128 + 4)
    assert "MTP layer: routed experts" in shown and "fp8_block" in shown
    assert all(line == line.rstrip() for line in shown.splitlines())


def test_inspect_shows_what_is_missing(capsys, tmp_path) -> None:
    folder = write_checkpoint(tmp_path / "model", fp8=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "num_nextn_predict_layers": 0}))
    assert run(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "tensors that the model has no place for, first model.layers.3.embed_tokens.weight" in shown
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5, "num_nextn_predict_layers": 0}))
    assert run(["inspect", str(folder)]) == 0
    assert "INCOMPLETE" in capsys.readouterr().out


def test_doctor(capsys) -> None:
    assert run(["doctor", "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["kernels"]["NVFP4 weights on cpu"] and "GiB" in facts["machine"]["memory"]
    assert run(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out


# ---------------------------------------------------------------- quantize and demo


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "maxx"], "recipe 'maxx' is unknown; choose from max"),
        (["--calibration", "no-such-file.txt"], "no-such-file.txt"),
        (["--calibration", "README.md"], "README.md"),  # neither text, jsonl nor parquet by its name
        (["--samples", "0"], "0 is not in the range"),
    ],
)
def test_quantize_refuses(capsys, model, tmp_path, flags: list[str], message: str) -> None:
    status, line = mistake(capsys, "quantize", model, str(tmp_path / "out"), "--calibration", "builtin", *flags)
    assert status in (1, 2) and message in line
    assert not list(tmp_path.iterdir())


def test_quantize_leaves_a_folder_that_is_not_empty_alone(capsys, model, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    status, line = mistake(capsys, "quantize", model, str(tmp_path), "--calibration", "builtin")
    assert status == 1 and str(tmp_path) in line and "empty" in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_quantize_generate_inspect(capsys, model, tmp_path) -> None:
    result = tmp_path / "nvfp4"
    (tmp_path / "text.txt").write_text("Some text to measure activations on. " * 50)
    arguments = ["--calibration", str(tmp_path / "text.txt"), "--samples", "4", "--tokens", "32", "--kv_cache", "bf16"]
    arguments += ["--max-shard-size", "300kB", "--json", str(tmp_path / "report.json")]
    assert run(["quantize", model, str(result), *arguments]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert "routed experts" in shown and "SQNR" in shown and "4 samples (128 tokens)" in shown
    assert len(list(result.glob("*.safetensors"))) > 3
    assert run(["inspect", str(result), "--json", "-"]) == 0
    content = json.loads(capsys.readouterr().out)
    experts = next(entry for entry in content["modules"] if entry["module"] == "routed experts")
    assert experts["format"] == "nvfp4" and content["quantization"]["latent cache"] == "bf16"
    assert experts["scales"] == dict.fromkeys(("weight_scale", "weight_scale_2", "input_scale"), experts["modules"])
    assert content["bytes"] == report["total"]["after"]
    for kind in ("fp4", "int8"):
        assert run(["generate", str(result), "a", "--max-new-tokens", "4", "--nvfp4-activations", kind]) == 0


def test_calibration_flags_are_all_used(capsys, model, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("Some text to measure activations on. " * 50)
    (tmp_path / "b.csv").write_text("text\nOne text.\nAnother text.\n")
    flags = ["--calibration", str(tmp_path / "a.txt"), "--calibration", str(tmp_path / "b.csv"), "--samples", "3"]
    assert run(["quantize", model, str(tmp_path / "out"), *flags, "--tokens", "32"]) == 0
    assert "the file a.txt (2 samples), the file b.csv (1 samples)" in " ".join(capsys.readouterr().out.split())


def test_demo_replaces_only_what_a_demo_made(capsys, tmp_path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    status, line = mistake(capsys, "demo", str(mine))
    assert status == 1 and "no demo made it" in line and (mine / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("flags", "says"), [("--device cuda:99", "cuda"), ("--device cpu --nvfp4-activations fp8", "fp8")]
)
def test_demo_removes_nothing_where_it_cannot_run(capsys, tmp_path, flags, says) -> None:
    (tmp_path / ".made-by-demo").touch()
    status, line = mistake(capsys, "demo", str(tmp_path), *flags.split())
    assert status == 1 and says in line and (tmp_path / ".made-by-demo").exists()


@pytest.mark.slow
def test_demo(capsys, tmp_path, monkeypatch) -> None:
    if not (embedded_folder() / "model.safetensors.index.json").is_file():
        pytest.skip("the embedded model is not there")
    monkeypatch.setattr("deepseek_fp4_plugin.cli.demo._SAMPLES", 8)
    monkeypatch.setattr("deepseek_fp4_plugin.cli.demo._TOKENS", 64)
    folder = tmp_path / "nvfp4"
    folder.mkdir()
    (folder / ".made-by-demo").touch()
    (folder / "stale").touch()
    assert run(["demo", str(folder), "--json", str(tmp_path / "demo.json")]) == 0
    assert (folder / ".made-by-demo").exists() and not (folder / "stale").exists()
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "demo.json").read_text())
    assert content["right"] == sum(problem["right"] for problem in content["problems"]) >= 7
    assert len(content["problems"]) == 8 and len(content["prompts"]) == 4
    assert f"{content['right']} of 8 right" in shown and "What to try next" in shown
    assert all(f"Prompt: {entry['prompt']!r}, Generated text:" in shown for entry in content["prompts"])
    with LLM(folder) as llm:
        answers, speed = _solve(llm, Output(None), again=True)  # as on a GPU
    assert sum(answer["right"] for answer in answers) >= 7 and "s the first time" in speed


# ---------------------------------------------------------------- how a process ends


def _start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )


def test_ctrl_c(model) -> None:
    process = _start("generate", model, "a", "--max-new-tokens", "2000", "--ignore-eos")
    assert process.stdout is not None and process.stdout.read(1)  # it is generating
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    lines = err.decode().splitlines()
    assert process.returncode == 130
    assert lines[-1] == "deepseek-fp4: interrupted" and "Traceback" not in err.decode()


def test_closed_pipe_is_quiet(model) -> None:
    process = _start("generate", model, "a", "--max-new-tokens", "2000", "--ignore-eos")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    process.wait(timeout=30)
    assert all(line.startswith("loading") for line in err.splitlines()), err


def test_flags_come_from_the_fields():
    """Every field that asks for a flag has one, under all its names, and it reaches the configuration."""
    common, served = field_flags(serve_only=False), field_flags(serve_only=True)
    assert {"tensor_parallel_size", "enable_attention_dp", "orchestrator_type", "kv_cache_dtype"} <= common.keys()
    assert served.keys() == {"stream_interval", "max_prompt_seconds"}

    @click.command(cls=Command)
    @engine_flags
    def show(**flags):
        click.echo(repr(engine_config("r1_nano", flags).model_dump(exclude_unset=True)))

    arguments = ["--tp_size", "4", "--ep-size", "2", "--enable_attention_dp", "--orchestrator-type", "ray",
                 "--free_gpu_memory_fraction", "0.5", "--kv_cache_dtype", "fp8", "--max-seq-len", "99"]  # fmt: skip
    result = CliRunner().invoke(show, arguments)
    assert result.exit_code == 0, result.output
    assert ast.literal_eval(result.output) == {
        "model": "r1_nano",
        "tensor_parallel_size": 4,
        "moe_expert_parallel_size": 2,
        "enable_attention_dp": True,
        "orchestrator_type": "ray",
        "kv_cache_config": {"free_gpu_memory_fraction": 0.5, "dtype": "fp8"},
        "max_seq_len": 99,
    }
    assert CliRunner().invoke(show, ["--dtype", "int3"]).exit_code == 2


def test_progress_in_bytes_says_the_speed_and_what_is_left():
    transfer = Transfer("convert")
    assert transfer.line(0, 10**9, 0.0) == "convert: 0 B of 1.0 GB read and written"
    half = transfer.line(5 * 10**9, 20 * 10**9, 100.0)
    assert half == "convert: 5.0 GB of 20.0 GB read and written, 50.0 MB/s, 0:05:00 left at this speed"
    assert transfer.line(10**9, 10**9, 4.0) == "convert: 1.0 GB of 1.0 GB read and written, 250.0 MB/s"
