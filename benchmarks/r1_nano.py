"""What each precision, and each acceptance rule, costs r1_nano on its held-out problems.

    python benchmarks/r1_nano.py [--problems 500] [--model r1_nano] [--device cpu] [--strict] [--json FILE]
        [--against FILE]

Quantizes the model (project's own calibration text), then answers every problem greedily with three MTP drafts as FP8,
as NVFP4 with BF16 activations, with FP4 and, on a CPU, with 8-bit ones. Accuracy by family; paired differences against
FP8 with a 95 % interval (normal, over problems); mean emitted tokens a step. Then strict against relaxed acceptance,
which --strict leaves out.

--against compares with another run's --json, another device's say: each precision's accuracy must be within 0.5 points
and 98 % of its answers the same, else the exit status is 1.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin import LLM, SamplingParams
from deepseek_fp4_plugin.assets.held_out import END_THINK, HeldOutProblem, boxed, grade, load_held_out, normalized
from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint

DRAFTS = 3
RELAXED = ((10, 0.6), (10, 0.5), (5, 0.3))
POINTS, SAME = 0.5, 98.0  # what two devices may differ in


def answer(llm: LLM, problems: list[HeldOutProblem], **params: Any) -> dict[str, Any]:
    """Right or wrong for each problem, and mean emitted tokens a step over all of them."""
    prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": p.prompt}]) for p in problems]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1024, **params))
    tokens = sum(o.outputs[0].length for o in outputs)
    steps = sum(o.metrics.steps for o in outputs)
    drafted, accepted = (sum(getattr(o.metrics, name) for o in outputs) for name in ("drafted", "accepted"))
    return {
        "answers": [normalized(boxed(o.outputs[0].text.rpartition(END_THINK)[2]) or "") for o in outputs],
        "right": [grade(p.answer, o.outputs[0].text) for p, o in zip(problems, outputs, strict=True)],
        "finished": sum(o.outputs[0].finish_reason == "stop" for o in outputs),
        "tokens": tokens,
        "tokens_per_step": tokens / steps,
        "acceptance": accepted / drafted if drafted else 0.0,
    }


def by_family(problems: list[HeldOutProblem], right: list[bool]) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for problem, value in zip(problems, right, strict=True):
        groups[problem.family].append(value)
    return {family: 100 * statistics.mean(values) for family, values in sorted(groups.items())}


def paired(right: list[bool], base: list[bool]) -> tuple[float, float]:
    """Mean difference in points, and half the width of its 95 % interval."""
    differences = [100.0 * (a - b) for a, b in zip(right, base, strict=True)]
    return statistics.mean(differences), 1.96 * statistics.stdev(differences) / len(differences) ** 0.5


def compare(results: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> bool:
    """Prints and tells whether every precision of both runs answers alike."""
    alike = True
    for name in results.keys() & others.keys():
        own, other = results[name], others[name]
        points = own["accuracy"] - other["accuracy"]
        same = 100 * statistics.mean(a == b for a, b in zip(own["answers"], other["answers"], strict=True))
        fine = abs(points) <= POINTS and same >= SAME
        alike &= fine
        print(
            f"{name:<42}{points:+5.1f} points, {same:.1f} % of the answers the same{'' if fine else ': too far apart'}"
        )
    return alike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--model", default="r1_nano", help="the FP8 checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--strict", action="store_true", help="no relaxed acceptance")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--against", metavar="FILE", help="another run's --json")
    options = parser.parse_args()
    problems = load_held_out()[: options.problems]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        quantized = Path(scratch) / "nvfp4"
        quantize_checkpoint(options.model, quantized, calibration="builtin", device=options.device)
        sides = {
            "FP8": (options.model, "bf16"),
            "NVFP4, bf16 activations": (quantized, "bf16"),
            "NVFP4, fp4 activations": (quantized, "fp4"),
        }
        if options.device == "cpu":
            sides["NVFP4, int8 activations"] = (quantized, "int8")
        for name, (model, activations) in sides.items():
            speculative = {"decoding_type": "MTP", "num_nextn_predict_layers": DRAFTS}
            with LLM(
                model,
                device=options.device,
                speculative_config=speculative,
                nvfp4_activations=activations,
                max_batch_size=64,
            ) as llm:
                results[name] = answer(llm, problems)
                if name == "NVFP4, bf16 activations" and not options.strict:
                    for topk, delta in RELAXED:
                        results[f"{name}, relaxed ({topk}, {delta})"] = answer(
                            llm,
                            problems,
                            use_relaxed_acceptance_for_thinking=True,
                            relaxed_topk=topk,
                            relaxed_delta=delta,
                        )
    base = results["FP8"]["right"]
    families = sorted({problem.family for problem in problems})
    print(f"{len(problems)} held-out problems, greedy, {DRAFTS} MTP drafts")
    for name, result in results.items():
        result["by_family"] = by_family(problems, result["right"])
        result["accuracy"] = 100 * statistics.mean(result["right"])
        line = f"{name:<42}{result['accuracy']:6.1f} %"
        if name != "FP8":
            difference, half = result["difference"] = paired(result["right"], base)
            line += f"  {difference:+5.1f} ± {half:.1f} against FP8"
        print(f"{line}  {result['tokens_per_step']:.2f} tokens/step, {100 * result['acceptance']:.0f} % accepted")
        print("    " + ", ".join(f"{family} {result['by_family'][family]:.0f}" for family in families))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    if options.against and not compare(results, json.loads(Path(options.against).read_text())):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
