"""`doctor`: what a bug report should begin with."""

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import Command, json_flag


@click.command(cls=Command, short_help="Show machine, packages and kernels.")
@json_flag
def doctor(json_path: str | None) -> None:
    """Show this machine, the packages installed, and the kernels chosen for it.

    \b
    Examples:
      deepseek-fp4 doctor
      deepseek-fp4 doctor --json machine.json
    """
    from deepseek_fp4_plugin.doctor import examine

    facts = examine()
    if json_path is not None:
        screen.write_json(json_path, facts)
    if json_path != "-":
        out = screen.Output()
        for section, entries in facts.items():
            out(screen.table(("", ""), list(entries.items()), title=section))
            out("")
