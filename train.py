"""Train a network: one loop of our own, wrapped in Hugging Face Accelerate.

    accelerate launch train.py                             # the slides' FishNet-99 on CIFAR-10
    accelerate launch train.py --recipe demo               # no download, for two CPU cores
    python train.py --output-dir runs/a --resume auto      # start runs/a, or continue it
    torchrun --nproc-per-node 8 train.py --recipe strong   # eight GPUs

A run writes last.pt, previous.pt (the save before it), best.pt (the lowest validation loss),
metrics.csv, args.json and TensorBoard events to --output-dir. SIGTERM and Ctrl-C finish the step
and save. A run that stops and resumes ends with the same bits as one that did not stop.
"""

import argparse
import ast
import contextlib
import ctypes
import errno
import io
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import broadcast, gather_object, parse_flag_from_env, tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from data import AUGMENTS, DATASETS, BatchCutMix, Data, EpochBatches, augment_examples
from data import choose_workers, collate, count_cores, count_images, describe_split, draw_grid
from data import ignore_signals, make_transform, parse_workers, pick_examples, seeded
from evaluate import CHECKPOINT_FORMAT, DamagedFileError, Metrics, call_on_main, check_weights
from evaluate import draw_confusion, evaluate, load_checkpoint, load_on_all, load_pretrained
from evaluate import raise_on_all
from fishnet import CONFIGS, UserError, checkpoint_activations, create_model, freeze, zero_init_last

# A recipe is a set of defaults, which flags override.
BASELINE = dict(  # the slides' experiment
    dataset="cifar10", model="fishnet99", model_args={}, val_fraction=0.2, augment="slides",
    epochs=100, batch_size=256, opt="adam", lr=1e-2, weight_decay=1e-4, sched="step",
    warmup_epochs=0, smoothing=0.0, patience=20, zero_init_last=False, mixed_precision=None,
)  # fmt: skip
STRONG = BASELINE | dict(
    # Without final_norm the pooled features are so large that SGD diverges at high rates.
    model_args={"final_norm": True}, val_fraction=0.1, augment="standard", epochs=30, opt="muon",
    lr=0.05, weight_decay=0.01, sched="cosine", warmup_epochs=2, smoothing=0.1, patience=0,
    zero_init_last=True, mixed_precision="auto",
)  # fmt: skip
DEMO = STRONG | dict(
    dataset="shapes", model="fishnet_tiny", model_args={}, val_fraction=0.2, augment="none",
    epochs=3, batch_size=64, warmup_epochs=0.5, smoothing=0.0,
)  # fmt: skip
RECIPES = {"baseline": BASELINE, "strong": STRONG, "demo": DEMO}

# A run may continue with other values of these flags. Any other change needs --override.
FREE = (
    "recipe", "data_dir", "workers", "model_args", "pretrained", "max_steps", "patience", "compile",
    "checkpoint_activations", "output_dir", "checkpoint_every", "resume", "override", "log_every",
)  # fmt: skip

def parse_field(text: str) -> tuple[str, object]:
    """Split FIELD=VALUE; a value in Python's notation becomes that value, others stay words."""
    name, _, value = text.partition("=")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return name, value

def add_flags(parser: argparse.ArgumentParser) -> None:
    add, path = parser.add_argument, os.path.expanduser
    add("--dataset", choices=DATASETS, help="what to train on")
    add("--data-dir", type=path, default="data", help="folder with CIFAR, or train/ and val/")
    add("--image-size", type=int, help="side of a folder's crops, 224 if not given")
    add("--val-fraction", type=float, help="part of the training images kept for validation")
    add("--augment", choices=AUGMENTS, help="see make_transform in data.py")
    add("--padding", type=int, default=4, help="largest shift of standard, cutout and cutmix")
    add("-j", "--workers", type=parse_workers, default="auto", help="processes that read images")
    add("--model", help=f"one of {', '.join(CONFIGS)}, or MODULE:FUNCTION")
    add("--model-args", nargs="+", action="extend", type=parse_field, default=[],
        metavar="FIELD=VALUE", help="fields of FishNetConfig, such as k=4, or FUNCTION's arguments")
    add("--pretrained", type=path, metavar="PATH", help="start from these weights")
    add("--freeze", metavar="PARTS", help='what is not trained, such as "tail" or "tail,body"')
    add("--zero-init-last", action=argparse.BooleanOptionalAction, help="units start as shortcuts")
    add("--whiten", action="store_true", help="freeze a first convolution that whitens patches")
    add("--progressive-resize", action="store_true", help="half of the epochs see smaller images")
    add("--epochs", type=int, help="number of epochs, which the learning rate follows")
    add("--max-steps", type=int, default=0, help="end after this many steps; 0: no limit")
    add("-b", "--batch-size", type=int, help="of all processes; not given: it suits the data")
    add("--grad-accum-steps", type=int, default=1, help="parts of a batch, to save memory")
    add("--opt", choices=("adam", "adamw", "sgd", "muon"), help="sgd, muon: Nesterov momentum 0.9")
    add("--lr", type=float, help="peak learning rate")
    add("--weight-decay", type=float, help="adam, sgd: L2 penalty; adamw, muon: decay")
    add("--sched", choices=("step", "cosine"), help="step: by 0.1 every --decay-epochs")
    add("--decay-epochs", type=int, default=30, help="for --sched step")
    add("--warmup-epochs", type=float, help="linear rise of the learning rate at the start")
    add("--smoothing", type=float, help="label smoothing")
    add("--clip-grad", type=float, default=0.0, help="largest gradient norm; 0: no limit")
    add("--patience", type=int, help="stop after so many epochs without a lower val loss")
    add("--seed", type=int, default=0, help="of weights, split, order and augmentation")
    add("--mixed-precision", choices=("auto", "no", "tf32", "fp16", "bf16"),
        help="auto: bf16 where the hardware multiplies in it; not given: as launched")
    add("--compile", action="store_true", help="use torch.compile; the first step takes minutes")
    add("--checkpoint-activations", action="store_true", help="less memory, more time")
    add("--output-dir", type=path, help="runs/<model>-<dataset>-<time> if not given")
    add("--checkpoint-every", type=int, default=0, help="steps between saves inside an epoch")
    add("--resume", type=path, metavar="PATH|auto", help="auto: newest in --output-dir")
    add("--override", action="store_true", help="resume although flags changed")
    add("--log-every", type=int, default=10, help="steps between checks, and TensorBoard's points")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=RECIPES, default="baseline", help="sets the defaults")
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(parents=[first], allow_abbrev=False, formatter_class=style)
    add_flags(parser)
    recipe = dict(RECIPES[first.parse_known_args(argv)[0].recipe])
    fields = recipe.pop("model_args")
    del recipe["batch_size"]  # choose_batch_size needs to know whether it was given
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    if args.dataset == "folder" and args.image_size is None:
        args.image_size = 224
    # A recipe's fields are FishNetConfig's; a function of the user's own does not know them.
    args.model_args = ({} if ":" in args.model else fields) | dict(args.model_args)
    return args

def check_args(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Raise UserError for values that no run can have."""
    counts = ("epochs", "batch_size", "grad_accum_steps", "decay_epochs", "log_every", "image_size")
    for name, value in vars(args).items():
        if type(value) in (int, float) and not int(name in counts) <= value < 2**63:
            expected = f"expected a finite number of at least {int(name in counts)}"
            raise UserError(f"{name.replace('_', '-')}={value}: {expected}")
    for name, is_wrong, expected in (
        ("smoothing", args.smoothing >= 1, "expected less than 1"),
        ("image_size", args.image_size is not None and args.dataset != "folder",
         "works with --dataset folder only"),
        ("mixed_precision", args.mixed_precision in ("tf32", "fp16")
         and accelerator.device.type == "cpu", "use bf16 or no on a CPU"),
        ("whiten", args.whiten and args.pretrained, "--pretrained would replace these filters"),
        ("patience", args.progressive_resize and args.patience, "use 0 with --progressive-resize"),
        ("model_args", "num_classes" in args.model_args, "num_classes is the dataset's"),
        ("resume", args.resume == "auto" and not args.output_dir, "needs --output-dir, its folder"),
    ):  # fmt: skip
        if is_wrong:
            raise UserError(f"{name.replace('_', '-')}={getattr(args, name)}: {expected}")

def choose_batch_size(args: argparse.Namespace, images: int, parts: int) -> int:
    """Return --batch-size, or else the recipe's, halved until an epoch has ten steps."""
    size, least = args.batch_size or RECIPES[args.recipe]["batch_size"], max(16, 4 * parts)
    while not args.batch_size and size >= least and 10 * size > images and size % (2 * parts) == 0:
        size //= 2
    if size % parts or size < 2 * parts:
        expected = f"expected {parts} parts of at least 2 images, for batch norm"
        raise UserError(f"batch-size={size}: {expected}")
    return size

def choose_precision(args: argparse.Namespace) -> tuple[str, str]:
    """Return the precision and the reason. "auto" takes the precision of the run that continues,
    else accelerate launch's, else bf16 if the hardware multiplies in it."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision not in (None, "auto"):
        return args.mixed_precision, "as asked for"
    folder = (args.output_dir or "") if args.resume == "auto" else Path(args.resume or "").parent
    if args.resume and args.mixed_precision and (found := Path(folder, "args.json")).exists():
        return json.loads(found.read_text())["mixed_precision"], "as the run began"
    if launched != "no" or not args.mixed_precision:
        return launched, "as launched"
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        has_bf16, device = torch.cuda.is_bf16_supported(including_emulation=False), "GPU"
    else:
        found = torch.cpu.get_capabilities()
        has_bf16, device = found.get("amx_bf16") or found.get("avx512_bf16"), "CPU"
    verb = "multiplies" if has_bf16 else "does not multiply"
    return "bf16" if has_bf16 else "no", f"this {device} {verb} in bf16"

def prepare_machine(precision: str | None) -> Accelerator:
    """Set PyTorch up for speed and exact repetition; return the accelerator."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # otherwise barriers expect one GPU per process
    is_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_tf32
    torch.backends.cudnn.deterministic = True
    loading = DataLoaderConfiguration(split_batches=True, non_blocking=True)
    accelerator = Accelerator(mixed_precision="no" if is_tf32 else precision,
                              dataloader_config=loading, dynamo_backend="no")  # fmt: skip
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started != accelerator.num_processes:
        raise UserError(f"{started} processes without a GPU each: set ACCELERATE_USE_CPU=true")
    # accelerate launch sets these two for several processes, but on a CPU it starts only one.
    asked_for_more = os.environ.keys() >= {"ACCELERATE_DYNAMO_BACKEND", "MASTER_PORT"}
    if asked_for_more and "LOCAL_RANK" not in os.environ:
        raise UserError("accelerate launch started one process: use torchrun for several")
    if accelerator.device.type == "cpu":
        if os.environ.get("OMP_NUM_THREADS") == "1":  # accelerate launch and torchrun set it
            torch.set_num_threads(count_cores())
        torch.set_flush_denormal(True)  # numbers under 1e-38 make arithmetic many times slower
        if mallopt := sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None):
            for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: fewer page faults
                mallopt(option, 2**31 - 1)
    return accelerator

def compute_lr(args: argparse.Namespace, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step: linear warm-up, then --sched."""
    warmup = args.warmup_epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    if args.sched == "step":
        return args.lr * 0.1 ** (step // steps_per_epoch // args.decay_epochs)
    done = (step - warmup) / (args.epochs * steps_per_epoch - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))

def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return matrices with the same singular vectors and most singular values near 1. Shapes (M, N)
    may differ, but not their smaller side. Three Newton-Schulz steps take each singular value s of
    x / |x| to p(p(p(s))) with p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5: 0.68 to 1.21 for s over
    0.02. Two more steps, as is usual, would lift smaller values as well."""
    # All steps are polynomials of x x^T (or of x^T x, if that is smaller), and so commute: only the
    # last product has to involve x. The small square matrices go through the steps as one batch.
    tall = [x.shape[0] > x.shape[1] for x in matrices]
    gram = torch.stack([x.mT @ x if t else x @ x.mT for x, t in zip(matrices, tall)])
    square = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-24)[:, None, None]  # |x|^2
    gram, factor, product = gram / square, None, None
    for step in range(3):
        if step:
            gram = factor @ gram @ factor
        factor = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)  # p(s) / s
        product = factor @ product if step else factor
    return [x @ p if t else p @ x for x, p, t in zip(matrices, product / square.sqrt(), tall)]

class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and decoupled weight decay that orthogonalizes the update of each
    convolution, a matrix of C_out rows. So directions of small gradients learn as fast as others.
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon."""

    def __init__(self, params: Iterable, lr: float, momentum=0.9, weight_decay=0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            for p in (p for p in params if not self.state[p]):
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            # One call for all weights: a GPU would wait for so many small operations.
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            updates = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
            alike = defaultdict(list)  # matrices by their smaller side, in channels_last order
            for update in updates:
                if update.ndim == 4:
                    alike[min(len(update), update[0].numel())].append(update.permute(0, 2, 3, 1))
            for matrices in alike.values():
                results = orthogonalize([x.flatten(1) for x in matrices])
                tall = [max(1, len(x) / x[0].numel()) ** 0.5 for x in matrices]  # usual factors
                torch._foreach_mul_(results, tall)
                torch._foreach_copy_(matrices, [y.view_as(x) for x, y in zip(matrices, results)])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(params, updates, alpha=group["lr"])

def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Adam and SGD decay all weights, as in the slides; AdamW matrices, Muon convolutions alone."""
    params, decay = [p for p in model.parameters() if p.requires_grad], args.weight_decay
    if args.opt == "adam":
        return torch.optim.Adam(params, args.lr, weight_decay=decay)
    if args.opt == "sgd":
        return torch.optim.SGD(params, args.lr, 0.9, weight_decay=decay, nesterov=True)
    optimizer, dims = (torch.optim.AdamW, 2) if args.opt == "adamw" else (Muon, 4)
    decayed = {"params": [p for p in params if p.ndim >= dims], "weight_decay": decay}
    others = {"params": [p for p in params if p.ndim < dims], "weight_decay": 0.0}
    return optimizer([decayed, others], args.lr)

@dataclass
class RunState:
    """Hold what a checkpoint has besides weights and optimizer. The last three cover this epoch."""
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done, with their validation
    best_loss: float = math.inf  # of the validation
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # the rows of metrics.csv
    sums: list[float] = field(default_factory=lambda: [0.0] * 3)  # of losses, errors, images
    seconds: float = 0.0  # of training
    data_seconds: float = 0.0  # the part of them that waits for images

class StopSignal:
    """SIGTERM or SIGINT, after which training ends once its step is done."""
    number = 0

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: setattr(self, "number", number))
        if hasattr(os, "register_at_fork"):  # not on Windows
            # Data workers leave the process group, which Ctrl-C and torchrun signal as a whole.
            os.register_at_fork(after_in_child=os.setpgrp)

    def agree(self, accelerator: Accelerator, wait: bool = True) -> int:
        """Return the signal that any process got, or 0. GPUs are asked only if they may `wait`."""
        if accelerator.num_processes == 1:
            return self.number
        if accelerator.device.type != "cpu" and not wait:
            return 0
        return int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())

# One chart each in TensorBoard's Custom Scalars: the tags that it shows.
CHARTS = {
    "loss": ["Multiline", ["loss/train", "loss/val"]],
    "error": ["Multiline", ["error/train", "error/val$"]], "learning rate": ["Multiline", ["lr"]],
    "images per second": ["Multiline", ["speed/images_per_second"]],
    "norm of the gradient": ["Multiline", ["gradient_norm/.*"]],
}  # fmt: skip
Run = argparse.Namespace  # what the loop works with; make_run lists its fields

# ------------------------------------------------------------------------------------ checkpoints

def write_atomic(path: Path, content: bytes | memoryview, keep_as: Path | None = None) -> None:
    """Write the whole file, or raise UserError and leave the old one. That becomes `keep_as`."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_as and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: {error.strerror}; earlier checkpoints are intact") from None

def describe(run: Run) -> dict:
    """Return what fixes an experiment besides its flags: a resumed run must have the same."""
    config = run.args.model_args | {"num_classes": len(run.data.classes)}
    if ":" not in run.args.model:
        config = asdict(run.accelerator.unwrap_model(run.model).config)
    return {"config": config, "images": describe_split(run.data), "classes": list(run.data.classes)}

def save(run: Run, *names: str) -> None:
    """Save a checkpoint under each name; the last.pt before it becomes previous.pt."""
    if not run.accelerator.is_main_process:
        return
    run.writer.flush()
    weights, scaler = run.accelerator.unwrap_model(run.model).state_dict(), run.accelerator.scaler
    checkpoint = describe(run) | {
        "format": CHECKPOINT_FORMAT, "name": run.args.model, "args": vars(run.args),
        "model": {name: weight.contiguous() for name, weight in weights.items()},
        "optimizer": run.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None,
        "mean": list(run.data.mean), "std": list(run.data.std), "state": asdict(run.state),
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    for name in names:
        keep_as = run.folder / "previous.pt" if name == "last.pt" else None
        write_atomic(run.folder / name, buffer.getbuffer(), keep_as)

def resume_run(run: Run, path: Path, checkpoint: dict) -> None:
    """Continue from a checkpoint. Raises UserError if it belongs to another experiment."""
    own, optimizer, model = describe(run), run.optimizer, run.accelerator.unwrap_model(run.model)
    wanted = {n: value for n, value in vars(run.args).items() if n not in FREE} | own["config"]
    found = vars(parse_args([])) | checkpoint["args"] | checkpoint["config"]  # for newer flags
    names = [name for name in wanted | checkpoint["config"] if found.get(name) != wanted.get(name)]
    changes = [f"{name} {found.get(name)} -> {wanted.get(name)}" for name in names]
    if changes and not run.args.override:
        settings = f"different settings: {', '.join(changes)}"
        raise UserError(f"{path} was trained with {settings}; repeat them, or add --override")
    steps = checkpoint["images"]["train"] // checkpoint["args"]["batch_size"]
    fixed = [(f"--{name}", found.get(name), wanted[name]) for name in ("opt", "freeze", "whiten")]
    fixed += [(name, checkpoint[name], own[name]) for name in ("classes", "images")]
    fixed.append(("epoch length", steps, run.steps))
    why = ", ".join(f"other {name}" for name, old, new in fixed if old != new)
    if why or not checkpoint["optimizer"]:
        raise UserError(f"{path} has {why or 'no optimizer'}: start a run with it as --pretrained")
    check_weights(model, checkpoint["model"], path)
    model.load_state_dict(checkpoint["model"])
    groups = zip(checkpoint["optimizer"]["param_groups"], optimizer.state_dict()["param_groups"])
    groups = [saved | {"weight_decay": own["weight_decay"]} for saved, own in groups]  # --override
    optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": groups})
    if run.accelerator.scaler and checkpoint["scaler"]:
        run.accelerator.scaler.load_state_dict(checkpoint["scaler"])
    run.state = RunState(**checkpoint["state"])
    run.accelerator.print(f"resumed {path} at step {run.state.step}, epoch {run.state.epoch + 1}")

# --------------------------------------------------------------------------------------- the loop

def train_step(run: Run, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Do one optimizer step on a global batch. Return this process's (4,): the sums of losses,
    errors and images, and a number that is not finite if the step must not be saved."""
    args, accelerator, state = run.args, run.accelerator, run.state
    for group in run.optimizer.param_groups:
        group["lr"] = compute_lr(args, state.step, run.steps)
    sums = torch.zeros(3, device=accelerator.device)
    for part in range(args.grad_accum_steps):
        started = time.perf_counter()
        images, labels = next(batches)  # uint8 (N, 3, H, W), (N,)
        state.data_seconds += time.perf_counter() - started
        # Parts are numbered alike on one process that accumulates and on several that do not.
        shard = part * accelerator.num_processes + accelerator.process_index
        is_last = part + 1 == args.grad_accum_steps  # only then do processes add their gradients
        sync = contextlib.nullcontext() if is_last else accelerator.no_sync(run.model)
        with sync, seeded(args.seed, state.epoch, state.step, shard):
            images, targets = run.transform(images), labels
            if run.mix:
                images, targets = run.mix(images, labels)  # targets: (N, classes)
                labels = targets.argmax(1)
            scale = (0.5, 0.5, 0.75, 1, 1, 1)[6 * state.epoch // args.epochs]
            if args.progressive_resize and scale < 1:
                images = F.interpolate(images, None, scale, "bilinear", antialias=True)
            logits = run.model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, targets, label_smoothing=args.smoothing)
            accelerator.backward(loss / args.grad_accum_steps)
        errors = (logits.detach().argmax(1) != labels).sum()
        count = torch.full_like(errors, len(labels))
        sums += torch.stack([loss.detach() * count, errors, count])
    norm = measure_gradient(run)
    run.optimizer.step()
    run.optimizer.zero_grad()
    # fp16's scaler skips a step if the norm is not finite, which is no harm.
    check = sums[0] if accelerator.optimizer_step_was_skipped else sums[0] + norm
    return torch.cat([sums, check[None]])

def train_epoch(run: Run) -> dict[str, float]:
    """Train to the end of the epoch or to --max-steps; return a row of metrics.csv. A signal saves
    and ends the program. Raises UserError if a loss or gradient is not finite."""
    args, state, steps = run.args, run.state, run.steps
    first, end = state.epoch * steps, min((state.epoch + 1) * steps, args.max_steps or math.inf)
    run.sampler.epoch, run.sampler.start = state.epoch, (state.step - first) * args.grad_accum_steps
    run.data.train.epoch = None if args.augment == "none" else state.epoch
    run.model.train()
    bar = tqdm(desc=f"epoch {state.epoch + 1}", initial=state.step - first, total=end - first,
               ncols=79, leave=False, disable=not sys.stderr.isatty())  # fmt: skip
    batches = iter(run.loader) if state.step < end else iter(())
    while state.step < end:
        started = time.perf_counter()
        run.pending.append(train_step(run, batches))
        state.step += 1
        is_logged = state.step == end or state.step % args.log_every == 0
        stopped = run.stop.agree(run.accelerator, is_logged)
        # The end of an epoch is saved before its validation, which may fail.
        is_due = state.step == end or state.step % (args.checkpoint_every or end) == 0
        if is_logged or stopped or is_due:  # seldom, since it waits for the device
            last = settle(run)
        state.seconds += time.perf_counter() - started
        bar.update()
        if is_logged:
            log_step(run, bar, last)
        if stopped or is_due:
            save(run, "last.pt")
        if stopped:
            bar.close()
            saved = f"{signal.Signals(stopped).name}: saved step {state.step}"
            way_on = f"--output-dir {shlex.quote(str(run.folder))} --resume auto"
            run.accelerator.print(f"{saved}; continue with the same flags and {way_on}")
            run.accelerator.end_training()
            sys.exit(128 + stopped)
    bar.close()
    return summarize_epoch(run)

def settle(run: Run) -> list[float]:
    """Add pending results of train_step to the sums of the epoch; return those of the last step.
    Raises UserError, on all processes, if one of them is not finite."""
    results = run.accelerator.reduce(torch.stack(run.pending), "sum").tolist()
    run.pending.clear()
    for step, (*values, check) in enumerate(results, run.state.step - len(results) + 1):
        if not math.isfinite(check):
            reason = f"the loss or its gradient is not finite at step {step}"
            raise UserError(f"{reason}: try a lower --lr; earlier checkpoints are intact")
        run.state.sums = [total + value for total, value in zip(run.state.sums, values)]
    return results[-1][:3]

def run_epochs(run: Run) -> None:
    """Train, validate, log and save, epoch by epoch, until the run is finished."""
    args, state, data = run.args, run.state, run.data
    clean = make_transform(data.mean, data.std)
    batch_size = args.batch_size // args.grad_accum_steps // run.accelerator.num_processes
    while (
        state.epoch < args.epochs
        and not 0 < args.max_steps <= state.epoch * run.steps
        and not 0 < args.patience <= state.epoch - state.best_epoch
    ):  # fmt: skip
        row, val = train_epoch(run), None
        if len(data.val):
            broadcast(list(run.model.buffers()))  # processes differ in batch norm's statistics
            val = evaluate(run.accelerator, run.model, data.val, clean, len(data.classes),
                           batch_size, args.workers)  # fmt: skip
            if not math.isfinite(val.loss):
                last = run.folder / "last.pt"  # --resume auto then takes the one before it
                call_on_main(run.accelerator, last.replace, f"{last}.damaged")
                way_on = "lower --lr, with --resume auto --override or in a new folder"
                raise UserError(f"validation loss after step {state.step} is not finite: {way_on}")
            row |= {"val_loss": val.loss, "val_top1_error": val.top1_error,
                    "val_top5_error": val.top5_error}  # fmt: skip
        log_epoch(run, row, val)
        if state.step < (state.epoch + 1) * run.steps:  # --max-steps ends inside the epoch
            break
        is_best = row.get("val_loss", -math.inf) < state.best_loss  # without validation: always
        state.epoch += 1
        state.history.append(row)
        state.sums, state.seconds, state.data_seconds = [0.0] * 3, 0.0, 0.0
        if is_best:
            state.best_loss, state.best_epoch = row.get("val_loss", math.inf), state.epoch
        save(run, *["best.pt"] * is_best, "last.pt")

def measure_gradient(run: Run) -> Tensor:
    """Return the norm of the gradient. Log that of each stage, and clip to --clip-grad."""
    run.accelerator.unscale_gradients()
    stages, step = defaultdict(list), run.state.step + 1
    for name, p in run.accelerator.unwrap_model(run.model).named_parameters():
        if p.grad is not None:
            stages[name.partition(".")[0]].append(p.grad)
    for stage, gradients in stages.items() if run.writer and step % run.args.log_every == 0 else ():
        run.writer.add_scalar(f"gradient_norm/{stage}", nn.utils.get_total_norm(gradients), step)
    norm = nn.utils.get_total_norm([g for gradients in stages.values() for g in gradients])
    if run.args.clip_grad:
        nn.utils.clip_grads_with_norm_(run.model.parameters(), run.args.clip_grad, norm)
    return norm

def summarize_epoch(run: Run) -> dict[str, float]:
    """Return a row of metrics.csv: means over the epoch so far, and the learning rate."""
    state, (loss, errors, images) = run.state, run.state.sums
    return {
        "epoch": state.epoch + 1, "step": state.step,
        "lr": compute_lr(run.args, state.step - 1, run.steps),
        "train_loss": loss / images, "train_top1_error": errors / images,
        "images_per_second": images / state.seconds, "seconds": state.seconds,
        "data_wait": state.data_seconds / state.seconds,  # the part of the time without a batch
    }  # fmt: skip

def log_step(run: Run, bar: tqdm, sums: list[float]) -> None:
    """Show the epoch's means on the bar, and log the last step's values to TensorBoard."""
    row, (loss, errors, images) = summarize_epoch(run), sums
    means = f"loss {row['train_loss']:.3f} error {row['train_top1_error']:.1%}"
    bar.set_postfix_str(f"{means} {row['images_per_second']:.0f} img/s")
    values = {"loss/train": loss / images, "error/train": errors / images, "lr": row["lr"]}
    values |= {f"speed/{name}": row[name] for name in ("images_per_second", "data_wait")}
    for name, value in values.items() if run.writer else ():
        run.writer.add_scalar(name, value, run.state.step)

def log_epoch(run: Run, row: dict[str, float], val: Metrics | None) -> None:
    """Write metrics.csv, log the validation to TensorBoard, and print a line."""
    if not run.accelerator.is_main_process:
        return
    if val:
        log_validation(run, val)
    table = [row.keys(), *(row.values() for row in [*run.state.history, row])]
    text = "".join(",".join(map(str, values)) + "\n" for values in table)
    write_atomic(run.folder / "metrics.csv", text.encode())
    line = f"epoch {row['epoch']}/{run.args.epochs}"
    for name in ("train", "val") if "val_loss" in row else ("train",):
        line += f"  {name} loss {row[f'{name}_loss']:.2f}  error {row[f'{name}_top1_error']:.2%}"
    print(f"{line}  {row['seconds']:.0f} s", flush=True)
    run.writer.flush()

def log_validation(run: Run, val: Metrics) -> None:
    """Log a validation to TensorBoard: errors, images of all classes, and the confusion matrix."""
    data, writer, step = run.data, run.writer, run.state.step
    writer.add_scalar("loss/val", val.loss, step)
    writer.add_scalar("error/val", val.top1_error, step)
    writer.add_scalar("error/val_top5", val.top5_error, step)
    chosen, names = pick_examples(data.val.labels, 32), data.classes
    images, labels = data.val.__getitems__(chosen)
    rows = zip(labels, val.predicted[chosen], val.probability[chosen])
    captions = [f"{names[label]}\n{names[guess]} {p:.0%}" for label, guess, p in rows]
    writer.add_image("predictions: true class, predicted class", draw_grid(images, captions), step)
    writer.add_image("confusion", draw_confusion(val.confusion, data.classes), step)

def log_result(run: Run) -> None:
    """Log flags and final errors for TensorBoard's HParams page, within the same run."""
    row, flags = run.state.history[-1], vars(run.args).items()
    flags = {key: value if isinstance(value, (int, float)) else str(value) for key, value in flags}
    tags = {"loss/train": "train_loss", "error/train": "train_top1_error",
            "loss/val": "val_loss", "error/val": "val_top1_error"}  # fmt: skip
    for summary in hparams(flags, {tag: row[name] for tag, name in tags.items() if name in row}):
        run.writer.file_writer.add_summary(summary)
    run.writer.flush()

# ----------------------------------------------------------------------------------------- set-up

def find_run(args: argparse.Namespace) -> tuple[Path, Path | None, dict | None]:
    """Return the run's folder, and path and content of the checkpoint to continue from, or None."""
    name = f"{args.model}-{args.dataset}-{time.strftime('%Y%m%d-%H%M%S')}".replace(":", "-")
    path = Path(args.resume) if args.resume and args.resume != "auto" else None
    folder = Path(args.output_dir or (path.parent if path else f"runs/{name}"))
    if args.resume != "auto":
        if any(folder.glob("*.pt")) and not (path and path.parent.resolve() == folder.resolve()):
            raise UserError(f"{folder}: holds a run; add --resume auto, or another --output-dir")
        return folder, path, load_checkpoint(path) if path else None
    for path in (folder / "last.pt", folder / "previous.pt"):
        try:
            if path.exists():
                return folder, path, load_checkpoint(path)
        except DamagedFileError as error:
            path.replace(f"{path}.damaged")
            print(f"{error}; renamed to {path.name}.damaged", flush=True)
    if any(folder.glob("*.pt*")):
        raise UserError(f"{folder}: no whole last.pt is left; use --resume PATH or another folder")
    return folder, None, None

def lock_folder(folder: Path) -> object:
    """Make the run's folder, and keep other runs out of it while the returned file is open."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        import fcntl  # not on Windows

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: in use by another run") from None
    except (ImportError, OSError):
        print(f"{folder} cannot be locked: take care that no other run uses it", flush=True)
    return file

def load_same_data(args: argparse.Namespace, accelerator: Accelerator) -> Data:
    """Load the data on every process. Raises UserError on all if it fails or differs on one."""
    options = (args.dataset, args.data_dir, args.val_fraction, args.seed, args.image_size)
    data = load_on_all(accelerator, *options)
    own = dict.fromkeys(("data_dir", "workers", "pretrained"))  # may differ between processes
    summary = (vars(args) | own, data.classes, data.train.labels.tolist(), len(data.val))
    if any(found != summary for found in gather_object([summary])):
        raise UserError("the processes have different flags or data, which must be the same")
    return data

def make_model(args: argparse.Namespace, classes: int, accelerator: Accelerator) -> nn.Module:
    """Return the network as the seed draws it."""
    torch.manual_seed(args.seed)
    model = create_model(args.model, num_classes=classes, **args.model_args)
    stride = getattr(getattr(model, "config", None), "stride", 1) * 4**args.progressive_resize
    if (side := args.image_size or 32) % stride:
        note = " with --progressive-resize" * args.progressive_resize
        raise UserError(f"image-size={side}: expected a multiple of {stride}{note}")
    if args.zero_init_last:
        zero_init_last(model)
    if args.freeze:
        freeze(model, args.freeze)
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if args.compile:  # in place, which leaves the names of the weights
        is_alone = accelerator.num_processes == args.grad_accum_steps == 1
        use_graphs = is_alone and accelerator.device.type == "cuda"  # gradients must not move
        model.compile(mode="reduce-overhead" if use_graphs else None, dynamic=False)
    return model.to(memory_format=torch.channels_last)

@torch.no_grad()
def whiten_patches(model: nn.Module, data: Data) -> None:
    """Set and freeze the first convolution: principal components of patches of 500 training images,
    scaled to variance 1, and their negatives. Jordan 2024, arXiv 2404.00498, section 3.1."""
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    chosen = list(range(0, len(data.train), max(1, len(data.train) // 500)))[:500]
    images = make_transform(data.mean, data.std)(data.train.__getitems__(chosen)[0])
    patches = F.unfold(images, conv.kernel_size, stride=conv.kernel_size)  # (N, C k k, patches)
    patches = patches.transpose(1, 2).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 1e-3).sqrt()).T.flip(0)  # those of large variance first
    filters = torch.cat([filters, -filters])[: conv.out_channels]
    conv.weight[: len(filters)] = filters.view(-1, *conv.weight.shape[1:]).float()
    conv.weight.requires_grad_(False)

def make_run(args: argparse.Namespace) -> Run:
    """Make everything that the loop needs. Raises UserError if an argument or a file is wrong."""
    args.mixed_precision, reason = choose_precision(args)
    accelerator = prepare_machine(args.mixed_precision)
    check_args(args, accelerator)
    folder, path, checkpoint = call_on_main(accelerator, find_run, args)
    args.output_dir = str(folder)
    data = load_same_data(args, accelerator)
    parts = accelerator.num_processes * args.grad_accum_steps
    args.batch_size = choose_batch_size(args, len(data.train), parts)
    args.workers = choose_workers(args.workers, data.train)
    sampler = EpochBatches(len(data.train), args.batch_size, args.grad_accum_steps, args.seed)
    loader = DataLoader(data.train, batch_sampler=sampler, num_workers=args.workers,
                        collate_fn=collate, worker_init_fn=ignore_signals,
                        pin_memory=torch.cuda.is_available())  # fmt: skip
    model = make_model(args, len(data.classes), accelerator)
    if args.whiten:
        whiten_patches(model, data)
    with raise_on_all():  # DistributedDataParallel takes the main process's weights to the others
        if args.pretrained and not path and accelerator.is_main_process:
            print(load_pretrained(model, args.pretrained))
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(args, model), loader)
    run = Run(
        args=args, accelerator=accelerator, folder=folder, data=data, model=model,
        optimizer=optimizer, sampler=sampler, loader=loader, state=RunState(), stop=StopSignal(),
        steps=sampler.batches // args.grad_accum_steps,  # of an epoch
        precision=f"precision {args.mixed_precision.replace('no', 'float32')}, {reason}",
        transform=make_transform(data.mean, data.std, args.augment, data.train, args.padding),
        mix=BatchCutMix(len(data.classes)) if args.augment == "cutmix" else None,
        pending=[],  # results of train_step that are not in state.sums yet
        lock=None, writer=None,  # on the main process alone
    )  # fmt: skip
    if path:
        resume_run(run, path, checkpoint)
    call_on_main(accelerator, start_writing, run)
    if path and path.resolve() != (folder / "last.pt").resolve():
        save(run, "last.pt")  # so that --resume auto continues from here
    return run

def start_writing(run: Run) -> None:
    """Lock the folder, write args.json, and open TensorBoard's events with augmented images."""
    run.lock = lock_folder(run.folder)
    run.writer = SummaryWriter(run.folder, purge_step=run.state.step + 1)
    versions = {name: version(name) for name in ("torch", "torchvision", "accelerate")}
    content = vars(run.args) | {"processes": run.accelerator.num_processes, "versions": versions}
    write_atomic(run.folder / "args.json", json.dumps(content, indent=2).encode())
    if run.state.step > 0:
        return
    run.writer.add_text("command", shlex.join(["python", *sys.argv]))
    run.writer.add_text("flags", "\n".join(f"- {k}: {v}" for k, v in vars(run.args).items()))
    run.writer.add_custom_scalars({"In the order in which to look": CHARTS})
    images = augment_examples(run.data, run.args.augment, run.args.seed, run.args.padding)
    run.writer.add_image("training images", draw_grid(*images))

def describe_run(run: Run) -> str:
    """Return lines that say what the run trains, on what, how and where to."""
    args, data, device = run.args, run.data, run.accelerator.device.type
    parameters = sum(p.numel() for p in run.model.parameters())
    counts = f"{len(data.train)} training and {len(data.val)} validation images"
    left_out = len(data.train) - run.steps * args.batch_size
    note = f", {left_out} left out, others each time" if left_out else ""
    return "\n".join([
        f"network   {args.model}, {parameters:,} parameters",
        f"data      {args.dataset}, {counts}",
        *(count_images(data) if args.dataset == "folder" else ()),
        f"an epoch  {run.steps} batches of {args.batch_size} images{note}",
        f"machine   {run.accelerator.num_processes} process(es) on {device}, each with "
        f"{args.workers} worker(s) that read images",
        f"          {run.precision}",
        f"writes    {run.folder}",
    ])  # fmt: skip

def describe_next(run: Run) -> str:
    """Return lines that say what to do next. A run that ended in its first epoch has no best.pt."""
    path = run.folder / ("best.pt" if (run.folder / "best.pt").exists() else "last.pt")
    more = f" --model {run.args.model}" if ":" in run.args.model else ""
    split = next(name for name in ("test", "val", "train") if len(getattr(run.data, name)))
    more += " --report report" + f" --split {split}" * (split != "test")
    best = run.state.history[run.state.best_epoch - 1] if run.state.best_epoch else {}
    lines = [f"best      epoch {best['epoch']}: val loss {best['val_loss']:.3f}, error "
             f"{best['val_top1_error']:.2%}"] if "val_loss" in best else []
    lines += [f"evaluate  python evaluate.py {shlex.quote(str(path))}{more}",
             f"look      tensorboard --logdir {shlex.quote(str(run.folder))}"]  # fmt: skip
    if run.args.recipe == "demo":
        lines += ["next      python train.py --recipe strong --model fishnet_tiny   # on CIFAR-10",
                  "          docs/images.md: train on a folder of your own photos"]
    return "\n".join(lines)

def explain(error: Exception) -> str:
    """Return one line for a failure of the machine. Raises any other error again."""
    text = str(error)
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        return f"{os.fsdecode(error.filename or 'TensorBoard')}: {error.strerror}"
    if isinstance(error, BlockingIOError):
        return f"a process cannot be started ({error.strerror}): lower --workers"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return "out of memory: lower --batch-size, or train with --checkpoint-activations"
    if "DataLoader worker" in text and "shared memory" in text:
        return "/dev/shm is full: use docker run --shm-size 8g, or --workers 0"
    if "gloo" in text and "by peer" in text:
        return "another process of the run ended: its own output says why"
    is_broken_pipe = isinstance(error, (ConnectionError, EOFError))
    if text.startswith("DataLoader worker (pid") or (is_broken_pipe and "Caught" not in text):
        return "a data worker was killed, perhaps for lack of memory: try --workers 0"
    raise error

@contextlib.contextmanager
def report_failures(program: str) -> Iterator[None]:
    """Turn a UserError or a failure of the machine in the block into one line that ends it."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{program}: {error}")
    except (RuntimeError, MemoryError, OSError, EOFError) as error:
        sys.exit(f"{program}: {explain(error)}")
    finally:
        if workers := multiprocessing.active_children():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would raise an error for each
            for worker in workers:
                worker.kill()  # they ignore SIGTERM, so Python would wait for them

def main() -> None:
    with report_failures("train.py"):
        run = make_run(parse_args())
        run.stop.listen()
        run.accelerator.print(describe_run(run))
        run_epochs(run)
        if run.writer and run.state.history:
            log_result(run)
        run.accelerator.print(describe_next(run))
    run.accelerator.end_training()

if __name__ == "__main__":
    main()
