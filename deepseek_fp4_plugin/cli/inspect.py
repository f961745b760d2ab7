"""`inspect`: what a checkpoint holds, from its headers alone."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import Command, ModelName, json_flag

if TYPE_CHECKING:
    from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
    from deepseek_fp4_plugin.models.config import DeepseekV3Config

_SCALES = ("weight_scale_inv", "weight_scale", "weight_scale_2", "input_scale")


@click.command(cls=Command, short_help="Show what a checkpoint holds.")
@click.argument("checkpoint", type=ModelName(), metavar="CHECKPOINT")
@json_flag
def inspect(checkpoint: str, json_path: str | None) -> None:
    """Show what a CHECKPOINT folder (or r1_nano) holds: architecture, the format, bytes and scales of each kind of
    module, the MTP layer, the cache's data type.

    Reads the headers only, never a weight.

    \b
    Examples:
      deepseek-fp4 inspect ./DeepSeek-R1-0528-FP4
      deepseek-fp4 inspect r1_nano --json r1_nano.json
    """
    content = examine(checkpoint)
    if json_path is not None:
        screen.write_json(json_path, content)
    if json_path != "-":
        _show(content)


@dataclass
class _Kind:
    """Modules of one role and format."""

    modules: int = 0
    parameters: int = 0
    bytes: int = 0
    scales: Counter[str] = field(default_factory=Counter)


def examine(checkpoint: str) -> dict[str, Any]:
    """The facts as plain JSON values. Raises CheckpointError for a folder that is no whole checkpoint."""
    from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
    from deepseek_fp4_plugin.checkpoint.hub import EMBEDDED, resolve
    from deepseek_fp4_plugin.checkpoint.quant_config import QuantConfig
    from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader, read_json
    from deepseek_fp4_plugin.models.config import DeepseekV3Config

    if not Path(checkpoint).expanduser().is_dir() and checkpoint != EMBEDDED:
        raise CheckpointError(f"{checkpoint} is not a folder here; inspect looks at local checkpoints (or {EMBEDDED})")
    folder = resolve(checkpoint)
    config = DeepseekV3Config.from_folder(folder)
    reader = CheckpointReader(folder)
    if config.num_nextn_predict_layers and f"model.layers.{config.num_hidden_layers}.eh_proj.weight" not in reader:
        config = replace(config, num_nextn_predict_layers=0)
    quantization = QuantConfig.from_folder(folder, read_json(folder / "config.json"))
    kinds, missing, other = _kinds(reader, config)
    return {
        "folder": str(folder),
        "architecture": _architecture(config),
        "quantization": {
            "algorithm": quantization.quant_algo or "none",
            "latent cache": (quantization.kv_cache_quant_algo or "bf16").lower(),
            "modules excluded by name": len(quantization.exclude_modules),
        },
        "modules": [
            {
                "module": f"MTP layer: {role.removeprefix('MTP ')}" if mtp else role,
                "format": form,
                "modules": kind.modules,
                "parameters": kind.parameters,
                "bytes": kind.bytes,
                "bits per weight": round(8 * kind.bytes / kind.parameters, 2),
                "scales": {name: kind.scales[name] for name in _SCALES if kind.scales[name]},
            }
            for (mtp, role, form), kind in sorted(kinds.items(), key=lambda item: item[0][0])
        ],
        "shards": len(reader.shards),
        "tensors": len(reader.tensors),
        "bytes": sum(info.nbytes for info in reader.tensors.values()),
        "parameters": sum(kind.parameters for kind in kinds.values()),
        "missing": missing,
        "other tensors": other,
    }


def _kinds(
    reader: "CheckpointReader", config: "DeepseekV3Config"
) -> tuple[dict[tuple[bool, str, str], _Kind], list[str], list[str]]:
    """(of the MTP layer, role, format) -> what there is; names of weights missing; tensors beside the model's."""
    from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat, detect_format
    from deepseek_fp4_plugin.models.inventory import Role, weights

    kinds: dict[tuple[bool, str, str], _Kind] = {}
    missing, seen = [], set()
    for weight in weights(config):
        mtp = weight.layer is not None and weight.layer >= config.num_hidden_layers
        if weight.name not in reader:
            duplicate = mtp and weight.role in (Role.EMBEDDING, Role.HEAD)
            if not duplicate:  # the MTP layer may leave out its copies of the model's own
                missing.append(weight.name)
            continue
        form = detect_format(reader, weight.module) if weight.name.endswith(".weight") else WeightFormat.PLAIN
        info = reader.info(weight.name)
        shown = str(info.dtype).removeprefix("torch.") if form is WeightFormat.PLAIN else str(form)
        kind = kinds.setdefault((mtp, str(weight.role), shown), _Kind())
        names = [weight.name, *(f"{weight.module}.{scale}" for scale in _SCALES)]
        present = [name for name in names if name in reader]
        seen.update(present)
        kind.modules += 1
        kind.bytes += sum(reader.info(name).nbytes for name in present)
        kind.scales.update(name.rpartition(".")[2] for name in present[1:])
        count = 1
        for length in weight.shape:
            count *= length
        kind.parameters += count
    return kinds, missing, [name for name in reader if name not in seen]


def _architecture(c: "DeepseekV3Config") -> dict[str, str]:
    yarn = c.rope_scaling
    context = f"{c.max_position_embeddings:,} tokens"
    if yarn:
        context += f" (YaRN, {yarn.factor:g} x {yarn.original_max_position_embeddings:,})"
    dense = sum(not c.is_moe_layer(layer) for layer in range(c.num_hidden_layers))
    return {
        "layers": f"{c.num_hidden_layers}, of them {dense} dense",
        "MTP layers": str(c.num_nextn_predict_layers),
        "width": f"{c.hidden_size:,}; vocabulary {c.vocab_size:,}",
        "attention": f"{c.num_attention_heads} heads, latent {c.kv_lora_rank} + {c.qk_rope_head_dim} a token and layer",
        "experts": f"{c.num_experts_per_tok} of {c.n_routed_experts} a token (in {c.topk_group} of {c.n_group} groups)"
        f" and {c.n_shared_experts} shared, {c.moe_intermediate_size:,} wide",
        "context": context,
    }


def _show(content: dict[str, Any]) -> None:
    out = screen.Output()
    out(content["folder"])
    facts = content["architecture"] | {name: str(value) for name, value in content["quantization"].items()}
    out(screen.table(("", ""), list(facts.items())))
    out("")
    rows = [
        (
            entry["module"],
            entry["format"],
            entry["modules"],
            f"{entry['parameters']:,}",
            screen.size(entry["bytes"]),
            f"{entry['bits per weight']:.2f}",
            _scales(entry["scales"], entry["modules"]),
        )
        for entry in content["modules"]
    ]
    bits = 8 * content["bytes"] / max(content["parameters"], 1)
    modules = sum(entry["modules"] for entry in content["modules"])
    rows.append(("all", "", modules, f"{content['parameters']:,}", screen.size(content["bytes"]), f"{bits:.2f}", ""))
    columns = ("module", "format", "modules", "parameters", "bytes", "bits/weight", "scales")
    out(screen.table(columns, rows))
    out(f"\n{content['tensors']:,} tensors in {content['shards']} shards")
    if content["other tensors"]:
        names = content["other tensors"]
        out(f"{len(names)} tensors that the model has no place for, first {names[0]}")
    if content["missing"]:
        names = content["missing"]
        out(f"INCOMPLETE: {len(names)} weights are missing, first {names[0]}")


def _scales(counts: dict[str, int], modules: int) -> str:
    """Names of the scales, with counts where not every module has one."""
    return ", ".join(name if count == modules else f"{name} ({count})" for name, count in counts.items())
