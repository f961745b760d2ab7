"""`plan`: what a model takes on a machine, before one is rented."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import Command, ModelName, json_flag

if TYPE_CHECKING:
    from deepseek_fp4_plugin.models.config import DeepseekV3Config
    from deepseek_fp4_plugin.models.ledger import FormatOf

R1 = "DeepSeek-R1"


@click.command(cls=Command, short_help="Plan a model on a machine: memory, batch, roofline.")
@click.argument("config", type=ModelName(), metavar="CONFIG")
@click.argument("machine", metavar="MACHINE")
@click.option(
    "--layout",
    type=click.Choice(["v1", "v2", "fp8", "bf16"]),
    help="Formats of the weights; left out, the checkpoint's own where CONFIG is one, else v1.",
)
@click.option("--kv-cache", type=click.Choice(["fp8", "bf16"]), default="fp8", show_default=True)
@click.option("--context", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of a request.")
@json_flag
def plan(config: str, machine: str, layout: str | None, kv_cache: str, context: int, json_path: str | None) -> None:
    """Say what a model of DeepSeek-V3's architecture takes on a MACHINE: bytes by kind of module and rank, the batch
    and context that fit, bytes and products of a step, tokens a second at the roofline with and without MTP, which way
    to cut it, and what quantizing it takes.

    CONFIG is a config.json, a checkpoint's folder, r1_nano, or DeepSeek-R1. MACHINE is 8xB200, 8xH200, 8xH100-80GB,
    1xH200 and the like, cpu (this one), or figures of one device: 4x96GB:3.3TB/s:800TFLOPS, cpu:64GB:80GB/s:2TFLOPS.

    \b
    Examples:
      deepseek-fp4 plan DeepSeek-R1 8xB200
      deepseek-fp4 plan ./DeepSeek-R1-0528/config.json 8xH100-80GB --layout v2 --json plan.json
      deepseek-fp4 plan r1_nano cpu
    """
    from deepseek_fp4_plugin.planner.machines import machine as named
    from deepseek_fp4_plugin.planner.plan import plan as make

    shape, form = read_shape(config)
    own = form if layout is None else None
    content = {"model": config, **make(shape, named(machine), layout or "v1", own, kv_cache, context)}
    if own is not None:
        content["layout"] = "the checkpoint's own"
    if json_path is not None:
        screen.write_json(json_path, content)
    if json_path != "-":
        _show(content)


def read_shape(name: str) -> "tuple[DeepseekV3Config, FormatOf | None]":
    """A config, and the formats of the checkpoint's own weights where there are some."""
    from deepseek_fp4_plugin.checkpoint.hub import EMBEDDED, resolve
    from deepseek_fp4_plugin.checkpoint.json_files import read_json
    from deepseek_fp4_plugin.checkpoint.shards import by_module
    from deepseek_fp4_plugin.checkpoint.weight_rules import judge
    from deepseek_fp4_plugin.models.config import DeepseekV3Config
    from deepseek_fp4_plugin.models.deepseek_r1 import DEEPSEEK_R1
    from deepseek_fp4_plugin.models.examination import examine
    from deepseek_fp4_plugin.quantization.plan import layout_format

    path = Path(name).expanduser()
    if path.is_file():
        return DeepseekV3Config.from_dict(read_json(path), str(path)), None
    if name.lower() == R1.lower() and not path.is_dir():
        return DEEPSEEK_R1, None
    if not path.is_dir() and name != EMBEDDED:
        raise ValueError(f"{name} is no config.json and no folder here; plan also knows {EMBEDDED} and {R1}")
    folder = resolve(name)
    if not any(folder.glob("*.safetensors")):
        return DeepseekV3Config.from_folder(folder), None
    examination = examine(folder)
    config, reader = examination.usable()
    groups, plain = by_module(reader.tensors), layout_format(config, "bf16")
    reader.close()
    formats = {m: form for m, group in groups.items() if "weight" in group and (form := judge(group, ()).format)}
    return config, lambda weight: formats.get(weight.module) or plain(weight)


def _show(content: dict[str, Any]) -> None:
    out, machine, size = screen.Output(), content["machine"], screen.size
    devices = f"{machine['devices']} x " if machine["devices"] > 1 else ""
    out(
        f"{content['model']} ({content['layout']}) on {machine['name']}: {devices}{size(machine['memory'])} at "
        f"{size(machine['bandwidth'])}/s, {machine['flops'] / 1e12:,.1f} TFLOP/s BF16"
    )
    elements = content["checkpoint_elements"]
    rows = [(name, size(n), f"{elements[name] / 1e9:,.2f} G") for name, n in content["checkpoint_bytes"].items()]
    out("")
    out(screen.table(("checkpoint", "bytes", "elements as the hub counts"), rows))
    out("")
    _show_batch_one(content, out)
    _show_memory(content, out)
    _show_speed(content, out)
    _show_advice(content, out)


def _show_batch_one(content: dict[str, Any], out: screen.Output) -> None:
    lines = content["batch_one"]
    read, products = (sum(line[name] for line in lines) for name in ("bytes", "flops"))
    rows = [_line(line["module"], line["bytes"], line["share"], line["flops"], line["bound_by"]) for line in lines]
    rows.append(_line("all", read, 1.0, products, ""))
    title = f"One token, context {content['context']:,}"
    out(screen.table(("module", "read", "share", "GFLOP", "bound by"), rows, title=title))
    out("")


def _line(module: str, read: float, share: float, flops: float, bound: str) -> tuple[str, ...]:
    return module, screen.size(read), f"{100 * share:.1f}%", f"{flops / 1e9:,.2f}", bound


def _show_memory(content: dict[str, Any], out: screen.Output) -> None:
    contexts = list(content["mappings"][0]["requests_by_context"])
    rows = [
        (
            way["name"],
            screen.size(way["weights_per_rank"]),
            "yes" if way["fits"] else "NO",
            f"{way['cache_tokens_per_rank']:,}",
            *(f"{way['requests_by_context'][context]:,}" for context in contexts),
        )
        for way in content["mappings"]
    ]
    per_token = f"{content['cache_bytes_per_token']:,} bytes a token ({content['kv_cache']})"
    title = f"Memory of one rank; the cache takes {per_token}"
    head = ("mapping", "weights", "fits", "cache tokens", *(f"requests of {int(context):,}" for context in contexts))
    out(screen.table(head, rows, title=title))
    out("")


def _show_speed(content: dict[str, Any], out: screen.Output) -> None:
    head = ("mapping", "requests", "drafts", "read a step", "ms", "tokens/s at the roofline", "measured share")
    for what, title in (("latency", "One request"), ("throughput", "As many requests as fit")):
        rows = [_step(way, way[what], step) for way in content["mappings"] for step in way[what]["steps"]]
        if rows:
            out(screen.table(head, rows, title=f"{title}, context {content['context']:,}"))
            out("")


def _step(way: dict[str, Any], speed: dict[str, Any], step: dict[str, Any]) -> tuple[Any, ...]:
    alike = (speed["requests"], step["drafts"])
    seen = [m["share"] for m in way["measured"] if (m["batch"], m["drafts"]) == alike]
    return (
        way["name"],
        f"{speed['requests']:,}",
        step["drafts"],
        screen.size(step["bytes_per_rank"]),
        f"{step['milliseconds']:,.2f}",
        f"{step['tokens_per_second']:,.0f}",
        f"{100 * seen[0]:.0f}%" if seen else "",
    )


def _show_advice(content: dict[str, Any], out: screen.Output) -> None:
    if content["latency"] is None:
        out("It does not fit on this machine: take more devices, or a smaller format (--layout).")
    else:
        out(f"For latency: {content['latency']}. For throughput: {content['throughput']}.")
    quantize = content["quantize"]
    out(
        f"Quantizing it: {screen.size(quantize['disk_bytes'])} of disk, {quantize['file_seconds'] / 60:,.0f} minutes "
        f"of reading and writing at {screen.size(quantize['file_rate'])}/s, calibration at least "
        f"{quantize['calibration_seconds_at_roofline'] / 60:,.1f} minutes on one device."
    )
    out(
        "The roofline leaves out what goes between devices. With drafts it takes the tokens a step that TensorRT-LLM "
        "reports for R1: "
        + ", ".join(f"{k}: {v:g}" for k, v in content["accepted_tokens_per_step"].items())
        + ". Measured shares are those of docs/performance.md."
    )
