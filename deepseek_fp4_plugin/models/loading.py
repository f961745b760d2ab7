"""Stream a checkpoint into a model, or into one decoder layer, reading only this rank's slices."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
from deepseek_fp4_plugin.checkpoint.hub import resolve
from deepseek_fp4_plugin.checkpoint.quant_config import QuantConfig
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader, read_json
from deepseek_fp4_plugin.kernels import select
from deepseek_fp4_plugin.layers.weight_source import WeightSource
from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.deepseek_v3 import DeepseekV3ForCausalLM, resolve_activations
from deepseek_fp4_plugin.parallel.mesh import Mesh

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
    config = DeepseekV3Config.from_folder(folder)
    reader = CheckpointReader(folder)
    config = without_absent_mtp(config, reader)
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
    model.path = folder
    model.quantization = QuantConfig.from_folder(folder, read_json(folder / "config.json"))
    reader.close()
    return model.eval()


def load_weights(model: DeepseekV3ForCausalLM, source: WeightSource, progress: Progress | None = None) -> None:
    """Load every part of `model`, then refuse a checkpoint with tensors that nothing read."""
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
    check_all_read(source, model.config)


def check_all_read(source: WeightSource, config: DeepseekV3Config) -> None:
    """Raises CheckpointError naming a tensor that the model has no place for."""
    if source.mesh.world_size > 1:
        return  # a rank reads its own experts only
    unread = unplaced((name for name in source.reader if name not in source.used), config)
    if unread:
        raise CheckpointError(
            f"{source.reader.folder} has {len(unread)} tensors this model has no place for, first {unread[0]}; "
            "does config.json belong to these weights?"
        )


def unplaced(unread: Iterable[str], config: DeepseekV3Config) -> list[str]:
    """Those of the unread tensors that a checkpoint of this architecture does not have."""
    # Buffers some exporters add, the MTP layer's duplicates, and cache scales (always 1 for the latent cache).
    expected = (
        rf".*rotary_emb\.inv_freq|model\.layers\.{config.num_hidden_layers}\.(embed_tokens|shared_head\.head)\.weight"
        r"|.*\.[kv]_scale"
    )
    if not config.num_nextn_predict_layers:
        expected = rf"{expected}|model\.layers\.{config.num_hidden_layers}\..*"
    return [name for name in unread if not re.fullmatch(expected, name)]


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


def without_absent_mtp(config: DeepseekV3Config, reader: CheckpointReader) -> DeepseekV3Config:
    """Some exporters drop the MTP layer but keep its count in config.json; such a checkpoint has no MTP."""
    from dataclasses import replace

    if config.num_nextn_predict_layers and f"model.layers.{config.num_hidden_layers}.eh_proj.weight" not in reader:
        return replace(config, num_nextn_predict_layers=0)
    return config
