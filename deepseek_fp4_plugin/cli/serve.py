"""`serve`: the OpenAI-compatible server, with trtllm-serve's flags."""

from pathlib import Path
from typing import Any

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import Command, ModelName, engine_config, engine_flags, read_text, serve_flags

_FILE = click.Path(path_type=Path)


# Settings of trtllm-serve that have no counterpart here: taken where they ask for nothing (EngineConfig.neutral).
_ACCEPTED = {
    "backend": click.option("--backend", type=click.Choice(["pytorch"]), help="As trtllm-serve has it; there is one."),
    "trust_remote_code": click.option(
        "--trust-remote-code", is_flag=True, default=None, help="Accepted; no checkpoint's code is run."
    ),
    "pipeline_parallel_size": click.option(
        "--pp-size", "--pipeline-parallel-size", "pipeline_parallel_size", type=int, hidden=True
    ),
    "context_parallel_size": click.option(
        "--cp-size", "--context-parallel-size", "context_parallel_size", type=int, hidden=True
    ),
    "moe_cluster_parallel_size": click.option(
        "--cluster-size", "--moe-cluster-parallel-size", "moe_cluster_parallel_size", type=int, hidden=True
    ),
    "gpus_per_node": click.option("--gpus-per-node", type=int, hidden=True),
    "max_beam_width": click.option("--max-beam-width", type=int, hidden=True),
    "num_postprocess_workers": click.option("--num-postprocess-workers", type=int, hidden=True),
    "enable_chunked_prefill": click.option("--enable-chunked-prefill", is_flag=True, default=None, hidden=True),
}


def _accepted_flags(command: Any) -> Any:
    for option in reversed(_ACCEPTED.values()):
        command = option(command)
    return command


_SERVER = (
    "host", "port", "served_model_name", "reasoning_parser", "tool_parser", "allowed_origins", "sampling_defaults",
    "max_queue", "max_body_bytes", "body_timeout", "request_timeout", "stall_timeout", "drain_timeout",
    "restart_on_failure", "vllm_metrics", "log_level",
)  # fmt: skip


@click.command(cls=Command, short_help="Serve a model over HTTP, OpenAI's interface.")
@click.argument("model", type=ModelName())
@click.option("--host", help="Address to listen on [localhost]; 0.0.0.0: every one.")
@click.option("--port", type=click.IntRange(0, 65535), help="[8000]")
@click.option("--served-model-name", multiple=True, metavar="NAME", help="In requests; may be repeated.")
@click.option(
    "--reasoning-parser",
    metavar="NAME",
    help="deepseek-r1 or deepseek-r1-0528; left out, thinking stays in the content.",
)
@click.option("--tool-parser", metavar="NAME", help="deepseek_v3; left out, requests with tools are refused.")
@click.option("--chat-template", type=_FILE, metavar="FILE", help="A Jinja file in place of the checkpoint's template.")
@click.option(
    "--sampling-defaults",
    type=click.Choice(["model", "openai"]),
    help="Of requests that do not say: generation_config.json's [model], or 1.0.",
)
@click.option("--api-key-file", type=_FILE, metavar="FILE", help="Keys, one a line; requests must bring one.")
@click.option(
    "--allowed-origin",
    "allowed_origins",
    multiple=True,
    metavar="URL",
    help="A web page's origin that may call; may be repeated.",
)
@serve_flags
@click.option("--max-queue", type=int, metavar="N", help="Answers waiting beyond the batch before 429 [256].")
@click.option("--max-body-bytes", type=int, metavar="N", help="Of a request [16777216].")
@click.option(
    "--body-timeout",
    type=float,
    metavar="S",
    help="Seconds for a request's head, and again for its body, to arrive [30].",
)
@click.option("--request-timeout", type=float, metavar="S", help="Seconds for an answer [3600].")
@click.option("--stall-timeout", type=float, metavar="S", help="Seconds a client may leave its stream unread [60].")
@click.option("--drain-timeout", type=float, metavar="S", help="Seconds for running answers after SIGTERM [30].")
@click.option("--restart-on-failure", is_flag=True, default=None, help="Start the engine again when a worker is lost.")
@click.option("--vllm-metrics", is_flag=True, default=None, help="Metrics under vLLM's names as well.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[info]")
@engine_flags
@_accepted_flags
def serve(model: str, chat_template: Path | None, api_key_file: Path | None, **flags: Any) -> int:
    """Serve MODEL, a checkpoint folder, a Hugging Face id, or r1_nano: chat, completions, a playground at /.

    What a flag says wins over the --config file, that over the defaults. docs/serving.md has every route and field.

    \b
    Examples:
      deepseek-fp4 serve r1_nano
      deepseek-fp4 serve ./r1_nano-NVFP4 --port 8000 --max_batch_size 4 --extra_llm_api_options args.yaml
      deepseek-fp4 serve r1_nano --mtp 3 --relaxed --reasoning_parser deepseek-r1-0528 --tool_parser deepseek_v3
    """
    from deepseek_fp4_plugin.serving.options import ServerOptions

    options = {name: flags[name] for name in _SERVER if flags[name] not in (None, ())}
    if chat_template is not None:
        options["chat_template"] = read_text("--chat_template", chat_template)
    if api_key_file is not None:
        options["api_keys"] = _keys(api_key_file)
    engine = {name: flags[name] for name in _ACCEPTED if flags[name] is not None}
    chosen = engine_config(model, flags, **engine), ServerOptions(**options)
    from deepseek_fp4_plugin.serving.server import serve as run  # torch comes with it: mistakes are told before

    return run(model, *chosen, screen.stages)


def _keys(path: Path) -> tuple[str, ...]:
    lines = read_text("--api_key_file", path).splitlines()
    keys = tuple(line.strip() for line in lines if line.strip())
    for number, line in enumerate(lines, 1):
        if not all("!" <= character <= "~" for character in line.strip()):
            raise ValueError(f"--api_key_file {path}, line {number}: a key is printable ASCII without blanks")
    if not keys:
        raise ValueError(f"{path} holds no key; write one on each line")
    return keys
