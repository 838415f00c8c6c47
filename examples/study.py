"""Do the slides' ideas for improvement help? Train small variants of the network and compare them.

    python examples/study.py --data-dir data         # train what is missing, then print the table
    python examples/study.py --seeds 0 -- --compile  # flags after "--" are given to train.py
    pip install matplotlib && python examples/study.py --picture study.png --csv study.csv

All variants train alike: 20 epochs of the recipe `strong` on 40,000 images of CIFAR-10. The error
is that on the other 10,000 training images, after the last epoch. A seed decides the weights, and
the images' split, order and augmentation. An interrupted run continues where it stopped. You can
start this program several times, with different variants or seeds, to share the work.

The 95 % intervals are those of a table of variants and seeds (a randomized block design): an error
is the mean of its variant, plus an effect of its seed, plus noise. All runs together tell the size
of the noise.
"""

import argparse
import csv
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from fishnet import FishNet, ResNet, UserError, create_model
from flops import count

TRAIN = Path(__file__).parent.parent / "train.py"
# The slides' network, made so small that a run takes a quarter of an hour on one core: narrow, a
# stem of one convolution with stride 2, and a body that sums 4 channels instead of 2.
NETWORK = {
    "channels": (32, 64, 96, 128), "tail_depths": (1, 2, 2, 1), "k": 4,
    "stem_depth": 0, "stem_stride": 2,
}  # fmt: skip
VARIANTS = {
    "slides": {},
    "tail repeats channels": {"tail_shortcut": "repeat"},
    "no SE unit": {"bridge": "none"},
    "both": {"tail_shortcut": "repeat", "bridge": "none"},
    "k doubled": {"k": 8},
    "no dilation": {"body_dilations": (1, 1, 1)},
    "tail alone, equal arithmetic": {
        "channels": (48, 96, 192, 256), "tail_depths": (1, 2, 2, 2), "body_depths": (),
        "head_depths": (),
    },
}  # fmt: skip
# Student's t for a 95 % interval, by degrees of freedom from 1 to 20.
T_975 = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23,
    2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09,
)  # fmt: skip

def make_model(variant: str) -> FishNet | ResNet:
    return create_model("fishnet99", **{"final_norm": True} | NETWORK | VARIANTS[variant])

def make_flags(variant: str, seed: int, flags: list[str]) -> list[str]:
    """Return the flags of train.py that decide a run's result."""
    fields = (NETWORK | VARIANTS[variant]).items()
    return [
        "--recipe", "strong", "--model", "fishnet99", "--whiten", "--padding", "2",
        "--epochs", "20", "--val-fraction", "0.2", "--seed", str(seed),
        "--model-args", *(f"{name}={value!r}" for name, value in fields), *flags,
    ]  # fmt: skip

def train(flags: list[str], folder: Path, data_dir: str) -> None:
    """Run train.py to its end, unless it has been there. Raises UserError if it fails, or if the
    folder holds a run with other flags."""
    done, flags = folder / "done.json", [*flags, "--data-dir", str(Path(data_dir).resolve())]
    if done.exists():
        if json.loads(done.read_text()) != flags:
            raise UserError(f"{folder}: a run with other flags or data; take another --output-dir")
        return
    command = [sys.executable, TRAIN, *flags, "--output-dir", folder, "--resume", "auto"]
    process = subprocess.Popen(list(map(str, command)))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # a terminal has sent it to both already
        process.wait()  # train.py saves a checkpoint
        raise
    if code:
        raise UserError(f"train.py ended with code {code}; its message stands above")
    temporary = done.with_suffix(".tmp")
    temporary.write_text(json.dumps(flags))
    temporary.replace(done)

def read_run(folder: Path) -> dict[str, float]:
    """Return the validation error and the training error after a run's last epoch, in per cent,
    and the seconds of its training."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    errors = {part: 100 * float(rows[-1][f"{part}_top1_error"]) for part in ("val", "train")}
    seconds = sum(float(row["seconds"]) for row in rows)
    return {"val_error": errors["val"], "train_error": errors["train"], "seconds": seconds}

def compute_interval(errors: np.ndarray) -> float:
    """Return half the width of the 95 % interval of a mean, from errors (variants, seeds): what is
    left of each error without the means of its variant and of its seed is noise. The interval of a
    difference between two variants is sqrt(2) times as wide."""
    rest = errors - errors.mean(1, keepdims=True) - errors.mean(0) + errors.mean()
    freedom = (errors.shape[0] - 1) * (errors.shape[1] - 1)
    if not freedom:
        return math.nan
    noise = math.sqrt((rest**2).sum() / freedom)
    return T_975[min(freedom, len(T_975)) - 1] * noise / math.sqrt(errors.shape[1])

def make_table(variants: list[str], errors: np.ndarray) -> list[str]:
    """Return the lines of a Markdown table of errors (variants, seeds), in per cent."""
    names = "variant", "parameters", "MACs, M", "error of each seed, %", "mean", "against slides"
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    half = math.sqrt(2) * compute_interval(errors)
    for variant, own in zip(variants, errors):
        costs, difference = count(make_model(variant)), ""
        if variant != "slides" and "slides" in variants:
            difference = own.mean() - errors[variants.index("slides")].mean()
            difference = f"{difference:+.2f}" + f" ± {half:.2f}" * math.isfinite(half)
        own = ", ".join(f"{error:.2f}" for error in own), f"{own.mean():.2f}"
        cells = variant, f"{costs.params:,}", f"{costs.macs / 1e6:.1f}", *own, difference
        lines.append(f"| {' | '.join(cells)} |")
    return lines

def draw(path: str, variants: list[str], errors: np.ndarray) -> None:
    """Draw each variant's runs as dots, and their mean with its interval; the best at the top."""
    from matplotlib.figure import Figure  # only the picture needs it

    figure = Figure(figsize=(7.5, 0.45 * len(variants) + 1.2), layout="constrained")
    axes = figure.subplots()
    order = errors.mean(1).argsort()[::-1]
    for y, i in enumerate(order):
        axes.plot(errors[i], [y] * len(errors[i]), "o", color="0.65", markersize=4)
    means, half = errors.mean(1)[order], compute_interval(errors)
    axes.errorbar(means, range(len(order)), xerr=half, fmt="D", color="#08306b", capsize=4)
    axes.set_yticks(range(len(order)), [variants[i] for i in order])
    axes.set_xlabel("validation error, % (grey: single runs; blue: mean and 95 % interval)")
    axes.grid(axis="x", color="0.9")
    figure.savefig(path, dpi=110)

def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the slides' ideas for improvement.")
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--data-dir", default="data", help="where CIFAR-10 is, or is put (default: data)")
    add("--output-dir", default="runs/study", help="for the runs' folders (default: runs/study)")
    add("--csv", metavar="FILE", help="write a row for each run")
    add("--picture", metavar="PNG", help="draw the errors")
    add("flags", nargs="*", metavar="-- FLAGS", help="more flags for train.py")
    args = parser.parse_args()
    rows = []
    try:
        for variant in args.variants:
            name = variant.replace(" ", "-").replace(",", "")
            for seed in args.seeds:
                folder = Path(args.output_dir) / f"{name}-{seed}"
                train(make_flags(variant, seed, args.flags), folder, args.data_dir)
                rows.append({"variant": variant, "seed": seed} | read_run(folder))
    except UserError as error:
        sys.exit(f"study.py: {error}")
    except KeyboardInterrupt:
        sys.exit("study.py: interrupted; give the same command to continue")
    errors = np.reshape([row["val_error"] for row in rows], (len(args.variants), len(args.seeds)))
    print(*make_table(args.variants, errors), sep="\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    if args.picture:
        draw(args.picture, args.variants, errors)

if __name__ == "__main__":
    main()
