"""Calibration, one decoder layer at a time: load it, observe its inputs, advance every sample's hidden states, free it.

The source's own weights are used, in the reference backend, so that the result does not depend on which fast kernels a
machine has. Hidden states of all samples lie in two files (input and output of the layer at hand, in turns); they and
each finished layer's maxima are all that a resumed run needs. A layer's result carries the checksum of its output, so
that hidden states are continued from only where they are the right ones. Memory holds one layer, as stored, and one
batch.
"""

import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_fp4_plugin.checkpoint.durable import not_written, read_sealed, seal, write_file
from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.layers.batch import ForwardBatch
from deepseek_fp4_plugin.layers.embedding import VocabEmbedding
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.decoder import DeepseekV3DecoderLayer, RotaryAngles
from deepseek_fp4_plugin.numerics import nvfp4
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.quantization.calibration_data import CalibrationData, token_batches
from deepseek_fp4_plugin.quantization.convert import decoded
from deepseek_fp4_plugin.quantization.observer import LayerAmax, LayerObserver
from deepseek_fp4_plugin.quantization.plan import Plan

ZERO_INPUT_SCALE = 1.0  # of a projection whose every input was zero: holds block maxima of 0.1 to 2688 in full
BATCH_TOKENS = 8192  # a layer's weights are decoded once a batch; attention's queries of R1 take 0.4 GB for so many
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
    results = _finished(work, config.num_hidden_layers)
    batches = list(token_batches(data.samples, BATCH_TOKENS))
    total = config.num_hidden_layers * len(batches)
    run = _Run(reader, config, data, work, device)
    with torch.inference_mode():
        for index in run.remaining(results, batches):
            done = index * len(batches)
            try:
                result = run.layer(index, batches, lambda batch, done=done: progress(done + batch, total))  # type: ignore[misc]
            except CheckpointError:
                raise
            except ValueError:
                _blame_weights(reader, plan, index, device)
                raise
            write_file(_result_file(work, index), seal(result._asdict()))
            results[index] = result
    for path in run.hidden:
        path.unlink(missing_ok=True)
    progress(total, total)
    merged = LayerAmax()
    for index in sorted(results):
        merged = merged.merge(LayerAmax.from_json(results[index].seen))
    return merged


def input_scales(found: LayerAmax, modules: Iterable[str]) -> dict[str, Tensor]:
    """Module -> `input_scale`, FP32 []: amax / 2688, over all experts of a layer the same for each projection.

    So an expert that saw no token has the scale of its peers, and every run-time kernel finds one value whichever
    expert it asks. Where nothing but zeros was seen (behind weights that are all zero, mostly) any scale decodes them
    exactly, and ZERO_INPUT_SCALE is written. Raises ValueError naming a module of which nothing at all was seen.
    """
    amax = _shared_amax(found)
    scales = {}
    for module in modules:
        if _shared(module) not in amax:
            raise ValueError(f"calibration saw no input of {module}; calibrate on more text")
        scale = nvfp4.tensor_scale(torch.tensor(amax[_shared(module)], dtype=torch.float32))
        scales[module] = scale if scale > 0 else torch.full_like(scale, ZERO_INPUT_SCALE)
    return scales


def zero_inputs(found: LayerAmax, modules: Iterable[str]) -> list[str]:
    """Modules whose scale is ZERO_INPUT_SCALE because their inputs, and their peers', were all zero."""
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


def hidden_bytes(config: DeepseekV3Config, data: CalibrationData) -> int:
    """Disk that the two files of hidden states take."""
    return 2 * data.num_tokens * config.hidden_size * torch.bfloat16.itemsize


class _LayerResult(NamedTuple):
    """What a finished layer leaves.  seen: LayerAmax as JSON.  output: CRC-32 of its output hidden states."""

    seen: dict[str, Any]
    output: int


class _Run:
    """The state between layers: where the hidden states are, and which sample starts where in them."""

    def __init__(
        self,
        reader: CheckpointReader,
        config: DeepseekV3Config,
        data: CalibrationData,
        work: Path,
        device: torch.device,
    ):
        self.reader, self.config, self.samples, self.device = reader, config, data.samples, device
        self.source = WeightSource(reader, device, torch.bfloat16, backend="reference")
        self.rotary = RotaryAngles(config)
        self.hidden = (work / "hidden-0.bin", work / "hidden-1.bin")
        self.starts = [0]
        for sample in data.samples:
            self.starts.append(self.starts[-1] + len(sample))

    def remaining(self, results: Mapping[int, _LayerResult], batches: list[tuple[int, int]]) -> Iterator[int]:
        """The layers to compute, in order; before the first its input is made ready, from scratch if nothing is left.

        They begin at the last layer whose input is still there and end where nothing after them is missing.
        """
        layers = range(self.config.num_hidden_layers)
        missing = [index for index in layers if index not in results]
        if not missing:
            return
        start = missing[0]
        while start and _checksum(self.hidden[start % 2]) != results[start - 1].output:
            start -= 1
        if not start:
            self.embed(batches)
        yield from range(start, missing[-1] + 1)

    def embed(self, batches: list[tuple[int, int]]) -> None:
        """Write the input of layer 0."""
        c = self.config
        embedding = VocabEmbedding("model.embed_tokens", c.vocab_size, c.hidden_size, Mesh())
        embedding.load(self.source)
        self._advance(batches, None, self.hidden[0], lambda batch, _: embedding(batch.input_ids), lambda done: None)

    def layer(self, index: int, batches: list[tuple[int, int]], progress: Callable[[int], None]) -> _LayerResult:
        """Read the input of layer `index`, write its output, return what its projections saw."""
        layer = DeepseekV3DecoderLayer(index, self.config, Mesh())
        layer.load(self.source)
        observer = LayerObserver(layer)

        def forward(batch: ForwardBatch, hidden: Tensor) -> Tensor:
            cos, sin = self.rotary(batch.positions)
            return layer(hidden, cos, sin, batch, None)

        output = self._advance(batches, self.hidden[index % 2], self.hidden[(index + 1) % 2], forward, progress)
        self.reader.close()
        return _LayerResult(observer.result().to_json(), output)

    def _advance(
        self,
        batches: list[tuple[int, int]],
        source: Path | None,
        target: Path,
        forward: Callable[[ForwardBatch, Tensor], Tensor],
        progress: Callable[[int], None],
    ) -> int:
        """Apply `forward` batch after batch; returns the CRC-32 of what was written to `target`."""
        checksum = 0
        try:
            with open(source or os.devnull, "rb") as read, open(target, "wb") as write:
                for done, (start, stop) in enumerate(batches):
                    progress(done)
                    batch = ForwardBatch.from_sequences(self.samples[start:stop], self.device)
                    hidden = self._read(read, self.starts[stop] - self.starts[start]) if source else torch.empty(0)
                    result = forward(batch, hidden.to(self.device)).to("cpu", torch.bfloat16)
                    data = result.contiguous().view(torch.uint8).numpy().data
                    checksum = zlib.crc32(data, checksum)
                    write.write(data)
                write.flush()
                os.fsync(write.fileno())
        except OSError as error:
            raise not_written(target, error) from None
        return checksum

    def _read(self, file, tokens: int) -> Tensor:
        """The next `tokens` rows, BF16 [tokens, hidden]."""
        hidden = torch.empty(tokens, self.config.hidden_size, dtype=torch.bfloat16)
        if file.readinto(hidden.view(torch.uint8).numpy().data.cast("B")) != hidden.nbytes:
            raise CheckpointError(f"{file.name} is shorter than it was written; remove its folder and start afresh")
        return hidden


def _result_file(work: Path, layer: int) -> Path:
    return work / f"layer-{layer:03d}.json"


def _finished(work: Path, layers: int) -> dict[int, _LayerResult]:
    """Results of the layers that an earlier run finished, as far as they are undamaged."""
    found = {layer: read_sealed(_result_file(work, layer)) for layer in range(layers)}
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
