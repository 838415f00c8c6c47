"""What the networks cost: parameters, arithmetic and memory, counted without weights on the meta device; or timed.

    python flops.py                            # a line for each network of fishnet.py
    python flops.py fishnet99 --image-size 64  # one network, larger images
    python flops.py --stages fishnet99         # a line for each stage: the slides' layer table
    python flops.py --json                     # a list of objects, whole numbers, instead of a table
    python flops.py fishnet99 --time --train --channels-last no yes --mixed-precision no bf16    # four settings, timed
    python flops.py fishnet99_imagenet torchvision.models:resnet50                               # or other packages'

Prints, for one square image, of 32 pixels, or of 224 for the paper's networks:

    parameters   elements of all weights and biases.
    MACs         multiply-adds of convolutions and linear layers; nothing else, no biases. "FLOPs" in many papers.
    FLOPs        as [S] counts them: 2 x (MACs + 2 per element of a batch norm + 1 per output element of a ReLU + 1 per
                 input element of a pool + 1 per output element of an upsampling). Pools are the max-pools, the average
                 pool before the classifier and the one in the squeeze-and-excitation unit. Sums, concatenations and
                 the sigmoid are free.
    activations  bytes of all that a training step in float32 keeps from the forward for the backward pass: each tensor
                 that autograd saves, the image included, once however many operators share it (a ReLU's output is the
                 next convolution's input). Neither parameters nor the statistics of batch norm are among them, so a
                 batch of n images keeps n times as much.

and with --stages, by the rule of [S], parameters and MACs of the stem, the stages, a ResNet's pool and the classifier
fc, besides:

    size         side of the stage's output; a tail stage's before its pool.
    blocks       bottlenecks of the stem, residual units of the tail, regular units of body and head.
    layers       all convolutions but those of shortcuts and transfer blocks; not the classifier.

and the I-convs: the convolutions that a gradient cannot go round, since neither an identity nor a concatenation is
beside them. [S]'s improvements leave those of the stem alone (fishnet99_direct).

With --time, for each network and each combination of the flags' values, the medians over rounds of

    images/s     of whole steps: of forward passes in evaluation mode or, with --train, of a forward and a backward
                 pass and a step of SGD. The images are random and already on the device.
    forward, backward, step   milliseconds. A round takes every setting in turn, for 0.2 s or one step.
    x            what stands before it, by that of the first row; for times the median of the rounds' ratios.
    MiB          peak memory: of the tensors on a GPU, else of the setting's whole process: Python, the libraries, what
                 the compiler took, and what the allocator holds without using it.
    GFLOP/s      2 x MACs for each image, 6 x in training, since a backward pass costs two forward passes. What
                 --checkpoint-activations computes a second time is not counted.
    product      GFLOP/s by those of a product of square matrices with 4,096 rows, or 2,048 on a CPU, of the same
                 precision and in the same rounds.
    set-up       seconds for making the network and two steps, three on a GPU; --compile compiles in them, or
                 finds it in its cache.

Settings have a process each. One works at a time, on all cores that it may use, but they hold their memory together.

Sources: [P] the paper, arXiv 1901.03495; [S] the slides of S. H. Kim, github.com/crapine1119/fishnet. They print 0.56
GFLOP and 3.00 M parameters for ResNet50; 2.53 GFLOP, 17.92 M and 99 layers for FishNet99.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C in them is no traceback

import argparse
import copy
import importlib
import itertools
import json
import multiprocessing
import re
import resource
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from data import one_line, reader_may_leave
from evaluate import allow_tf32, available_cores, compile_in_place, prepare_cpu
from fishnet import (
    FishNet,
    FishNetConfig,
    PostActBottleneck,
    PreActBottleneck,
    ResNet,
    checkpoint_activations,
    create_model,
    model_names,
)

STAGES = ("stem", "T1", "T2", "T3", "T4", "B4", "B3", "B2", "H1", "H2", "H3", "H4")  # in the order of the forward pass

aten = torch.ops.aten
Operator = torch._ops.OpOverloadPacket
Cost = Callable[[tuple, Tensor], int]  # of an operator's arguments and its output

MACS: dict[Operator, Cost] = {
    # weight (out, in/groups, k, k), or of a transposed convolution, args[6], (in, out/groups, k, k)
    aten.convolution: lambda args, output: (args[0] if args[6] else output).numel() * args[1].shape[1:].numel(),
    aten.mm: lambda args, output: output.numel() * args[0].shape[1],  # linear without bias
    aten.addmm: lambda args, output: output.numel() * args[1].shape[1],  # linear with bias, which is args[0]
}
OTHERS: dict[Operator, Cost] = {
    aten.native_batch_norm: lambda args, output: 2 * args[0].numel(),
    aten.relu: lambda args, output: output.numel(),
    aten.relu_: lambda args, output: output.numel(),
    aten.max_pool2d_with_indices: lambda args, output: args[0].numel(),
    aten.mean: lambda args, output: args[0].numel(),  # the average pools to 1 x 1
    aten.upsample_nearest2d: lambda args, output: output.numel(),
}


class Arithmetic(TorchDispatchMode):
    """Adds up the costs of the operators that run under it; one that is in neither table is free."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.others = 0

    def __torch_dispatch__(
        self, op: torch._ops.OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        output = op(*args, **(kwargs or {}))
        if op.overloadpacket in MACS:
            self.macs += MACS[op.overloadpacket](args, output)
        elif op.overloadpacket in OTHERS:
            self.others += OTHERS[op.overloadpacket](args, output)
        return output


@dataclass(frozen=True)
class Counts:
    """The columns of the table; this file's docstring defines them."""

    params: int
    macs: int
    flops: int
    activation_bytes: int


def measure(module: nn.Module, *inputs: Tensor | None) -> Counts:
    """What a forward pass of any module costs. Works on a copy without values: the module stays as it is.

    Batch norm runs in evaluation mode, which costs the same and takes a single value per channel.
    """
    module = copy.deepcopy(module).to("meta", torch.float32).eval().requires_grad_()
    inputs = [x if x is None else x.to("meta", torch.float32) for x in inputs]
    kept = set()  # storages: a tensor and its views share one

    def keep(tensor: Tensor) -> Tensor:
        if tensor.ndim > 1:  # else the statistics of a batch norm
            kept.add(tensor.untyped_storage())
        return tensor

    with torch.enable_grad(), Arithmetic() as total, saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    kept -= {p.untyped_storage() for p in module.parameters()}
    return Counts(
        params=sum(p.numel() for p in module.parameters()),
        macs=total.macs,
        flops=2 * (total.macs + total.others),
        activation_bytes=sum(storage.nbytes() for storage in kept),
    )


def make_model(name: str) -> nn.Module:
    """A network by its name in fishnet.py, or another package's: what FUNCTION of "MODULE:FUNCTION" returns.

    ValueError: there is none.
    """
    module, colon, function = name.partition(":")
    if not colon:
        return create_model(name)
    try:
        make = getattr(importlib.import_module(module), function)
        try:
            model = make()
        except RuntimeError:  # on meta: it computes while it is made
            with torch.device("cpu"):
                model = make()
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{name}: expected MODULE:FUNCTION that makes a network ({one_line(error)})") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: expected MODULE:FUNCTION that makes a network, not a {type(model).__name__}")
    return model


def make_image(model: nn.Module, size: int | None) -> Tensor:
    """One image without values, (1, in_channels, size, size); None: of the size that the network was made for.

    Another package's network is taken to be made for 224 pixels of 3 channels. ValueError: no sensible size.
    """
    config = getattr(model, "config", None)  # ours, or that of a wrapper of ours
    if not isinstance(config, FishNetConfig):
        config = None
    if size is None:
        size = 32 if config and config.structure == "slides" else 224
    if not 1 <= size <= 2**14:
        raise ValueError(f"image-size={size}: expected 1 to {2**14}")
    return torch.empty(1, config.in_channels if config else 3, size, size, device="meta")


def count(model: nn.Module, image_size: int | None = None) -> Counts:
    """What a network costs for one image. ValueError: the size does not fit the network."""
    image = make_image(model, image_size)
    try:
        return measure(model, image)
    except (RuntimeError, AssertionError, TypeError) as error:
        if isinstance(model, (FishNet, ResNet)):
            raise
        size = f"{image.shape[-1]} x {image.shape[-1]}"
        raise ValueError(f"{type(model).__name__} takes no image of {size} pixels ({one_line(error)})") from None


@dataclass(frozen=True)
class StageCounts:
    """A row of the layer table; this file's docstring defines the columns."""

    stage: str
    size: int
    blocks: int
    layers: int
    params: int
    macs: int


def count_stages(model: FishNet | ResNet, image_size: int | None = None) -> list[StageCounts]:
    """The layer table; its parameters and MACs add up to the network's. ValueError: the size does not fit."""
    model = copy.deepcopy(model).to("meta", torch.float32).eval()
    modules = [model.stem, *model.tail, *getattr(model, "body", ()), *getattr(model, "head", ())]
    stages = dict(zip(STAGES, modules))
    stages |= {name: m for name, m in model.named_children() if name not in ("stem", "tail", "body", "head")}  # fc
    calls = {}  # stage -> its inputs and its output
    for name, stage in stages.items():
        stage.register_forward_hook(lambda _, args, output, name=name: calls.update({name: (args, output)}))
    with torch.no_grad():
        model(make_image(model, image_size))

    rows = []
    for name, stage in stages.items():
        args, output = calls[name]
        # A tail stage's size before its pool is that of its input; body and head also return their concatenation.
        last = args[0] if name.startswith("T") else output[-1] if isinstance(output, tuple) else output
        costs = measure(stage, *args)
        rows.append(
            StageCounts(
                stage=name,
                size=last.shape[-1] if last.ndim == 4 else 1,
                blocks=count_modules(stage, (PreActBottleneck, PostActBottleneck), outside=("transfer", "refine")),
                layers=count_modules(stage, nn.Conv2d, outside=("transfer", "shortcut")),
                params=costs.params,
                macs=costs.macs,
            )
        )
    return rows


def count_modules(root: nn.Module, kinds: type | tuple[type, ...], outside: tuple[str, ...]) -> int:
    """Modules of these kinds within root, without those inside modules of the given names."""
    found = (name.split(".") for name, module in root.named_modules() if isinstance(module, kinds))
    return sum(not set(outside) & set(path) for path in found)


def i_convs(model: FishNet | ResNet) -> list[str]:
    """The convolutions that a gradient cannot go round: those with neither an identity nor a concatenation beside them.

    All but those of branches, of transfer blocks (whose output is concatenated to the trunk) and of attentions. [P]
    section 3 calls them isolated convolutions, I-conv.
    """
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    beside = {"transfer", "se", "attention"}
    inside = re.compile(r"(tail|body|head)\..*\.branch\.")  # the stem's M have no shortcut
    return [name for name in convs if not beside & set(name.split(".")) and not inside.match(name)]


# --------------------------------------------------------------------------------------------------------------- time

DTYPES = {"no": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLAGS = {  # what the flags of --time may say, the default first; the settings are the product of what they do say
    "compile": ("no", "yes"),
    "channels_last": ("yes", "no"),
    "mixed_precision": tuple(DTYPES),
    "checkpoint_activations": ("no", "yes"),
}
PRODUCT = "matrix product"  # where a network's name would be


@dataclass(frozen=True)
class Setting:
    """What one process times: a network, or the matrix product, and how."""

    name: str
    compile: str
    channels_last: str
    mixed_precision: str
    checkpoint_activations: str
    train: bool
    batch_size: int
    image_size: int
    device: str

    def __str__(self) -> str:
        return " ".join([self.name, *(f"--{flag.replace('_', '-')} {getattr(self, flag)}" for flag in FLAGS)])


def now(device: torch.device) -> float:
    """Seconds, after all that a GPU has been told to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """Of the tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # whose ru_maxrss may be that of the process which started this one
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_step(setting: Setting, device: torch.device) -> Callable[[], list[float]]:
    """A function that does one step and returns the moments of its start and the end of each part.

    The parts are the forward pass and, in training, backward pass and update, at a learning rate of 0: every step does
    the same. The matrix product is one part.
    """
    dtype = DTYPES[setting.mixed_precision]
    allow_tf32(setting.mixed_precision == "tf32")
    if setting.name == PRODUCT:
        a, b = torch.randn(2, setting.image_size, setting.image_size, device=device, dtype=dtype)
        return lambda: [now(device), (a @ b, now(device))[1]]

    layout = torch.channels_last if setting.channels_last == "yes" else torch.contiguous_format
    model = make_model(setting.name).to(device, memory_format=layout).train(setting.train)
    if setting.checkpoint_activations == "yes":
        checkpoint_activations(model)
    if setting.compile == "yes":
        compile_in_place(model, device)
    images = torch.randn(setting.batch_size, *make_image(model, setting.image_size).shape[1:], device=device)
    images = images.contiguous(memory_format=layout)
    labels = torch.zeros(setting.batch_size, dtype=torch.int64, device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.0, 0.9, nesterov=True)
    scaler = torch.amp.GradScaler(device.type, enabled=setting.mixed_precision == "fp16")

    def step() -> list[float]:
        moments = [now(device)]
        with torch.set_grad_enabled(setting.train):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
        moments.append(now(device))
        if setting.train:
            scaler.scale(loss).backward()
            moments.append(now(device))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moments.append(now(device))
        return moments

    return step


def work(pipe: Connection, setting: Setting) -> None:
    """A process's life: asked first, it gets ready and sends the seconds of that; asked again, it times a round.

    Of a round it sends the mean seconds of each part of a step, and its peak of memory in bytes. A line instead says
    what went wrong.
    """
    try:
        pipe.recv()
        started, device = time.perf_counter(), torch.device(setting.device)
        prepare_cpu(device)
        torch.set_num_threads(available_cores())
        step = make_step(setting, device)
        step()  # a compiler does its work here
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # not of its trials
            step()  # CUDA graphs are recorded in it, and take their memory
        first, *_, last = step()
        steps = max(1, round(0.2 / (last - first)))
        pipe.send(time.perf_counter() - started)
        while True:
            pipe.recv()
            moments = torch.tensor([step() for _ in range(steps)], dtype=torch.float64)
            pipe.send((moments.diff().mean(0).tolist(), peak_bytes(device)))
    except (EOFError, ConnectionError):
        return  # the parent is gone
    except Exception as error:  # compilers and full memories raise many kinds
        pipe.send(one_line(error))


class Worker:
    """A process of its own for a setting. It does something only when it is asked."""

    def __init__(self, setting: Setting) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would not count the libraries as its memory
        self.setting = setting
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(theirs, setting), daemon=True)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the process inherits it: we end it
        self.process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()  # so that the pipe ends with the process

    def ask(self) -> object:
        """What `work` sends. ValueError, naming the setting: what went wrong there."""
        try:
            self.pipe.send(None)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            answer = f"its process ended with exit code {self.process.exitcode}: out of memory?"
        if isinstance(answer, str):
            raise ValueError(f"{self.setting}: {answer}")
        return answer


def time_settings(settings: list[Setting], macs: dict[str, int], rounds: int) -> list[dict]:
    """A row for each setting, the columns of --time; this file's docstring defines them. macs: of each network's image.

    One process works at a time. ValueError, naming the setting: it does not run on this machine.
    """
    workers, setup = [], []
    side = 4096 if settings[0].device.startswith("cuda") else 2048
    products = {s.mixed_precision: replace(s, name=PRODUCT, image_size=side) for s in settings}
    try:
        for setting in (*settings, *products.values()):
            workers.append(Worker(setting))
            setup.append(workers[-1].ask())
        answers = zip(*[[worker.ask() for worker in workers] for _ in range(rounds)])  # of each worker, round by round
    finally:
        for worker in workers:
            worker.pipe.close()  # `work` returns: a compiler that is killed leaves semaphores behind
        for worker in workers:
            worker.process.join(5)
            worker.process.terminate()  # one that is in the middle of a step

    parts, peaks = zip(*[([seconds for seconds, _ in answer], answer[-1][1]) for answer in answers])
    steps = [[sum(seconds) for seconds in part] for part in parts]
    peak_flops = {precision: 2 * side**3 / median(step) for precision, step in zip(products, steps[len(settings) :])}
    rows = []
    for i, setting in enumerate(settings):
        forward, *backward = map(median, zip(*parts[i]))
        speed = setting.batch_size / median(steps[i])
        flops = (6 if setting.train else 2) * macs[setting.name] * speed
        rows.append(asdict(setting) | {
            "images_per_second": speed,
            "forward_seconds": forward,
            "backward_seconds": backward[0] if backward else None,
            "step_seconds": median(steps[i]),
            "step_ratio": median(own / first for own, first in zip(steps[i], steps[0])),
            "peak_bytes": peaks[i],
            "peak_ratio": peaks[i] / peaks[0],
            "flops_per_second": flops,
            "product_share": flops / peak_flops[setting.mixed_precision],
            "setup_seconds": setup[i],
        })  # fmt: skip
    return rows


def make_settings(args: argparse.Namespace) -> list[Setting]:
    """Networks x values of the flags. ValueError: what cannot be timed."""
    if args.stages is not None or not args.names:
        raise ValueError("--time: expected names of networks, and no --stages")
    for name in ("batch_size", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name.replace('_', '-')}={getattr(args, name)}: expected at least 1")
    gpus = torch.cuda.device_count()
    devices = ["cpu", *["cuda"][:gpus], *(f"cuda:{i}" for i in range(gpus))]
    if args.device not in devices:
        raise ValueError(f"device={args.device}: expected one of {', '.join(devices)}")
    if not args.mixed_precision:
        raise ValueError(f"mixed-precision: expected one or several of {', '.join(DTYPES)}")
    values = [dict.fromkeys(getattr(args, flag) or ["yes"]) for flag in FLAGS]  # a bare flag means yes
    missing = {"fp16", "tf32"} & set(args.mixed_precision)
    if args.device == "cpu" and missing:
        raise ValueError(f"mixed-precision={min(missing)}: a CPU has none, use bf16 or no")
    if "yes" in values[-1] and not args.train:
        raise ValueError("checkpoint-activations=yes: expected with --train, an evaluation keeps nothing")
    with torch.device("meta"):
        sizes = {name: make_image(make_model(name), args.image_size).shape[-1] for name in args.names}
    combinations = itertools.product(sizes, *values)
    return [Setting(*c, args.train, args.batch_size, sizes[c[0]], args.device) for c in combinations]


def print_timings(rows: list[dict]) -> None:
    """Two lines for each row: the setting, as far as it is not the default, and its numbers."""
    print(f"{'images/s':>9}{'forward':>9}{'backward':>9}{'step':>9}{'x':>6}{'MiB':>8}{'x':>6}{'GFLOP/s':>9}"
          f"{'product':>8}{'set-up':>7}")  # fmt: skip
    for row in rows:
        flags = [f"--{flag.replace('_', '-')} {row[flag]}" for flag in FLAGS if row[flag] != FLAGS[flag][0]]
        seconds = (row[f"{part}_seconds"] for part in ("forward", "backward", "step"))
        forward, backward, step = ("-" if s is None else f"{1e3 * s:.1f}" for s in seconds)
        print(" ".join([row["name"], *flags]))
        print(
            f"{row['images_per_second']:>9.1f}{forward:>9}{backward:>9}{step:>9}{row['step_ratio']:>6.2f}"
            f"{row['peak_bytes'] / 2**20:>8.0f}{row['peak_ratio']:>6.2f}{row['flops_per_second'] / 1e9:>9.1f}"
            f"{row['product_share']:>8.1%}{row['setup_seconds']:>7.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Parameters, arithmetic, memory and speed of the networks.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(model_names())} (default: all), or MODULE:FUNCTION")
    parser.add_argument("--stages", metavar="NAME", help="the layer table of this network instead")
    parser.add_argument("--image-size", type=int, help="side in pixels (default: 32; 224 for *_imagenet)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    group = parser.add_argument_group("time", "where values may be several, all combinations are timed")
    group.add_argument("--time", action="store_true", help="time the networks instead of counting")
    group.add_argument("--train", action="store_true", help="training steps, not forward passes for evaluation")
    group.add_argument("--batch-size", type=int, default=32, help="images a step (default: %(default)s)")
    group.add_argument("--rounds", type=int, default=5, help="over all settings (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group.add_argument("--device", default=device, help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    for flag, values in FLAGS.items():
        text = f"one or several (default: {values[0]})"
        group.add_argument(f"--{flag.replace('_', '-')}", nargs="*", choices=values, default=values[:1], help=text)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # now there may be processes to end
    try:
        for name in ("train", "batch_size", "rounds", "device", *FLAGS):
            if not args.time and getattr(args, name) != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')}: expected with --time")
        settings = make_settings(args) if args.time else []
        if args.stages is not None and (args.names or ":" in args.stages):
            raise ValueError(f"--stages {args.stages}: expected one network of fishnet.py, and no other names")
        names = [args.stages] if args.stages is not None else args.names or model_names()
        with torch.device("meta"):
            models = {name: make_model(name) for name in names}
        counts = {name: count(model, args.image_size) for name, model in models.items()}
        rows = count_stages(models[args.stages], args.image_size) if args.stages is not None else []
        timings = time_settings(settings, {name: c.macs for name, c in counts.items()}, args.rounds) if settings else []
    except ValueError as error:
        sys.exit(f"flops.py: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)

    if args.json:
        networks = [{"name": name} | asdict(c) for name, c in counts.items()]
        print(json.dumps(timings or [asdict(row) for row in rows] or networks))
    elif args.time:
        print_timings(timings)
    elif args.stages is None:
        width = max(20, *(len(name) + 1 for name in counts))
        print(f"{'network':<{width}}{'parameters':>11} {'MACs, M':>12} {'FLOPs, M':>12} {'activations, MiB':>17}")
        for name, c in counts.items():
            memory = c.activation_bytes / 2**20
            print(f"{name:<{width}}{c.params:>11,} {c.macs / 1e6:>12,.2f} {c.flops / 1e6:>12,.2f} {memory:>17,.2f}")
    else:
        print(f"{'stage':<8}{'size':>6}{'blocks':>9}{'layers':>9}{'parameters':>15} {'MACs, M':>15}")
        for r in rows:
            print(f"{r.stage:<8}{r.size:>6}{r.blocks:>9}{r.layers:>9}{r.params:>15,} {r.macs / 1e6:>15,.2f}")
        layers, total = sum(r.layers for r in rows), counts[args.stages]
        print(f"{'sum':<8}{'':>15}{layers:>9}{total.params:>15,} {total.macs / 1e6:>15,.2f}")
        print("Layers: without shortcuts, transfer blocks and the classifier, fc.")
        names = i_convs(models[args.stages])
        print(textwrap.fill(f"{len(names)} I-convs: {', '.join(names)}.", 79, subsequent_indent="  "))


if __name__ == "__main__":
    with reader_may_leave():
        main()
