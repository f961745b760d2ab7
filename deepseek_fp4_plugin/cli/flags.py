"""Flags: dashes and underscores alike, suggestions for misspelt ones, and the flags that several commands share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import click
from click.shell_completion import CompletionItem
from pydantic.fields import FieldInfo

from deepseek_fp4_plugin.config import EngineConfig, SamplingParams, did_you_mean
from deepseek_fp4_plugin.settings.choices import Choices, Flag
from deepseek_fp4_plugin.settings.engine import FLAT

_F = TypeVar("_F", bound=Callable[..., Any])

DIRECTIVE = "Please reason step by step, and put your final answer within \\boxed{}."  # the model card's, for maths


def _dashes(name: str) -> str:
    return name.replace("_", "-")


class Command(click.Command):
    """A command whose flags may be written --max-new-tokens or --max_new_tokens."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        return super().make_context(*args, **{"token_normalize_func": _dashes, **extra})


class Group(click.Group):
    """Commands, listed in the order they were added; a misspelt one is told what it may have meant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = _dashes(args[0])
        if name not in self.commands and not name.startswith("-"):
            ctx.fail(f"no command {args[0]!r}{did_you_mean(name, self.commands)}")
        return super().resolve_command(ctx, [name, *args[1:]])


class ModelName(click.ParamType):
    """A model; completes folders."""

    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem("r1_nano"), CompletionItem(incomplete, type="dir")]


def field_flags(serve_only: bool) -> dict[str, Callable[[Any], Any]]:
    """A click option for each field of EngineConfig and its parts that asks for one, by the name of its setting."""
    options = {}
    for name, field in EngineConfig.model_fields.items():
        if isinstance(field.default, Choices):  # its fields have flat keys, of which the first is the setting
            settings = [
                ([key for key, place in FLAT.items() if place == (name, inner)], own)
                for inner, own in type(field.default).model_fields.items()
            ]
        else:
            settings = [([name, *(alias for alias, known in EngineConfig.aliases.items() if known == name)], field)]
        for names, own in settings:
            flag = next((data for data in own.metadata if isinstance(data, Flag)), None)
            if flag is not None and flag.serve_only == serve_only:
                options[names[0]] = _option(names, own, flag)
    return options


def _option(names: Sequence[str], field: FieldInfo, flag: Flag) -> Callable[[Any], Any]:
    """A flag under a setting's names; left out, it says nothing."""
    setting, spellings = names[0], [f"--{_dashes(name)}" for name in names]
    types = _types(field.annotation)
    if Literal in types:
        return click.option(*spellings, setting, type=click.Choice(types[Literal]), help=flag.help)
    if bool in types and type(None) in types:
        both = (f"{name}/--no-{name[2:]}" for name in spellings)
        return click.option(*both, setting, default=None, help=flag.help)
    if bool in types:
        return click.option(*spellings, setting, is_flag=True, default=None, help=flag.help)
    kind = next(kind for kind in (int, float, str) if kind in types)
    return click.option(*spellings, setting, type=kind, metavar=flag.metavar, help=flag.help)


def _types(annotation: Any) -> dict[Any, list[Any]]:
    """The plain types in an annotation; for Literal its values."""
    if get_origin(annotation) is Literal:
        return {Literal: list(get_args(annotation))}
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    found: dict[Any, list[Any]] = {} if get_args(annotation) else {annotation: []}
    for part in get_args(annotation):
        found |= _types(part)
    return found


_COMMON, _OF_SERVE = field_flags(serve_only=False), field_flags(serve_only=True)
_MTP = {
    "mtp": click.option(
        "--mtp",
        "--speculative",
        "--num-nextn-predict-layers",
        "mtp",
        type=click.IntRange(min=0),
        metavar="K",
        help="Draft K tokens a step with the MTP layer; 0: none.",
    ),
    "relaxed": click.option(
        "--relaxed", is_flag=True, help="Relaxed acceptance of drafts inside <think> (with --mtp)."
    ),
    "relaxed_topk": click.option(
        "--relaxed-topk", type=int, help="  a draft passes among the so many likeliest tokens [10]"
    ),
    "relaxed_delta": click.option(
        "--relaxed-delta", type=float, help="  and at most so much less likely than the first [0.6]"
    ),
}
_FILE = {
    "config": click.option(
        "--config",
        "--extra-llm-api-options",
        "config",
        metavar="YAML",
        type=click.Path(path_type=Path),
        help="A file of settings, as trtllm-serve takes it; flags win over it.",
    )
}
ENGINE_FLAGS = (*_COMMON, *_OF_SERVE, *_MTP, *_FILE)


def engine_flags(command: _F) -> _F:
    """The flags of an engine's configuration; `engine_config` turns what was given into an EngineConfig."""
    for option in reversed([*_COMMON.values(), *_MTP.values(), *_FILE.values()]):
        command = option(command)
    return command


def serve_flags(command: _F) -> _F:
    """Those that only a server has."""
    for option in _OF_SERVE.values():
        command = option(command)
    return command


def engine_config(model: str, flags: Mapping[str, Any], **more: Any) -> EngineConfig:
    """The configuration of a command's engine flags, and `more` of its own, over its YAML file if there is one."""
    given = {name: flags[name] for name in ENGINE_FLAGS if flags.get(name) is not None} | more
    path = given.pop("config", None)
    drafts = given.pop("mtp", None)
    relaxed: dict[str, Any] = {name: given.pop(name) for name in ("relaxed_topk", "relaxed_delta") if name in given}
    if given.pop("relaxed", False):
        relaxed = {
            "use_relaxed_acceptance_for_thinking": True, "relaxed_topk": 10, "relaxed_delta": 0.6, **relaxed
        }  # fmt: skip
    if drafts == 0:
        given["speculative_config"] = None
    elif drafts or relaxed:
        if drafts is None and path is None:
            raise click.UsageError("relaxed acceptance is of drafted tokens: give --mtp as well")
        given["speculative_config"] = relaxed | ({"num_nextn_predict_layers": drafts} if drafts else {})
    if path is not None:
        return EngineConfig.from_yaml(path, model=model, **given)
    return EngineConfig.from_kwargs(model, **given)


def sampling_flags(command: _F) -> _F:
    """The flags of a request; `sampling_params` turns them into SamplingParams."""
    options = [
        click.option("--temperature", type=float, metavar="T", help="0 is greedy."),
        click.option("--top-p", type=float, metavar="P", help="Sample from the likeliest tokens of this total."),
        click.option("--top-k", type=int, metavar="K", help="Sample from so many tokens; 0: all."),
        click.option("--min-p", type=float, metavar="P", help="Leave out tokens this much less likely than the first."),
        click.option("--seed", type=int, help="Of the random numbers; the same seed gives the same text."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
        click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos")


def sampling_params(flags: Mapping[str, Any], **defaults: Any) -> SamplingParams:
    """`defaults`, and over them what the flags say."""
    given = {name: flags[name] for name in SAMPLING_FLAGS if flags[name] not in (None, (), False)}
    return SamplingParams(**{**defaults, **given})


def json_flag(command: _F) -> _F:
    return click.option(
        "--json",
        "json_path",
        metavar="FILE",
        callback=_writable,
        help="Write what is shown as JSON as well; - prints only JSON.",
    )(command)


def _writable(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Refuse a file in a folder that is not there before hours of work, not after."""
    if path not in (None, "-") and not Path(str(path)).absolute().parent.is_dir():
        raise click.BadParameter(f"{Path(str(path)).parent} is not a folder", ctx, param)
    return path


def read_text(flag: str, path: Path) -> str:
    """A file's text. Raises ValueError naming the flag and the file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ValueError(f"{flag} {path} cannot be read: {reason}") from None
