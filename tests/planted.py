"""Faults to plant in an NVFP4 checkpoint that `quantize` made, each as its users have met it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deepseek_fp4_plugin.checkpoint.findings import Fault
from deepseek_fp4_plugin.checkpoint.reader import INDEX_NAME
from deepseek_fp4_plugin.numerics import e2m1, nvfp4, scale_layout

Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.mlp.experts.3"
UP, DOWN = f"{EXPERT}.up_proj", f"{EXPERT}.down_proj"
E4M3 = torch.float8_e4m3fn
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@dataclass(frozen=True)
class Planted:
    """plant: changes a copy's files.  fault: what must be named.  source: is needed to see or mend it.

    exact: the mended tensors are those of the healthy checkpoint, bit for bit.  fp4: also with FP4 activations the
    text is the same; not where calibrated scales are lost.
    """

    plant: Callable[[Path], None]
    fault: Fault
    source: bool = False
    exact: bool = True
    fp4: bool = True


def tensors(edit: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        held = load(folder)
        edit(held)
        for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
            path.unlink(missing_ok=True)
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return plant


def load(folder: Path) -> Tensors:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def file(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))

    return plant


def both(*plants: Callable[[Path], None]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for one in plants:
            one(folder)

    return plant


def put(name: str, value: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], None]:
    """Change one tensor; None removes it."""

    def edit(held: Tensors) -> None:
        old = held.pop(name)
        if value is not None:
            held[name] = value(old)

    return tensors(edit)


def every(suffix: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(held: Tensors) -> None:
        for name in [name for name in held if name.endswith(f".{suffix}")]:
            if suffix != "weight" or held[name].dtype == torch.uint8:
                held[name] = value(held[name])

    return tensors(edit)


def tiled_in_place(scale: torch.Tensor) -> torch.Tensor:
    """In the tensor cores' order where that has the same size; tensors of other sizes stay."""
    tiled = scale_layout.to_tiled(scale)
    return tiled.reshape(scale.shape) if tiled.numel() == scale.numel() else scale


def towards_zero(held: Tensors) -> None:
    """Every code whose neighbour towards zero exists becomes that one, in a third of the places."""
    for name, packed in list(held.items()):
        if packed.dtype == torch.uint8:
            codes = e2m1.unpack(packed)
            lower = (codes & 7 > 0) & (torch.arange(codes.numel()).view(codes.shape) % 3 == 0)
            held[name] = e2m1.pack(torch.where(lower, codes - 1, codes))


def other_pair_scale(held: Tensors) -> None:
    held[f"{UP}.weight_scale_2"] = held[f"{UP}.weight_scale_2"] * 2
    held[f"{UP}.weight_scale"] = (held[f"{UP}.weight_scale"].float() / 2).to(E4M3)


def quantized_latent(held: Tensors) -> None:
    module = "model.layers.0.self_attn.kv_b_proj"
    packed, scale, scale_2 = nvfp4.quantize(held[f"{module}.weight"])
    held |= {f"{module}.weight": packed, f"{module}.weight_scale": scale, f"{module}.weight_scale_2": scale_2}
    held[f"{module}.input_scale"] = torch.tensor(0.01)


def another_expert(held: Tensors) -> None:
    for suffix in ("weight", "weight_scale"):
        held[f"{DOWN}.{suffix}"] = held[f"{DOWN.replace('experts.3', 'experts.5')}.{suffix}"].clone()


def mtp_layer(held: Tensors) -> str:
    return next(name for name in held if name.endswith(".eh_proj.weight")).removesuffix("eh_proj.weight")


def without_mtp(held: Tensors) -> None:
    prefix = mtp_layer(held)
    for name in [name for name in held if name.startswith(prefix)]:
        del held[name]


def other_copy(held: Tensors) -> None:
    name = f"{mtp_layer(held)}embed_tokens.weight"
    held[name] = held[name].flip(0).contiguous()


def in_two(folder: Path) -> tuple[Tensors, Tensors]:
    held = load(folder)
    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.unlink(missing_ok=True)
    names = sorted(held)
    return {n: held[n] for n in names[: len(names) // 2]}, {n: held[n] for n in names[len(names) // 2 :]}


def save_two(folder: Path, first: Tensors, second: Tensors, index: dict[str, str] | None = None) -> None:
    save_file(first, folder / FIRST, {"format": "pt"})
    save_file(second, folder / SECOND, {"format": "pt"})
    weight_map = dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND) if index is None else index
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def wrong_index(folder: Path) -> None:
    first, second = in_two(folder)
    lost = dict.fromkeys(list(second)[:7], FIRST)
    save_two(folder, first, second, dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND) | lost)


def unnamed_shard(folder: Path) -> None:
    held = load(folder)
    prefix = mtp_layer(held)
    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.unlink(missing_ok=True)
    mtp = {name: held.pop(name) for name in list(held) if name.startswith(prefix)}
    save_file(mtp, folder / "mtp.safetensors", {"format": "pt"})
    save_file(held, folder / FIRST, {"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(held, FIRST)}))


def cut_shard(content: bytes | None) -> Callable[[Path], None]:
    """The second of two shards half-written, or replaced by `content`."""

    def plant(folder: Path) -> None:
        save_two(folder, *in_two(folder))
        data = (folder / SECOND).read_bytes()
        (folder / SECOND).write_bytes(data[: len(data) // 2] if content is None else content)

    return plant


def missing_shard(folder: Path) -> None:
    save_two(folder, *in_two(folder))
    (folder / SECOND).unlink()


def no_attention(names: list[str]) -> list[str]:
    return [name for name in names if "self_attn" not in name]


def old_section(folder: Path) -> None:
    (folder / "hf_quant_config.json").unlink()
    file(
        "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    )(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 4999999999\n"
TEMPLATE = "{{ '<｜start▁of▁nothing｜>' }}{% for m in messages %}{{ m.content }}{% endfor %}"

FAULTS: dict[str, Planted] = {
    "an expert without input_scale": Planted(put(f"{UP}.input_scale", None), Fault.NO_INPUT_SCALE),
    "input_scale 0": Planted(put(f"{UP}.input_scale", torch.zeros_like), Fault.INPUT_SCALE),
    "input_scale infinite": Planted(put(f"{DOWN}.input_scale", lambda t: t / 0), Fault.INPUT_SCALE),
    "no weight_scale_2": Planted(put(f"{UP}.weight_scale_2", None), Fault.NO_SCALE, source=True),
    "no weight_scale": Planted(put(f"{DOWN}.weight_scale", None), Fault.NO_SCALE, source=True),
    "weight_scale_2 NaN": Planted(
        put(f"{UP}.weight_scale_2", lambda t: t * torch.nan), Fault.TENSOR_SCALE, source=True
    ),
    "weight_scale_2 0": Planted(put(f"{DOWN}.weight_scale_2", torch.zeros_like), Fault.TENSOR_SCALE, source=True),
    "block scales NaN": Planted(
        put(f"{UP}.weight_scale", lambda t: torch.full_like(t.view(torch.uint8), 0x7F).view(E4M3)),
        Fault.BLOCK_SCALE,
        source=True,
    ),
    "block scales 0": Planted(put(f"{UP}.weight_scale", torch.zeros_like), Fault.BLOCK_SCALE, source=True),
    "gate and up differ": Planted(tensors(other_pair_scale), Fault.PAIR_SCALES, exact=False),
    "reciprocal tensor scales": Planted(every("weight_scale_2", lambda t: 1 / t), Fault.RECIPROCAL),
    "nibbles swapped": Planted(every("weight", lambda t: (t >> 4) | ((t & 15) << 4)), Fault.NIBBLES, source=True),
    "tiled scales": Planted(every("weight_scale", tiled_in_place), Fault.TILED_SCALES, source=True),
    "tiled scales, flat": Planted(put(f"{UP}.weight_scale", scale_layout.to_tiled), Fault.TILED_SCALES),
    "half of the scales": Planted(
        put(f"{UP}.weight_scale", lambda t: t[:, ::2].contiguous()), Fault.SCALE_SIZE, source=True
    ),
    "rounded towards zero": Planted(tensors(towards_zero), Fault.ROUNDING, source=True),
    "another expert's weight": Planted(tensors(another_expert), Fault.OTHER_VALUES, source=True),
    "NaN in a norm": Planted(put("model.norm.weight", lambda t: t * torch.nan), Fault.NOT_FINITE, source=True),
    "MTP lost, still counted": Planted(tensors(without_mtp), Fault.MTP_ABSENT, exact=False),
    "MTP lost and not counted": Planted(
        both(tensors(without_mtp), file("config.json", lambda c: c.update(num_nextn_predict_layers=0))),
        Fault.MTP_DROPPED,
        source=True,
    ),
    "MTP not counted": Planted(
        file("config.json", lambda c: c.update(num_nextn_predict_layers=0)), Fault.MTP_UNCOUNTED
    ),
    "MTP with another embedding": Planted(tensors(other_copy), Fault.MTP_COPIES),
    "kv_b_proj quantized": Planted(tensors(quantized_latent), Fault.LATENT_QUANTIZED, source=True),
    "index names the wrong shard": Planted(wrong_index, Fault.WRONG_INDEX),
    "MTP in a shard of its own": Planted(unnamed_shard, Fault.UNNAMED_SHARD),
    "half-written shard": Planted(cut_shard(None), Fault.DAMAGED_FILE, source=True, exact=False, fp4=False),
    "empty shard": Planted(cut_shard(b""), Fault.DAMAGED_FILE, source=True, exact=False, fp4=False),
    "a pointer instead of a shard": Planted(cut_shard(LFS), Fault.DAMAGED_FILE, source=True, exact=False, fp4=False),
    "missing shard": Planted(missing_shard, Fault.MISSING_SHARD, source=True, exact=False, fp4=False),
    "attention missing in the lists": Planted(
        both(
            file("hf_quant_config.json", lambda c: c["quantization"].update(
                exclude_modules=no_attention(c["quantization"]["exclude_modules"]))),
            file("config.json", lambda c: c["quantization_config"].update(
                ignore=no_attention(c["quantization_config"]["ignore"]))),
        ),
        Fault.LISTS,
    ),
    "the source's section kept": Planted(old_section, Fault.QUANT_FILES),
    "two caches": Planted(
        file("config.json", lambda c: c["quantization_config"].pop("kv_cache_scheme")), Fault.QUANT_FILES
    ),
    "another end-of-text token": Planted(file("config.json", lambda c: c.update(eos_token_id=7)), Fault.SPECIAL_TOKENS),
    "a tokenizer beyond the vocabulary": Planted(
        file("tokenizer.json", lambda c: c["model"]["vocab"].update({"unheard": 99999})), Fault.VOCABULARY, source=True
    ),
    "saved truncation": Planted(
        file("tokenizer.json", lambda c: c.update(truncation={"max_length": 512, "direction": "Right", "stride": 0,
                                                              "strategy": "LongestFirst"})),
        Fault.TRUNCATION,
    ),
    "another model's chat template": Planted(
        file("tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE)), Fault.CHAT_TEMPLATE, source=True
    ),
    "no tokenizer": Planted(lambda folder: (folder / "tokenizer.json").unlink(), Fault.NO_TOKENIZER, source=True),
    "auto_map without code": Planted(
        file("config.json", lambda c: c.update(auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})),
        Fault.AUTO_MAP,
    ),
}  # fmt: skip


def planted(name: str, healthy: Path, folder: Path) -> Path:
    """A copy of `healthy` with the fault in it."""
    shutil.copytree(healthy, folder)
    FAULTS[name].plant(folder)
    return folder
