"""`doctor`: what a bug report should begin with; and what is wrong with a checkpoint, and its repair."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import Command, ModelName, json_flag

if TYPE_CHECKING:
    from deepseek_fp4_plugin.checkup.diagnosis import Diagnosis


@click.command(cls=Command, short_help="Show machine and kernels, or examine and repair a checkpoint.")
@click.argument("checkpoint", type=ModelName(), required=False, metavar="[CHECKPOINT]")
@click.option("--source", type=ModelName(), help="The FP8 or BF16 checkpoint it was made from: decides what it cannot.")
@click.option("--repair", "destination", metavar="DST", type=click.Path(path_type=Path), help="Write a mended copy.")
@click.option("--full", is_flag=True, help="Read every value, not headers and a hundredth of the bytes.")
@json_flag
def doctor(
    checkpoint: str | None, source: str | None, destination: Path | None, full: bool, json_path: str | None
) -> None:
    """Without a CHECKPOINT: show this machine, the packages installed, and the kernels chosen for it.

    With one: say what is wrong with it, what each fault does in TensorRT-LLM, vLLM, SGLang and here, and what can be
    repaired. Ends with status 1 where something is wrong. --repair reads every value and leaves CHECKPOINT as it is.

    \b
    Examples:
      deepseek-fp4 doctor
      deepseek-fp4 doctor ./R1-NVFP4
      deepseek-fp4 doctor ./R1-NVFP4 --source deepseek-ai/DeepSeek-R1-0528 --repair ./R1-NVFP4-mended
    """
    if checkpoint is None:
        if source or destination or full:
            raise click.UsageError("--source, --repair and --full are about a CHECKPOINT; name one")
        _machine(json_path)
        return
    if not _examine(checkpoint, source, destination, full, json_path):
        raise click.exceptions.Exit(1)


def _machine(json_path: str | None) -> None:
    from deepseek_fp4_plugin.doctor import examine

    facts = examine()
    if json_path is not None:
        screen.write_json(json_path, facts)
    if json_path != "-":
        out = screen.Output()
        for section, entries in facts.items():
            out(screen.table(("", ""), list(entries.items()), title=section))
            out("")


def _examine(checkpoint: str, source: str | None, destination: Path | None, full: bool, json_path: str | None) -> bool:
    """Whether the checkpoint, or its mended copy, is in order."""
    from deepseek_fp4_plugin.checkpoint.hub import resolve
    from deepseek_fp4_plugin.checkup.diagnosis import diagnose
    from deepseek_fp4_plugin.cli.inspect import local_folder

    folder = local_folder(checkpoint, "doctor")
    original = None if source is None else resolve(source)
    found = diagnose(folder, original, full or destination is not None)
    content = found.to_json()
    out = screen.Output(json_path)
    _show(found, out)
    healthy = not found.findings
    if destination is not None and healthy:
        out("nothing to mend; nothing is written")
    elif destination is not None:
        from deepseek_fp4_plugin.checkup.repair import repair

        with screen.progress("mend") as progress:
            repair(found, destination, progress)
        after = diagnose(destination.expanduser(), original)
        out("")
        _show(after, out)
        content["after_repair"] = after.to_json()
        healthy = not after.findings
    if json_path is not None:
        screen.write_json(json_path, content)
    return healthy


def _show(found: "Diagnosis", out: screen.Output) -> None:
    from deepseek_fp4_plugin.checkup.consequences import CONSEQUENCES, RUNTIMES

    content = found.to_json()
    compared = content["compared_with_source"]
    against = f", {compared:,} matrices compared with {content['source']}" if compared else ""
    out(f"{found.folder}: headers and {screen.size(found.spent)} of {screen.size(content['bytes'])} read{against}")
    for finding in found.findings:
        out("")
        out(f"{finding.severity.upper()}: {finding}")
        if finding.fault is not None:
            consequence = CONSEQUENCES[finding.fault]
            for field, name in RUNTIMES.items():
                out(f"    {name + ':':14} {getattr(consequence, field)}")
            out(f"    {'repair:':14} {consequence.mending}")
    out("" if found.findings else "nothing is wrong with it")
