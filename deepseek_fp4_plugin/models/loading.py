"""Stream a checkpoint into a model, or into one decoder layer, reading only this rank's slices."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from deepseek_fp4_plugin.checkpoint.hub import resolve
from deepseek_fp4_plugin.kernels import select
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM, resolve_activations
from deepseek_fp4_plugin.models.examination import examine
from deepseek_fp4_plugin.parallel.mesh import Mesh

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # parts done, parts in all
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "auto": torch.bfloat16}


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    nvfp4_activations: str = "auto",
    mesh: Mesh | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> DeepseekV3ForCausalLM:
    """A model with its weights, in evaluation mode.

    dtype: of activations and decoded weights; "auto" is BF16.  nvfp4_activations: auto, bf16 or fp4.
    Raises CheckpointError for a checkpoint that cannot be used, ValueError for a wrong choice.
    """
    folder = resolve(path)
    device = checked_device(device)
    examination = examine(folder)
    config, reader = examination.usable()
    source = WeightSource(
        reader,
        device,
        resolve_dtype(dtype),
        mesh,
        resolve_activations(nvfp4_activations, select.has_fp4_tensor_cores(device)),
        backend,
    )
    model = DeepseekV3ForCausalLM(config, mesh)
    load_weights(model, source, progress)
    if source.not_finite:
        count = f" ({len(source.not_finite)} such scales)" if len(source.not_finite) > 1 else ""
        first = source.not_finite[0]
        logger.warning(
            "%s in %s holds NaN or infinity%s: requests that meet it will fail; download %s again",
            first,
            folder,
            count,
            reader.info(first).shard,
        )
    model.path = folder
    model.quantization = examination.quantization
    reader.close()
    return model.eval()


def load_weights(model: DeepseekV3ForCausalLM, source: WeightSource, progress: Progress | None = None) -> None:
    """Load every part of `model`."""
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    if model.mtp is not None:
        parts.append(model.mtp)
    with torch.inference_mode():
        for done, part in enumerate(parts):
            if progress:
                progress(done, len(parts))
            part.load(source)
    if progress:
        progress(len(parts), len(parts))


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
    return device
