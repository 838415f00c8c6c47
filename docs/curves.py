"""Curves of one or more runs, from the metrics.csv that train.py writes.

    pip install matplotlib    # for this picture alone
    python docs/curves.py OUT.png runs/a/metrics.csv [runs/b/metrics.csv ...]
    python docs/curves.py OUT.png FishNet-99=runs/a/metrics.csv "the tail alone=runs/b/metrics.csv"

Draws loss and top-1 error (per cent) by epoch, side by side: training dashed, validation solid, a colour for each run.
A run goes by its label, LABEL=path, or else by its folder's name. An epoch without validation has no solid point.
"""

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Curves = dict[str, list[tuple[int, float]]]  # points (epoch, value) by column
PANELS = (("loss", "loss", 1), ("top1_error", "top-1 error, %", 100))  # a column without train_ or val_, title, factor
SPLITS = {"train": "--", "val": "-"}


def parse_run(argument: str) -> tuple[str, Path]:
    """(label, path) of "LABEL=path" or "path"."""
    label, equals, path = argument.partition("=")
    plain = not equals or Path(argument).exists()  # a folder's name may have a "="
    return (Path(argument).resolve().parent.name, Path(argument)) if plain else (label, Path(path))


def read_curves(path: Path) -> Curves:
    """OSError, ValueError, csv.Error: no file, or no metrics.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not all(row.get(name) for row in rows for name in ("epoch", "train_loss", "train_top1_error")):
        raise ValueError("expected rows with epoch, train_loss and train_top1_error, as train.py writes them")
    columns = [f"{split}_{column}" for split in SPLITS for column, _, _ in PANELS]
    return {name: [(int(row["epoch"]), float(row[name])) for row in rows if row.get(name)] for name in columns}


def draw(out: Path, runs: list[tuple[str, Curves]]) -> None:
    """OSError, ValueError: the picture cannot be written there, or not in the format of that name."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for panel, (column, title, factor) in zip(figure.subplots(1, 2), PANELS):
        for i, (_, curves) in enumerate(runs):
            for split, style in SPLITS.items():
                if points := curves[f"{split}_{column}"]:
                    epochs, values = zip(*points)
                    panel.plot(epochs, [factor * value for value in values], f".{style}", markersize=4, color=f"C{i}")
        panel.set(title=title, xlabel="epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    lines = [Line2D([], [], color=f"C{i}", label=label) for i, (label, _) in enumerate(runs)]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, title="training dashed, validation solid")
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.png", type=Path)
    parser.add_argument("runs", metavar="[LABEL=]metrics.csv", nargs="+", type=parse_run)
    args = parser.parse_args()
    runs = []
    for label, path in args.runs:
        try:
            runs.append((label, read_curves(path)))
        except (OSError, ValueError, csv.Error) as error:
            sys.exit(f"{path}: {getattr(error, 'strerror', None) or error}")
    try:
        draw(args.out, runs)
    except (OSError, ValueError) as error:
        sys.exit(f"{args.out}: {getattr(error, 'strerror', None) or error}")


if __name__ == "__main__":
    main()
