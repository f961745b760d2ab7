"""Stream a checkpoint into a model's parts, reading only this rank's slices. Which model is the caller's affair."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.hub import resolve
from deepseek_fp4_plugin.checkpoint.quant_config import QuantConfig, WeightFormat
from deepseek_fp4_plugin.checkpoint.reader import read_json
from deepseek_fp4_plugin.kernels import select
from deepseek_fp4_plugin.kernels.weights import Activations, Case
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.examination import examine
from deepseek_fp4_plugin.models.inventory import Weight
from deepseek_fp4_plugin.models.random_weights import LoadFormat, RandomWeights
from deepseek_fp4_plugin.parallel.mesh import Mesh

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # parts done, parts in all
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "auto": torch.bfloat16}


class Loadable(Protocol):
    """A part of a model that reads its own weights."""

    def load(self, source: WeightSource) -> None: ...


@dataclass
class OpenCheckpoint:
    """A checkpoint about to be loaded; a context manager that closes its files."""

    folder: Path
    config: DeepseekV3Config
    quantization: QuantConfig
    source: WeightSource

    def __enter__(self) -> "OpenCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()


def open_checkpoint(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    nvfp4_activations: str = "auto",
    mesh: Mesh | None = None,
    backend: str | None = None,
    load_format: LoadFormat = "auto",
) -> OpenCheckpoint:
    """Resolve a caller's choices. Raises CheckpointError or ValueError; see DeepseekV3ForCausalLM.from_pretrained."""
    folder = resolve(path)
    device = checked_device(device)
    reader = None
    if load_format == "dummy":
        config, quantization = read_shapes(folder)
    else:
        examination = examine(folder)
        config, reader = examination.usable()
        quantization = examination.quantization
    activations = resolve_activations(nvfp4_activations, device)
    choices = device, resolve_dtype(dtype), mesh, activations, backend
    if reader is not None:
        return OpenCheckpoint(folder, config, quantization, WeightSource(reader, *choices))

    def is_nvfp4(weight: Weight) -> bool:
        return quantization.quant_algo == "NVFP4" and weight.linear and not quantization.excludes(weight.module)

    return OpenCheckpoint(folder, config, quantization, RandomWeights(config, is_nvfp4, *choices))


def read_shapes(folder: Path) -> tuple[DeepseekV3Config, QuantConfig]:
    """What a folder without weights says of a model. Raises CheckpointError."""
    config = DeepseekV3Config.from_folder(folder)
    quantization = QuantConfig.from_folder(folder, read_json(folder / "config.json"))
    if quantization.quant_algo not in (None, "NVFP4"):
        raise CheckpointError(
            f"{folder} says quant_algo {quantization.quant_algo}; load_format=dummy makes weights in NVFP4 or "
            "unquantized, so take a config of such a checkpoint"
        )
    return config, quantization


def load_parts(parts: Sequence[Loadable], source: WeightSource, progress: Progress | None = None) -> None:
    """Load every part of a model, and say which scales are not numbers."""
    with torch.inference_mode():
        for done, part in enumerate(parts):
            if progress:
                progress(done, len(parts))
            part.load(source)
    if progress:
        progress(len(parts), len(parts))
    if source.not_finite:
        count = f" ({len(source.not_finite)} such scales)" if len(source.not_finite) > 1 else ""
        first = source.not_finite[0]
        logger.warning(
            "%s in %s holds NaN or infinity%s: requests that meet it will fail; download %s again",
            first,
            source.reader.folder,
            count,
            source.reader.info(first).shard,
        )


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def checked_device(device: str | torch.device) -> torch.device:
    """The device, or ValueError when this machine does not have it."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is not a device name; use cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device {device} was asked for, but the last one here is cuda:{count - 1}")
    return device


def resolve_activations(choice: str, device: torch.device) -> Activations:
    """`auto` is fp4 where FP4 tensor cores exist and bf16 elsewhere. Raises ValueError for what is none of the choices,
    or not one on this device."""
    if choice == "auto":
        return "fp4" if select.has_fp4_tensor_cores(device) else "bf16"
    if choice == "bf16":
        return "bf16"
    if choice == "fp4":
        return "fp4"
    if choice == "int8":
        if device.type != "cpu":
            raise ValueError(f"nvfp4_activations=int8 is for CPUs; on {device} use bf16, fp4 or fp8")
        return "int8"
    if choice == "fp8":
        refused = select.refusal("cuda", Case(device, torch.bfloat16, WeightFormat.NVFP4, "fp8"))
        if refused:
            raise ValueError(f"nvfp4_activations=fp8 is for Hopper GPUs, use bf16 or fp4 ({device}: {refused})")
        return "fp8"
    raise ValueError(f"nvfp4_activations={choice!r} is not one of auto, bf16, fp4, fp8, int8")
