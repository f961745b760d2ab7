"""`dequantize`: a quantized checkpoint back to BF16 or FP8."""

from pathlib import Path

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import Command, ModelName
from deepseek_fp4_plugin.cli.quantize import Bytes


@click.command(cls=Command, short_help="Write a quantized checkpoint in BF16 or FP8.")
@click.argument("source", type=ModelName())
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["bf16", "fp8"]),
    default="bf16",
    show_default=True,
    help="bf16, or fp8: 128x128 blocks, as DeepSeek publishes.",
)
@click.option("--max-shard-size", type=Bytes(), default="5GB", show_default=True, help="Largest file to write.")
def dequantize(source: str, destination: Path, to: str, max_shard_size: int) -> None:
    """Write the NVFP4 or FP8 checkpoint SOURCE with plain weights to DESTINATION, a folder that is not there yet.

    The values are those that runtimes compute with; what quantizing lost does not come back. An interrupted run is
    continued by the same command.

    \b
    Examples:
      deepseek-fp4 dequantize ./r1_nano-NVFP4 ./r1_nano-BF16
      deepseek-fp4 dequantize nvidia/DeepSeek-R1-0528-FP4 ./fp8 --to fp8
    """
    from deepseek_fp4_plugin.quantization.dequantize import dequantize_checkpoint

    with screen.progress("dequantize") as progress:
        before, after = dequantize_checkpoint(
            source, destination, to=to, max_shard_bytes=max_shard_size, progress=progress
        )
    screen.Output(None)(f"{destination}: {screen.size(before)} became {screen.size(after)} in {to.upper()}")
