"""Do the slides' improvements help? The same training of small networks that differ in one thing each.

    python examples/study.py --data-dir data             # trains what runs/study does not hold yet, then the table
    python examples/study.py --seeds 0 -- --compile      # some seeds; after "--": flags for train.py
    python examples/study.py --csv runs.csv              # a row for each run besides
    pip install matplotlib && python examples/study.py --picture norms.png

A seed gives the weights, the split, the order of the images and their augmentation, and every run sees as many: so
seeds pair the variants. Interrupted runs go on where they stopped; programs with other variants may share the work.

The table is Markdown. Of the validation error after the last epoch, in per cent: mean and standard deviation over the
seeds; mean difference from the slides' network and its standard error, of the paired seeds. Of the gradient norms, as
train.py logs them: the mean over the first tenth of the training, and over the last.
"""

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))

from fishnet import create_model
from flops import count

TRAIN = Path(__file__).parent.parent / "train.py"
# As the slides have it, but small: a run takes minutes on one core.
NETWORK = {"channels": (48, 48, 64, 96), "tail_depths": (1, 2, 2, 1), "stem_stride": 2, "final_norm": True}
TAIL = {"body_depths": (), "head_depths": ()}
VARIANTS = {
    "slides": {},
    "tail repeats channels": {"tail_shortcut": "repeat"},
    "no SE unit": {"bridge": "none"},
    "both": {"tail_shortcut": "repeat", "bridge": "none"},
    "post-activation": {"preact": False},
    "tail alone": TAIL,
    "tail alone, wider and deeper": TAIL | {"channels": (112, 112, 128, 192), "tail_depths": (2, 3, 3, 2)},
    "no dilation": {"body_dilations": (1, 1, 1)},
    "k = 1": {"k": 1},
    "k = 4": {"k": 4},
}
PARTS = ("tail", "body", "head")
Row = dict[str, str | int | float]


def train(variant: str, seed: int, folder: Path, data_dir: str, flags: list[str]) -> None:
    """Run train.py to its end, from where it is. CalledProcessError: it failed, and has said why."""
    fields = [f"{name}={value!r}" for name, value in (NETWORK | VARIANTS[variant]).items()]
    command = [
        sys.executable, str(TRAIN), "--recipe", "strong", "--model", "fishnet99", "--data-dir", data_dir,
        "--epochs", "2", "--warmup-epochs", "0.3", "--val-fraction", "0.4", "--seed", str(seed),
        "--model-args", *fields, "--output-dir", str(folder), "--resume", "auto", *flags,
    ]  # fmt: skip
    subprocess.run(command, check=True)


def gradient_norms(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, norm) of the gradient of each part of a run's network."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    logged = [part for part in PARTS if f"gradient_norm/{part}" in events.Tags()["scalars"]]
    return {part: [(p.step, p.value) for p in events.Scalars(f"gradient_norm/{part}")] for part in logged}


def summarise(variant: str, seed: int, folder: Path) -> Row:
    """A run as a row: the validation error after its last epoch, in per cent, and its gradient norms."""
    with (folder / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    row: Row = {"variant": variant, "seed": seed, "val_top1_error": 100 * float(last["val_top1_error"])}
    for part, points in gradient_norms(folder).items():
        norms = [norm for _, norm in points]
        tenth = max(1, len(norms) // 10)
        row |= {f"{part}_first": mean(norms[:tenth]), f"{part}_last": mean(norms[-tenth:])}
    return row


def table(rows: list[Row]) -> Iterable[str]:
    """The lines of the table; this file's docstring says what is in it."""
    errors = {(row["variant"], row["seed"]): row["val_top1_error"] for row in rows}
    yield "| variant | MACs, M | seeds | error, % | std | against `slides` | " + " | ".join(PARTS) + " |"
    yield "| --- " * (6 + len(PARTS)) + "|"
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        values = [row["val_top1_error"] for row in mine]
        paired = [errors[variant, row["seed"]] - errors["slides", row["seed"]] for row in mine
                  if variant != "slides" and ("slides", row["seed"]) in errors]  # fmt: skip
        difference = f"{mean(paired):+.2f} ± {stdev(paired) / len(paired) ** 0.5:.2f}" if len(paired) > 1 else ""
        norms = [
            " to ".join(f"{mean(row[f'{part}_{end}'] for row in mine):.2f}" for end in ("first", "last"))
            if all(f"{part}_first" in row for row in mine) else ""
            for part in PARTS
        ]  # fmt: skip
        macs = count(create_model("fishnet99", **NETWORK | VARIANTS[variant])).macs / 1e6
        spread = f"{stdev(values):.2f}" if len(values) > 1 else ""
        cells = (variant, f"{macs:.1f}", len(mine), f"{mean(values):.2f}", spread, difference, *norms)
        yield f"| {' | '.join(map(str, cells))} |"


def draw(out: str, folders: dict[tuple[str, int], Path]) -> None:
    """A panel for each variant: gradient norms of tail, body and head over the steps, a line for each seed."""
    from matplotlib.figure import Figure  # for the picture alone

    variants = list(dict.fromkeys(variant for variant, _ in folders))
    figure = Figure(figsize=(3 * len(variants), 3), layout="constrained")
    for axis, variant in zip(figure.subplots(1, len(variants), sharey=True), variants):
        for (name, seed), folder in folders.items():
            for i, (part, points) in enumerate(gradient_norms(folder).items() if name == variant else ()):
                axis.semilogy(*zip(*points), color=f"C{i}", linewidth=0.8, alpha=0.8, label=part if not seed else None)
        axis.set(title=variant, xlabel="step")
        axis.legend()
    figure.axes[0].set_ylabel("gradient norm")
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="The slides' improvements, measured.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is or goes (default: data)")
    parser.add_argument("--output-dir", default="runs/study", help="a folder for each run (default: runs/study)")
    parser.add_argument("--csv", metavar="FILE", help="write a row for each run")
    parser.add_argument("--picture", metavar="PNG", help="draw the gradient norms of the variants")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags for train.py")
    args = parser.parse_args()
    folders = {
        (variant, seed): Path(args.output_dir) / f"{variant.replace(' ', '-').replace(',', '')}-{seed}"
        for variant in args.variants for seed in args.seeds
    }  # fmt: skip
    try:
        for (variant, seed), folder in folders.items():
            if not (folder / "done").exists():
                train(variant, seed, folder, args.data_dir, args.flags)
                (folder / "done").touch()
    except subprocess.CalledProcessError as error:
        sys.exit(f"study.py: train.py ended with code {error.returncode}; go on with the same command")
    rows = [summarise(variant, seed, folder) for (variant, seed), folder in folders.items()]
    print(*table(rows), sep="\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    if args.picture:
        draw(args.picture, folders)


if __name__ == "__main__":
    main()
