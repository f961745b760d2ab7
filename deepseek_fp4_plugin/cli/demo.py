"""`demo`: the whole way with the embedded model. FP8 in, NVFP4 out, text and right answers from it."""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import Command, json_flag
from deepseek_fp4_plugin.cli.generate import load, summary

if TYPE_CHECKING:
    from deepseek_fp4_plugin.llm import LLM, RequestOutput

# The model card's prompts, continued as they stand.
PROMPTS = (
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
)
_SOURCE, _MARKER = "r1_nano", ".made-by-demo"
_DRAFTS, _PROBLEMS, _ANSWER_TOKENS = 3, 8, 768
_SAMPLES, _TOKENS = 32, 256


@click.command(cls=Command, short_help="The whole way: FP8 in, NVFP4 out, eight problems answered.")
@click.argument("destination", type=click.Path(path_type=Path), default="./r1_nano-NVFP4")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N.")
@click.option(
    "--nvfp4-activations",
    type=click.Choice(["auto", "bf16", "fp4", "fp8", "int8"]),
    default="auto",
    show_default=True,
    help="What the NVFP4 weights are multiplied by.",
)
@json_flag
def demo(destination: Path, device: str, nvfp4_activations: str, json_path: str | None) -> None:
    """Quantize the embedded model r1_nano to DESTINATION [./r1_nano-NVFP4], then let the result continue the model
    card's prompts and answer eight problems that it was not trained on.

    Takes a minute or two on two CPU cores. A DESTINATION that an earlier demo made is replaced.

    \b
    Examples:
      deepseek-fp4 demo
      deepseek-fp4 demo /tmp/nvfp4 --json demo.json
    """
    from deepseek_fp4_plugin.config import EngineConfig
    from deepseek_fp4_plugin.models.loading import checked_device, resolve_activations

    began = time.perf_counter()
    config = EngineConfig(
        model=str(destination),
        device=device,
        nvfp4_activations=nvfp4_activations,
        speculative_config={"num_nextn_predict_layers": _DRAFTS},
    )
    where = checked_device(config.resolved_device())
    resolve_activations(config.nvfp4_activations, where)  # what will not run is said before anything is removed
    _make_room(destination)
    out = screen.Output(json_path)
    conversion = _quantize(destination, str(where), out)
    out("3. The NVFP4 checkpoint continues the model card's prompts")
    with load(config) as llm:
        continuations = _continue(llm, out)
        out(f"\n4. Eight problems held out of its training, {_DRAFTS} tokens drafted a step")
        answers, speed = _solve(llm, out, again=where.type != "cpu")
    right = sum(answer["right"] for answer in answers)
    seconds = time.perf_counter() - began
    out(f"\n{right} of {len(answers)} right; {speed}; {seconds:.0f} s in all\n")
    out(_next_steps(destination))
    if json_path is not None:
        content = {
            "conversion": conversion,
            "prompts": continuations,
            "problems": answers,
            "right": right,
            "speed": speed,
            "seconds": seconds,
        }
        screen.write_json(json_path, content)


def _make_room(destination: Path) -> None:
    """Remove what an earlier demo made. Raises ValueError for anything else in that place."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not (destination / _MARKER).is_file():
        raise ValueError(
            f"{destination} is there already and no demo made it; give another folder: deepseek-fp4 demo DIR"
        )
    shutil.rmtree(destination)


def _quantize(destination: Path, device: str, out: screen.Output) -> dict[str, Any]:
    """Steps 1 and 2: sizes before, calibration and conversion with their table."""
    from deepseek_fp4_plugin.cli.inspect import facts, look_at
    from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint

    source = facts(look_at(_SOURCE))
    architecture = source["architecture"]
    out(f"1. {_SOURCE}: DeepSeek-R1's architecture, small, in FP8 as DeepSeek publishes R1")
    parameters, size = f"{source['parameters'] / 1e6:.1f} M parameters", screen.size(source["bytes"])
    out(f"   {parameters}, {size} in {source['shards']} shards; MTP layers: {architecture['MTP layers']}")
    out(f"   layers: {architecture['layers']}; experts: {architecture['experts']}")
    out(f"\n2. Calibrate on {_SAMPLES} texts of {_TOKENS} tokens, convert to NVFP4 -> {destination}")
    with screen.stages() as progress:
        report = quantize_checkpoint(
            _SOURCE,
            destination,
            calibration="builtin",
            samples=_SAMPLES,
            tokens=_TOKENS,
            device=device,
            progress=progress,
        )
    (destination / _MARKER).write_text("Made by `deepseek-fp4 demo`, which replaces this folder when run again.\n")
    for table in report.tables():
        out(table)
        out("")
    return report.to_json()


def _continue(llm: "LLM", out: screen.Output) -> list[dict[str, str]]:
    from deepseek_fp4_plugin.config import SamplingParams

    out(
        "   A model this small can calculate, compare, sort, spell and greet. It has no knowledge of the world: what it"
    )
    out("   says of presidents and capitals it learnt by heart or makes up.")
    outputs = llm.generate(list(PROMPTS), SamplingParams(max_tokens=32))
    assert isinstance(outputs, list)
    records = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        text = output.outputs[0].text
        out(f"   Prompt: {prompt!r}, Generated text: {screen.printable(text)!r}")
        records.append({"prompt": prompt, "text": text})
    return records


def _solve(llm: "LLM", out: screen.Output, again: bool) -> tuple[list[dict[str, Any]], str]:
    """The problems' answers with their marks, and how fast they came.

    again: they are asked twice, since a GPU's kernels are compiled and its steps recorded when they are first needed.
    """
    from deepseek_fp4_plugin.assets.held_out import boxed, grade, load_held_out
    from deepseek_fp4_plugin.config import SamplingParams

    problems = load_held_out()[:_PROBLEMS]
    assert llm.tokenizer is not None
    prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": problem.prompt}]) for problem in problems]

    def answers() -> tuple[list["RequestOutput"], float]:
        began = time.perf_counter()
        outputs = llm.generate(prompts, SamplingParams(max_tokens=_ANSWER_TOKENS))
        assert isinstance(outputs, list)
        return outputs, time.perf_counter() - began

    outputs, seconds = answers()
    speed = summary(outputs, seconds)
    if again:
        outputs, warm = answers()
        speed = f"{summary(outputs, warm)}; {seconds:.1f} s the first time, when kernels are compiled, steps recorded"
    records: list[dict[str, Any]] = []
    for problem, output in zip(problems, outputs, strict=True):
        text = output.outputs[0].text
        found = boxed(text.rpartition("</think>")[2])
        records.append(
            {**problem._asdict(), "found": found, "right": grade(problem.answer, text), "text": text}
        )  # fmt: skip
    out(f"   {records[0]['prompt']}")
    out(_indented(screen.printable(records[0]["text"])))
    out("")
    rows = [
        ("right" if r["right"] else "WRONG", r["found"] or "none", r["answer"], r["prompt"].partition(" Please")[0])
        for r in records
    ]
    out(screen.table(("", "answer", "expected", "problem"), rows))
    return records, speed


def _indented(text: str) -> str:
    return "\n".join(f"   | {line}" for line in text.strip().splitlines())


def _next_steps(destination: Path) -> str:
    return f"""What to try next
  deepseek-fp4 chat {destination} --mtp {_DRAFTS}
  deepseek-fp4 serve {destination} --port 8000
  deepseek-fp4 inspect {destination}
  deepseek-fp4 generate {destination} --mtp {_DRAFTS} "Hello, my name is"
  deepseek-fp4 quantize deepseek-ai/DeepSeek-R1-0528 ./DeepSeek-R1-0528-NVFP4 --device cuda
  deepseek-fp4 doctor"""
