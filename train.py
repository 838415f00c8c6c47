"""Training: one loop of our own inside Hugging Face Accelerate.

    accelerate launch train.py                                   # the slides' experiment: FishNet-99 on CIFAR-10
    accelerate launch train.py --recipe demo                     # drawn shapes, no download, 4 minutes on two cores
    accelerate launch train.py --output-dir runs/a --resume auto # begin, or go on where runs/a stopped
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 train.py # two processes on the CPU

Prints a progress bar (on a terminal) and a line an epoch. Writes to --output-dir: last.pt and the one before it,
previous.pt, best.pt (by validation loss), metrics.csv, args.json and TensorBoard events; last.pt.left, what last.pt was
before --resume of another checkpoint.

A run is a function of its arguments and the number of processes: the order of samples follows from (seed, epoch), the
crop of a file from (seed, epoch, index), the augmentation of a batch from (seed, epoch, step, shard), the learning rate
from the step. So last.pt holds all that a run is: weights, optimizer, and the few numbers of `RunState`; and a global
batch is of the same images and has the same learning rate on one process or eight. --checkpoint-activations changes
only what a step costs. SIGTERM and SIGINT end a run after the step it is in (on several GPUs after --log-every steps at
most), with a checkpoint.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C in them is no traceback

import argparse
import ast
import csv
import dataclasses
import fcntl
import io
import json
import logging
import math
import os
import shlex
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import accelerate
import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast, broadcast_object_list, tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

import data as datasets
from data import BatchTransform, CutMix, EpochBatches, one_line, reader_may_leave, seeded_generator
from evaluate import (
    CHECKPOINT_FORMAT,
    allow_tf32,
    check_processes,
    compile_in_place,
    count_images,
    evaluate,
    explain,
    hide_unused_gpus,
    leave,
    load_checkpoint,
    prepare_cpu,
    signals_held,
    workers_released,
)
from fishnet import (
    check_weights,
    checkpoint_activations,
    create_model,
    load_pretrained,
    model_names,
    out_of_memory,
    zero_init_last,
)

# A recipe is a set of defaults; any flag overrides its own.
RECIPES = {
    # The slides' experiment, https://github.com/crapine1119/fishnet
    "baseline": dict(
        dataset="cifar10", model="fishnet99", val_fraction=0.2, augment="slides", epochs=100, batch_size=256,
        opt="adam", lr=1e-2, weight_decay=1e-4, sched="step", warmup_epochs=0, smoothing=0.0, patience=20,
        zero_init_last=False, model_args={},
    ),
    # final_norm: the slides' pooled features reach a squared norm of 10^4 and more, where SGD at 0.1 diverges; Muon's
    # steps for the classifier are SGD's.
    "strong": dict(
        dataset="cifar10", model="fishnet99", val_fraction=0.1, augment="standard", epochs=30, batch_size=256,
        opt="muon", lr=0.05, weight_decay=0.01, sched="cosine", warmup_epochs=2, smoothing=0.1, patience=0,
        zero_init_last=True, model_args={"final_norm": True},
    ),
    "demo": dict(
        dataset="shapes", model="fishnet_tiny", val_fraction=0.2, augment="none", epochs=5, batch_size=64,
        opt="muon", lr=0.05, weight_decay=0.01, sched="cosine", warmup_epochs=0.5, smoothing=0.0, patience=0,
        zero_init_last=True, model_args={},
    ),
}  # fmt: skip

MAX_SKIPPED = 20  # steps in a row that fp16's loss scaler may skip: it halves the scale at each

# A resumed run must agree in these. Where it ends (--max-steps, --patience) and how it is computed (--compile,
# --workers, the number of processes) may change.
FIXED = (
    "dataset", "val_fraction", "augment", "image_size", "model", "zero_init_last", "epochs", "batch_size",
    "grad_accum_steps", "opt", "lr", "weight_decay", "sched", "decay_epochs", "warmup_epochs", "smoothing", "clip_grad",
    "seed", "mixed_precision",
)  # fmt: skip


class ModelArgs(argparse.Action):
    """FIELD=VALUE ... with values in Python's notation, added to the recipe's."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list[str], option: str
    ) -> None:
        fields = dict(getattr(namespace, self.dest))
        for text in values:
            name, _, value = text.partition("=")
            try:
                fields[name] = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError):
                fields[name] = value  # a word; FishNetConfig says whether it is one that it knows
        setattr(namespace, self.dest, fields)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    recipe = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # read first: it sets the others' defaults
    recipe.add_argument("--recipe", choices=RECIPES, default="baseline", help="the defaults of the flags below")
    parser = argparse.ArgumentParser(
        description="Train a FishNet. Defaults are the recipe's.", parents=[recipe], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=datasets.DATASETS, help="what to train on")
    group.add_argument(
        "--data-dir", type=os.path.expanduser, default="data",
        help="where the CIFAR folders are or go; or your train and val",
    )  # fmt: skip
    group.add_argument("--image-size", type=int, help="side of the crops of --dataset folder, if not 224")
    group.add_argument("--val-fraction", type=float, help="part of each class of the training set kept for validation")
    group.add_argument("--augment", choices=datasets.AUGMENTS, help="see train_transforms in data.py")
    group.add_argument("-j", "--workers", type=int, default=0, help="processes that read data; 0: the main one")
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=model_names(), help="which network")
    group.add_argument(
        "--model-args", nargs="+", action=ModelArgs, metavar="FIELD=VALUE",
        help="fields of FishNetConfig besides the recipe's, such as k=4 preact=False",
    )  # fmt: skip
    group.add_argument("--pretrained", metavar="PATH", help="start from weights: load_pretrained in fishnet.py")
    group.add_argument("--zero-init-last", action=argparse.BooleanOptionalAction, help="start units as their shortcuts")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="length of the learning rate schedule")
    group.add_argument("--max-steps", type=int, default=0, help="end after this many optimizer steps; 0: no limit")
    group.add_argument("-b", "--batch-size", type=int, help="global batch: over all processes and accumulated steps")
    group.add_argument("--grad-accum-steps", type=int, default=1, help="parts a batch is cut into, to save memory")
    group.add_argument("--opt", choices=("adam", "adamw", "sgd", "muon"), help="sgd, muon: Nesterov, momentum 0.9")
    group.add_argument("--lr", type=float, help="peak learning rate")
    group.add_argument("--weight-decay", type=float, help="adam, sgd: L2 penalty; adamw, muon: decay")
    group.add_argument("--sched", choices=("step", "cosine"), help="a tenth every --decay-epochs, or a cosine to 0")
    group.add_argument("--decay-epochs", type=int, default=30, help="for --sched step")
    group.add_argument("--warmup-epochs", type=float, help="linear rise of the learning rate at the start")
    group.add_argument("--smoothing", type=float, help="label smoothing")
    group.add_argument("--clip-grad", type=float, default=0.0, help="largest gradient norm; 0: no limit")
    group.add_argument("--patience", type=int, help="epochs without a better validation loss before stopping; 0: never")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="of weights, split, order and augmentation")
    group.add_argument(
        "--mixed-precision", choices=("no", "tf32", "fp16", "bf16"), help="default: what accelerate launch says"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the model: minutes before the first step")
    group.add_argument("--checkpoint-activations", action="store_true", help="less memory, more time, the same results")
    group.add_argument("--output-dir", help="default: runs/<model>-<dataset>-<time>, or that of --resume PATH")
    group.add_argument("--checkpoint-every", type=int, default=0, help="steps between saves of last.pt inside an epoch")
    group.add_argument("--resume", metavar="PATH|auto", help="a last.pt; auto: that of --output-dir, if there is one")
    group.add_argument("--override", action="store_true", help="resume though flags changed that the result depends on")
    group.add_argument("--log-every", type=int, default=10, help="steps between TensorBoard points and checks")
    parser.set_defaults(**RECIPES[recipe.parse_known_args(argv)[0].recipe])
    args = parser.parse_args(argv)
    if args.dataset == "folder" and args.image_size is None:
        args.image_size = 224
    return args


def check_args(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """ValueError for values that no run can have."""
    check_processes(accelerator)
    processes = accelerator.num_processes
    least = {"epochs": 1, "batch_size": 1, "grad_accum_steps": 1, "decay_epochs": 1, "log_every": 1, "lr": 0.0,
             "workers": 0, "max_steps": 0, "weight_decay": 0, "warmup_epochs": 0, "clip_grad": 0, "patience": 0,
             "checkpoint_every": 0, "seed": 0}  # fmt: skip
    for name, minimum in least.items():
        if not minimum <= getattr(args, name) < math.inf:
            raise ValueError(f"{name.replace('_', '-')}={getattr(args, name)}: expected at least {minimum}")
    if args.image_size is not None and args.dataset != "folder":
        raise ValueError(f"image-size={args.image_size}: for --dataset folder, images of {args.dataset} have a size")
    if args.warmup_epochs >= args.epochs:
        raise ValueError(f"warmup-epochs={args.warmup_epochs}: expected less than epochs={args.epochs}")
    if args.seed >= 2**63:
        raise ValueError(f"seed={args.seed}: expected less than 2**63")
    if not 0 <= args.smoothing < 1:
        raise ValueError(f"smoothing={args.smoothing}: expected 0 <= smoothing < 1")
    parts = processes * args.grad_accum_steps
    if args.batch_size % parts:
        raise ValueError(
            f"batch-size={args.batch_size}: expected a multiple of {parts}, "
            f"{processes} processes x {args.grad_accum_steps} accumulated steps"
        )
    if args.batch_size // parts < 2:
        raise ValueError(f"batch-size={args.batch_size}: expected at least 2 images a process and step for batch norm")
    if args.mixed_precision in ("tf32", "fp16") and accelerator.device.type == "cpu":
        raise ValueError(f"mixed-precision={args.mixed_precision}: a CPU has none, use bf16 or no")
    if "num_classes" in args.model_args:
        raise ValueError("model-args num_classes: is the dataset's number of classes")
    if args.resume == "auto" and not args.output_dir:
        raise ValueError("resume=auto: expected --output-dir, the run to go on with")
    if args.resume not in (None, "auto"):  # before its folder is made
        if not Path(args.resume).exists():
            raise FileNotFoundError(f"{args.resume}: no such checkpoint")
        if Path(args.resume).is_dir():
            way = f"--output-dir {shlex.quote(args.resume)} --resume auto"
            raise ValueError(f"resume={args.resume}: a folder; to go on with its run: {way}")


# ------------------------------------------------------------------------------------------------- state of a run


@dataclasses.dataclass
class RunState:
    """What a run is besides weights and optimizer. Sums are of the current epoch's training batches so far."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    best_loss: float = math.inf
    best_epoch: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)  # the rows of metrics.csv
    sums: list[list[float]] = dataclasses.field(default_factory=list)  # [loss, errors, images] of each process


class StopSignal:
    """SIGTERM or SIGINT, which end the program as ever until `listen` is called, and training after a step then."""

    def __init__(self) -> None:
        self.number = 0

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: object) -> None:
        self.number = number

    def agreed(self, accelerator: Accelerator, wait: bool = True) -> int:
        """The signal that any process got, or 0: the same on all of them, so that all stop at the same step.

        Several GPUs have to be waited for: without `wait` it is 0 there.
        """
        if accelerator.num_processes == 1:
            return self.number
        if not wait and accelerator.device.type != "cpu":
            return 0
        return int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())


@dataclasses.dataclass
class Run:
    """What the loop works with."""

    args: argparse.Namespace
    accelerator: Accelerator
    output_dir: Path
    data: datasets.Data
    model: nn.Module
    optimizer: torch.optim.Optimizer
    sampler: EpochBatches
    loader: DataLoader
    transform: BatchTransform
    mix: CutMix | None
    sums: Tensor  # (3,) this process's part of state.sums, on the device
    lock: TextIO | None  # on the main process: open as long as the run lives
    writer: SummaryWriter | None = None  # on the main process
    state: RunState = dataclasses.field(default_factory=RunState)
    stop: StopSignal = dataclasses.field(default_factory=StopSignal)
    data_seconds: float = 0.0  # of the epoch: waiting for images and augmenting them
    compiled: bool = False  # with --compile: once the first step is done
    skipped: int = 0  # steps in a row that fp16's loss scaler has skipped

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.batches // self.args.grad_accum_steps


def learning_rate(args: argparse.Namespace, step: int, steps_per_epoch: int) -> float:
    """Of optimizer step 0, 1, ...: linear warm-up, then steps down or a cosine to 0 at the last epoch's end."""
    warmup = args.warmup_epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    if args.sched == "step":
        return args.lr * 0.1 ** (step // steps_per_epoch // args.decay_epochs)
    done = (step - warmup) / (args.epochs * steps_per_epoch - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))


def write_atomic(path: Path, content: bytes | memoryview, keep_as: Path | None = None) -> None:
    """Write a file whole or not at all: the old one stays until the new one is on the disk, then as `keep_as`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_as and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # it fills a full disk
        error.filename = error.filename or str(path)  # a failed write does not say of what
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def save(run: Run, *names: str, keep_as: str | None = "previous.pt") -> None:
    """A checkpoint of plain values and tensors, loadable with weights_only=True. Call it on every process.

    keep_as: what the last.pt until then is called from now on; None: it goes.
    """
    run.state.sums = run.accelerator.gather(run.sums[None]).tolist()
    if not run.accelerator.is_main_process:
        return
    run.writer.flush()  # what a run that goes on from here does not log again
    model = run.accelerator.unwrap_model(run.model)
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "name": run.args.model,
        "config": dataclasses.asdict(model.config),
        "model": {k: x.contiguous() for k, x in model.state_dict().items()},  # safetensors takes no channels_last
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
        "classes": list(run.data.classes),
        "images": count_images(run.data),
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "args": vars(run.args),
        "state": dataclasses.asdict(run.state),
    }
    buffer = io.BytesIO()  # so that a full disk is an OSError here, not an error inside torch's own writer
    torch.save(checkpoint, buffer)
    for name in names:
        keep = run.output_dir / keep_as if keep_as and name == "last.pt" else None
        write_atomic(run.output_dir / name, buffer.getbuffer(), keep)


def resumable(folder: Path) -> list[Path]:
    """What `--resume auto` may go on from, the newest first."""
    return [path for path in (folder / "last.pt", folder / "previous.pt") if path.exists()]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, last.pt or previous.pt; None: it never had one.

    ValueError: there is none, but a damaged one or best.pt. A damaged one is renamed, so that the next save does not
    put it in the place of a whole one.
    """
    for path in resumable(folder):
        try:
            load_checkpoint(path)
            return path
        except ValueError as error:
            path.replace(path.with_name(path.name + ".damaged"))
            print(f"left aside as {path.name}.damaged: {error}", flush=True)
    best = folder / "best.pt"
    if best.exists() or any(folder.glob("*.pt.damaged")):  # now, or when it was started before
        way = f", or --resume {shlex.quote(str(best))}" if best.exists() else ""
        raise ValueError(f"resume=auto: no whole last.pt is left in {folder}; take another folder to start anew{way}")
    return None


def resume(run: Run, path: Path) -> None:
    """Continue from a checkpoint. ValueError: it is of another experiment, and --override is not given; or damaged."""
    checkpoint = load_checkpoint(path)
    model = run.accelerator.unwrap_model(run.model)
    config = dataclasses.asdict(model.config)
    ours = vars(run.args) | config | {"images": count_images(run.data)}
    theirs = checkpoint["args"] | checkpoint["config"] | {"images": checkpoint.get("images", ours["images"])}
    changed = [
        f"{name.replace('_', '-') if name in FIXED else name} {theirs.get(name)} -> {ours[name]}"
        for name in (*FIXED, *config, "images")
        if theirs.get(name) != ours[name]
    ]
    other_classes = checkpoint["classes"] != list(run.data.classes)
    changed += ["other classes"] if other_classes else []
    unlike = other_classes or theirs.get("opt") != ours["opt"]
    if unlike or (changed and not run.args.override):
        way = "--override changes neither classes nor optimizer" if unlike else "or --override"
        raise ValueError(f"{path} is of another run ({', '.join(changed)}): give its flags, {way}")
    check_weights(model, checkpoint["model"], str(path))
    model.load_state_dict(checkpoint["model"])
    try:
        sums = load_state(run, checkpoint)
    except Exception as error:  # what a changed file holds can be anything
        if out_of_memory(error):
            raise
        raise ValueError(f"{path}: its state does not fit ({one_line(error)})") from None
    if path.resolve().parent != run.output_dir.resolve():  # its best.pt stays there
        run.state.best_loss, run.state.best_epoch = math.inf, run.state.epoch
    if len(sums) == run.accelerator.num_processes:
        run.sums.copy_(sums[run.accelerator.process_index])
    elif run.accelerator.is_main_process:
        run.sums.copy_(sums.sum(0))
    run.accelerator.print(f"resumed {path} at step {run.state.step}, epoch {run.state.epoch + 1}")


def load_state(run: Run, checkpoint: dict) -> Tensor:
    """Optimizer, scaler and RunState of a checkpoint, checked; returns its sums (processes, 3). ValueError: no fit."""
    theirs, ours = ({name: type(value) for name, value in s.items()} for s in (checkpoint["state"], vars(run.state)))
    if theirs != ours:
        raise ValueError("its numbers are not those of a RunState")
    state, steps = RunState(**checkpoint["state"]), run.steps_per_epoch
    sums = torch.tensor(state.sums, dtype=torch.float64).view(-1, 3)
    if checkpoint.get("images") and steps != checkpoint["images"]["train"] // checkpoint["args"]["batch_size"]:
        raise ValueError(f"--override cannot change how many steps an epoch has, which would be {steps}")
    if 0 < state.step < state.epoch * steps:  # best.pt of an epoch that --max-steps cut: it is not done
        state.epoch -= 1
        state.history.pop()
        state.best_loss, state.best_epoch = math.inf, state.epoch
    if not 0 <= state.epoch * steps <= state.step <= (state.epoch + 1) * steps:
        raise ValueError(f"step {state.step} is not in epoch {state.epoch + 1} at {steps} steps an epoch")
    if state.step > state.epoch * steps and not sums[:, 2].sum() > 0:
        raise ValueError("its sums are of no images")
    if len(state.history) != state.epoch or not all(isinstance(row, dict) for row in state.history):
        raise ValueError(f"{state.epoch} epochs and {len(state.history)} rows do not agree")
    groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    for group, new in zip(run.optimizer.param_groups, groups):
        group.update(new)  # the flags', not the checkpoint's: they differ with --override
    for parameter, values in run.optimizer.state.items():
        for value in values.values():
            if value is None:
                continue  # SGD's momentum before the first step
            if value.shape not in ((), parameter.shape) or not value.isfinite().all():
                raise ValueError("a tensor of the optimizer does not fit or is not finite")
    if run.accelerator.scaler and checkpoint["scaler"]:
        run.accelerator.scaler.load_state_dict(checkpoint["scaler"])
    run.state = state
    return sums


# ------------------------------------------------------------------------------------------------------- training


def train_step(run: Run, batches: Iterator[tuple[Tensor, Tensor]], lr: float) -> tuple[Tensor, Tensor]:
    """One optimizer step on a global batch: this process's [sum of losses, errors, images], and the gradient's norm."""
    args, accelerator, state = run.args, run.accelerator, run.state
    result = torch.zeros_like(run.sums)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    for part in range(args.grad_accum_steps):
        started = time.perf_counter()
        with signals_held():  # the first one starts the workers
            images, labels = next(batches)  # uint8 (N, 3, H, W), (N,)
        # A global batch's parts are numbered alike on one process that accumulates and on many that do not.
        shard = part * accelerator.num_processes + accelerator.process_index
        generator = seeded_generator(args.seed, state.epoch, state.step, shard)
        images, targets = run.transform(images, generator), labels
        if run.mix:
            images, targets = run.mix(images, labels, generator)  # (N, 3, H, W), (N, classes)
            labels = targets.argmax(1)  # of the larger part
        run.data_seconds += time.perf_counter() - started
        with accelerator.accumulate(run.model):
            logits = run.model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, targets, label_smoothing=args.smoothing)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()
                if run.writer and (state.step + 1) % args.log_every == 0:
                    log_gradient_norms(run)
                norm = nn.utils.clip_grad_norm_(run.model.parameters(), args.clip_grad or math.inf)
            run.optimizer.step()
            run.optimizer.zero_grad()
        errors = (logits.detach().argmax(1) != labels).sum()
        result += torch.stack([loss.detach() * len(labels), errors, torch.full_like(errors, len(labels))])
    return result, norm


def train_epoch(run: Run) -> dict[str, float]:
    """From where the run is to its epoch's end, or to --max-steps; the columns of metrics.csv that training fills.

    FloatingPointError: a loss or gradient was not finite. That is found before anything is saved. SystemExit: a signal
    came; a checkpoint is saved.
    """
    args, accelerator, state, steps = run.args, run.accelerator, run.state, run.steps_per_epoch
    end = (state.epoch + 1) * steps
    if args.max_steps:
        end = min(end, args.max_steps)
    first = state.step
    run.sampler.seek(state.epoch, (first - state.epoch * steps) * args.grad_accum_steps)
    bar = tqdm(
        desc=f"epoch {state.epoch + 1}", initial=first - state.epoch * steps, total=end - state.epoch * steps,
        bar_format="{desc} {bar} {n_fmt}/{total_fmt}{postfix} {remaining}", ncols=79, leave=False,
        disable=not (sys.stderr and sys.stderr.isatty()),  # it may be closed
    )  # fmt: skip
    run.model.train()
    run.data.train.epoch = None if args.augment == "none" else state.epoch  # before the workers get their copies
    started, run.data_seconds = time.perf_counter(), 0.0
    batches = iter(run.loader)
    unchecked = []  # of the last steps: what must be finite, the step, its learning rate
    while state.step < end:
        lr = learning_rate(args, state.step, steps)
        result, norm = train_step(run, batches, lr)
        if args.compile and not run.compiled:
            result.tolist()  # waits for the device
            accelerator.print(f"compiled in the first step, {time.perf_counter() - started:.0f} s")
            started, first, run.data_seconds, run.compiled = time.perf_counter(), first + 1, 0.0, True
        run.skipped = run.skipped + 1 if accelerator.optimizer_step_was_skipped else 0
        if run.skipped > MAX_SKIPPED:
            raise FloatingPointError(f"{run.skipped} steps in a row overflowed fp16, to step {state.step + 1}")
        value = result[0] if run.skipped else result[0] + norm  # fp16's scaler skips steps whose norm is not finite
        unchecked.append((value, state.step, lr))
        run.sums += result
        state.step += 1
        bar.update()
        shown = state.step % args.log_every == 0 or state.step == end
        stopped = run.stop.agreed(accelerator, shown)
        due = args.checkpoint_every and state.step % args.checkpoint_every == 0 and state.step < end
        if shown or stopped or due:  # seldom, since it waits for the device; and before anything is saved
            require_finite(accelerator, unchecked)
            unchecked.clear()
        if shown:
            seconds = time.perf_counter() - started
            log_step(run, bar, result, lr, (state.step - first) * args.batch_size / seconds, run.data_seconds / seconds)
        if stopped or due:
            save(run, "last.pt")
        if stopped:
            bar.close()
            leave_on_signal(run, stopped)
    bar.close()
    seconds = time.perf_counter() - started
    loss, errors, images = accelerator.reduce(run.sums, "sum").tolist()
    return {
        "epoch": state.epoch + 1, "step": state.step, "lr": learning_rate(args, state.step - 1, steps),
        "train_loss": loss / images, "train_top1_error": errors / images,
        "images_per_second": (state.step - first) * args.batch_size / seconds, "seconds": seconds,
        "data_wait": run.data_seconds / seconds,
    }  # fmt: skip


def require_finite(accelerator: Accelerator, steps: list[tuple[Tensor, int, float]]) -> None:
    """FloatingPointError, on all processes at once: on one of them a step's value is not."""
    values = accelerator.reduce(torch.stack([value for value, *_ in steps]), "sum")
    for finite, (_, step, lr) in zip(values.isfinite().tolist(), steps):
        if not finite:
            raise FloatingPointError(f"the loss or its gradient is not finite at step {step + 1}, learning rate {lr:g}")


def leave_on_signal(run: Run, number: int) -> None:
    run.accelerator.print(f"{signal.Signals(number).name}: saved step {run.state.step}; {go_on(run.args)}")
    leave(run.accelerator)
    sys.exit(128 + number)


def finished(run: Run) -> bool:
    args, state = run.args, run.state
    return (
        state.epoch >= args.epochs
        or (0 < args.max_steps <= state.step <= state.epoch * run.steps_per_epoch)  # counted, so evaluated
        or (args.patience > 0 and state.epoch - state.best_epoch >= args.patience)
    )


# ---------------------------------------------------------------------------------------------------- what it shows


def log_gradient_norms(run: Run) -> None:
    """Of the tail (with the stem), the body and the head (with the classifier), each over all its weights."""
    norms = {"tail": [], "body": [], "head": []}
    for name, parameter in run.accelerator.unwrap_model(run.model).named_parameters():
        part = name.split(".")[0]
        norms[{"stem": "tail", "pool": "head", "fc": "head"}.get(part, part)].append(parameter.grad)
    for part, gradients in norms.items():
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
            run.writer.add_scalar(f"gradient_norm/{part}", float(norm), run.state.step + 1)


def log_step(run: Run, bar: tqdm, result: Tensor, lr: float, speed: float, data_wait: float) -> None:
    """The epoch's mean on the progress bar, this step's values to TensorBoard.

    speed: images/s, data_wait: the part of the time in which data is awaited or augmented; both of the epoch so far.
    """
    both = run.accelerator.reduce(torch.stack([run.sums, result]), "sum").tolist()
    (epoch_loss, epoch_errors, epoch_images), (loss, errors, images) = both
    bar.set_postfix_str(
        f"loss {epoch_loss / epoch_images:.3f} error {epoch_errors / epoch_images:.1%} {speed:.0f} img/s"
    )
    if run.writer:
        for name, value in {
            "train/loss": loss / images, "train/top1_error": errors / images, "lr": lr, "images_per_second": speed,
            "data_wait": data_wait,
        }.items():  # fmt: skip
            run.writer.add_scalar(name, value, run.state.step)


def log_epoch(run: Run, row: dict[str, float], again: bool) -> None:
    """Add a row to metrics.csv and its validation to TensorBoard.

    again: the evaluation is repeated, and points that are there already are not written twice.
    """
    run.state.history.append(row)
    if not run.accelerator.is_main_process:
        return
    logged = logged_tags(run.output_dir, row["step"]) if again else ()
    for name in ("loss", "top1_error", "top5_error"):
        if f"val_{name}" in row and f"val/{name}" not in logged:
            run.writer.add_scalar(f"val/{name}", row[f"val_{name}"], row["step"])
    run.writer.flush()
    write_metrics(run)


def write_metrics(run: Run) -> None:
    """metrics.csv, of the epochs so far."""
    text = io.StringIO(newline="")
    columns = dict.fromkeys(name for row in run.state.history for name in row)
    table = csv.DictWriter(text, columns)
    table.writeheader()
    table.writerows(run.state.history)
    write_atomic(run.output_dir / "metrics.csv", text.getvalue().encode())


def logged_tags(folder: Path, step: int) -> set[str]:
    """Of which scalars TensorBoard has a point at a step already."""
    # Here, since few runs need it: it takes 0.2 s of every start.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of steps that come again after a resume
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag for tag in events.Tags()["scalars"] if any(point.step == step for point in events.Scalars(tag))}


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """What the terminal shows of a row of metrics.csv."""
    line = f"epoch {row['epoch']:>3}/{epochs}  train {row['train_loss']:.3f} {row['train_top1_error']:6.2%}"
    if "val_loss" in row:
        line += f"  val {row['val_loss']:.3f} {row['val_top1_error']:6.2%} ({row['val_top5_error']:.2%})"
    return f"{line}  {row['images_per_second']:.0f} img/s  {row['seconds']:.0f} s"


# ----------------------------------------------------------------------------------------------------------- set-up


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """One whose batches are global and split over the processes."""
    hide_unused_gpus()
    tf32 = args.mixed_precision == "tf32"
    allow_tf32(tf32)
    torch.backends.cudnn.deterministic = True  # without it a resumed run on a GPU has other bits
    accelerator = Accelerator(
        mixed_precision="no" if tf32 else args.mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        step_scheduler_with_optimizer=False,
        dynamo_backend="no",  # whatever accelerate launch says: --compile compiles in place
    )
    accelerator.gradient_accumulation_steps = args.grad_accum_steps  # an argument would yield to the environment
    args.mixed_precision = "tf32" if tf32 else accelerator.mixed_precision
    prepare_cpu(accelerator.device)
    return accelerator


def make_output_dir(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """The run's folder, the same on all processes. ValueError: it holds a run that --resume does not continue."""
    name = args.output_dir or f"runs/{args.model}-{args.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    if args.resume and not args.output_dir:
        name = str(Path(args.resume).parent)
    folder = Path(broadcast_object_list([name])[0])
    folder.mkdir(parents=True, exist_ok=True)
    goes_on = args.resume == "auto" or (args.resume and Path(args.resume).resolve().parent == folder.resolve())
    best = folder / "best.pt"
    if not goes_on and (resumable(folder) or best.exists()):
        path = "auto" if resumable(folder) else shlex.quote(str(best))
        raise ValueError(f"output-dir={folder}: holds a run; go on with --resume {path}, or take another folder")
    return folder


def lock_output_dir(folder: Path) -> TextIO:
    """Held by this process, not by the data workers that it forks, until it ends. ValueError: another run has it."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"output-dir={folder}: in use by another run") from None
    return file


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Matrices with the singular vectors of the given ones and singular values near 1: three Newton-Schulz steps.

    They take a singular value s of x / |x|, |x| the Frobenius norm, to p(p(p(s))), p(s) = 3.4445 s - 4.775 s^3 +
    2.0315 s^5, which is 0.68 to 1.21 for s over 0.02 and 41 s near 0. Two steps more, as is usual, would take smaller
    values to 1, too. The shapes (M, N) may differ, their smaller sides have to be equal; 0 stays 0.
    """
    # Each step is a product of x with a polynomial of x x^T, all of which commute: only the last product is with x.
    # Or of x^T x, if that is smaller. So most of the work is on square matrices, which go through it together.
    tall = [x.shape[0] > x.shape[1] for x in matrices]
    gram = torch.stack([x.mT @ x if t else x @ x.mT for x, t in zip(matrices, tall)])  # (L, m, m), m = min(M, N)
    square = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-24)[:, None, None]  # |x|^2, (L, 1, 1)

    def factor_of(gram: Tensor) -> Tensor:
        factor = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        return factor

    gram = gram / square
    product = factor = factor_of(gram)
    for _ in range(2):
        gram = factor @ gram @ factor
        factor = factor_of(gram)
        product = factor @ product
    return [x @ p if t else p @ x for x, p, t in zip(matrices, product / square.sqrt(), tall)]


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, whose step for a convolution's weight is orthogonalized, and decoupled weight decay.

    A weight (C_out, C_in, k, k) is a matrix of C_out rows. Most singular values of its step are near
    sqrt(max(1, C_out / (C_in k^2))), while those of SGD's step are its gradient's: the directions in which a layer's
    gradient is small learn as fast as those in which it is large. Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon. torch.optim.Muon takes no convolutions, and is slow on a CPU that has no
    bf16.
    """

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """From the gradients that there are; takes no closure."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            gradients, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
            # For all weights at once, as torch.optim does it: a GPU would wait for so many small operations.
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
            updates = self.orthogonalized(torch._foreach_add(gradients, buffers, alpha=momentum))
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(params, updates, alpha=lr)

    @staticmethod
    def orthogonalized(updates: Sequence[Tensor]) -> list[Tensor]:
        """The updates, those of convolutions orthogonalized: together where the smaller sides of their matrices agree.

        The columns are in the order of channels_last, which is that of the weights.
        """
        alike = defaultdict(list)
        for i, update in enumerate(updates):
            if update.ndim == 4:
                alike[min(len(update), update[0].numel())].append(i)
        updates = list(updates)
        for indices in alike.values():
            matrices = [updates[i].permute(0, 2, 3, 1).flatten(1) for i in indices]
            results = orthogonalize(matrices)
            torch._foreach_mul_(results, [max(1, len(x) / x.shape[1]) ** 0.5 for x in matrices])
            for i, result in zip(indices, results):
                rows, channels, *kernel = updates[i].shape
                updates[i] = result.view(rows, *kernel, channels).permute(0, 3, 1, 2)
        return updates


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Adam and SGD penalise all weights as in the slides; AdamW decays matrices, Muon those that it orthogonalizes."""
    if args.opt == "adam":
        return torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay)
    if args.opt == "sgd":
        return torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay, nesterov=True)
    optimizer, least = (torch.optim.AdamW, 2) if args.opt == "adamw" else (Muon, 4)
    decayed = [p for p in model.parameters() if p.ndim >= least]
    others = [p for p in model.parameters() if p.ndim < least]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return optimizer(groups, args.lr, weight_decay=args.weight_decay)


def make_model(args: argparse.Namespace, accelerator: Accelerator, data: datasets.Data, path: Path | None) -> nn.Module:
    """The network as it begins, its weights drawn from the seed. path: what the run goes on from.

    ValueError or OSError: something the user gave is wrong.
    """
    torch.manual_seed(args.seed)
    model = create_model(args.model, num_classes=len(data.classes), **args.model_args)
    if model.config.in_channels != 3:
        raise ValueError(f"model-args in_channels={model.config.in_channels}: expected 3, the images' channels")
    if (side := args.image_size) is not None:
        stride = model.config.stride
        if not stride <= side <= datasets.MAX_SIDE or side % stride:
            what = f"expected a multiple of {stride}, the stride of {args.model}, up to {datasets.MAX_SIDE}"
            raise ValueError(f"image-size={side}: {what}")
        if side > 112 and model.config.stem_stride == 1:
            others = "the *_imagenet networks and --model-args stem_stride=4 have smaller ones"
            accelerator.print(f"{args.model} keeps maps of {side} x {side}, which is slow; {others}")
    model = model.to(memory_format=torch.channels_last)
    if args.zero_init_last:
        zero_init_last(model)
    if args.pretrained and path:
        accelerator.print(f"{args.pretrained}: not read, since the run goes on from {path}")
    elif args.pretrained:
        accelerator.print(load_pretrained(model, args.pretrained))
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if args.compile:
        alone = accelerator.num_processes == 1 and args.grad_accum_steps == 1
        compile_in_place(model, accelerator.device, graphs=alone)
    return model


def make_run(args: argparse.Namespace, accelerator: Accelerator) -> Run:
    """Everything from the arguments. ValueError or OSError: something the user gave is wrong."""
    check_args(args, accelerator)
    output_dir = make_output_dir(args, accelerator)
    args.output_dir = str(output_dir)
    lock = lock_output_dir(output_dir) if accelerator.is_main_process else None
    with accelerator.local_main_process_first():  # one process downloads, the others read
        data = datasets.load_data(args.dataset, args.data_dir, args.val_fraction, args.seed, args.image_size)
    transform = BatchTransform(data.mean, data.std, datasets.train_transforms(args.augment, data.train))
    mix = datasets.train_mix(args.augment, len(data.classes))
    sampler = EpochBatches(len(data.train), args.batch_size, args.grad_accum_steps, args.seed)
    loader = DataLoader(
        data.train, batch_sampler=sampler, num_workers=args.workers, collate_fn=data.train.collate,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip

    path = args.resume
    if path == "auto":  # the main process chooses, since it may also rename
        path = broadcast_object_list([newest_checkpoint(output_dir) if accelerator.is_main_process else None])[0]

    model = make_model(args, accelerator, data, path)
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(args, model), loader)

    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    run = Run(
        args=args, accelerator=accelerator, output_dir=output_dir, data=data, model=model, optimizer=optimizer,
        sampler=sampler, loader=loader, transform=transform, mix=mix, sums=sums, lock=lock,
    )  # fmt: skip
    if path:
        resume(run, Path(path))
    if accelerator.is_main_process:
        run.writer = SummaryWriter(output_dir, purge_step=run.state.step + 1)
        if run.state.step == 0:
            images = datasets.first_augmented(data, args.augment, args.seed)
            run.writer.add_image("augmented", make_grid(images, padding=0))
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, accelerate)}
        text = json.dumps(vars(args) | {"processes": accelerator.num_processes, "versions": versions}, indent=2)
        write_atomic(output_dir / "args.json", text.encode())
    if path and Path(path).resolve() != (output_dir / "last.pt").resolve():  # what it goes on from is its last.pt now
        left = "last.pt.left"  # the first one stays: a command that goes back may be given again
        save(run, "last.pt", keep_as=None if (output_dir / left).exists() else left)
        if accelerator.is_main_process:
            write_metrics(run)
    return run


def run_epochs(run: Run) -> None:
    """Train, evaluate, log, save, until the run is finished."""
    state, data = run.state, run.data
    clean = BatchTransform(data.mean, data.std)
    batch_size = run.args.batch_size // run.args.grad_accum_steps // run.accelerator.num_processes
    while not finished(run):
        first = state.step
        row = train_epoch(run)
        whole = state.step == (state.epoch + 1) * run.steps_per_epoch  # not where --max-steps ends inside an epoch
        again = state.step == first  # the run was stopped between the epoch's last step and the end of its evaluation
        if not again:
            save(run, "last.pt")  # whatever becomes of the evaluation; and from inside an epoch a longer run goes on
        state.epoch += 1
        if whole:
            run.sums.zero_()
        val = None
        if len(data.val):
            broadcast(list(run.model.buffers()))  # batch norm's statistics are each process's own: judge what is saved
            val = evaluate(run.accelerator, run.model, data.val, clean, len(data.classes), batch_size, run.args.workers)
            if not math.isfinite(val.loss):
                before = run.output_dir / "previous.pt"
                way = f"; go on with --resume {shlex.quote(str(before))} --override" if before.exists() else ""
                raise FloatingPointError(f"the validation loss of last.pt, step {state.step}, is not finite{way}")
            row |= {"val_loss": val.loss, "val_top1_error": val.top1_error, "val_top5_error": val.top5_error}
        log_epoch(run, row, again)
        better = (whole or math.isinf(state.best_loss)) and (not val or val.loss < state.best_loss)
        if better:
            state.best_loss, state.best_epoch = val.loss if val else math.inf, state.epoch
        names = (["best.pt"] if better else []) + (["last.pt"] if whole else [])
        if names:
            save(run, *names)
        run.accelerator.print(epoch_line(row, run.args.epochs), flush=True)  # all is saved if its reader has left
        if number := run.stop.agreed(run.accelerator):
            leave_on_signal(run, number)  # all is saved


def raised_in_thread(hook: threading.ExceptHookArgs) -> None:
    """An OSError of TensorBoard's thread is raised again at its next point, for one line: here it is not printed."""
    if not (issubclass(hook.exc_type, OSError) and type(hook.thread).__module__.startswith("tensorboard")):
        threading.__excepthook__(hook)


def main() -> None:
    args = parse_args()
    processes = 1
    try:
        accelerator = make_accelerator(args)
        processes = accelerator.num_processes
        run = make_run(args, accelerator)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except (RuntimeError, MemoryError) as error:
        sys.exit(f"train.py: {explain(error, *advice(args, processes))}")
    run.stop.listen()
    state, data = run.state, run.data
    parameters = sum(p.numel() for p in run.model.parameters())
    accelerator.print(
        f"{args.model}, {parameters:,} parameters; {args.dataset}, {len(data.train)} training and {len(data.val)} "
        f"validation images\n"
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, precision {args.mixed_precision}, "
        f"{run.steps_per_epoch} steps an epoch\nwrites to {run.output_dir}"
    )
    at_its_end = finished(run)
    try:
        with workers_released():
            run_epochs(run)
    except FloatingPointError as error:
        sys.exit(f"train.py: {error}; try a lower --lr. What was saved before is whole.")
    except (OSError, datasets.ImageFileError) as error:
        sys.exit(f"train.py: {error}. What was saved before is whole; {go_on(args)}.")
    except (RuntimeError, MemoryError) as error:
        sys.exit(f"train.py: {explain(error, *advice(args, processes))}")
    finally:
        if run.lock:
            run.lock.close()
    if run.writer:
        run.writer.close()
    best_file = run.output_dir / "best.pt"
    if at_its_end and not best_file.exists():  # its best epoch is another folder's
        accelerator.print("the run was at its end: nothing was left to do")
    else:
        best = f"best epoch {state.best_epoch}" + (f", validation loss {state.best_loss:.4f}" if len(data.val) else "")
        accelerator.print(best)
        if best_file.exists() and (len(data.test) or len(data.val)):
            split = "" if len(data.test) else " --split val"
            accelerator.print(f"python evaluate.py {shlex.quote(str(best_file))}{split}")
    leave(accelerator)


def advice(args: argparse.Namespace, processes: int) -> tuple[str, str]:
    """For `explain`: how to need less memory, and how to go on."""
    share, parts, ways = args.batch_size // processes, args.grad_accum_steps, []
    if not args.checkpoint_activations:
        ways.append("--checkpoint-activations")
    if more := next((n for n in range(parts + 1, share // 2 + 1) if share % n == 0), 0):  # of at least 2 images each
        ways.append(f"--grad-accum-steps {more} (with --override, to go on)")
    if (smaller := share // parts // 2) > 1:  # images in a part
        ways.append(f"--batch-size {smaller * parts * processes} in a new run")
    return ", or ".join(ways) or "another machine", go_on(args)


def go_on(args: argparse.Namespace) -> str:
    if args.output_dir and resumable(Path(args.output_dir)):
        return f"go on with the same command and --output-dir {shlex.quote(args.output_dir)} --resume auto"
    return "start again"


if __name__ == "__main__":
    threading.excepthook = raised_in_thread
    with reader_may_leave():
        main()
