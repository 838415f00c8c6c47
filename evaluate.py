"""Evaluate a checkpoint: loss and top-1 and top-5 error of a dataset, or predictions for images.

    python evaluate.py runs/NAME/best.pt                     # test set of the checkpoint's dataset
    python evaluate.py runs/NAME/best.pt --split val --json  # or --tta: averaged over mirror images
    python evaluate.py runs/NAME/best.pt cat.jpg dog.png     # the most probable classes of images

Network, classes, image size and normalisation come from the checkpoint. JSON has fractions.
"""

import argparse
import contextlib
import io
import json
import math
import pickle
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from data import CENTRE_RATIO, DATASETS, Data, FolderSet, ImageSet, centre_crop, collate
from data import ignore_signals, load_data, make_transform, read_image
from fishnet import UserError, create_model

# ------------------------------------------------------------------------------------ checkpoints

CHECKPOINT_FORMAT = 2
CHECKPOINT_KEYS = {"format", "name", "config", "model", "optimizer", "scaler", "classes", "images"}
CHECKPOINT_KEYS |= {"mean", "std", "args", "state"}

class DamagedFileError(UserError):
    """A file with damaged content."""

def load_file(path: str | Path) -> object:
    """Return what torch.save wrote, on the CPU, without running code from the file. Raises
    DamagedFileError if it holds anything but whole tensors and values, UserError if unreadable."""
    try:
        content = io.BytesIO(Path(path).expanduser().read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        with zipfile.ZipFile(content) as archive:  # torch.load does not look at the checksums
            has_folders = any(record.external_attr for record in archive.infolist())
            is_whole = archive.testzip() is None and not has_folders
        content.seek(0)
        if is_whole:
            return torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DamagedFileError(f"{path}: holds objects other than tensors and values") from None
    except Exception as error:  # damaged archives raise many kinds
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
    raise DamagedFileError(f"{path}: damaged, or not written by torch.save")

def check_weights(model: nn.Module, weights: dict, path: str | Path) -> None:
    """Raise UserError, naming up to three faults, if weights do not fit the model."""
    expected = model.state_dict()
    faults = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    faults += [f"{name} is not the model's" for name in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        found, needed = tuple(weights[name].shape), tuple(expected[name].shape)
        if found != needed:
            faults.append(f"{name} is {found}, expected {needed}")
        elif not weights[name].isfinite().all():
            faults.append(f"{name} is not finite")
    if faults:
        text = "; ".join(sorted(faults)[:3])
        raise UserError(f"{path}: {len(faults)} weights do not fit the model: {text}")

def load_checkpoint(path: str | Path) -> dict:
    """Return a checkpoint of train.py. Raises UserError if the file is not one."""
    checkpoint = load_file(path)
    has_keys = isinstance(checkpoint, dict) and checkpoint.keys() >= CHECKPOINT_KEYS
    if not has_keys or checkpoint["format"] != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: not a checkpoint of this version of train.py")
    return checkpoint

def load_model(checkpoint: dict, allowed: str | None = None) -> nn.Module:
    """Return the network of a checkpoint. MODULE:FUNCTION is code that would run, so a checkpoint
    may name it only if it is `allowed`. Raises UserError if it is not, or if weights do not fit."""
    name = checkpoint["name"]
    if ":" in name and name != allowed:
        raise UserError(f"this checkpoint needs code of {name}: give --model {name} to run it")
    model = create_model(name, **checkpoint["config"])
    check_weights(model, checkpoint["model"], "checkpoint")
    model.load_state_dict(checkpoint["model"])
    return model

def load_pretrained(model: nn.Module, path: str | Path) -> str:
    """Load weights from a checkpoint or a state_dict of this project; return what was loaded. A
    classifier for another number of classes stays as it is. Raises UserError if anything else does
    not fit; the model is then unchanged."""
    content, own, kept = None, model.state_dict(), {}
    with contextlib.suppress(DamagedFileError):  # files of torch before 1.6 look damaged, too
        content = load_file(path)
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights.keys() & own.keys():
        command = f"python examples/convert_weights.py {path} OUT.pt"
        raise UserError(f"{path}: damaged, or not this project's; convert others with {command}")
    if "fc.weight" in own and len(weights.get("fc.weight", ())) != len(own["fc.weight"]):
        kept = {name: value for name, value in own.items() if name.startswith("fc.")}
    check_weights(model, weights | kept, path)
    model.load_state_dict(weights | kept)
    note = f"; the classifier is new, for {len(own['fc.weight'])} classes" if kept else ""
    return f"{path}: loaded {len(own) - len(kept)} of {len(own)} tensors{note}"

# ------------------------------------------------------------------------------------- evaluation

@dataclass(frozen=True)
class Metrics:
    """Mean cross entropy, errors as fractions, and error and number of images of each class."""
    loss: float
    top1_error: float
    top5_error: float
    images: int
    class_errors: tuple[float, ...]
    class_images: tuple[int, ...]

@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, images: ImageSet | FolderSet,
             transform: v2.Compose, num_classes: int, batch_size: int = 256,
             workers: int = 0) -> Metrics:  # fmt: skip
    """Return the metrics of a model on a set of images, the same on every process. Each process
    takes every n-th image and the results are gathered, so every image counts once. `batch_size` is
    a process's. With fewer than five classes, top-5 means all of them."""
    model = accelerator.unwrap_model(model)  # DDP would wait for processes with more batches
    share = Subset(images, range(accelerator.process_index, len(images), accelerator.num_processes))
    results = [torch.empty(4, 0, device=accelerator.device)]  # label, loss, top-1 and top-5 hit
    with in_evaluation(model):
        loader = DataLoader(share, batch_size, num_workers=workers, collate_fn=collate,
                            worker_init_fn=ignore_signals)  # fmt: skip
        for batch, labels in loader:
            logits = compute_logits(accelerator, model, batch, transform)
            labels = labels.to(accelerator.device)
            losses = F.cross_entropy(logits, labels, reduction="none")
            hits = logits.topk(min(5, num_classes)).indices == labels[:, None]  # (N, 5)
            results.append(torch.stack([labels, losses, hits[:, 0], hits.any(1)]))
    results = gather_object([torch.cat(results, dim=1).cpu()])
    labels, losses, top1, top5 = torch.cat(results, dim=1).double()
    assert len(labels) == len(images), f"{len(labels)} images counted of {len(images)}"
    class_images = labels.long().bincount(minlength=num_classes)
    class_misses = labels.long().bincount(1 - top1, minlength=num_classes)
    return Metrics(
        loss=losses.mean().item(),
        top1_error=(1 - top1).sum().item() / len(labels),
        top5_error=(1 - top5).sum().item() / len(labels),
        images=len(labels),
        class_errors=tuple((class_misses / class_images.clamp(min=1)).tolist()),
        class_images=tuple(class_images.tolist()),
    )

def compute_logits(accelerator: Accelerator, model: nn.Module, images: Tensor,
                   transform: v2.Compose) -> Tensor:  # fmt: skip
    """Return logits, float32 (N, classes) on the device, of images uint8 (N, 3, H, W)."""
    images = transform(images.to(accelerator.device)).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        return model.forward(images).float()  # model(images) would compile for each batch size

@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode, and each back in its own mode after the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

class FlipAveraged(nn.Module):
    """Average a model's logits over each image and its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x).float() + self.model(x.flip(3)).float()) / 2

@torch.no_grad()
def predict(accelerator: Accelerator, model: nn.Module, image: Tensor, transform: v2.Compose,
            classes: list[str]) -> list[tuple[str, float]]:  # fmt: skip
    """Return the five most probable classes of an image uint8 (3, H, W), with probabilities."""
    with in_evaluation(model):
        probabilities = compute_logits(accelerator, model, image[None], transform)[0].softmax(0)
    top = probabilities.topk(min(5, len(classes)))
    return [(classes[label], p) for label, p in zip(top.indices.tolist(), top.values.tolist())]

# ----------------------------------------------------------------------------------- command line

def get_input_size(checkpoint: dict) -> tuple[int, float]:
    """Return the arguments size and ratio of centre_crop for a checkpoint's images."""
    if checkpoint["args"]["dataset"] == "folder":
        return checkpoint["args"]["image_size"], CENTRE_RATIO
    return 32, 1.0  # CIFAR and shapes are seen whole

def load_split(args: argparse.Namespace, checkpoint: dict, accelerator: Accelerator) -> Data:
    """Load the dataset of the flags or of the checkpoint. Raises UserError if it does not fit."""
    trained = checkpoint["args"]
    dataset, data_dir = args.dataset or trained["dataset"], args.data_dir or trained["data_dir"]
    size, ratio = get_input_size(checkpoint)
    if dataset != "folder" and size != 32:
        raise UserError(f"dataset={dataset}: 32 x 32 pixels, but the network takes {size} x {size}")
    with accelerator.local_main_process_first():  # one process downloads
        data = load_data(dataset, data_dir, trained["val_fraction"], trained["seed"], size, ratio)
    if list(data.classes) != checkpoint["classes"]:
        raise UserError(f"dataset={dataset}: has other classes than {args.checkpoint}")
    images = {"train": len(data.train), "val": len(data.val)}
    if args.split == "val" and dataset == trained["dataset"] and images != checkpoint["images"]:
        raise UserError(f"split=val: found {images} images, but the run had {checkpoint['images']}")
    if not len(getattr(data, args.split)):
        raise UserError(f"split={args.split}: has no images in {data_dir}; give another --split")
    return data

def predict_files(args: argparse.Namespace, checkpoint: dict, accelerator: Accelerator,
                  model: nn.Module, transform: v2.Compose) -> int:  # fmt: skip
    """Print the most probable classes of each file; return 1 if one is not an image, else 0."""
    predictions = []
    for file in args.files:
        try:
            image = centre_crop(read_image(file), *get_input_size(checkpoint))
        except UserError as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            continue
        top = predict(accelerator, model, image, transform, checkpoint["classes"])
        predictions.append({"file": file, "top": [{"class": c, "probability": p} for c, p in top]})
        if not args.json:
            accelerator.print(file, *(f"  {p:7.2%}  {name:.68}" for name, p in top), sep="\n")
    if args.json:
        accelerator.print(json.dumps({"predictions": predictions}))
    return int(len(predictions) < len(args.files))

def print_metrics(m: Metrics, args: argparse.Namespace, name: str, classes: tuple[str]) -> None:
    """Print one JSON object, or a table."""
    if args.json:
        by_class = {k: dict(zip(classes, getattr(m, k))) for k in ("class_errors", "class_images")}
        print(json.dumps(asdict(m) | by_class | {"tta": args.tta}))
        return
    print(f"{name} on {m.images} {args.split} images{', averaged over flips' if args.tta else ''}")
    print(f"loss {m.loss:.4f}   top-1 error {m.top1_error:.2%}   top-5 error {m.top5_error:.2%}")
    width = min(56, max(map(len, classes)))
    for name, error, count in zip(classes, m.class_errors, m.class_images):
        print(f"  {name:<{width}.{width}} {error:7.2%}  of {count}")

def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint, or predict images.")
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run")
    parser.add_argument("files", nargs="*", metavar="image", help="predict these, evaluate nothing")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="allow this code to run")
    parser.add_argument("--dataset", choices=DATASETS, help="default: the one it was trained on")
    parser.add_argument("--data-dir", help="default: as in training")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="default: test")
    parser.add_argument("-b", "--batch-size", type=int, default=256, help="of each process")
    parser.add_argument("-j", "--workers", type=int, default=0, help="processes that read data")
    parser.add_argument("--tta", action="store_true", help="average over each image's mirror image")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args()  # a flag may stand before the images
    if args.batch_size < 1 or args.workers < 0:
        parser.error("expected --batch-size of at least 1 and --workers of at least 0")
    return args

def main() -> None:
    from train import prepare_machine, report_failures  # late: train.py imports this file

    args = parse_args()
    with report_failures("evaluate.py"):
        accelerator = prepare_machine("no")
        checkpoint = load_checkpoint(args.checkpoint)
        model = load_model(checkpoint, args.model)
        model = model.to(accelerator.device, memory_format=torch.channels_last)
        model = FlipAveraged(model) if args.tta else model
        transform = make_transform(checkpoint["mean"], checkpoint["std"])
        if args.files:
            sys.exit(predict_files(args, checkpoint, accelerator, model, transform))
        data = load_split(args, checkpoint, accelerator)
        images, options = getattr(data, args.split), (args.batch_size, args.workers)
        metrics = evaluate(accelerator, model, images, transform, len(data.classes), *options)
        if not math.isfinite(metrics.loss):
            raise UserError(f"{args.checkpoint}: its outputs are not finite")
    if accelerator.is_main_process:
        print_metrics(metrics, args, checkpoint["name"], data.classes)
    accelerator.end_training()

if __name__ == "__main__":
    main()
