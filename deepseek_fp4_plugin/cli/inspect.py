"""`inspect`: what a checkpoint holds, from its headers alone."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import Command, ModelName, json_flag

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
    from deepseek_fp4_plugin.checkpoint.shards import TensorInfo
    from deepseek_fp4_plugin.models.config import DeepseekV3Config
    from deepseek_fp4_plugin.models.examination import Examination

_SCALES = ("weight_scale_inv", "weight_scale", "weight_scale_2", "input_scale")
_STORED = (*_SCALES, "weight_global_scale", "input_global_scale")  # the same, as the file calls them


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
    from deepseek_fp4_plugin.checkpoint.findings import refuse

    examination = look_at(checkpoint)
    whole = examination.config is not None and bool(examination.shards.tensors)
    content = facts(examination) if whole else _findings(examination)
    if json_path is not None:
        screen.write_json(json_path, content)
    if json_path != "-":
        _show(content)
    if not whole:
        refuse(examination.findings)


@dataclass
class _Kind:
    """Modules of one role and format."""

    modules: int = 0
    parameters: int = 0
    bytes: int = 0
    scales: Counter[str] = field(default_factory=Counter)


def look_at(checkpoint: str) -> "Examination":
    """Raises CheckpointError for what is no local folder."""
    from deepseek_fp4_plugin.models.examination import examine

    return examine(local_folder(checkpoint, "inspect"))


def local_folder(checkpoint: str, command: str) -> Path:
    """Raises CheckpointError for what is neither a folder here nor the embedded model: nothing is downloaded."""
    from deepseek_fp4_plugin.checkpoint.errors import CheckpointError
    from deepseek_fp4_plugin.checkpoint.hub import EMBEDDED, resolve

    if not Path(checkpoint).expanduser().is_dir() and checkpoint != EMBEDDED:
        raise CheckpointError(
            f"{checkpoint} is not a folder here; {command} looks at local checkpoints (or {EMBEDDED})"
        )
    return resolve(checkpoint)


def _findings(examination: "Examination") -> dict[str, Any]:
    return {
        "folder": str(examination.folder),
        "findings": [
            {"severity": str(found.severity), "subject": found.subject, "finding": str(found), "count": found.count}
            for found in examination.findings
        ],
    }


def facts(examination: "Examination") -> dict[str, Any]:
    """What there is and what was found, as plain JSON values."""
    config, quantization, tensors = examination.config, examination.quantization, examination.shards.tensors
    assert config is not None
    kinds, missing, other = _kinds(tensors, config)
    return _findings(examination) | {
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
                "scales": {name: kind.scales[name] for name in _STORED if kind.scales[name]},
            }
            for (mtp, role, form), kind in sorted(kinds.items(), key=lambda item: item[0][0])
        ],
        "shards": len(examination.shards.names),
        "tensors": len(tensors),
        "bytes": sum(info.nbytes for info in tensors.values()),
        "parameters": sum(kind.parameters for kind in kinds.values()),
        "missing": missing,
        "other tensors": other,
    }


def _kinds(
    tensors: "Mapping[str, TensorInfo]", config: "DeepseekV3Config"
) -> tuple[dict[tuple[bool, str, str], _Kind], list[str], list[str]]:
    """(of the MTP layer, role, format) -> what there is; names of weights missing; tensors beside the model's."""
    from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
    from deepseek_fp4_plugin.checkpoint.scales import dtype_name
    from deepseek_fp4_plugin.checkpoint.shards import by_module
    from deepseek_fp4_plugin.checkpoint.weight_rules import judge, read_of
    from deepseek_fp4_plugin.models.examination import may_be_absent
    from deepseek_fp4_plugin.models.inventory import weights

    kinds: dict[tuple[bool, str, str], _Kind] = {}
    groups = by_module(tensors)
    missing: list[str] = []
    seen: set[str] = set()
    for weight in weights(config):
        mtp = weight.layer is not None and weight.layer >= config.num_hidden_layers
        module, _, suffix = weight.name.rpartition(".")
        group = groups.get(module, {})
        if suffix == "weight" and group:
            verdict = judge(group, weight.shape)
            form, present = verdict.format, sorted(read_of(group, verdict), key=lambda name: name != "weight")
        elif suffix in group:
            form, present = WeightFormat.PLAIN, [suffix]
        else:
            if not may_be_absent(weight, config):
                missing.append(weight.name)
            continue
        first = group[present[0]]
        shown = dtype_name(first.dtype) if form in (WeightFormat.PLAIN, None) else _shown(group, form, weight.shape)
        kind = kinds.setdefault((mtp, str(weight.role), shown if form else f"not read ({shown})"), _Kind())
        seen.update(f"{module}.{name}" for name in present)
        kind.modules += 1
        kind.bytes += sum(group[name].nbytes for name in present)
        kind.scales.update(group[name].stored_as or name for name in present if name in _SCALES)
        kind.parameters += math.prod(weight.shape)
    return kinds, missing, [name for name in tensors if name not in seen]


def _shown(group: "Mapping[str, TensorInfo]", form: "WeightFormat", shape: tuple[int, ...]) -> str:
    """A quantized format, and where it is another program's form of it."""
    from deepseek_fp4_plugin.checkpoint.quant_config import WeightFormat
    from deepseek_fp4_plugin.checkpoint.scales import fp8_grain

    if form is WeightFormat.FP8_BLOCK and group["weight_scale_inv"].stored_as:
        return f"fp8 by {fp8_grain(group['weight_scale_inv'].shape, shape)}"
    return f"{form} packed" if group["weight"].stored_as else str(form)


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
    if "architecture" in content:
        _show_facts(content, out)
    for found in content["findings"]:
        out(f"{found['severity'].upper() if found['severity'] == 'error' else found['severity']}: {found['finding']}")


def _show_facts(content: dict[str, Any], out: screen.Output) -> None:
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
