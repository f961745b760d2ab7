"""`chat`: a conversation on the terminal, or one line of standard input a turn."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import (
    DIRECTIVE,
    SAMPLING_FLAGS,
    Command,
    ModelName,
    engine_config,
    engine_flags,
    read_text,
    sampling_flags,
    sampling_params,
)
from deepseek_fp4_plugin.cli.generate import load
from deepseek_fp4_plugin.cli.speakers import LocalSpeaker, RemoteSpeaker

CARD_SAMPLING = {"temperature": 0.6, "top_p": 0.95}  # DeepSeek's advice, where generation_config.json gives none
_EXAMPLES = (
    "What is the greatest common divisor of 84 and 126?",
    "How many letters r are in strawberry?",
    "Write a haiku about four-bit numbers.",
)
_NUM_EXAMPLES = 4
_HELP = "/reset forgets the conversation, /examples lists problems, /1 sends the first, /exit (or Ctrl-D) ends"


@click.command(cls=Command, short_help="Talk to a model.")
@click.argument("model", type=ModelName(), required=False)
@click.option("--url", metavar="URL", help="Talk to this OpenAI-compatible server; MODEL is then its name for one.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Its first line is the server's key."
)
@click.option("--system", metavar="TEXT", help="A system prompt. The model card advises against one.")
@click.option("--math", is_flag=True, help="Add the card's directive for maths: step by step, answer boxed.")
@click.option("--max-new-tokens", "--max-tokens", type=int, default=4096, show_default=True, help="Of each answer.")
@sampling_flags
@engine_flags
def chat(
    model: str | None,
    url: str | None,
    api_key_file: Path | None,
    system: str | None,
    math: bool,
    max_new_tokens: int,
    **flags: Any,
) -> None:
    """Talk to MODEL (r1_nano unless given). It samples as its generation_config.json says: for R1, temperature 0.6
    and top_p 0.95.

    Ctrl-C stops an answer, and at the prompt ends the program. Where standard input is no terminal, each of its lines
    is a turn.

    \b
    Examples:
      deepseek-fp4 chat
      deepseek-fp4 chat ./r1_nano-NVFP4 --mtp 3 --math
      deepseek-fp4 chat --url http://localhost:8000
      echo "What is 17 + 25?" | deepseek-fp4 chat r1_nano --temperature 0
    """
    if url is not None:
        fields = {name: flags[name] for name in SAMPLING_FLAGS if flags[name] not in (None, (), False)}
        key = None if api_key_file is None else _key(api_key_file)
        speaker = RemoteSpeaker(url, model, key, {"max_tokens": max_new_tokens, **fields})
        Conversation(speaker, system, math, _examples(speaker.model)).run()
        return
    model = model or "r1_nano"
    with load(engine_config(model, flags)) as llm:
        if llm.tokenizer is None or llm.tokenizer.chat_template is None:
            raise ValueError(f"{model} has no chat template; use deepseek-fp4 generate")
        advice = {k: v for k, v in llm.tokenizer.generation_defaults.items() if k in ("temperature", "top_p", "top_k")}
        params = sampling_params(flags, **(advice or CARD_SAMPLING), max_tokens=max_new_tokens)
        Conversation(LocalSpeaker(llm, params), system, math, _examples(model)).run()


def _key(path: Path) -> str:
    """A key file's first line."""
    key = read_text("--api-key-file", path).split("\n")[0].strip()
    if not key or not all("!" <= character <= "~" for character in key):
        raise ValueError(f"--api-key-file {path}: its first line is no key; a key is printable ASCII without blanks")
    return key


class Conversation:
    """The turns so far, and how to take the next one."""

    def __init__(self, speaker: LocalSpeaker | RemoteSpeaker, system: str | None, math: bool, examples: list[str]):
        self._speaker, self._examples, self._math = speaker, examples, math
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = list(self._opening)
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Until the input ends or /exit."""
        if self._terminal:
            screen.note(_HELP)
            self._list_examples()
        for line in self._turns():
            command = line.lower()
            if command in ("/exit", "/quit"):
                return
            if command == "/reset":
                self._messages = list(self._opening)
                screen.note("forgotten")
            elif command == "/examples":
                self._list_examples()
            elif command == "/help":
                screen.note(_HELP)
            elif command.startswith("/") and command[1:].isdigit() and 1 <= int(command[1:]) <= len(self._examples):
                example = self._examples[int(command[1:]) - 1]
                click.echo(example)
                self._answer(example)
            elif command.startswith("/"):
                screen.note(f"no command {line}; {_HELP}")
            else:
                self._answer(line)

    def _turns(self) -> Iterator[str]:
        """The user's lines, without empty ones."""
        if not self._terminal:
            yield from filter(None, map(str.strip, sys.stdin))
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then has editing and a history
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                click.echo()
                return
            if line:
                yield line

    def _answer(self, text: str) -> None:
        """One turn. Ctrl-C during the answer keeps what was said so far out of the conversation."""
        content = f"{text}\n{DIRECTIVE}" if self._math else text
        messages = [*self._messages, {"role": "user", "content": content}]
        thought, stream = False, self._speaker.stream(messages)
        try:
            for split in stream:
                thought = self._show(split.reasoning, split.content, thought)
        except KeyboardInterrupt:
            stream.close()
            click.echo()
            screen.note("stopped; this turn is forgotten")
            if not self._terminal:
                raise
            return
        click.echo()
        screen.note(self._speaker.note)
        if self._speaker.cut:
            screen.note("cut off at --max-new-tokens")
        self._messages = [*messages, {"role": "assistant", "content": self._speaker.text}]

    def _show(self, reasoning: str, content: str, thought: bool) -> bool:
        """Write a piece of an answer, thinking dimmed; whether there has been thinking that no answer followed yet."""
        if self._terminal:
            reasoning, content = screen.printable(reasoning), screen.printable(content)
        if reasoning:
            opening = "" if thought or self._terminal else "<think>\n"
            click.echo(click.style(reasoning, dim=True) if self._terminal else opening + reasoning, nl=False)
            thought = True
        if content:
            closing = "\n\n" if self._terminal else "\n</think>\n\n"
            click.echo((closing if thought else "") + content, nl=False)
            thought = False
        return thought

    def _list_examples(self) -> None:
        for number, example in enumerate(self._examples, 1):
            screen.note(f"  /{number}  {example}")


def _examples(model: str) -> list[str]:
    """Problems to try: r1_nano's own kind for a model of its name, else some for a large one."""
    if "r1_nano" not in model:
        return list(_EXAMPLES)
    from deepseek_fp4_plugin.assets.held_out import load_held_out

    plain = [p.prompt for p in load_held_out() if "\\boxed" not in p.prompt and p.language == "en"]
    return plain[:_NUM_EXAMPLES]
