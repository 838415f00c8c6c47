"""Evaluation: loss, top-1 and top-5 error of a checkpoint, every image counted once; predictions for image files.

    python evaluate.py runs/NAME/best.pt                     # test set; the dataset is the checkpoint's
    python evaluate.py runs/NAME/best.pt --split val --json  # one JSON object instead of the table
    python evaluate.py runs/NAME/best.pt --tta               # averaged with the images' mirror images
    python evaluate.py runs/NAME/best.pt cat.jpg dog.png     # the most probable classes of each file

Model, class names, image size and normalisation come from the checkpoint. Errors and probabilities are fractions in
JSON, per cent in the table.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C in them is no traceback

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import sys
import traceback
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from data import (
    CENTRE_RATIO,
    DATASETS,
    MAX_SIDE,
    BatchTransform,
    Data,
    ImageFileError,
    ImageSet,
    centre_crop,
    load_data,
    one_line,
    parse_pickle,
    read_image,
    reader_may_leave,
)
from fishnet import FishNetConfig, check_weights, checked_copy, create_model, out_of_memory


class StateDict(dict):
    """Stands for the OrderedDict of a state_dict, which has the version of each module as an attribute."""

    def __init__(self) -> None:
        """Empty: a pickle fills it item by item."""

    def set_state(self, state: dict) -> None:
        """The versions, and nothing that would take the place of a method."""
        if list(state) != ["_metadata"]:
            raise ValueError("a state_dict in it has odd attributes")


CHECKPOINT_FORMAT = 1
CHECKPOINT_KEYS = {
    "format": int, "name": str, "config": dict, "model": dict, "classes": list, "mean": list, "std": list,
    "args": dict, "state": dict,
}  # fmt: skip
ARGS_KEYS = {"dataset": str, "data_dir": str, "val_fraction": (int, float), "seed": int}
FOLDER_ARGS_KEYS = ARGS_KEYS | {"image_size": int}


@dataclass(frozen=True)
class Metrics:
    """Mean cross entropy, errors as fractions, the number of images, and the error and count of each class."""

    loss: float
    top1_error: float
    top5_error: float
    images: int
    class_errors: tuple[float, ...]
    class_images: tuple[int, ...]


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    images: ImageSet,
    transform: BatchTransform,
    num_classes: int,
    batch_size: int = 256,
    workers: int = 0,
) -> Metrics:
    """Metrics of a model on a set; call it on every process, and every process gets the whole set's metrics.

    Each process takes every n-th image, however unequal the shares, and sums are added up: nothing is padded, so
    nothing is counted twice. `batch_size` is a process's. With under five classes top-5 means all of them.
    """
    # Without DDP, whose forward waits for the other processes' forward: the shares may differ by a batch.
    model = accelerator.unwrap_model(model)
    share = range(accelerator.process_index, len(images), accelerator.num_processes)
    loader = DataLoader(Subset(images, share), batch_size, num_workers=workers, collate_fn=images.collate)
    loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    counts = torch.zeros(3, num_classes, dtype=torch.int64, device=accelerator.device)  # images, top-1, top-5 hits

    with in_evaluation(model):
        with signals_held():
            batches = iter(loader)
        for batch, labels in batches:
            logits, labels = forward(accelerator, model, batch, transform), labels.to(accelerator.device)
            loss += F.cross_entropy(logits, labels, reduction="sum").double()
            hits = logits.topk(min(5, num_classes)).indices == labels[:, None]  # (N, 5), true at most once a row
            counted = torch.stack([torch.ones_like(labels), hits[:, 0], hits.any(1)])  # (3, N)
            counts.index_add_(1, labels, counted)

    loss, counts = accelerator.reduce(loss, "sum"), accelerator.reduce(counts, "sum")
    class_images, class_hits, _ = counts.tolist()
    total, top1, top5 = counts.sum(1).tolist()
    assert total == len(images), f"{total} images counted of {len(images)}"
    return Metrics(
        loss=loss.item() / total,
        top1_error=(total - top1) / total,
        top5_error=(total - top5) / total,
        images=total,
        class_errors=tuple((n - hits) / n if n else 0.0 for n, hits in zip(class_images, class_hits)),
        class_images=tuple(class_images),
    )


class FlipAveraged(nn.Module):
    """A model that sees each image and its mirror image: images (N, C, H, W) -> mean logits (N, classes), float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x).float() + self.model(x.flip(3)).float()) / 2


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Within it all modules are in evaluation mode; then each is as it was: some may be frozen in a training model."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def forward(accelerator: Accelerator, model: nn.Module, images: Tensor, transform: BatchTransform) -> Tensor:
    """Logits, float32 (N, classes) on the device, of images uint8 (N, 3, H, W)."""
    images = transform(images.to(accelerator.device)).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        # .forward goes round a compiled model's graph, which another batch size would compile anew.
        return model.forward(images).float()


@torch.no_grad()
def predict(
    accelerator: Accelerator, model: nn.Module, image: Tensor, transform: BatchTransform, classes: list[str]
) -> list[tuple[str, float]]:
    """The five most probable classes of an image uint8 (3, H, W), or all if they are fewer, with probabilities."""
    with in_evaluation(model):
        probabilities = forward(accelerator, model, image[None], transform)[0].softmax(0)
    top = probabilities.topk(min(5, len(classes)))
    return [(classes[label], p) for label, p in zip(top.indices.tolist(), top.values.tolist())]


def count_images(data: Data) -> dict[str, int]:
    """What a checkpoint knows of its run's split: files of a folder may come and go."""
    return {"train": len(data.train), "val": len(data.val)}


def input_size(checkpoint: dict) -> tuple[int, float]:
    """The side of a checkpoint's images, and the part of an image's short side that it is: for centre_crop."""
    if checkpoint["args"]["dataset"] == "folder":
        return checkpoint["args"]["image_size"], CENTRE_RATIO
    return 32, 1.0  # CIFAR and shapes are seen whole


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """For the start of data workers: they inherit it and never get SIGTERM or SIGINT, even when their group does.

    The main process, which still needs them for what it is at, gets its own at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def workers_released() -> Iterator[None]:
    """An exception's frames keep data workers alive, for which Python would wait at its exit: it lets them go."""
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def explain(error: RuntimeError | MemoryError, smaller: str, again: str) -> str:
    """One line for the failures of a machine that no argument check foresees; any other error is raised again.

    `smaller` says which flags need less memory, `again` how to go on.
    """
    message = str(error)
    if out_of_memory(error):
        return f"out of memory: try {smaller}"
    if "DataLoader worker" in message:
        return f"{message.splitlines()[0]}: {again}, or read data in the main process with --workers 0"
    if "torch._dynamo" in sys.modules and isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return f"--compile failed ({one_line(error)[:200]}): mend that (it needs a C++ compiler), or leave it out"
    if "gloo" in message or "ncclRemoteError" in message or isinstance(error, torch.distributed.DistNetworkError):
        return f"another process is gone ({message.splitlines()[0][:100]}): {again}"
    if isinstance(error, torch.distributed.DistError):  # NCCL's reason stands in its last line
        return f"the processes cannot work together ({' '.join(message.split())[:600]}): {again}"
    raise error


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of train.py on the CPU, its checksums verified; it cannot run code (weights_only).

    Fields of FishNetConfig that an older one lacks have their defaults, which is what its network was.
    ValueError or OSError, naming the file: not there, damaged, or not such a checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; expected a checkpoint, such as {path / 'best.pt'}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(read_archive(path), map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        if out_of_memory(error):
            raise  # and the file may be whole
        if isinstance(error, OSError):  # it cannot be read now, and may be whole
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise ValueError(f"{path}: damaged, or not a checkpoint ({one_line(error)})") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}; expected a checkpoint of train.py")
    wrong = [key for key, kind in CHECKPOINT_KEYS.items() if not isinstance(checkpoint.get(key), kind)]
    if not wrong:
        keys = FOLDER_ARGS_KEYS if checkpoint["args"].get("dataset") == "folder" else ARGS_KEYS
        wrong = [key for key, kind in keys.items() if not isinstance(checkpoint["args"].get(key), kind)]
        wrong += ["seed"] if not wrong and not 0 <= checkpoint["args"]["seed"] < 2**63 else []
        for key, least in (("mean", -math.inf), ("std", 0.0)):
            fits = [type(value) is float and least < value < math.inf for value in checkpoint[key]]
            wrong += [] if fits == [True] * 3 else [key]
        images = checkpoint.get("images", {"train": 0, "val": 0})  # not in the first checkpoints
        if not isinstance(images, dict) or [type(images.get(split)) for split in ("train", "val")] != [int, int]:
            wrong.append("images")
        wrong += [key for key in ("classes", "config") if not all(type(name) is str for name in checkpoint[key])]
        wrong += [key for key in ("args", "config", "state") if key not in wrong and not is_plain(checkpoint[key])]
    if wrong:
        raise ValueError(f"{path}: wrong or missing: {', '.join(wrong)}; expected a checkpoint of train.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: format {checkpoint['format']}, expected {CHECKPOINT_FORMAT}")
    checkpoint["model"] = dict(checkpoint["model"])  # without the versions, which can be anything
    checkpoint["config"] = asdict(FishNetConfig()) | checkpoint["config"]
    return checkpoint


def read_archive(path: Path) -> io.BytesIO:
    """A checked copy of a checkpoint's file. ValueError: there is more in it than train.py puts there."""
    copy = checked_copy(path)
    with zipfile.ZipFile(copy) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        parse_pickle(archive.read(f"{folder}/data.pkl"), pickled_names())
    copy.seek(0)
    return copy


def pickled_names() -> dict[str, object]:
    """For `parse_pickle`: what a checkpoint may name, with stand-ins that make tensors no larger than the file."""
    seen = set()

    def storage(key: tuple) -> int:
        """The size of what `key` names, ("storage", type, name, device, size)."""
        _, _, name, _, size = key
        if name.lower() in seen:
            raise ValueError("two tensors in it share their numbers")
        seen.add(name.lower())
        return size

    def tensor(size: int, offset: int, shape: tuple, *others: object) -> None:
        if len(shape) > 8 or not all(type(side) is int for side in shape) or math.prod(shape) > size:
            raise ValueError("one number in it stands for many of a tensor")

    names = {f"torch {kind}Storage": None for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int")}
    return names | {
        "collections OrderedDict": StateDict,
        "torch._utils _rebuild_tensor_v2": tensor,
        "persistent id": storage,
    }


def is_plain(value: object) -> bool:
    """Whether it is made of numbers and strings alone."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def load_model(checkpoint: dict) -> nn.Module:
    """The checkpoint's model with its weights. ValueError: they do not fit, or are not finite."""
    config, weights = checkpoint["config"], checkpoint["model"]
    try:
        if config["num_classes"] != len(checkpoint["classes"]):
            raise ValueError(f"{len(checkpoint['classes'])} classes")
        depths = (config[f"{part}_depths"] for part in ("tail", "body", "head", "transfer"))
        if config["stem_depth"] + sum(map(sum, depths)) > len(weights):
            raise ValueError(f"more units than its {len(weights)} weights")  # a small file must not keep us building
        with torch.device("meta"):  # takes no memory: a width in the file may be anything
            empty = create_model(checkpoint["name"], **config)
    except Exception as error:  # what a changed file holds can be anything
        raise ValueError(f"checkpoint: its config does not fit ({type(error).__name__}: {error})") from None
    check_weights(empty, weights, "checkpoint")
    model = create_model(checkpoint["name"], **config)
    model.load_state_dict(weights)
    return model


def check_processes(accelerator: Accelerator) -> None:
    """ValueError: torchrun started several processes, and each takes itself for the only one, or two share a GPU."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started != accelerator.num_processes:
        raise ValueError(f"{started} processes, but Accelerate knows of one: set ACCELERATE_USE_CPU=true on a CPU")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if accelerator.device.type == "cuda" and here > gpus:
        raise ValueError(f"{here} processes on a machine with {gpus} GPU(s): expected one process for each GPU")


def hide_unused_gpus() -> None:
    """Of PyTorch, before it looks for them, if ACCELERATE_USE_CPU says so: else barriers want one for each process.

    Apple's is never used: it has no float64, in which we sum.
    """
    if torch.backends.mps.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def allow_tf32(allowed: bool) -> None:
    """On a GPU: whether float32 products are rounded to 10 bits. As it comes, PyTorch does so in convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def prepare_cpu(device: torch.device) -> None:
    """On a CPU: all cores work, and two things that cost time are avoided, page faults and tiny numbers."""
    if device.type != "cpu":
        return
    if os.environ.get("OMP_NUM_THREADS") == "1":  # set by accelerate launch and torchrun: it leaves cores idle
        torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    torch.set_flush_denormal(True)  # arithmetic on numbers under 1e-38 is many times slower
    set_malloc_thresholds(mmap=2**31 - 1, trim=2**31 - 1)  # as it comes, a fifth of a step is page faults


def compile_in_place(model: nn.Module, device: torch.device, graphs: bool = True) -> None:
    """The weights keep their names. On a GPU a step's thousand kernels are launched at once, as CUDA graphs.

    graphs=False: without them, for gradients that are added up or sent to other GPUs, and so outlive a graph's step.
    """
    model.compile(mode="reduce-overhead" if graphs and device.type == "cuda" else None)


def set_malloc_thresholds(mmap: int, trim: int) -> None:
    """glibc, where there is one: tensors of `mmap` bytes and more go back to the system as soon as they are freed.

    So does what is free at the heap's end, once it has `trim` bytes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_threshold = -1, -3
        if not mallopt(m_mmap_threshold, mmap):
            mallopt(m_mmap_threshold, 2**25)  # the most that an older glibc takes
        mallopt(m_trim_threshold, trim)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss and error of a checkpoint, or its predictions for image files.")
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run")
    parser.add_argument("files", nargs="*", default=[], metavar="image", help="predict these, evaluate no dataset")
    parser.add_argument("--dataset", choices=DATASETS, help="default: the one it was trained on")
    parser.add_argument("--data-dir", type=os.path.expanduser, help="default: as in training")
    parser.add_argument("--split", choices=("test", "val"), help="default: test")
    parser.add_argument("-b", "--batch-size", type=int, default=256, help="of each process (default: %(default)s)")
    parser.add_argument("-j", "--workers", type=int, default=0, help="data processes (default: %(default)s)")
    parser.add_argument("--tta", action="store_true", help="average the logits of each image and its mirror image")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args()  # a flag may stand before the images
    for name in ("dataset", "data_dir", "split", "batch_size", "workers"):
        if args.files and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')}: for evaluating a dataset, while image files are given")
    args.split = args.split or "test"
    hide_unused_gpus()
    try:
        accelerator = Accelerator(mixed_precision="no")  # whatever accelerate launch says
        allow_tf32(False)
        prepare_cpu(accelerator.device)
        check_processes(accelerator)
        if args.batch_size < 1 or args.workers < 0:
            raise ValueError(f"batch-size={args.batch_size}, workers={args.workers}: expected at least 1 and 0")
        checkpoint = load_checkpoint(args.checkpoint)
        args.dataset = args.dataset or checkpoint["args"]["dataset"]
        data = None if args.files else load_evaluated(args, checkpoint, accelerator)
        model = load_model(checkpoint).to(accelerator.device, memory_format=torch.channels_last)
        size, _ = input_size(checkpoint)
        if not 0 < size <= MAX_SIDE or size % model.config.stride:
            raise ValueError(f"{args.checkpoint}: images of side {size} do not suit its {checkpoint['name']}")
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except (RuntimeError, MemoryError) as error:
        sys.exit(f"evaluate.py: {explain(error, 'another device', 'start again')}")
    if args.tta:
        model = FlipAveraged(model)

    transform = BatchTransform(checkpoint["mean"], checkpoint["std"])
    if args.files:
        try:
            whole = not accelerator.is_main_process or predict_files(args, accelerator, model, checkpoint, transform)
        except (RuntimeError, MemoryError) as error:
            sys.exit(f"evaluate.py: {explain(error, 'another device', 'start again')}")
        leave(accelerator)
        sys.exit(0 if whole else 1)
    images, batch_size = getattr(data, args.split), args.batch_size
    try:
        with workers_released():
            m = evaluate(accelerator, model, images, transform, len(data.classes), batch_size, args.workers)
    except (OSError, ImageFileError) as error:
        sys.exit(f"evaluate.py: {error}")
    except (RuntimeError, MemoryError) as error:
        smaller = f"--batch-size {batch_size // 2}" if batch_size > 1 else "another device"
        sys.exit(f"evaluate.py: {explain(error, smaller, 'start again')}")
    if not math.isfinite(m.loss):
        sys.exit(f"evaluate.py: {args.checkpoint}: the loss of its outputs is not finite")
    if accelerator.is_main_process:
        print_metrics(m, checkpoint["name"], args, data.classes)
    leave(accelerator)


def load_evaluated(args: argparse.Namespace, checkpoint: dict, accelerator: Accelerator) -> Data:
    """The flags' dataset, or else the checkpoint's. ValueError or OSError: faults, other classes, an empty split."""
    trained = checkpoint["args"]
    data_dir = args.data_dir or trained["data_dir"]
    with accelerator.local_main_process_first():  # one process downloads, the others read
        size, ratio = input_size(checkpoint)
        if args.dataset != "folder" and size != 32:
            raise ValueError(f"dataset={args.dataset}: 32 x 32 pixels; {args.checkpoint} takes {size} x {size}")
        data = load_data(args.dataset, data_dir, trained["val_fraction"], trained["seed"], size, ratio)
    if list(data.classes) != checkpoint["classes"]:
        raise ValueError(f"dataset={args.dataset}: its classes are not those of {args.checkpoint}")
    there, trained_on = count_images(data), checkpoint.get("images")
    has_val = args.dataset == "folder" and (Path(data_dir) / "val").is_dir()
    if args.split == "val" and args.dataset == trained["dataset"] and not has_val and trained_on not in (None, there):
        raise ValueError(
            f"split=val: {data_dir} has other images, {there}, than the run, {trained_on}: "
            "what is val now may have been trained on"
        )
    if not len(getattr(data, args.split)):
        reason = f"{data_dir}/test is not there; take --split val"
        if args.split == "val":
            reason = f"the run had --val-fraction {trained['val_fraction']:g}"
        raise ValueError(f"split={args.split}: empty, since {reason}")
    return data


def predict_files(
    args: argparse.Namespace, accelerator: Accelerator, model: nn.Module, checkpoint: dict, transform: BatchTransform
) -> bool:
    """Print the most probable classes of each file, or one JSON object; a line on stderr for each that is no image.

    False: there was such a file.
    """
    predictions = []
    for file in args.files:
        try:
            image = centre_crop(read_image(file), *input_size(checkpoint))
        except ImageFileError as error:
            print(f"evaluate.py: {error}", file=sys.stderr, flush=True)
            continue
        top = predict(accelerator, model, image, transform, checkpoint["classes"])
        if not math.isfinite(top[0][1]):
            sys.exit(f"evaluate.py: {args.checkpoint}: its outputs for {file} are not finite")
        predictions.append({"file": file, "top": [{"class": name, "probability": p} for name, p in top]})
        if not args.json:
            print(file, *(f"  {p:7.2%}  {name:.68}" for name, p in top), sep="\n", flush=True)
    if args.json:
        print(json.dumps({"predictions": predictions}))
    return len(predictions) == len(args.files)


def print_metrics(m: Metrics, model: str, args: argparse.Namespace, classes: tuple[str, ...]) -> None:
    """One JSON object, or a table."""
    if args.json:
        result = asdict(m) | {"tta": args.tta}
        print(json.dumps(result | {k: dict(zip(classes, result[k])) for k in ("class_errors", "class_images")}))
        return
    print(f"{model}{', flip-averaged,' if args.tta else ''} on {m.images} {args.split} images of {args.dataset}")
    print(f"loss {m.loss:.4f}   top-1 error {m.top1_error:.2%}   top-5 error {m.top5_error:.2%}")
    width = min(56, max(map(len, classes)))
    for name, error, count in zip(classes, m.class_errors, m.class_images):
        print(f"  {name:<{width}.{width}} {error:7.2%}  of {count}")


def leave(accelerator: Accelerator) -> None:
    """The end of a program on any number of processes: one that goes while others still talk to it makes them abort."""
    try:
        accelerator.wait_for_everyone()
    except RuntimeError:
        sys.exit(f"{Path(sys.argv[0]).name}: another process is gone before the end; what is written is whole")
    accelerator.end_training()


if __name__ == "__main__":
    with reader_may_leave():
        main()
