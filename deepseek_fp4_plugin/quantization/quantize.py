"""The whole way: check everything that can be checked, calibrate, convert, describe, give the folder its name."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from deepseek_fp4_plugin import __version__
from deepseek_fp4_plugin.checkpoint import compressed_tensors
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.hub import is_small_file, resolve
from deepseek_fp4_plugin.checkpoint.quant_config import HF_QUANT_CONFIG, nvfp4_config_section, nvfp4_quant_config
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader, read_json
from deepseek_fp4_plugin.checkpoint.shards import Shards
from deepseek_fp4_plugin.checkpoint.sizes import size_text
from deepseek_fp4_plugin.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    CheckpointWriter,
    incomplete_folder,
    real_destination,
    refuse_taken,
)
from deepseek_fp4_plugin.models.config import DeepseekV3Config, with_mtp_layers
from deepseek_fp4_plugin.models.declarations import absent_code
from deepseek_fp4_plugin.models.deepseek_r1 import DEEPSEEK_R1
from deepseek_fp4_plugin.models.examination import examine
from deepseek_fp4_plugin.models.loading import checked_device
from deepseek_fp4_plugin.quantization.cache_scales import cache_scale, cache_scale_names
from deepseek_fp4_plugin.quantization.calibrate import (
    SAFE_INPUT_SCALE,
    Calibration,
    cold_experts,
    hidden_bytes,
    input_scales,
    observed_layers,
    safe_input_scales,
    zero_inputs,
)
from deepseek_fp4_plugin.quantization.calibration_data import CNN_DAILYMAIL, CalibrationData, load_calibration
from deepseek_fp4_plugin.quantization.convert import DEFAULT_BUDGET, Converter
from deepseek_fp4_plugin.quantization.memory import (
    BATCH_TOKENS,
    Portions,
    Solving,
    capped,
    portions,
    portions_on_gpu,
    solving_bytes,
)
from deepseek_fp4_plugin.quantization.model_card import model_card, source_facts
from deepseek_fp4_plugin.quantization.observer import LayerAmax
from deepseek_fp4_plugin.quantization.plan import Plan, make_plan
from deepseek_fp4_plugin.quantization.recipe import Needs, Recipe, Rounding
from deepseek_fp4_plugin.quantization.recipes import find_recipe
from deepseek_fp4_plugin.quantization.report import (
    QuantizationReport,
    module_figures,
    planned_sizes,
    sizes,
    sqnr_by_class,
)
from deepseek_fp4_plugin.quantization.report_page import report_files
from deepseek_fp4_plugin.quantization.saved_calibration import (
    UNCALIBRATED,
    SavedCalibration,
    is_saved,
    load_saved,
)
from deepseek_fp4_plugin.quantization.smoothing import MANIFEST, Smoothing
from deepseek_fp4_plugin.quantization.solve import LayerSolver
from deepseek_fp4_plugin.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # stage, parts done, parts in all
CALIBRATE, CONVERT = "calibrate", "convert"
_KV_CACHES = {"fp8": "FP8", "bf16": None}
FORMATS = ("modelopt", "compressed-tensors")
_WRITTEN = ("config.json", HF_QUANT_CONFIG)  # not copied, and no indexes either
_log = logging.getLogger(__name__)


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    recipe: str = "max",
    arithmetic: str | None = None,
    layout: str = "v1",
    format: str = "modelopt",
    calibration: str | Path = CNN_DAILYMAIL,
    samples: int = 512,
    tokens: int = 512,
    kv_cache: str = "fp8",
    kv_scales: bool = False,
    mtp: str = "bf16",
    smooth: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    device: str = "cpu",
    seed: int = 0,
    max_memory: int | None = None,
    share: bool = False,
    save_calibration: str | Path | None = None,
    progress: Progress | None = None,
    moved: Callable[[int, int], None] | None = None,
) -> QuantizationReport:
    """Write the FP8 or BF16 checkpoint `source` as a calibrated NVFP4 checkpoint to `destination`.

    source: a folder, a Hugging Face id, or `r1_nano`.  destination: a folder that is absent or empty; `~` and links
    are followed.
    recipe: a name in recipes.RECIPES.  arithmetic: of max, a release in recipes.ARITHMETICS.
    layout: a key of plan.LAYOUTS.  kv_cache: what the config files ask for.
    format: one of FORMATS, under whose names the same bits are stored.
    kv_scales: calibrate a scale of each layer's FP8 cache too.
    mtp: "bf16" keeps the MTP layer, as published checkpoints do; "nvfp4" quantizes it as the other layers.
    smooth: move what calibration finds loud before an MLP from its inputs to its weights (smoothing.py).
    calibration, samples, tokens, seed: see calibration_data.load_calibration; or what save_calibration wrote; or
        "none" for recipes that look at no data: every input_scale is then calibrate.SAFE_INPUT_SCALE.
    device: where layers and weights are computed.
    max_memory: bytes of this process's resident memory that it stays below; None takes whole layers.
    share: with other runs of the same call, in other processes or on other machines that see the same folders.
    save_calibration: a file for what the projections saw.
    progress: called with ("calibrate" or "convert", done, total).
    moved: called with bytes that converting has read and written, done and in all.
    An interrupted run leaves `<destination>.incomplete`; the same call goes on from there and writes the same bytes.
    Raises ValueError for a wrong choice or unusable calibration text, CheckpointError (a ValueError) for a checkpoint
    that cannot be used or written; before calibration starts wherever headers can tell.
    """
    chosen = find_recipe(recipe, arithmetic)
    if kv_cache not in _KV_CACHES:
        raise ValueError(f"kv_cache {kv_cache!r} is unknown; choose from {', '.join(_KV_CACHES)}")
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; choose from {', '.join(FORMATS)}")
    if mtp not in ("bf16", "nvfp4"):
        raise ValueError(f"mtp {mtp!r} is unknown; choose from bf16, nvfp4")
    if kv_scales and kv_cache != "fp8":
        raise ValueError(f"a cache in {kv_cache} has no scales; leave kv_scales out, or take kv_cache fp8")
    target = checked_device(device)
    refuse_taken(destination)
    folder = resolve(source)
    _refuse_in_the_way(folder, real_destination(destination))
    config, reader = examine(folder).usable(result="the result")
    _note_absent_code(folder)
    names = compressed_tensors.NAMES if format == "compressed-tensors" else None
    scaled = cache_scale_names(format) if kv_scales else lambda layer: []
    plan = make_plan(reader, config, layout, names, mtp == "nvfp4", scaled)
    data = _calibration(calibration, folder, samples, tokens, config, seed)
    if chosen.needs is not Needs.NOTHING:
        _refuse_without_forward(chosen, data, share)
    if smooth:
        _refuse_smoothing(data, save_calibration is not None)
    if isinstance(data, SavedCalibration):
        _refuse_unseen(data, plan, save_calibration is not None)
    solving = solving_bytes(config, chosen.needs, layout == "v2")
    if mtp == "nvfp4":  # eh_proj in BF16, which joins its two inputs, is there while the layer passes
        solving = solving._replace(attention=solving.attention + 4 * config.hidden_size**2)
    memory = _portions(reader, plan, config, data, solving, max_memory, target)
    job: dict[str, Any] = {
        "version": __version__,
        "source": _fingerprint(reader),
        "recipe": recipe,
        "layout": layout,
        "kv_cache": kv_cache,
        "calibration": data.digest,
        "device": target.type,
    }
    if memory is not None and memory.batch_tokens != BATCH_TOKENS:
        job["batch_tokens"] = memory.batch_tokens  # sums over more rows may round otherwise
    if memory is not None and memory.block_tokens not in (memory.batch_tokens, BATCH_TOKENS):
        job["block_tokens"] = memory.block_tokens
    if arithmetic is not None:
        job["arithmetic"] = arithmetic
    if format != "modelopt":
        job["format"] = format
    if kv_scales:
        job["kv_scales"] = True
    if mtp != "bf16":
        job["mtp"] = mtp
    if smooth:
        job["smooth"] = True
    where = str(Path(destination).expanduser())
    tell = progress or (lambda stage, done, total: None)
    work_bytes = 0
    if isinstance(data, CalibrationData):
        work_bytes = hidden_bytes(config, data)
        if memory is not None and memory.spill:
            work_bytes += int(solving.token * data.num_tokens)
    writer = CheckpointWriter(destination, plan.tensors, job, max_shard_bytes, work_bytes, share)
    try:
        if writer.finished is not None:  # an earlier run got as far as tidying up
            writer.finish({})
            return replace(QuantizationReport.from_state(writer.finished), destination=where)
        with capped(max_memory if target.type == "cpu" else None):  # a GPU's driver maps what it never uses
            found, roundings = _layers(reader, writer, plan, config, chosen, data, target, tell, memory, moved, smooth)
        modules = [c.weight.module for unit in plan.units for c in unit.conversions if c.nvfp4]
        sqnr, worst = sqnr_by_class(plan, config, roundings)
        report = QuantizationReport(
            source=str(source),
            destination=where,
            recipe=recipe if arithmetic is None else f"{recipe} ({arithmetic})",
            layout=layout,
            kv_cache=kv_cache,
            calibration=data.description,
            samples=data.samples if isinstance(data, SavedCalibration) else len(data.samples),
            tokens=data.tokens if isinstance(data, SavedCalibration) else data.num_tokens,
            size=sizes(reader, config, plan),
            sqnr_db=sqnr,
            worst=worst,
            modules=module_figures(plan, config, roundings, found.rows),
            quantized_modules=len(modules),
            cold_experts=0 if data is UNCALIBRATED else len(cold_experts(found, modules)),
            zero_inputs=() if data is UNCALIBRATED else tuple(zero_inputs(found, modules)),
            r1=planned_sizes(DEEPSEEK_R1, layout, mtp == "nvfp4"),
            format=format,
            kv_scales=kv_scales,
            mtp=mtp,
            smooth=smooth,
        )
        if save_calibration is not None:
            saved = SavedCalibration(found, report.calibration, report.samples, report.tokens)
            saved.write(save_calibration, config)
        files = _files(folder, plan, report, config)
        if smooth:
            every = (c.weight.module for unit in plan.units for c in unit.conversions)
            files[MANIFEST] = Smoothing(found.exponents).manifest(every)
        _refuse_changed(reader, job["source"], writer.folder)
        writer.finish(files, report.to_state())
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror or error}"
        raise CheckpointError(f"{what}; run again to continue from {writer.folder}") from None
    except (MemoryError, RuntimeError) as error:
        if max_memory is None or not (isinstance(error, MemoryError) or "allocate memory" in str(error)):
            raise
        raise CheckpointError(
            f"--max-memory {size_text(max_memory)} was reached; give it more and run again to continue from "
            f"{writer.folder}"
        ) from None
    finally:
        writer.close()
        reader.close()
    return report


def _layers(
    reader: CheckpointReader,
    writer: CheckpointWriter,
    plan: Plan,
    config: DeepseekV3Config,
    recipe: Recipe,
    data: CalibrationData | SavedCalibration,
    device: torch.device,
    tell: Progress,
    memory: Portions | None,
    moved: Callable[[int, int], None] | None,
    smooth: bool,
) -> tuple[LayerAmax, dict[str, Rounding]]:
    """The loop: observe a layer, solve and write its weights, free it, advance. What was seen, and what was lost."""
    own = CheckpointReader(reader.folder, Shards(reader.shards, reader.tensors, []))  # read by a thread of its own
    budget = memory.convert if memory else DEFAULT_BUDGET
    converted, quiet = partial(tell, CONVERT), lambda done, total: None
    converter = Converter(own, writer, plan, recipe, device, converted, budget, moved or quiet)
    spill = memory is not None and memory.spill
    solver = None
    if recipe.needs is not Needs.NOTHING:
        solver = LayerSolver(reader, writer, plan, recipe, converter, device, spill)
    layers = observed_layers(config, plan)
    inputs: Calibration | SavedCalibration
    if isinstance(data, SavedCalibration):
        inputs = data
    else:
        solve, observed = solver.forward if solver else None, partial(tell, CALIBRATE)
        inputs = Calibration(
            reader, config, plan, data, writer.work, device, observed, memory, writer.shared, solve, smooth
        )
    try:
        for _ in writer.parts():
            for layer, members in groupby(plan.units, key=lambda unit: unit.layer):
                units = list(members)
                needed = [unit for unit in units if converter.needs(unit)]
                modules = [c.weight.module for unit in needed for c in unit.conversions if c.nvfp4]
                edited = smooth and needed and layer in range(layers)  # the norm and the router are
                seen = inputs.seen(layer) if (modules or edited) and layer is not None else LayerAmax()
                converter.smooth(seen.exponents)
                unknown = data is UNCALIBRATED
                scales = safe_input_scales(modules) if unknown else input_scales(seen, modules, recipe)
                if solver and modules:
                    solver.write_input_scales(scales)
                    lost = any(converter.needs(unit) for unit in needed if unit.conversions[0].nvfp4)
                    if lost and layer is not None and isinstance(inputs, Calibration):
                        inputs.again(layer)  # an earlier run wrote them, and they are damaged
                        inputs.seen(layer)
                converter.convert(units, scales)
            for layer, name in plan.cache_scales:
                if writer.needs(name):
                    writer.write(name, cache_scale(inputs.seen(layer), layer))
        found = LayerAmax()
        for index in range(layers):
            found = found.merge(inputs.seen(index))
        inputs.end()
        converter.smooth(found.exponents)
        return found, converter.end()
    finally:
        own.close()


def _refuse_without_forward(recipe: Recipe, data: CalibrationData | SavedCalibration, share: bool) -> None:
    """Refuse what a recipe cannot do that solves a layer while all samples pass through it."""
    if isinstance(data, SavedCalibration):
        raise ValueError(
            f"recipe {recipe.name} needs more of the inputs than a kept calibration holds; give --calibration a text"
        )
    if share:
        raise ValueError(f"recipe {recipe.name} solves layer after layer on its own results, which cannot be shared")


def _refuse_smoothing(data: CalibrationData | SavedCalibration, keep: bool) -> None:
    if isinstance(data, SavedCalibration):
        raise ValueError("--smooth looks at every channel of the inputs; give --calibration a text")
    if keep:
        raise ValueError(
            "what --smooth sees is of the smoothed model, and no calibration of another; leave --save-calibration out"
        )


def _refuse_unseen(data: SavedCalibration, plan: Plan, keep: bool) -> None:
    """Refuse what a kept calibration, or none, does not say; nothing is known before the weights are read then."""
    for layer, _ in plan.cache_scales:
        cache_scale(data.seen(layer), layer)
    if data is UNCALIBRATED:
        if keep:
            raise ValueError("there is nothing to save of a calibration that is none; leave --save-calibration out")
        _log.warning(
            "input scales are not calibrated: every one is %s, good for activations whose blocks' largest values lie "
            "between 0.1 and 2688; give --calibration a text to measure them",
            SAFE_INPUT_SCALE,
        )
        return
    modules = [c.weight.module for unit in plan.units for c in unit.conversions if c.nvfp4]
    input_scales(data.found, modules)


def _calibration(
    name: str | Path, folder: Path, samples: int, tokens: int, config: DeepseekV3Config, seed: int
) -> CalibrationData | SavedCalibration:
    if name == "none":
        return UNCALIBRATED
    kept = Path(name).expanduser()
    if is_saved(kept):
        return load_saved(kept, config)
    return load_calibration(name, Tokenizer.from_folder(folder), samples, tokens, config.vocab_size, seed)


def _portions(
    reader: CheckpointReader,
    plan: Plan,
    config: DeepseekV3Config,
    data: CalibrationData | SavedCalibration,
    solving: Solving,
    max_memory: int | None,
    device: torch.device,
) -> Portions | None:
    if max_memory is None and device.type == "cpu":
        return None
    widths = [reader.info(c.weight.name).dtype.itemsize for unit in plan.units for c in unit.conversions if c.nvfp4]
    longest, tokens = 0, 0
    if isinstance(data, CalibrationData):
        longest, tokens = max(map(len, data.samples)), data.num_tokens
    width = max(widths, default=1)
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
        return portions_on_gpu(config, max_memory, there, longest, width, solving, tokens)
    assert max_memory is not None
    return portions(config, max_memory, longest, width, solving, tokens)


def _refuse_in_the_way(source: Path, destination: Path) -> None:
    """Refuse a source that lies where the work on the destination will."""
    work, real = incomplete_folder(destination), source.resolve()
    if real == work or work in real.parents:
        raise CheckpointError(f"{source} lies in {work}, where the work would lie; choose another destination")


def _note_absent_code(folder: Path) -> None:
    """Say which files `auto_map` names and the source lacks: they decide whether others can open the result."""
    for file in absent_code(folder, read_json(folder / "config.json")):
        _log.warning(
            "auto_map in %s names %s, which is not there: trust_remote_code=True will fail on the result until that "
            "file of the original is copied into it",
            folder / "config.json",
            file,
        )


def _fingerprint(reader: CheckpointReader) -> str:
    """Changes with the source's config, tensors, or a shard's size or time; reading 700 GB to be surer is too much."""
    digest = hashlib.sha256((reader.folder / "config.json").read_bytes())
    for shard in reader.shards:
        status = os.stat(reader.folder / shard)
        digest.update(f"{shard} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _refuse_changed(reader: CheckpointReader, fingerprint: str, work: Path) -> None:
    """Refuse to finish when the source is not what it was at the start."""
    try:
        changed = _fingerprint(reader) != fingerprint
    except OSError:  # a shard is gone
        changed = True
    if changed:
        raise CheckpointError(
            f"{reader.folder} changed while it was being read, so that {work} may hold parts of both; "
            "remove that and run again"
        )


def _files(folder: Path, plan: Plan, report: QuantizationReport, config: DeepseekV3Config) -> dict[str, str | bytes]:
    """Everything but weights: the source's small files, the config files, the card, the report."""
    files: dict[str, str | bytes] = {}
    for path in sorted(folder.iterdir()):
        ours = path.name in _WRITTEN or path.name.endswith(".index.json") or path.name.startswith(".")
        if path.is_file() and is_small_file(path.name) and not ours:
            try:
                files[path.name] = path.read_bytes()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    excluded, cache = plan.exclude_modules, _KV_CACHES[report.kv_cache]
    if report.format == "modelopt":
        quant_config = nvfp4_quant_config(excluded, cache)
        files[HF_QUANT_CONFIG] = _json(quant_config)
        section = nvfp4_config_section(quant_config)
    else:
        section = compressed_tensors.config_section(excluded, cache)
    original = {k: v for k, v in read_json(folder / "config.json").items() if k != "quantization_config"}
    original = with_mtp_layers(original, config.num_nextn_predict_layers)
    files["config.json"] = _json({**original, "quantization_config": section})
    files["README.md"] = model_card(source_facts(report.source, folder), report, config, __version__)
    return files | report_files(report)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
