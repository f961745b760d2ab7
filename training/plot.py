"""Plot the loss curves of training runs.

python -m training.plot docs/r1_nano_training.png runs/first/curve.csv runs/second/curve.csv
"""

import argparse
import csv
from pathlib import Path
from statistics import median

from training.data import LONG_EVERY


def smooth(values: list[float], reach: int = 6) -> list[float]:
    """Median of each value and its neighbours."""
    return [median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def plot(curves: list[Path], image: Path) -> None:
    """Main and draft losses, and the load of the busiest expert, over the tokens of all runs together."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[dict[str, str]] = []
    tokens: list[float] = []
    starts: list[float] = []
    for curve in curves:
        with open(curve, newline="") as file:
            run = list(csv.DictReader(file))
        starts.append(tokens[-1] if tokens else 0.0)
        rows += run
        tokens += [starts[-1] + float(row["tokens"]) / 1e6 for row in run]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(3, 1))
    labels = {"loss": "next token", "mtp_1": "draft 1", "mtp_2": "draft 2", "mtp_3": "draft 3"}
    for column, label in labels.items():
        values = [float(row[column]) for row in rows]
        (line,) = top.plot(tokens, smooth(values), label=label, linewidth=1.2)
        if column == "loss":
            top.plot(tokens, values, color=line.get_color(), alpha=0.25, linewidth=0.7)
    top.set_yscale("log")
    top.set_ylabel("cross entropy (nats a character)")
    top.set_title(f"r1_nano: training loss (spikes: every {LONG_EVERY}th batch is of longer texts, with more prose)")
    top.legend()
    bottom.plot(tokens, smooth([float(row["imbalance"]) for row in rows]), color="tab:gray")
    bottom.set_ylabel("busiest / mean expert")
    bottom.set_xlabel("tokens (millions)")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    for start in starts[1:]:
        for axis in (top, bottom):
            axis.axvline(start, color="black", linestyle=":", linewidth=1)
    figure.tight_layout()
    figure.savefig(image, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="PNG to write")
    parser.add_argument("curves", type=Path, nargs="+", help="curve.csv of each run, in order")
    arguments = parser.parse_args()
    plot(arguments.curves, arguments.image)


if __name__ == "__main__":
    main()
