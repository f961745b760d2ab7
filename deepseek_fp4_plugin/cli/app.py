"""The program: its commands, and what a mistake, Ctrl-C or a closed pipe looks like."""

import logging
import os
import sys
from collections.abc import Sequence

import click

from deepseek_fp4_plugin import __version__
from deepseek_fp4_plugin.cli.chat import chat
from deepseek_fp4_plugin.cli.demo import demo
from deepseek_fp4_plugin.cli.dequantize import dequantize
from deepseek_fp4_plugin.cli.doctor import doctor
from deepseek_fp4_plugin.cli.evaluate import evaluate
from deepseek_fp4_plugin.cli.flags import Group
from deepseek_fp4_plugin.cli.generate import generate
from deepseek_fp4_plugin.cli.inspect import inspect
from deepseek_fp4_plugin.cli.plan import plan
from deepseek_fp4_plugin.cli.quantize import quantize
from deepseek_fp4_plugin.cli.serve import serve
from deepseek_fp4_plugin.config import did_you_mean

PROGRAM = "deepseek-fp4"
INTERRUPTED = 130  # as a shell reports SIGINT


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name=PROGRAM)
def app() -> None:
    """DeepSeek-R1/V3 in NVFP4: quantize an FP8 checkpoint, look at it, and run it.

    A MODEL is a checkpoint folder, a Hugging Face id such as nvidia/DeepSeek-R1-0528-FP4, or r1_nano, a small model of
    the same architecture that comes with the package.

    \b
    First steps:
      deepseek-fp4 demo                                  the whole way, in a minute or two
      deepseek-fp4 chat r1_nano                          talk to the embedded model
      deepseek-fp4 quantize r1_nano ./r1_nano-NVFP4      FP8 in, NVFP4 out
      deepseek-fp4 inspect ./r1_nano-NVFP4               what a checkpoint holds
    """


for command in (demo, quantize, dequantize, generate, chat, serve, evaluate, inspect, doctor, plan):
    app.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 for what could not be done, 2 for wrong usage, 130 for Ctrl-C."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit status. A user's mistake is one sentence on standard error; only a fault of ours has a traceback."""
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the program
    try:
        result = app.main(args=arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _fail(f"{_mistake(error)}{hint}", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except click.Abort:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # click sees to those inside a command
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except ValueError as error:
        return _fail(" ".join(str(error).split()), 1)


def _mistake(error: click.UsageError) -> str:
    if isinstance(error, click.NoSuchOption):
        return f"no flag {error.option_name}{did_you_mean(error.option_name, error.possibilities or ())}"
    message = error.format_message().rstrip(".")
    return message[:1].lower() + message[1:]


def _fail(sentence: str, status: int) -> int:
    click.echo(f"{PROGRAM}: {sentence}", err=True)
    return status
