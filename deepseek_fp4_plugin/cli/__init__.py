"""The command line, `deepseek-fp4`: one file a command; the only place that parses arguments."""

from deepseek_fp4_plugin.cli.app import main

__all__ = ["main"]
