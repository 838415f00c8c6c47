"""Do the slides' improvements help? The same short training of small networks that differ in what their names say.

    python examples/study.py --data-dir data             # trains what runs/study does not hold yet, then the table
    python examples/study.py --seeds 0 -- --compile      # some seeds; after "--": flags for train.py
    python examples/study.py --csv runs.csv              # a row for each run besides
    pip install matplotlib && python examples/study.py --picture norms.png

A seed gives the split, the order of the images and their augmentation, so it pairs the variants; weights are drawn from
it, too, but others where the networks differ. Every run sees as many images. Interrupted runs go on where they stopped;
programs with other variants or seeds may share the work.

The table is Markdown. Of the validation error after the last epoch, in per cent: mean and standard deviation over the
seeds; mean difference from the slides' network and its 95 % confidence interval (Student's t of the paired seeds). Of
the gradients of tail, body and head: the root of the mean square over a part's weights, times 1,000, as a mean over the
first and over the second half of the training. The picture has these gradients step by step.
"""

import argparse
import csv
import importlib.util
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))

from fishnet import FishNet, ResNet, create_model
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
    "k = 4": {"k": 4},
}
PARTS = {"tail": ("stem", "tail"), "body": ("body",), "head": ("head", "pool", "fc")}  # as train.py adds up gradients
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # by degrees of freedom
Row = dict[str, str | int | float]


def make_model(variant: str) -> FishNet | ResNet:
    return create_model("fishnet99", **NETWORK | VARIANTS[variant])


def flags_of(variant: str, seed: int, flags: list[str]) -> list[str]:
    """train.py's flags that a run's result depends on."""
    return [
        "--recipe", "strong", "--model", "fishnet99", "--epochs", "2", "--warmup-epochs", "0.3", "--batch-size", "128",
        "--val-fraction", "0.4", "--seed", str(seed), "--opt", "sgd", "--lr", "0.1", "--weight-decay", "5e-4",
        "--model-args", *(f"{name}={value!r}" for name, value in (NETWORK | VARIANTS[variant]).items()), *flags,
    ]  # fmt: skip


def train(flags: list[str], folder: Path, data_dir: str) -> None:
    """Run train.py to its end, from where it is; nothing, if it is there. ValueError: it failed, or had other flags."""
    done, flags = folder / "done.json", [*flags, "--data-dir", str(Path(data_dir).resolve())]
    if done.exists():
        if json.loads(done.read_text()) != flags:
            raise ValueError(f"{folder}: a run with other flags or data; take another --output-dir")
        return
    command = [sys.executable, TRAIN, *flags, "--output-dir", folder, "--resume", "auto"]
    process = subprocess.Popen(list(map(str, command)))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # as a terminal did already
        process.wait()  # it saves
        raise
    if code:
        raise ValueError(f"train.py ended with code {code}; what it says stands above")
    written = done.with_suffix(".tmp")
    written.write_text(json.dumps(flags))
    written.replace(done)


def gradient_norms(folder: Path, model: FishNet | ResNet) -> dict[str, list[tuple[int, float]]]:
    """(step, root of the mean square times 1,000) of the gradient of each part that the model has."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    norms = {}
    for part, modules in PARTS.items():
        weights = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in modules)
        if weights:
            tag = f"gradient_norm/{part}"
            points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
            norms[part] = [(point.step, 1e3 * point.value / math.sqrt(weights)) for point in points]
    return norms


def summarise(variant: str, seed: int, folder: Path) -> Row:
    """A run as a row: the validation error after its last epoch, in per cent, and its gradients."""
    with (folder / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    if not last.get("val_top1_error"):
        raise ValueError(f"{folder}: the run has no validation error")
    row: Row = {"variant": variant, "seed": seed, "val_top1_error": 100 * float(last["val_top1_error"])}
    for part, points in gradient_norms(folder, make_model(variant)).items():
        norms = [norm for _, norm in points]
        half = len(norms) // 2
        if not half:
            raise ValueError(f"{folder}: the run logged fewer than two gradients; take more steps or --log-every 1")
        row |= {f"{part}_first_half": mean(norms[:half]), f"{part}_second_half": mean(norms[half:])}
    return row


def table(rows: list[Row]) -> Iterable[str]:
    """The lines of the table; this file's docstring says what is in it."""
    errors = {(row["variant"], row["seed"]): row["val_top1_error"] for row in rows}
    yield f"| variant | parameters | MACs, M | seeds | error, % | std | against slides | {' | '.join(PARTS)} |"
    yield "| --- " * (7 + len(PARTS)) + "|"
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        values = [row["val_top1_error"] for row in mine]
        spread, difference = f"{stdev(values):.2f}" if len(values) > 1 else "", ""
        paired = [errors[variant, row["seed"]] - errors["slides", row["seed"]]
                  for row in mine if ("slides", row["seed"]) in errors]  # fmt: skip
        if variant != "slides" and len(paired) > 1:
            interval = T_975[min(len(paired) - 1, max(T_975))] * stdev(paired) / math.sqrt(len(paired))
            difference = f"{mean(paired):+.2f} ± {interval:.2f}"
        gradients = [
            " to ".join(f"{mean(row[f'{part}_{half}_half'] for row in mine):.2f}" for half in ("first", "second"))
            if f"{part}_first_half" in mine[0] else ""
            for part in PARTS
        ]  # fmt: skip
        costs = count(make_model(variant))
        cells = (
            variant, f"{costs.params:,}", f"{costs.macs / 1e6:.1f}", len(mine), f"{mean(values):.2f}", spread,
            difference, *gradients,
        )  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"


def draw(out: str, folders: dict[tuple[str, int], Path]) -> None:
    """A panel for each variant: the gradients of tail, body and head over the steps, a line for each seed."""
    from matplotlib.figure import Figure  # for the picture alone

    variants = list(dict.fromkeys(variant for variant, _ in folders))
    rows = math.ceil(len(variants) / 3)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
    for axis, variant in zip(figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False).flat, variants):
        for (name, _), folder in folders.items():
            norms = gradient_norms(folder, make_model(variant)) if name == variant else {}
            for part, points in norms.items():
                axis.semilogy(*zip(*points), color=f"C{list(PARTS).index(part)}", linewidth=0.8)
        axis.set_title(variant, fontsize="medium")
    for i, part in enumerate(PARTS):
        figure.axes[0].plot([], color=f"C{i}", label=part)
    figure.axes[0].legend()
    figure.supxlabel("step")
    figure.supylabel("gradient, root mean square x 1,000")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="The slides' improvements, measured.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is or goes (default: data)")
    parser.add_argument("--output-dir", default="runs/study", help="a folder for each run (default: runs/study)")
    parser.add_argument("--csv", metavar="FILE", help="write a row for each run")
    parser.add_argument("--picture", metavar="PNG", help="draw the gradients")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags for train.py")
    args = parser.parse_args()
    folders = {
        (variant, seed): Path(args.output_dir) / f"{variant.replace(' ', '-').replace(',', '')}-{seed}"
        for variant in args.variants for seed in args.seeds
    }  # fmt: skip
    try:
        mine = "--model", "--model-args", "--dataset", "--recipe", "--seed", "--data-dir", "--output-dir", "--resume"
        for flag in mine:
            if any(word.partition("=")[0] == flag for word in args.flags):
                way = 'give it before "--"' if flag in ("--data-dir", "--output-dir") else "this program chooses it"
                raise ValueError(f"{flag}: {way}")
        if args.picture and not args.picture.endswith(".png"):
            raise ValueError(f"picture={args.picture}: expected a name that ends in .png")
        for out in filter(None, (args.csv, args.picture)):
            open(out, "a").close()  # hours before it is needed
        if args.picture and not importlib.util.find_spec("matplotlib"):
            raise ValueError("--picture: needs matplotlib, pip install matplotlib")
        for (variant, seed), folder in folders.items():
            train(flags_of(variant, seed, args.flags), folder, args.data_dir)
        rows = [summarise(variant, seed, folder) for (variant, seed), folder in folders.items()]
    except (ValueError, OSError) as error:
        sys.exit(f"study.py: {error}")
    except KeyboardInterrupt:
        sys.exit("study.py: interrupted; go on with the same command")
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
