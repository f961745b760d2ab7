"""A plan: what a model takes on a machine, and how fast it could be at the roofline, for each way to cut it.

Everything is counted by models/ledger.py (read and computed) and models/residency.py (kept). A roofline is what no
kernel can beat: each class of modules at the larger of bytes over read rate and products over arithmetic rate. What
goes between devices is not counted.
"""

import functools
import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, NamedTuple

from deepseek_fp4_plugin.models.config import DeepseekV3Config
from deepseek_fp4_plugin.models.ledger import (
    CACHE,
    FormatOf,
    Line,
    Step,
    checkpoint_size,
    decode_step,
    draft_step,
    seconds,
)
from deepseek_fp4_plugin.models.residency import resident_bytes, token_bytes
from deepseek_fp4_plugin.parallel.mesh import Mesh
from deepseek_fp4_plugin.planner.machines import Machine
from deepseek_fp4_plugin.quantization.plan import layout_format

# Tokens a step that TensorRT-LLM reports for R1 and so many drafts (its tech blog 1, May 2025).
ACCEPTED = {0: 1.0, 1: 1.92, 2: 2.58, 3: 2.82}
CONTEXTS = (1024, 4096, 32768, 131072)
LAYOUTS = {"fp8": "fp8", "nvfp4_v1": "v1", "nvfp4_v2": "v2"}
_CACHE_SHARE = 0.9  # of the memory that weights leave, the engine's default
_MOST_REQUESTS = 4096  # running at once
_CALIBRATION_TOKENS, _FILE_RATE = 512 * 512, 2e9  # quantize's defaults; bytes a second of a disk


class Mapping(NamedTuple):
    """One way to cut the model. sizes: arguments of Mesh."""

    name: str
    sizes: dict[str, Any]

    @property
    def mesh(self) -> Mesh:
        return Mesh(**self.sizes)


def mappings(config: DeepseekV3Config, devices: int) -> Iterator[Mapping]:
    """The ways that fit the model's heads and experts: cut, dealt, and attention whole on every device."""
    if devices == 1:
        yield Mapping("one device", {})
        return
    if config.num_attention_heads % devices == 0 and config.vocab_size % devices == 0:
        yield Mapping(f"TP{devices}", {"tensor_parallel_size": devices})
        for dealt in (2, devices):
            if dealt <= devices and devices % dealt == 0 and config.n_routed_experts % dealt == 0:
                sizes = {"tensor_parallel_size": devices, "moe_expert_parallel_size": dealt}
                yield Mapping(f"TP{devices}/EP{dealt}", sizes)
                if devices == 2:
                    break
    if config.n_routed_experts % devices == 0:
        sizes = {"tensor_parallel_size": devices, "moe_expert_parallel_size": devices, "enable_attention_dp": True}
        yield Mapping(f"DP{devices}/EP{devices}", sizes)


def plan(
    config: DeepseekV3Config,
    machine: Machine,
    layout: str = "v1",
    format_of: FormatOf | None = None,
    kv_cache: str = "fp8",
    context: int = 4096,
) -> dict[str, Any]:
    """Plain JSON values.  layout: of quantization.plan, for what `format_of` does not say.  context: of throughput.

    Raises ValueError where the model cannot be cut over the machine's devices at all.
    """
    form = format_of or layout_format(config, layout)
    value_bytes = 1 if kv_cache == "fp8" else 2
    ways = [_way(config, machine, form, way, value_bytes, context) for way in mappings(config, machine.devices)]
    if not ways:
        raise ValueError(
            f"{config.num_attention_heads} heads and {config.n_routed_experts} experts cannot be cut over "
            f"{machine.devices} devices; take a divisor of one of them"
        )
    fitting = [way for way in ways if way["fits"]]
    sizes = {name: checkpoint_size(config, layout_format(config, own)) for name, own in LAYOUTS.items()}
    return {
        "machine": machine._asdict(),
        "layout": layout,
        "kv_cache": kv_cache,
        "context": context,
        "checkpoint_bytes": {name: size for name, (size, _) in sizes.items()},
        "checkpoint_elements": {name: count for name, (_, count) in sizes.items()},
        "checkpoint_of_this_plan": checkpoint_size(config, form)[0],
        "cache_bytes_per_token": token_bytes(config, value_bytes, bool(config.num_nextn_predict_layers)),
        "batch_one": _lines(decode_step(config, form, Step(context=context, cache_bytes=value_bytes)), machine),
        "mappings": ways,
        "latency": _best(fitting, lambda way: way["latency"]["best_tokens_per_second"]),
        "throughput": _best(fitting, lambda way: way["throughput"]["best_tokens_per_second"]),
        "quantize": _quantize(config, machine, sizes),
        "accepted_tokens_per_step": {str(k): v for k, v in ACCEPTED.items()},
    }


def _best(ways: list[dict[str, Any]], speed: Callable[[dict[str, Any]], float]) -> str | None:
    return max(ways, key=speed)["name"] if ways else None


def _way(
    config: DeepseekV3Config, machine: Machine, form: FormatOf, way: Mapping, value_bytes: int, context: int
) -> dict[str, Any]:
    held = resident_bytes(config, form, way.mesh, machine.kernels)
    weights = sum(held.values())
    left = max(0.0, machine.memory - weights) * _CACHE_SHARE
    per_token = token_bytes(config, value_bytes, bool(config.num_nextn_predict_layers))
    tokens = int(left // per_token)
    schedulers = machine.devices if way.sizes.get("enable_attention_dp") else 1
    requests = {length: min(_MOST_REQUESTS, tokens // length * schedulers) for length in CONTEXTS}
    roof = functools.partial(_roof, config, machine, form, way, value_bytes, context)
    crowd = min(_MOST_REQUESTS // schedulers, tokens // context)
    return {
        "name": way.name,
        "settings": way.sizes,
        "weight_bytes_per_rank": {str(role): size for role, size in held.items()},
        "weights_per_rank": weights,
        "fits": weights < machine.memory and tokens >= context,
        "cache_tokens_per_rank": tokens,
        "requests_by_context": {str(length): count for length, count in requests.items()},
        "latency": roof(1, 1),
        "throughput": roof(crowd, crowd * schedulers) if crowd else _nothing(),
        "measured": measured(machine, way),
    }


def _roof(
    config: DeepseekV3Config,
    machine: Machine,
    form: FormatOf,
    way: Mapping,
    value_bytes: int,
    context: int,
    requests: int,
    in_all: int,
) -> dict[str, Any]:
    """Steps of `requests` a scheduler, without drafts and with each number of them.  in_all: requests of all ranks."""
    steps = []
    for drafts in ACCEPTED if config.num_nextn_predict_layers else (0,):
        rows, mesh = 1 + drafts, way.mesh
        others = in_all * rows if mesh.enable_attention_dp else None
        step = Step(requests, rows, context, value_bytes, others)
        one = Step(requests, 1, context, value_bytes, in_all if mesh.enable_attention_dp else None)
        lines = decode_step(config, form, step, mesh)
        took = seconds(lines, machine.bandwidth, machine.flops)
        took += drafts * seconds(draft_step(config, form, one, mesh), machine.bandwidth, machine.flops)
        steps.append(
            {
                "drafts": drafts,
                "bytes_per_rank": sum(line.bytes for line in lines),
                "flops_per_rank": sum(line.flops for line in lines),
                "milliseconds": 1e3 * took,
                "tokens_per_second": in_all * ACCEPTED[drafts] / took,
            }
        )
    return {
        "requests": in_all,
        "steps": steps,
        "best_tokens_per_second": max(step["tokens_per_second"] for step in steps),
    }


def _nothing() -> dict[str, Any]:
    return {"requests": 0, "steps": [], "best_tokens_per_second": 0.0}


def _lines(lines: list[Line], machine: Machine) -> list[dict[str, Any]]:
    """The whole model's step, a class of modules a line, dearest first."""
    ordered = sorted(lines, key=lambda line: -line.bytes)
    total = sum(line.bytes for line in lines)
    return [
        {
            "module": "latent cache" if line.role == CACHE else str(line.role),
            "bytes": line.bytes,
            "share": line.bytes / total,
            "flops": line.flops,
            "bound_by": "reading" if line.bytes / machine.bandwidth >= line.flops / machine.flops else "arithmetic",
        }
        for line in ordered
    ]


def _quantize(config: DeepseekV3Config, machine: Machine, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What `quantize` takes: the source is read twice (calibration, conversion), the result written once."""
    source, result = sizes["fp8"][0], sizes["nvfp4_v1"][0]
    hidden = 2 * _CALIBRATION_TOKENS * config.hidden_size * 2
    step = Step(requests=512, tokens=512, context=512)
    form = layout_format(config, "fp8")
    flops = sum(line.flops for line in decode_step(config, form, step))
    return {
        "disk_bytes": result + hidden,
        "reads_bytes": 2 * source,
        "file_rate": _FILE_RATE,
        "file_seconds": (2 * source + result) / _FILE_RATE,
        "calibration_seconds_at_roofline": flops / machine.flops,
    }


@functools.cache
def measurements() -> dict[str, Any]:
    return json.loads((files(__package__) / "measured.json").read_text(encoding="utf-8"))


def measured(machine: Machine, way: Mapping) -> list[dict[str, Any]]:
    """What was measured on such devices cut this way, with its share of the roofline."""
    device = machine.name.partition("x")[2]
    return [
        {**step, "share": step["roofline_ms"] / step["measured_ms"]}
        for step in measurements()["steps"]
        if (step["device"], step["mapping"]) == (device, way.name)
    ]
