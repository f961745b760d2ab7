"""`generate`: continue prompts, the text streaming as it comes."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import (
    Command,
    ModelName,
    engine_config,
    engine_flags,
    json_flag,
    sampling_flags,
    sampling_params,
)

if TYPE_CHECKING:
    from deepseek_fp4_plugin.config import EngineConfig
    from deepseek_fp4_plugin.llm import LLM, RequestHandle, RequestOutput

_CONTINUATION = 64  # tokens that a text is continued by: it need not end by itself


@click.command(cls=Command, short_help="Continue prompts.")
@click.argument("model", type=ModelName())
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Prompts, one a line.")
@click.option(
    "--max-new-tokens",
    "--max-tokens",
    type=int,
    help=f"Of each answer [{_CONTINUATION}; with --chat until it ends or the context is full].",
)
@click.option("--chat", is_flag=True, help="Take each prompt as a user's message, through the chat template.")
@sampling_flags
@engine_flags
@json_flag
def generate(
    model: str,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    max_new_tokens: int | None,
    chat: bool,
    json_path: str | None,
    **flags: Any,
) -> int:
    """Continue each PROMPT with MODEL, a checkpoint folder, a Hugging Face id, or r1_nano.

    Greedy unless a sampling flag says otherwise. Without a prompt, standard input is one. The text goes to standard
    output, everything else to standard error.

    \b
    Examples:
      deepseek-fp4 generate r1_nano "Hello, my name is" "The capital of France is"
      deepseek-fp4 generate r1_nano --chat --mtp 3 --max-new-tokens 300 "What is 17 + 25?"
      deepseek-fp4 generate ./r1_nano-NVFP4 --temperature 0.6 --top-p 0.95 --seed 7 "Once"
      deepseek-fp4 generate r1_nano --prompt-file prompts.txt --json answers.json
    """
    texts = [*prompts, *_lines(prompt_file)]
    if not texts:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt; give one, --prompt-file, or text on standard input")
        texts = [sys.stdin.read().rstrip("\n")]
    if max_new_tokens is None and not chat:
        max_new_tokens = _CONTINUATION
    params = sampling_params(flags, max_tokens=max_new_tokens)
    with load(engine_config(model, flags)) as llm:
        inputs: list[Any] = list(texts)
        if chat:
            if llm.tokenizer is None:
                raise ValueError(f"{model} has no tokenizer, which --chat needs")
            inputs = [llm.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
        began = time.perf_counter()
        handles: list[RequestHandle] = []
        try:
            for prompt in inputs:
                handles.append(llm.generate_async(prompt, params, streaming=True))
            quiet, heading = json_path == "-", len(texts) > 1
            failed = sum(not _stream(text, handle, quiet, heading) for text, handle in zip(texts, handles, strict=True))
        except BaseException:
            for handle in handles:
                handle.abort()
            raise
        outputs = [handle.output for handle in handles]
        screen.note(summary(outputs, time.perf_counter() - began))
        if cut := _cut(outputs, max_new_tokens):
            screen.note(cut)
        if json_path is not None:
            screen.write_json(json_path, [_record(t, h) for t, h in zip(texts, handles, strict=True)])
    return 1 if failed else 0


def load(config: "EngineConfig") -> "LLM":
    """The model behind its engine, with progress.

    Who asks once would wait for a warm-up as well as for a first request: there is none unless it is asked for.
    """
    from deepseek_fp4_plugin.llm import LLM  # torch comes with it

    if config.warm_up is None:
        config = config.model_copy(update={"warm_up": False})
    with screen.stages() as report:

        def progress(what: str, done: int, parts: int) -> None:
            report(f"{what} {config.model}", done, parts)

        return LLM(config.model, config=config, progress=progress)


def summary(outputs: "list[RequestOutput]", seconds: float) -> str:
    """Tokens, tokens a second, tokens a step."""
    tokens = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    steps = sum(output.metrics.steps for output in outputs)
    text = f"{tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s"
    drafted, accepted = (sum(getattr(o.metrics, name) for o in outputs) for name in ("drafted", "accepted"))
    if drafted:
        text += f", {1 + accepted / max(steps, 1):.2f} tokens a step ({accepted} of {drafted} drafts accepted)"
    return text


def _cut(outputs: "list[RequestOutput]", limit: int | None) -> str:
    """What is said of answers that did not end by themselves; nothing where all did."""
    cut = [output.outputs[0] for output in outputs if output.outputs[0].finish_reason == "length"]
    if not cut:
        return ""
    of = f"{len(cut)} of {len(outputs)} answers were" if len(outputs) > 1 else "the answer was"
    if limit is not None and all(len(answer.token_ids) >= limit for answer in cut):
        return f"{of} cut after {limit} tokens; --max-new-tokens takes more"
    return f"{of} cut where the context was full; --max-seq-len, up to the model's own, takes more"


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _stream(prompt: str, handle: "RequestHandle", quiet: bool, heading: bool) -> bool:
    """Write the text as it comes. On a terminal, and of several, the prompt stands in front of it.

    False for an answer that could not be finished, which is told on standard error; the others go on.
    """
    from deepseek_fp4_plugin.llm import GenerationError

    terminal = sys.stdout.isatty()
    if not quiet and (heading or terminal):
        click.echo(click.style(prompt, dim=True) if terminal else f"> {prompt}\n", nl=False)
    failure = None
    try:
        for output in handle:
            if not quiet:
                text = output.outputs[0].text_diff
                click.echo(screen.printable(text) if terminal else text, nl=False)
    except GenerationError as error:
        failure = error
    if not quiet:
        click.echo("\n" if heading else "")
    if failure is not None:
        click.echo(f"deepseek-fp4: this answer could not be finished: {failure}", err=True)
    return failure is None


def _record(prompt: str, handle: "RequestHandle") -> dict[str, Any]:
    output, failure = handle.output, handle.failure
    answer, metrics = output.outputs[0], output.metrics
    return {
        "prompt": prompt,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "error": None if failure is None else str(failure),
        "prompt_tokens": len(output.prompt_token_ids),
        "steps": metrics.steps,
        "drafted": metrics.drafted,
        "accepted": metrics.accepted,
        "seconds": None if metrics.finished is None else metrics.finished - metrics.arrival,
    }
