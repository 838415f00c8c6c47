"""Do the slides' ideas for improvement help? Train small variants of the network and compare them.

    python examples/study.py --data-dir data         # train what is missing, then print the table
    python examples/study.py --seeds 0 -- --compile  # flags after "--" are given to train.py
    python examples/study.py --csv runs.csv          # write a row for each run, too
    pip install matplotlib && python examples/study.py --picture norms.png

All variants train alike. A seed decides the split, the order and the augmentation of the images,
so runs of the same seed are paired. An interrupted run continues where it stopped. You can start
this program several times, with different variants or seeds, to share the work.

The table is Markdown. It has the top-1 error on the validation images after the last epoch, in per
cent: mean and standard deviation over the seeds, and the mean difference from the slides' network
with its 95 % confidence interval (Student's t of the paired runs). For tail, body and head it has
the gradient's root mean square over the weights, times 1,000: means over the first and the second
half of the training. The picture shows these gradients step by step.
"""

import argparse
import csv
import importlib.util
import json
import math
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))

from fishnet import PARTS as STAGES
from fishnet import FishNet, ResNet, UserError, create_model
from flops import count

TRAIN = Path(__file__).parent.parent / "train.py"
# The slides' network, made so small that a run takes minutes on one core.
NETWORK = {
    "channels": (48, 48, 64, 96), "tail_depths": (1, 2, 2, 1), "stem_stride": 2, "final_norm": True,
}  # fmt: skip
TAIL = {"body_depths": (), "head_depths": ()}
WIDER = {"channels": (112, 112, 128, 192), "tail_depths": (2, 3, 3, 2)}
VARIANTS = {
    "slides": {},
    "tail repeats channels": {"tail_shortcut": "repeat"},
    "no SE unit": {"bridge": "none"},
    "both": {"tail_shortcut": "repeat", "bridge": "none"},
    "post-activation": {"preact": False},
    "tail alone": TAIL,
    "tail alone, wider and deeper": TAIL | WIDER,
    "no dilation": {"body_dilations": (1, 1, 1)},
    "k = 4": {"k": 4},
}
PARTS = {stage: part for part, stages in STAGES.items() for stage in stages.split()}
PARTS["fc"] = "head"
FIXED = (  # flags of train.py that this program chooses
    "--model", "--model-args", "--dataset", "--recipe", "--seed", "--resume", "--val-fraction",
)  # fmt: skip
# Student's t for a 95 % interval, by degrees of freedom.
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}

def make_model(variant: str) -> FishNet | ResNet:
    return create_model("fishnet99", **NETWORK | VARIANTS[variant])

def make_flags(variant: str, seed: int, flags: list[str]) -> list[str]:
    """Return the flags of train.py that decide a run's result."""
    fields = (NETWORK | VARIANTS[variant]).items()
    return [
        "--recipe", "strong", "--model", "fishnet99", "--epochs", "2", "--warmup-epochs", "0.3",
        "--batch-size", "128", "--val-fraction", "0.4", "--seed", str(seed), "--opt", "sgd",
        "--lr", "0.1", "--weight-decay", "5e-4",
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

def read_gradients(folder: Path, model: FishNet | ResNet) -> dict[str, list[tuple[int, float]]]:
    """Return the points (step, 1,000 x root mean square of the gradient) of each part."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    weights = dict.fromkeys(PARTS.values(), 0)
    for name, p in model.named_parameters():
        weights[PARTS[name.partition(".")[0]]] += p.numel()
    gradients = {}
    for part in filter(weights.get, weights):
        squares = Counter()  # of the part's stages, added up by step
        for stage in (stage for stage, own in PARTS.items() if own == part):
            tag = f"gradient_norm/{stage}"
            for point in events.Scalars(tag) if tag in events.Tags()["scalars"] else ():
                squares[point.step] += point.value**2
        norms = ((step, math.sqrt(square / weights[part])) for step, square in squares.items())
        gradients[part] = [(step, 1e3 * norm) for step, norm in sorted(norms)]
    return gradients

def summarise(variant: str, seed: int, folder: Path) -> dict:
    """Return a run as a row: the validation error after its last epoch, and its gradients."""
    with (folder / "metrics.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    row = {"variant": variant, "seed": seed, "val_top1_error": 100 * float(last["val_top1_error"])}
    for part, points in read_gradients(folder, make_model(variant)).items():
        norms = [norm for _, norm in points]
        half = len(norms) // 2
        if not half:
            raise UserError(f"{folder}: fewer than two gradients; give train.py --log-every 1")
        row |= {f"{part}_first_half": mean(norms[:half]), f"{part}_second_half": mean(norms[half:])}
    return row

def make_table(rows: list[dict]) -> list[str]:
    """Return the lines of the table, which the top of this file defines."""
    parts = list(dict.fromkeys(PARTS.values()))
    columns = "variant | parameters | MACs, M | seeds | error, % | std | against slides"
    lines = [f"| {' | '.join((columns, *parts))} |", "| --- " * (7 + len(parts)) + "|"]
    slides = {row["seed"]: row["val_top1_error"] for row in rows if row["variant"] == "slides"}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        errors = {row["seed"]: row["val_top1_error"] for row in own}
        paired = [errors[seed] - slides[seed] for seed in errors.keys() & slides.keys()]
        difference = ""
        if variant != "slides" and len(paired) > 1:
            t = T_975[min(len(paired) - 1, max(T_975))]
            difference = f"{mean(paired):+.2f} ± {t * stdev(paired) / math.sqrt(len(paired)):.2f}"
        gradients = []
        for part in parts:
            halves = (f"{part}_first_half", f"{part}_second_half")
            means = [f"{mean(row[half] for row in own):.2f}" for half in halves if half in own[0]]
            gradients.append(" to ".join(means))
        costs = count(make_model(variant))
        cells = (
            variant, f"{costs.params:,}", f"{costs.macs / 1e6:.1f}", str(len(own)),
            f"{mean(errors.values()):.2f}",
            f"{stdev(errors.values()):.2f}" if len(errors) > 1 else "", difference, *gradients,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines

def draw(out: str, folders: dict[tuple[str, int], Path]) -> None:
    """Draw a panel for each variant, with the gradients of its parts and a line for each seed."""
    from matplotlib.figure import Figure  # only the picture needs it

    variants = list(dict.fromkeys(variant for variant, _ in folders))
    colours = {part: f"C{i}" for i, part in enumerate(dict.fromkeys(PARTS.values()))}
    height = math.ceil(len(variants) / 3)
    figure = Figure(figsize=(10, 2.6 * height), layout="constrained")
    panels = figure.subplots(height, 3, sharex=True, sharey=True, squeeze=False).flat
    panels = dict(zip(variants, panels))
    for (variant, _), folder in folders.items():
        for part, points in read_gradients(folder, make_model(variant)).items():
            panels[variant].semilogy(*zip(*points), color=colours[part], linewidth=0.8)
        panels[variant].set_title(variant, fontsize="medium")
    for part, colour in colours.items():
        figure.axes[0].plot([], color=colour, label=part)
    figure.axes[0].legend()
    figure.supxlabel("step")
    figure.supylabel("gradient, root mean square x 1,000")
    figure.savefig(out, dpi=110)

def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for flags that would fail only after hours of training."""
    for word in args.flags:
        flag = word.partition("=")[0]
        if flag in ("--data-dir", "--output-dir"):
            raise UserError(f'{flag}: give it before "--"')
        if flag in FIXED:
            raise UserError(f"{flag}: this program chooses it")
    if args.picture and not args.picture.endswith(".png"):
        raise UserError(f"picture={args.picture}: expected a name that ends in .png")
    if args.picture and not importlib.util.find_spec("matplotlib"):
        raise UserError("--picture needs matplotlib: pip install matplotlib")
    for out in filter(None, (args.csv, args.picture)):
        try:
            open(out, "a").close()
        except OSError as error:
            raise UserError(f"{out}: {error.strerror}") from None

def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the slides' ideas for improvement.")
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--data-dir", default="data", help="where CIFAR-10 is, or is put (default: data)")
    add("--output-dir", default="runs/study", help="for the runs' folders (default: runs/study)")
    add("--csv", metavar="FILE", help="write a row for each run")
    add("--picture", metavar="PNG", help="draw the gradients")
    add("flags", nargs="*", metavar="-- FLAGS", help="more flags for train.py")
    args = parser.parse_args()
    root, folders = Path(args.output_dir), {}
    for variant in args.variants:
        name = variant.replace(" ", "-").replace(",", "")
        folders |= {(variant, seed): root / f"{name}-{seed}" for seed in args.seeds}
    try:
        check_args(args)
        for (variant, seed), folder in folders.items():
            train(make_flags(variant, seed, args.flags), folder, args.data_dir)
        rows = [summarise(variant, seed, folder) for (variant, seed), folder in folders.items()]
    except UserError as error:
        sys.exit(f"study.py: {error}")
    except KeyboardInterrupt:
        sys.exit("study.py: interrupted; give the same command to continue")
    print(*make_table(rows), sep="\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
    if args.picture:
        draw(args.picture, folders)

if __name__ == "__main__":
    main()
