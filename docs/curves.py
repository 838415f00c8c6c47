"""Curves of one or more runs, from the metrics.csv that train.py writes.

    pip install matplotlib                       # for this picture alone
    python docs/curves.py OUT.png NAME=runs/a/metrics.csv [NAME=runs/b/metrics.csv ...]

Draws loss and top-1 error by epoch, training dashed, validation solid, a colour for each run.
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def draw(out: str, runs: dict[str, Path]) -> None:
    """One picture with two panels. OSError or KeyError: a file is missing or no metrics.csv."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for colour, (name, path) in enumerate(runs.items()):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        epochs = [int(row["epoch"]) for row in rows]
        for panel, column, scale in ((panels[0], "loss", 1), (panels[1], "top1_error", 100)):
            for split, style in (("train", "--"), ("val", "-")):
                if f"{split}_{column}" in rows[0]:
                    values = [scale * float(row[f"{split}_{column}"]) for row in rows]
                    panel.plot(epochs, values, style, color=f"C{colour}", label=f"{name}, {split}")
    for panel, title in zip(panels, ("loss", "top-1 error, %")):
        panel.set(title=title, xlabel="epoch")
        panel.grid(alpha=0.3)
    panels[1].legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    if len(sys.argv) < 3 or not all("=" in run for run in sys.argv[2:]):
        sys.exit(__doc__)
    runs = {name: Path(path) for name, path in (run.split("=", 1) for run in sys.argv[2:])}
    try:
        draw(sys.argv[1], runs)
    except (OSError, KeyError, IndexError, ValueError) as error:
        sys.exit(f"curves.py: {error!r}: expected metrics.csv files of train.py")


if __name__ == "__main__":
    main()
