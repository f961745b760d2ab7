"""Calibration, one decoder layer at a time: load it, observe its inputs, advance every sample's hidden states, free it.

The source's own weights are used, in the reference backend, so that the result does not depend on which fast kernels a
machine has. Hidden states of all samples lie in two files (input and output of the layer at hand, in turns); they and
each finished layer's maxima are all that a resumed run needs. A layer's result carries the checksum of its output, so
that hidden states are continued from only where they are the right ones. How much of a layer and how many tokens are
in memory at once is memory.py's to say.
"""

import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.durable import forget, not_written, read_sealed, seal, write_file
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.job_lock import claim
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.decoder import RotaryAngles
from deepseek_fp4_plugin.numerics import nvfp4
from deepseek_fp4_plugin.quantization.calibration_data import CalibrationData, grouped, token_batches
from deepseek_fp4_plugin.quantization.convert import decoded
from deepseek_fp4_plugin.quantization.memory import BATCH_TOKENS, Portions
from deepseek_fp4_plugin.quantization.mtp_input import MtpInput
from deepseek_fp4_plugin.quantization.observer import LayerAmax
from deepseek_fp4_plugin.quantization.plan import Plan
from deepseek_fp4_plugin.quantization.recipe import Recipe
from deepseek_fp4_plugin.quantization.streaming import Batch, StreamedLayer

SAFE_INPUT_SCALE = 1.0  # where nothing is known of inputs, or zeros alone: holds block maxima of 0.1 to 2688 in full
Solve = Callable[[int, StreamedLayer, Callable[[], Iterator[Batch]]], Iterator[Tensor]]
_DTYPE = torch.bfloat16  # of hidden states
_EXPERT = re.compile(r"\.experts\.\d+\.")


def calibrate(
    reader: CheckpointReader,
    config: DeepseekV3Config,
    plan: Plan,
    data: CalibrationData,
    work: Path,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> LayerAmax:
    """The largest input magnitudes of every linear of the main model over all samples.

    work: an existing folder for the hidden states and the finished layers; an interrupted run continues from it.
    Raises CheckpointError naming a weight that holds NaN, or ValueError naming a projection whose input became NaN.
    """
    calibration = Calibration(reader, config, plan, data, work, device, progress)
    merged = LayerAmax()
    for index in range(calibration.layers):
        merged = merged.merge(calibration.seen(index))
    calibration.end()
    return merged


def input_scales(found: LayerAmax, modules: Iterable[str], recipe: Recipe | None = None) -> dict[str, Tensor]:
    """Module -> `input_scale`, FP32 []: the recipe's, or amax / 2688, over all experts of a layer the same.

    So an expert that saw no token has the scale of its peers, and every run-time kernel finds one value whichever
    expert it asks. Where nothing but zeros was seen (behind weights that are all zero, mostly) any scale decodes them
    exactly, and SAFE_INPUT_SCALE is written. Raises ValueError naming a module of which nothing at all was seen.
    """
    amax = _shared_amax(found)
    scales = {}
    for module in modules:
        if _shared(module) not in amax:
            raise ValueError(f"calibration saw no input of {module}; calibrate on more text")
        largest = torch.tensor(amax[_shared(module)], dtype=torch.float32)
        scale = recipe.input_scale(largest) if recipe else nvfp4.tensor_scale(largest)
        scales[module] = scale if scale > 0 else torch.full_like(scale, SAFE_INPUT_SCALE)
    return scales


def safe_input_scales(modules: Iterable[str]) -> dict[str, Tensor]:
    """Module -> `input_scale` of a run without calibration."""
    return {module: torch.tensor(SAFE_INPUT_SCALE) for module in modules}


def zero_inputs(found: LayerAmax, modules: Iterable[str]) -> list[str]:
    """Modules whose scale is SAFE_INPUT_SCALE because their inputs, and their peers', were all zero."""
    amax = _shared_amax(found)
    return [module for module in modules if not nvfp4.tensor_scale(torch.tensor(amax[_shared(module)])) > 0]


def _shared_amax(found: LayerAmax) -> dict[str, float]:
    """The largest magnitude by projection, over all experts of a layer together."""
    amax: dict[str, float] = {}
    for name, value in found.amax.items():
        amax[_shared(name)] = max(amax.get(_shared(name), 0.0), value)
    return amax


def _shared(module: str) -> str:
    """The name under which all experts of a layer share a projection's scale."""
    return _EXPERT.sub(".experts.*.", module)


def cold_experts(found: LayerAmax, modules: Iterable[str]) -> list[str]:
    """Modules of experts that saw no token."""
    return [module for module in modules if _EXPERT.search(module) and not found.rows.get(module)]


def observed_layers(config: DeepseekV3Config, plan: Plan) -> int:
    """How many layers are calibrated: the main model's, and the MTP layer where it is to be quantized."""
    mtp = any(c.nvfp4 and c.weight.layer == config.num_hidden_layers for unit in plan.units for c in unit.conversions)
    return config.num_hidden_layers + mtp


def hidden_bytes(config: DeepseekV3Config, data: CalibrationData) -> int:
    """Disk that the two files of hidden states take."""
    return 2 * data.num_tokens * config.hidden_size * torch.bfloat16.itemsize


class _LayerResult(NamedTuple):
    """What a finished layer leaves.  seen: LayerAmax as JSON.  output: CRC-32 of its output hidden states."""

    seen: dict[str, Any]
    output: int


class Calibration:
    """What each layer's projections see, layer after layer, when it is asked for.

    Arguments as of `calibrate`.  memory: how much is computed at once.  shared: other processes may ask for the layers
    of the same folder; whichever asks first for one that nobody has computed does so, and the others wait.
    solve: gives a layer's outputs, from the number of tokens and all batches, as often as it begins them, for a recipe
        that quantizes on the way.
    smooth: find the exponents of smoothing.py too.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: DeepseekV3Config,
        plan: Plan,
        data: CalibrationData,
        work: Path,
        device: torch.device,
        progress: Callable[[int, int], None],
        memory: Portions | None = None,
        shared: bool = False,
        solve: Solve | None = None,
        smooth: bool = False,
    ):
        self.reader, self.config, self.plan, self.samples = reader, config, plan, data.samples
        self.work, self.device, self.progress, self.shared = work, device, progress, shared
        self.memory = memory or Portions(BATCH_TOKENS, BATCH_TOKENS, config.n_routed_experts or 1, keep=True)
        self.batches = token_batches(data.samples, self.memory.batch_tokens)
        self.source = WeightSource(reader, device, torch.bfloat16, backend="reference")
        self.rotary = RotaryAngles(config)
        self.hidden = (work / "hidden-0.bin", work / "hidden-1.bin")
        self.starts = [0]
        for sample in data.samples:
            self.starts.append(self.starts[-1] + len(sample))
        self.layers = observed_layers(config, plan)
        self._solve, self._smooth = solve, smooth
        self._ready: int | None = None  # the layer whose input is known to be in its file
        self._results = _finished(work, range(self.layers))

    def seen(self, index: int) -> LayerAmax:
        """Of layer `index`, computed now, with the layers before it that are missing, unless an earlier run did."""
        if index not in self._results:
            with claim(self.work / "calibration", wait=True) if self.shared else nullcontext():
                if self.shared and (others := _finished(self.work, self._missing())):
                    self._results |= others
                    self._ready = None
                if index not in self._results:
                    with torch.inference_mode():
                        self._compute(index)
        return LayerAmax.from_json(self._results[index].seen)

    def again(self, index: int) -> None:
        """Layer `index` must pass once more: something that comes of it is missing."""
        self._results.pop(index, None)
        self._ready = None

    def end(self) -> None:
        """Every layer was asked for: nobody needs the hidden states any more."""
        for path in self.hidden:
            path.unlink(missing_ok=True)
        total = self.layers * len(self.batches)
        self.progress(total, total)

    def _missing(self) -> list[int]:
        return [index for index in range(self.layers) if index not in self._results]

    def _compute(self, index: int) -> None:
        """Up to and with layer `index`, from the last one whose input is still there, or from the embedding."""
        total = self.layers * len(self.batches)
        start = self._ready if self._ready is not None and self._ready <= index else self._latest_input(index)
        for layer in range(start, index + 1):
            done = layer * len(self.batches)
            try:
                result = self._layer(layer, lambda batch, done=done: self.progress(done + batch, total))  # type: ignore[misc]
            except CheckpointError:
                raise
            except ValueError:
                _blame_weights(self.reader, self.plan, layer, self.device)
                raise
            write_file(_result_file(self.work, layer), seal(result._asdict()))
            self._results[layer] = result
            self._ready = layer + 1

    def _latest_input(self, index: int) -> int:
        """The last layer up to `index` whose input is there; that of layer 0 is made if there is none."""
        for start in range(index, 0, -1):
            before = self._results.get(start - 1)
            if before is not None and _checksum(self.hidden[start % 2]) == before.output:
                return start
        self._embed()
        return 0

    def _embedding(self) -> Callable[[Tensor], Tensor]:
        """Token ids to embeddings. Only the rows of tokens that occur are in memory."""
        name, c = "model.embed_tokens.weight", self.config
        used = sorted({token for sample in self.samples for token in sample})
        if self.reader.info(name).dtype == torch.float8_e4m3fn:
            rows = self.source.tensor(name, (c.vocab_size, c.hidden_size))[used]
        else:
            rows = torch.cat([self.reader.get_slice(name, 0, token, token + 1) for token in used])
        rows = rows.to(self.device, torch.bfloat16)
        place = torch.zeros(c.vocab_size, dtype=torch.int64, device=self.device)
        place[used] = torch.arange(len(used), device=self.device)

        return lambda ids: rows[place[ids]]

    def _embed(self) -> None:
        """Write the input of layer 0."""
        embed = self._embedding()
        _write(self.hidden[0], (embed(torch.tensor(sample, device=self.device)) for sample in self.samples))

    def _layer(self, index: int, progress: Callable[[int], None]) -> _LayerResult:
        """Read the input of layer `index`, write its output, return what its projections saw."""
        experts, keep = self.memory.experts, self.memory.keep
        layer = StreamedLayer(index, self.config, self.source, self.rotary, experts, keep, self._smooth)
        source, target = self.hidden[index % 2], self.hidden[(index + 1) % 2]
        tokens, inputs = self.starts[-1], partial(self._inputs, source, progress)
        if index == self.config.num_hidden_layers:
            enter = MtpInput(self.config, self.source, self._embedding())
            tokens, inputs = tokens - len(self.samples), partial(_entered, enter, inputs)
        outputs = self._solve(tokens, layer, inputs) if self._solve else self._through(layer, inputs())
        output = _write(target, outputs)
        self.reader.close()
        return _LayerResult(layer.seen().to_json(), output)

    def _through(self, layer: StreamedLayer, inputs: Iterator[Batch]) -> Iterator[Tensor]:
        """The layer's outputs, batch by batch."""
        for span in self._spans(layer.moe is not None):
            yield from layer.forward([[next(inputs) for _ in range(count)] for count in span])

    def _inputs(self, source: Path, progress: Callable[[int], None]) -> Iterator[Batch]:
        """All batches with their hidden states, from the first one on."""
        with open(source, "rb") as file:
            for done, (start, stop) in enumerate(self.batches):
                progress(done)
                hidden = torch.empty(self.starts[stop] - self.starts[start], self.config.hidden_size, dtype=_DTYPE)
                if file.readinto(hidden.view(torch.uint8).numpy().data.cast("B")) != hidden.nbytes:
                    raise CheckpointError(
                        f"{source} is shorter than it was written; remove its folder and start afresh"
                    )
                yield ForwardBatch.from_sequences(self.samples[start:stop], self.device), hidden.to(self.device)

    def _spans(self, experts: bool) -> list[list[int]]:
        """What goes through a layer together: of each block the number of its batches."""
        if not experts:
            return [[1] for _ in self.batches]
        sizes = [self.starts[stop] - self.starts[start] for start, stop in self.batches]
        blocks = grouped(sizes, self.memory.block_tokens)
        spans = grouped([sum(sizes[start:stop]) for start, stop in blocks], self.memory.span_tokens)
        return [[stop - start for start, stop in blocks[first:last]] for first, last in spans]


def _entered(enter: MtpInput, inputs: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    return itertools.starmap(enter, inputs())


def _write(target: Path, outputs: Iterable[Tensor]) -> int:
    """Hidden states to a file; returns their CRC-32."""
    checksum = 0
    try:
        with open(target, "wb") as file:
            for result in outputs:
                data = result.to("cpu", _DTYPE).contiguous().view(torch.uint8).numpy().data
                checksum = zlib.crc32(data, checksum)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            forget(file.fileno())
    except OSError as error:
        raise not_written(target, error) from None
    return checksum


def _result_file(work: Path, layer: int) -> Path:
    return work / f"layer-{layer:03d}.json"


def _finished(work: Path, layers: Iterable[int]) -> dict[int, _LayerResult]:
    """Results of those of `layers` that are finished, as far as they are undamaged."""
    found = {layer: read_sealed(_result_file(work, layer)) for layer in layers}
    return {layer: _LayerResult(**content) for layer, content in found.items() if content is not None}


def _checksum(path: Path) -> int | None:
    """CRC-32 of a file, None when it is not there."""
    if not path.is_file():
        return None
    value = 0
    with open(path, "rb") as file:
        while data := file.read(2**22):
            value = zlib.crc32(data, value)
    return value


def _blame_weights(reader: CheckpointReader, plan: Plan, index: int, device: torch.device) -> None:
    """Raise CheckpointError naming the weight whose NaN reached layer `index`, if a weight is the cause."""
    near: Mapping[int | None, bool] = {index: True, index - 1: True, None: index == 0}
    for unit in plan.units:
        if near.get(unit.layer):
            for conversion in unit.conversions:
                decoded(reader, conversion, torch.bfloat16, device)
