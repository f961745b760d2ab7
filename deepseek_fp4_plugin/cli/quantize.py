"""`quantize`: an FP8 (or BF16) checkpoint becomes an NVFP4 one."""

from pathlib import Path

import click

from deepseek_fp4_plugin.cli import screen
from deepseek_fp4_plugin.cli.flags import Command, ModelName, json_flag


class Bytes(click.ParamType):
    """A size such as 5GB or 500MB, in powers of ten."""

    name = "size"
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # noqa: RUF012

    def convert(self, value, param, ctx) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().upper()
        unit = next((u for u in ("KB", "MB", "GB", "TB", "B") if text.endswith(u)), "")
        try:
            count = int(float(text.removesuffix(unit)) * self.units.get(unit, 1))
        except (ValueError, OverflowError):
            count = 0
        if count < 1:
            self.fail(f"{value!r} is not a size; write for example 5GB", param, ctx)
        return count


@click.command(cls=Command, short_help="Write an FP8 checkpoint as an NVFP4 one.")
@click.argument("source", type=ModelName())
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    default="max",
    show_default=True,
    help="How scales and codes are found: max, four-over-six, mse-sweep, local-hessian or gptq.",
)
@click.option("--arithmetic", metavar="RELEASE", help="Of max: modelopt-0.47.0 (default), or modelopt-0.31.0's bits.")
@click.option(
    "--layout",
    type=click.Choice(["v1", "v2"]),
    default="v1",
    show_default=True,
    help="v1: as NVIDIA published DeepSeek-R1-0528-FP4; v2: the attention's output projection as well.",
)
@click.option(
    "--format",
    type=click.Choice(["modelopt", "compressed-tensors"]),
    default="modelopt",
    show_default=True,
    help="Whose names the tensors get; the bits are the same.",
)
@click.option(
    "--calibration",
    multiple=True,
    default=("cnn_dailymail",),
    show_default=True,
    metavar="NAME|PATH",
    help="Text the activations are measured on: cnn_dailymail or another data set of the hub "
    "(OWNER/NAME[:CONFIG[:SPLIT]]), builtin, a txt, jsonl, json, csv, tsv or parquet file, or several with commas "
    "between or the flag repeated; or what --save-calibration kept; or none, for recipes that look at no data.",
)
@click.option("--samples", type=click.IntRange(min=1), default=512, show_default=True, help="Texts to take of it.")
@click.option("--tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of each text.")
@click.option(
    "--kv-cache",
    type=click.Choice(["fp8", "bf16"]),
    default="fp8",
    show_default=True,
    help="The latent cache that the checkpoint asks for at run time.",
)
@click.option("--kv-scales", is_flag=True, help="Calibrate a scale of each layer's FP8 cache too.")
@click.option(
    "--mtp",
    type=click.Choice(["bf16", "nvfp4"]),
    default="bf16",
    show_default=True,
    help="What the MTP layer becomes; published checkpoints keep it.",
)
@click.option(
    "--smooth",
    is_flag=True,
    help="Edit the norms and routers before the MLPs by powers of two, so that loud channels cost less.",
)
@click.option("--max-shard-size", type=Bytes(), default="5GB", show_default=True, help="Largest file to write.")
@click.option(
    "--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N; calibrates there."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of texts.")
@click.option(
    "--max-memory",
    type=Bytes(),
    metavar="SIZE",
    help="Stay below this much memory, such as 4GB; experts then come in groups. By default a layer is held whole.",
)
@click.option(
    "--share",
    is_flag=True,
    help="Work beside other runs of the same command with --share, here or on machines that see the same folders.",
)
@click.option(
    "--save-calibration", metavar="FILE", help="Keep what was measured in a file for another run's --calibration."
)
@json_flag
def quantize(
    source: str,
    destination: Path,
    recipe: str,
    arithmetic: str | None,
    layout: str,
    format: str,
    calibration: tuple[str, ...],
    samples: int,
    tokens: int,
    kv_cache: str,
    kv_scales: bool,
    mtp: str,
    smooth: bool,
    max_shard_size: int,
    device: str,
    seed: int,
    max_memory: int | None,
    share: bool,
    save_calibration: str | None,
    json_path: str | None,
) -> None:
    """Write the FP8 or BF16 checkpoint SOURCE as an NVFP4 checkpoint to DESTINATION, a folder that is not there yet.

    Calibrates one decoder layer at a time and converts shard by shard, so that memory does not grow with the model. An
    interrupted run leaves DESTINATION.incomplete; the same command goes on from there.

    \b
    Examples:
      deepseek-fp4 quantize r1_nano ./r1_nano-NVFP4 --calibration builtin --samples 64
      deepseek-fp4 quantize deepseek-ai/DeepSeek-R1-0528 ./DeepSeek-R1-0528-NVFP4 --device cuda
      deepseek-fp4 quantize ./fp8 ./nvfp4 --calibration articles.jsonl --layout v2 --kv-cache bf16
      deepseek-fp4 quantize ./fp8 ./nvfp4 --calibration kept.json --max-memory 4GB --share
    """
    from deepseek_fp4_plugin.quantization.quantize import quantize_checkpoint

    with screen.stages() as stages:
        report = quantize_checkpoint(
            source,
            destination,
            recipe=recipe,
            arithmetic=arithmetic,
            layout=layout,
            format=format,
            calibration=",".join(calibration),
            samples=samples,
            tokens=tokens,
            kv_cache=kv_cache,
            kv_scales=kv_scales,
            mtp=mtp,
            smooth=smooth,
            max_shard_bytes=max_shard_size,
            device=device,
            seed=seed,
            max_memory=max_memory,
            share=share,
            save_calibration=save_calibration,
            progress=lambda stage, done, total: stages(stage, done, total) if stage != "convert" else None,
            moved=screen.Transfer("convert"),
        )
    out = screen.Output(json_path)
    for table in report.tables():
        out(table)
        out("")
    tokens_text = f"calibrated on {report.samples} samples ({report.tokens:,} tokens) of {report.calibration}"
    out(f"{report.destination}: {tokens_text if report.samples else 'input scales not calibrated, each of them 1'}")
    if json_path is not None:
        screen.write_json(json_path, report.to_json())
