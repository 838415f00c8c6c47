"""Measure speed: of training steps, of forward passes, of each operator, of augmentation.

    python examples/benchmark.py step plain:fishnet99 fishnet99 --batch-size 64 --compile no yes
    python examples/benchmark.py forward fishnet99_imagenet torchvision.models:resnet50
    python examples/benchmark.py roofline fishnet99 --batch-size 64
    python examples/benchmark.py augment --data-dir data

"step" times forward pass, backward pass and an update by SGD, "forward" evaluation alone, for all
combinations of the flags' values. "plain:NAME" is a network as a first version would run it: NCHW,
eager, glibc's allocator as it comes. Each setting has its own process. They take turns, each for
0.2 seconds or one step; the columns are medians over these rounds:

    images/s     of whole steps, with random images that are on the device already
    forward, backward, step    milliseconds
    x            the column on the left, relative to the first row
    MiB          peak memory: of the tensors on a GPU, of the whole process on Linux
    GFLOP/s      6 FLOPs for each multiply-add in a step, 2 in a forward pass. What
                 --checkpoint-activations computes a second time does not count.
    product      GFLOP/s relative to a product of square matrices in the same precision, with 4,096
                 rows on a GPU and 2,048 on a CPU
    set-up       seconds until the first steps are done, including compilation

"roofline" prints a Markdown table of the operators in an eager training step on the CPU, with means
over --rounds steps (Williams, Waterman and Patterson 2009):

    GB/s         of tensors that go in and come out, each counted once: the least that has to move
    roof         the least possible time relative to the measured one. It is that of FLOPs at the
                 speed of a matrix product, or of bytes at the speed of a copy if that is longer.
                 More than 100 % means that the data were in a cache.
    bound        which of the two is longer: "arithmetic" or "memory"

"augment" prints images/s on one thread: of --augment slides on batches of 256 images, and of
torchvision's transforms image by image, without Fancy PCA.
"""

import argparse
import ctypes
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict, namedtuple
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import CIFAR, Data, load_data, make_transform
from fishnet import CONFIGS, UserError, checkpoint_activations, create_model
from flops import count, make_image
from train import explain, prepare_machine

FLAGS = {  # the values that each flag can have, the default first
    "compile": ("no", "yes"),
    "channels_last": ("yes", "no"),
    "mixed_precision": ("no", "tf32", "bf16", "fp16"),
    "checkpoint_activations": ("no", "yes"),
}
PLAIN = "plain:"
PRODUCT = "matrix product"  # stands in the place of a network's name
COLUMNS = {
    "images/s": "9.1f", "forward": "9.1f", "backward": "9.1f", "step": "9.1f", "x": "6.2f",
    "MiB": "8.0f", "x ": "6.2f", "GFLOP/s": "9.1f", "product": "8.1%", "set-up": "7.1f",
}  # fmt: skip
SHOWN = 14  # operators in the table of "roofline"; the others share a row

# What one process times, and the FLOPs of one step.
Setting = namedtuple("Setting", ["name", *FLAGS, "train", "batch_size", "image_size", "flops"])

def has_gpu() -> bool:
    """Return True if Accelerate will choose a GPU."""
    return torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")

def make_settings(args: argparse.Namespace) -> list[Setting]:
    """Return all combinations of networks and flags. Raises UserError if one cannot be timed."""
    if min(args.batch_size, args.rounds) < 1:
        raise UserError("expected --batch-size and --rounds of at least 1")
    if not has_gpu() and {"tf32", "fp16"} & set(args.mixed_precision):
        raise UserError("mixed-precision: tf32 and fp16 need a GPU; use bf16 or no")
    train, settings = args.command != "forward", []
    for name in args.names:
        with torch.device("meta"):
            model = create_model(name.removeprefix(PLAIN))
        size = make_image(model, args.image_size).shape[-1]
        flops = (6 if train else 2) * count(model, size).macs * args.batch_size
        for values in itertools.product(*(getattr(args, flag) for flag in FLAGS)):
            setting = Setting(name, *values, train, args.batch_size, size, flops)
            if name.startswith(PLAIN):
                setting = setting._replace(compile="no", channels_last="no")
            settings.append(setting)
    return list(dict.fromkeys(settings))

def describe(setting: Setting) -> str:
    """Return the name and the flags that do not have their default."""
    changed = [flag for flag in FLAGS if getattr(setting, flag) != FLAGS[flag][0]]
    flags = [f"--{flag.replace('_', '-')} {getattr(setting, flag)}" for flag in changed]
    return " ".join([setting.name, *flags])

def use_plain_allocator() -> None:
    """Let this process allocate memory as in a first version."""
    if sys.platform == "linux":  # glibc itself arrives at these thresholds if tensors are large
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**26)  # M_TRIM_THRESHOLD

def now(device: torch.device) -> float:
    """Return a time in seconds, after a GPU has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()

def measure_peak(device: torch.device) -> float:
    """Return the peak memory in bytes of the tensors on a GPU, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # only Linux has it
    if not status.exists():
        return math.nan
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])

def make_step(setting: Setting, accelerator: Accelerator) -> Callable[[], list[float]]:
    """Return a function that does one step and returns when it started and when each part ended:
    forward pass, backward pass, update. The learning rate is 0, so all steps are alike. A matrix
    product is one part."""
    device, dtypes = accelerator.device, {"bf16": torch.bfloat16, "fp16": torch.float16}
    if setting.name == PRODUCT:
        dtype = dtypes.get(setting.mixed_precision, torch.float32)
        a, b = torch.randn(2, setting.image_size, setting.image_size, device=device, dtype=dtype)
        return lambda: [now(device), (a @ b, now(device))[1]]

    layout = torch.channels_last if setting.channels_last == "yes" else torch.contiguous_format
    model = create_model(setting.name.removeprefix(PLAIN)).to(memory_format=layout)
    if setting.name.startswith(PLAIN):
        use_plain_allocator()
    if setting.checkpoint_activations == "yes":
        checkpoint_activations(model)
    if setting.compile == "yes":  # as train.py does on one GPU
        model.compile(mode="reduce-overhead" if device.type == "cuda" else None)
    images = torch.randn(setting.batch_size, *make_image(model, setting.image_size).shape[1:])
    images = images.to(device, memory_format=layout)
    labels = torch.zeros(setting.batch_size, dtype=torch.int64, device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.0, 0.9, nesterov=True)
    model, optimizer = accelerator.prepare(model.train(setting.train), optimizer)

    def step() -> list[float]:
        times = [now(device)]
        with torch.set_grad_enabled(setting.train):
            loss = F.cross_entropy(model(images), labels)
        times.append(now(device))
        if setting.train:
            accelerator.backward(loss)
            times.append(now(device))
            optimizer.step()
            optimizer.zero_grad()
            times.append(now(device))
        return times

    return step

@functools.cache  # a process sets its setting up once
def set_up(setting: Setting) -> tuple[Callable[[], list[float]], torch.device, float]:
    """Return a step that is ready to be timed, its device, and the seconds that this took."""
    started = time.perf_counter()
    accelerator = prepare_machine(setting.mixed_precision)
    step, device = make_step(setting, accelerator), accelerator.device
    step()  # a compiler works here
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the compiler's trials do not count
        step()  # CUDA graphs are recorded here
    return step, device, time.perf_counter() - started

def time_round(setting: Setting) -> tuple[list[float], float, float]:
    """Return mean seconds of each part of a step, peak memory, and the seconds of the set-up."""
    step, device, seconds = set_up(setting)
    started, times = time.perf_counter(), []
    while not times or time.perf_counter() < started + 0.2:
        times.append(step())
    parts = torch.tensor(times, dtype=torch.float64).diff().mean(0)
    return parts.tolist(), measure_peak(device), seconds

def run_rounds(settings: list[Setting], rounds: int) -> list[list]:
    """Return the answers of time_round for each setting, round by round. Raises UserError, naming
    the setting, if one does not run on this machine."""
    spawn = multiprocessing.get_context("spawn")  # forked processes would share memory
    ignore = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # the main process ends the others
    pools = [ProcessPoolExecutor(1, spawn, *ignore) for _ in settings]
    answers = [[] for _ in settings]
    for _ in range(rounds + 1):
        for setting, pool, own in zip(settings, pools, answers):
            try:
                own.append(pool.submit(time_round, setting).result())
            except (UserError, BrokenProcessPool) as error:
                raise UserError(f"{describe(setting)}: {error}") from None
            except (RuntimeError, MemoryError) as error:
                raise UserError(f"{describe(setting)}: {explain(error)}") from None
    return [own[1:] for own in answers]  # the first round warms up

def print_timings(settings: list[Setting], rounds: int) -> None:
    """Time the settings, and print two lines for each: its flags, and the columns that the top of
    this file defines."""
    side = 4096 if has_gpu() else 2048
    size = {"name": PRODUCT, "train": False, "image_size": side, "flops": 2 * side**3}
    products = {setting.mixed_precision: setting._replace(**size) for setting in settings}
    timed = [*settings, *products.values()]
    answers = run_rounds(timed, rounds)
    steps = [[sum(parts) for parts, _, _ in own] for own in answers]
    speeds = [setting.flops / median(own) for setting, own in zip(timed, steps)]
    limits, first_peak = dict(zip(products, speeds[len(settings) :])), answers[0][-1][1]
    print(*(f"{name.strip():>{form.split('.')[0]}}" for name, form in COLUMNS.items()), sep="")
    for setting, own, step, speed in zip(settings, answers, steps, speeds):
        parts = [1e3 * median(seconds) for seconds in zip(*(parts for parts, _, _ in own))]
        _, peak, set_up_seconds = own[-1]
        values = (
            setting.batch_size / median(step), parts[0], parts[1] if setting.train else math.nan,
            1e3 * median(step), median(a / b for a, b in zip(step, steps[0])),
            peak / 2**20, peak / first_peak,
            speed / 1e9, speed / limits[setting.mixed_precision], set_up_seconds,
        )  # fmt: skip
        print(describe(setting))
        print(*(f"{value:{form}}" for value, form in zip(values, COLUMNS.values())), sep="")

def time_in_turns(rounds: int, *functions: Callable[[], object]) -> list[float]:
    """Return the median seconds of each function. They take turns; the first round warms up."""
    seconds = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, own in zip(functions, seconds):
            started = time.perf_counter()
            function()
            own.append(time.perf_counter() - started)
    return [median(own[1:]) for own in seconds]

class OperatorCosts(TorchDispatchMode):
    """Add up [calls, seconds, FLOPs, bytes] of each operator that runs under this mode. Views are
    left out, since they move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        kwargs = kwargs or {}
        started = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - started
        returns = func._schema.returns
        if returns and returns[0].alias_info and not returns[0].alias_info.is_write:
            return out
        count_flops = flop_registry.get(func.overloadpacket, lambda *args, **kwargs: 0)
        flops = count_flops(*args, **kwargs, out_val=out)
        tensors = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        size = sum(x.nbytes for x in (*tensors.values(), *outputs))
        name = func.overloadpacket.__name__
        if name.startswith("convolution"):
            kernel = args[2 if name == "convolution_backward" else 1].shape[2:]
            name += f" {kernel[0]} x {kernel[1]}"
        self.costs[name] = [a + b for a, b in zip(self.costs[name], (1, seconds, flops, size))]
        return out

def make_table(costs: dict[str, list], steps: int, peak: float, bandwidth: float) -> list[str]:
    """Return the lines of the table of "roofline". `peak` is in FLOP/s, `bandwidth` in bytes/s."""
    rows = sorted(costs.items(), key=lambda item: -item[1][1])
    if rest := [sum(column) for column in zip(*(values for _, values in rows[SHOWN:]))]:
        rows = [*rows[:SHOWN], ("all others", rest)]
    total = sum(seconds for _, (_, seconds, _, _) in rows)
    header = "| operator | calls | ms | share | GFLOP/s | GB/s | roof | bound |"
    lines = [header, "| --- " * 8 + "|"]
    for name, (calls, seconds, flops, size) in rows:
        least, bound = max((flops / peak, "arithmetic"), (size / bandwidth, "memory"))
        lines.append(
            f"| `{name}` | {calls / steps:,.0f} | {1e3 * seconds / steps:,.1f} | "
            f"{seconds / total:.1%} | {f'{flops / seconds / 1e9:.1f}' if flops else ''} | "
            f"{size / seconds / 1e9:.1f} | {least / seconds:.0%} | {bound} |"
        )
    return lines

def print_roofline(setting: Setting, steps: int) -> None:
    """Time the operators of training steps, and print their table."""
    step, _, _ = set_up(setting)
    a, b = torch.randn(2, 2048, 2048)
    source, target = torch.zeros(2, 1 << 26)  # 256 MiB each, more than a cache holds
    product, copy = time_in_turns(7, lambda: a @ b, lambda: target.copy_(source))
    peak, bandwidth = 2 * 2048**3 / product, 2 * source.nbytes / copy  # bytes read and written
    with OperatorCosts() as mode:
        times = [step() for _ in range(steps)]
    seconds = sum(last - first for first, *_, last in times) / steps
    flops = sum(flops for _, _, flops, _ in mode.costs.values()) / steps
    print(f"{describe(setting)}, batch {setting.batch_size}, {torch.get_num_threads()} threads: "
          f"{seconds:.2f} s a step, {flops / seconds / 1e9:.0f} GFLOP/s; a float32 matrix product "
          f"does {peak / 1e9:.0f}, a copy moves {bandwidth / 1e9:.1f} GB/s.\n")  # fmt: skip
    print(*make_table(mode.costs, steps, peak, bandwidth), sep="\n")

def print_augmentation(data: Data) -> None:
    """Print images/s of our transform on batches and of torchvision's on single images."""
    images = data.train.images[:256]
    batches = make_transform(data.mean, data.std, "slides", data.train)
    single = v2.Compose([
        v2.RandomResizedCrop(images.shape[-1], (0.5, 1.0), (1.0, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(data.mean, data.std),
    ])  # fmt: skip
    torch.set_num_threads(1)
    ours, theirs = (len(images) / seconds for seconds in time_in_turns(
        30, lambda: batches(images), lambda: torch.stack([single(image) for image in images])
    ))  # fmt: skip
    print(f"images/s on one thread: {ours:,.0f} in batches, {theirs:,.0f} image by image with "
          f"torchvision, ratio {ours / theirs:.1f}")  # fmt: skip

def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed; the top of this file says how.")
    add = parser.add_argument
    add("command", choices=("step", "forward", "roofline", "augment"))
    networks = f"{', '.join(CONFIGS)}, or MODULE:FUNCTION, with or without {PLAIN} before it"
    add("names", nargs="*", metavar="NAME", default=["fishnet99"], help=networks)
    add("--batch-size", type=int, default=32, help="images in a step (default: 32)")
    add("--image-size", type=int, help="side in pixels (default: 32 or 224)")
    add("--rounds", type=int, default=5, help="or steps of roofline (default: 5)")
    for flag, values in FLAGS.items():
        name, default = f"--{flag.replace('_', '-')}", values[:1]
        add(name, nargs="+", choices=values, default=default, help=f"default: {values[0]}")
    add("--dataset", choices=(*CIFAR, "shapes"), default="cifar10", help="to augment")
    add("--data-dir", default="data", help="where its files are (default: data)")
    args = parser.parse_args()
    try:
        if args.command == "augment":
            return print_augmentation(load_data(args.dataset, args.data_dir, val_fraction=0))
        if args.command == "roofline":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        settings = make_settings(args)
        if args.command != "roofline":
            print_timings(settings, args.rounds)
        elif len(settings) == 1:
            print_roofline(settings[0], args.rounds)
        else:
            raise UserError("roofline: expected one network, and one value for each flag")
    except UserError as error:
        sys.exit(f"benchmark.py: {error}")

if __name__ == "__main__":
    main()
