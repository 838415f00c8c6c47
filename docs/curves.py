"""Draw the curves of one or more runs, from the metrics.csv that train.py writes.

    pip install matplotlib
    python docs/curves.py OUT.png runs/a/metrics.csv runs/b/metrics.csv
    python docs/curves.py OUT.png FishNet-99=runs/a/metrics.csv "the tail alone=runs/b/metrics.csv"

The picture shows loss and top-1 error by epoch: training dashed, validation solid, with a colour
for each run. Without LABEL= a run is named after its folder.
"""

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Curves = dict[str, list[tuple[int, float]]]  # points (epoch, value) by column
PANELS = (("loss", "loss", 1), ("top1_error", "top-1 error, %", 100))  # column, title, factor
STYLES = {"train": "--", "val": "-"}

def parse_run(argument: str) -> tuple[str, Path]:
    """Return (label, path) of "LABEL=path" or "path"."""
    label, equals, path = argument.partition("=")
    if equals and not Path(argument).exists():  # the name of a folder may contain "=", too
        return label, Path(path)
    return Path(argument).resolve().parent.name, Path(argument)

def read_curves(path: Path) -> Curves:
    """Read a metrics.csv. Exits with one line if it is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        sys.exit(f"curves.py: {path}: {error}")
    if not rows or not {"epoch", "train_loss", "train_top1_error"} <= rows[0].keys():
        sys.exit(f"curves.py: {path}: not a metrics.csv of train.py")
    curves = {}
    for column in (f"{split}_{name}" for split in STYLES for name, _, _ in PANELS):
        shown = [row for row in rows if row.get(column)]  # an epoch may lack a validation
        curves[column] = [(int(row["epoch"]), float(row[column])) for row in shown]
    return curves

def draw(out: Path, runs: list[tuple[str, Curves]]) -> None:
    """Draw a panel for each of PANELS. Exits with one line if the file cannot be written."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for panel, (column, title, factor) in zip(figure.subplots(1, 2), PANELS):
        for i, (_, curves) in enumerate(runs):
            for split, style in STYLES.items():
                points = [(epoch, factor * value) for epoch, value in curves[f"{split}_{column}"]]
                if points:
                    panel.plot(*zip(*points), f".{style}", markersize=4, color=f"C{i}")
        panel.set(title=title, xlabel="epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    lines = [Line2D([], [], color=f"C{i}", label=label) for i, (label, _) in enumerate(runs)]
    title = "training dashed, validation solid"
    figure.legend(handles=lines, loc="outside lower center", ncols=3, title=title)
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:  # matplotlib does not know the format
        sys.exit(f"curves.py: {out}: {error}")

def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of runs.")
    parser.add_argument("out", metavar="OUT.png", type=Path)
    parser.add_argument("runs", metavar="[LABEL=]metrics.csv", nargs="+", type=parse_run)
    args = parser.parse_args()
    draw(args.out, [(label, read_curves(path)) for label, path in args.runs])

if __name__ == "__main__":
    main()
