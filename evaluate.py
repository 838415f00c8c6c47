"""Evaluate a checkpoint: loss and top-1 and top-5 error of a dataset, or predictions for images.

    python evaluate.py runs/NAME/best.pt                     # test set of the checkpoint's dataset
    python evaluate.py runs/NAME/best.pt --split val --report DIR  # pictures, mistakes, report.json
    python evaluate.py runs/NAME/best.pt cat.jpg photos/     # the most probable classes of images

Network, classes, image size and normalisation are the checkpoint's. JSON has errors as fractions.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from data import CENTRE_RATIO, DATASETS, IMAGE_SUFFIXES, Data, FolderSet, ImageSet, centre_crop
from data import choose_workers, collate, describe_split, draw_grid, ignore_signals, load_data
from data import is_hidden, make_transform, parse_workers, read_crop, read_image, to_ascii
from fishnet import FishNet, Network, UserError, create_model

# ------------------------------------------------------------------------------------ checkpoints

CHECKPOINT_FORMAT = 2

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
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: not a checkpoint of this version of train.py")
    return checkpoint

def load_model(checkpoint: dict, path="checkpoint", allowed: str | None = None) -> nn.Module:
    """Return a checkpoint's network, with its classes, mean, std and input_size, as centre_crop
    takes it. Code, MODULE:FUNCTION, must be `allowed`. Raises UserError if it does not fit."""
    name = checkpoint["name"]
    if ":" in name and name != allowed:
        raise UserError(f"{path}: needs code of {name}: give --model {name} to run it")
    model = create_model(name, **checkpoint["config"])
    check_weights(model, checkpoint["model"], path)
    model.load_state_dict(checkpoint["model"])
    model.classes, model.mean, model.std = (checkpoint[key] for key in ("classes", "mean", "std"))
    is_folder = checkpoint["args"]["dataset"] == "folder"  # CIFAR and shapes are seen whole
    model.input_size = (checkpoint["args"]["image_size"], CENTRE_RATIO) if is_folder else (32, 1.0)
    return model

def load_pretrained(model: nn.Module, path: str | Path) -> str:
    """Load weights from a checkpoint or a state_dict; return what was loaded. A classifier of other
    size is left out. Raises UserError, and changes nothing, if anything else does not fit."""
    content, own, kept = None, model.state_dict(), {}
    with contextlib.suppress(DamagedFileError):  # files of torch before 1.6 look damaged, too
        content = load_file(path)
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights.keys() & own.keys():
        command = f"python examples/convert_weights.py {path} OUT.pt"
        raise UserError(f"{path}: damaged, or not this project's; convert others with {command}")
    if "fc.weight" in own and len(weights.get("fc.weight", ())) != len(own["fc.weight"]):
        kept = {name: value for name, value in own.items() if name.startswith("fc.")}
    weights = {n: w for n, w in weights.items() if n in own or not n.startswith("fc.")} | kept
    check_weights(model, weights, path)
    model.load_state_dict(weights)
    note = f"; the classifier is new, for {len(own['fc.weight'])} classes" if kept else ""
    return f"{path}: loaded {len(own) - len(kept)} of {len(own)} tensors{note}"

# ------------------------------------------------------------------------------------- evaluation

@contextlib.contextmanager
def raise_on_all() -> Iterator[None]:
    """Raise on every process the UserError or OSError that the block raises on one of them."""
    error = None
    try:
        yield
    except (UserError, OSError) as raised:
        error = raised
    if errors := [found for found in gather_object([error]) if found]:
        raise errors[0]

def call_on_main(accelerator: Accelerator, function: Callable, *args: object) -> object:
    """Call a function on the main process; return its result, or raise its UserError, on all."""
    with raise_on_all():
        result = function(*args) if accelerator.is_main_process else None
    return broadcast_object_list([result])[0]

def load_on_all(accelerator: Accelerator, *options: object) -> Data:
    """Call load_data on every process, first on one of each machine, which may have to download."""
    for is_main in (True, False):
        with raise_on_all():
            if accelerator.is_local_main_process == is_main:
                data = load_data(*options)
    return data

@dataclass(frozen=True)
class Metrics:
    """Results on N images. Errors are fractions; top-5 means all classes if there are fewer."""
    loss: float  # mean cross entropy
    top1_error: float
    top5_error: float
    confusion: Tensor  # int64 (classes, classes): images by true class (row) and predicted class
    predicted: Tensor  # int64 (N,): the most probable class of each image
    probability: Tensor  # float64 (N,): the probability of that class

@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, images: ImageSet | FolderSet,
             transform: v2.Compose, num_classes: int, batch_size: int = 256, workers: int = 0,
             tta: bool = False) -> Metrics:  # fmt: skip
    """Return a model's metrics on a set of images, the same on every process. Each of n processes
    takes every n-th image, and results are gathered. Leaves the model in evaluation mode."""
    model = accelerator.unwrap_model(model)  # DDP would wait for processes with more batches
    total, n = len(images), accelerator.num_processes
    shares = [torch.arange(total)[i::n] for i in range(n)]
    results = [torch.empty(5, 0, device=accelerator.device)]
    model.eval()
    share = images.subset(shares[accelerator.process_index])
    loader = DataLoader(share, batch_size, num_workers=workers, collate_fn=collate,
                        worker_init_fn=ignore_signals)  # fmt: skip
    for batch, labels in loader:
        with accelerator.autocast():
            logits = compute_logits(model, batch.to(accelerator.device), transform, tta)
        labels = labels.to(accelerator.device)
        losses = F.cross_entropy(logits, labels, reduction="none")
        top = logits.topk(min(5, num_classes)).indices  # (N, 5)
        probability = logits.softmax(1).gather(1, top[:, :1])[:, 0]
        in_top5 = (top == labels[:, None]).any(1)
        results.append(torch.stack([labels, losses, in_top5, top[:, 0], probability]))
    results = torch.cat(gather_object([torch.cat(results, dim=1).cpu()]), dim=1).double()
    labels, losses, in_top5, predicted, probability = results[:, torch.cat(shares).argsort()]
    cells = (labels * num_classes + predicted).long().bincount(minlength=num_classes**2)
    errors = (labels != predicted).sum().item() / total, (1 - in_top5).sum().item() / total
    confusion = cells.view(num_classes, num_classes)
    return Metrics(losses.mean().item(), *errors, confusion, predicted.long(), probability)

def summarize(m: Metrics, classes: Sequence[str]) -> dict:
    """Return the metrics as numbers, and as dicts by class. A fraction of no images is 0."""
    hits, true, found = m.confusion.diag().double(), m.confusion.sum(1), m.confusion.sum(0)
    by_class = {
        "class_errors": (true - hits) / true.clamp(min=1), "class_images": true,
        "precision": hits / found.clamp(min=1), "recall": hits / true.clamp(min=1),
        "f1": 2 * hits / (true + found).clamp(min=1),
    }  # fmt: skip
    numbers = {name: getattr(m, name) for name in ("loss", "top1_error", "top5_error")}
    tables = {name: dict(zip(classes, values.tolist())) for name, values in by_class.items()}
    return numbers | {"images": len(m.predicted)} | tables

def compute_logits(model: nn.Module, images: Tensor, transform: v2.Compose, tta: bool) -> Tensor:
    """Return logits float32 (N, classes) of uint8 (N, 3, H, W), with `tta` averaged over flips."""
    x = transform(images).contiguous(memory_format=torch.channels_last)
    logits = model.forward(x).float()  # model(x) would compile for each batch size
    return (logits + model.forward(x.flip(3)).float()) / 2 if tta else logits

# ------------------------------------------------------------------------------------- prediction

def read_crops(paths: Iterable[str | Path], input_size: tuple, faults: list) -> Iterator[tuple]:
    """Yield (file, crop) of files and of images below folders, sorted. UserErrors go to faults."""
    for path in map(Path, paths):
        below = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        for file in [p for p in below if not is_hidden(p.relative_to(path))] or [path]:
            try:
                yield str(file), read_crop(file, *input_size)
            except UserError as error:
                faults.append(error)

@torch.no_grad()
def predict(model: nn.Module | str | Path, images: Tensor | Iterable[str | Path], tta: bool = False,
            batch_size: int = 64, faults: list | None = None) -> list[tuple]:  # fmt: skip
    """Return (image, [(class, probability), ...]) for each image, its five most probable classes.
    `model`, a checkpoint's path or from load_model, is left in evaluation mode. `images` are one or
    more paths of files and folders, or uint8 (N, 3, H, W), named by index. The UserError of a file
    that cannot be read goes to `faults`, or is raised at the end. `tta` averages over flips."""
    if not isinstance(model, nn.Module):
        model = load_model(load_checkpoint(model), model)
        model = model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    device, transform = next(model.parameters()).device, make_transform(model.mean, model.std)
    images = [images] if isinstance(images, (str, Path)) else images
    results, errors = [], [] if faults is None else faults
    if isinstance(images, Tensor):
        crops = ((i, centre_crop(image, *model.input_size)) for i, image in enumerate(images))
    else:
        crops = read_crops(images, model.input_size, errors)
    model.eval()
    while batch := list(itertools.islice(crops, batch_size)):
        names, batch = zip(*batch)
        logits = compute_logits(model, torch.stack(batch).to(device), transform, tta)
        top = logits.softmax(1).topk(min(5, len(model.classes)))
        for name, labels, values in zip(names, top.indices.tolist(), top.values.tolist()):
            results.append((name, [(model.classes[i], p) for i, p in zip(labels, values)]))
    if errors and faults is None:
        raise errors[0]
    return results

# --------------------------------------------------------------------------------------- pictures

def draw_confusion(matrix: Tensor, classes: Sequence[str]) -> Tensor:
    """Draw a confusion matrix, int64 (classes, classes) with a row for each true class: uint8
    (3, H, W). The colour of a cell shows its part of the row; up to 20 classes have numbers."""
    names = [to_ascii(n if len(n) < 25 else f"{n[:13]}...{n[-8:]}") for n in classes]
    count, total, wrong = len(classes), int(matrix.sum()), int(matrix.sum() - matrix.trace())
    cell = max(1, min(60, 1100 // count))
    font, small = (ImageFont.load_default(size) for size in (14, min(14, max(10, cell - 1))))
    left, top, side = 16 + int(max(map(small.getlength, [*names, "true class"]))), 60, cell * count
    part = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).sqrt()  # the root shows small parts
    cells = Image.fromarray((255 * part).byte().numpy()).resize((side, side), Image.Resampling.BOX)
    scale = ImageOps.flip(Image.linear_gradient("L")).resize((16, side))
    picture = Image.new("RGB", (left + side + 130, top + side + left + 20), "white")
    for image, x in ((cells, left), (scale, left + side + 24)):
        picture.paste(ImageOps.colorize(image, "#f0f6fc", "#08306b"), (x, top))
    for x, y, turn in ((left, top, "ROTATE_270"), (left + 20, left, "ROTATE_90")):
        for i in range(0, count, -(-11 // cell)):  # names of rows, then those of columns
            ImageDraw.Draw(picture).text((x - 6, y + (i + 0.5) * cell), names[i], 0, small, "rm")
        picture = picture.transpose(Image.Transpose[turn])
    title = f"{total} images, {wrong} wrong ({wrong / max(total, 1):.2%})"
    texts = [(left, 24, title, "ls"), (left - 6, top - 14, "true class", "rs")]
    texts += [(left + side / 2, picture.height - 4, "predicted class", "ms")]
    texts += [(left + side + 24, top - 14, "% of true class", "ls")]
    for percent in (0, 1, 5, 20, 50, 100):
        texts.append((left + side + 46, top + side * (1 - percent**0.5 / 10), str(percent), "lm"))
    for row, column in matrix.nonzero().tolist() if count <= 20 else ():
        x, y = left + (column + 0.5) * cell, top + (row + 0.5) * cell
        texts.append((x, y, str(int(matrix[row, column])), "mm"))
    for x, y, text, anchor in texts:
        colour = "white" if sum(picture.getpixel((int(x), int(y)))) < 400 else "black"
        ImageDraw.Draw(picture).text((x, y), text, colour, font, anchor)
    return TF.pil_to_tensor(picture)

def draw_curves(path: Path) -> Tensor:
    """Draw loss and top-1 error by epoch, from a metrics.csv: uint8 (3, H, W)."""
    rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
    picture, font = Image.new("RGB", (2300, 820), "white"), ImageFont.load_default(26)
    draw, width, height, bottom = ImageDraw.Draw(picture), 960, 620, 700
    panels = (100, "loss", "loss", 1), (1260, "top1_error", "top-1 error, %", 100)
    for left, name, title, factor in panels:
        keys = (f"train_{name}", f"val_{name}")  # an epoch may lack a validation
        lines = [[(int(r["epoch"]), factor * float(r[k])) for r in rows if r.get(k)] for k in keys]
        x_end, y_end = (max(values) for values in zip(*lines[0], *lines[1]))
        unit = 10.0 ** math.floor(math.log10(y_end or 1))
        y_end = unit * (math.ceil(y_end / unit) or 1)
        draw.text((left, 46), f"{title}: training as circles, validation as a line", 0, font, "ls")
        for epoch in (1, x_end):
            draw.text((left + width * epoch / x_end, bottom + 42), f"epoch {epoch}", 0, font, "ms")
        for part in (0, 0.25, 0.5, 0.75, 1):
            y = bottom - height * part
            draw.line((left, y, left + width, y), "#d8d8d8", 2)
            draw.text((left - 12, y), f"{y_end * part:g}", 0, font, "rm")
        for line, radius, fill in zip(lines, (8, 5), ("white", "#08306b")):
            places = [(left + width * x / x_end, bottom - height * y / y_end) for x, y in line]
            draw.line(places if radius == 5 else [], fill, 5)
            for place in places:
                draw.circle(place, radius, fill, "#08306b", 3)
    return TF.pil_to_tensor(picture.reduce(2))  # drawn at twice the size, for smooth lines

def paint(features: Tensor, image: Tensor) -> Image.Image:
    """Return a picture of a map (C, h, w): the first three principal components over its pixels as
    brightness and two colours, with signs that follow the image (3, H, W)."""
    x = (features - features.mean((1, 2), keepdim=True)).flatten(1)  # (C, h w)
    x = F.normalize(x, dim=1)  # otherwise a few channels of deep stages hide the rest
    y = x.T @ torch.linalg.svd(x, full_matrices=False).U[:, :3]  # (h w, 3)
    grey = F.adaptive_avg_pool2d(image.float().mean(0, True), features.shape[1:]).flatten()
    y = y * torch.where((grey - grey.mean()) @ y < 0, -1, 1)
    low, high = y.quantile(torch.tensor([0.02, 0.98]), dim=0)  # a few pixels would hide the rest
    y = ((y - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) - 0.5
    y = (128 + y * torch.tensor([230, 130, 130])).byte().view(*features.shape[1:], 3)
    return Image.fromarray(y.numpy(), "YCbCr").convert("RGB")

@torch.no_grad()
def draw_features(model: nn.Module, image: Tensor) -> Tensor:
    """Draw what tail, body and head make of an image uint8 (3, S, S), with a row for each
    resolution: uint8 (3, H, W). Raises UserError if the model is not of fishnet.py."""
    if not isinstance(model, Network):
        raise UserError("--features works for the networks of fishnet.py only")
    x = make_transform(model.mean, model.std)(image[None].to(next(model.parameters()).device))
    model.eval()
    maps = dict(Network.forward_stages(model, x))  # of the tail
    if isinstance(model, FishNet):
        maps |= model.forward_features(x, ("B4", "B3", "B2", "H1", "H2", "H3", "H4"))
    side = maps["T1"].shape[-1] * -(-144 // maps["T1"].shape[-1])  # of a tile
    step, tiles, places = side + 28, {"image": TF.to_pil_image(image)}, [(12, 12)]
    for i, (name, (y,)) in enumerate(maps.items()):
        tiles[f"{name}: {' x '.join(map(str, y.shape))}"] = paint(y.float().cpu(), image)
        column, row = 1.3 + (i + (i > 3)) / 2, i if i < 4 else abs(7 - i)
        places.append((12 + int(column * step), 12 + row * step))
    picture = Image.new("RGB", (max(places)[0] + side + 12, 4 * step + 12), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.line([(x + side // 2, y + side // 2) for x, y in places], "#b0b8c4", 8)
    for (x, y), (title, tile) in zip(places, tiles.items()):
        picture.paste(tile.resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + side + 18), title, 0, font, "ls", stroke_width=4, stroke_fill="white")
    return TF.pil_to_tensor(picture)

def write_file(path: Path, content: bytes | Tensor) -> None:
    """Write bytes, or a picture uint8 (3, H, W) as PNG."""
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        TF.to_pil_image(content).save(path, "PNG")

def write_table(path: Path, rows: Iterable[Sequence]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_file(path, text.getvalue().encode(errors="surrogateescape"))

def write_report(args: argparse.Namespace, m: Metrics, images: Dataset, classes: Sequence) -> None:
    """Write pictures, report.json and predictions.csv: surest mistakes first, surest hits last."""
    rows, captions = [("image", "true class", "predicted class", "probability")], []
    is_wrong = m.predicted != images.labels
    order = torch.where(is_wrong, m.probability, -m.probability).argsort(descending=True).tolist()
    for i in order:
        name = images.samples[i][0] if isinstance(images, FolderSet) else str(i)
        true, found, p = classes[images.labels[i]], classes[m.predicted[i]], m.probability[i].item()
        rows.append((name, true, found, round(p, 6)))
        captions.append(f"{Path(name).name}\ntrue: {true}\n{p:.1%} {found}")
    write_table(args.report / "predictions.csv", rows)
    report = summarize(m, classes) | {"tta": args.tta, "confusion": m.confusion.tolist()}
    write_file(args.report / "report.json", json.dumps(report, indent=1).encode())
    write_file(args.report / "confusion.png", draw_confusion(m.confusion, classes))
    if count := min(48, int(is_wrong.sum())):
        grid = draw_grid(images.__getitems__(order[:count])[0], captions[:count])
        write_file(args.report / "mistakes.png", grid)
    if (curves := Path(args.checkpoint).expanduser().with_name("metrics.csv")).exists():
        write_file(args.report / "curves.png", draw_curves(curves))

# ----------------------------------------------------------------------------------- command line

def load_split(args: argparse.Namespace, checkpoint: dict, accelerator: Accelerator, size: int,
               ratio: float) -> Data:  # fmt: skip
    """Load the dataset of the flags or of the checkpoint. Raises UserError if it does not fit."""
    trained = checkpoint["args"]
    dataset, data_dir = args.dataset or trained["dataset"], args.data_dir or trained["data_dir"]
    if dataset != "folder" and size != 32:
        raise UserError(f"dataset={dataset}: 32 x 32 pixels, but the network takes {size} x {size}")
    options = (data_dir, trained["val_fraction"], trained["seed"], size, ratio)
    data = load_on_all(accelerator, dataset, *options)
    if list(data.classes) != checkpoint["classes"]:
        raise UserError(f"dataset={dataset}: has other classes than {args.checkpoint}")
    is_other = dataset == trained["dataset"] and describe_split(data) != checkpoint["images"]
    if args.split == "val" and is_other:
        raise UserError("split=val: other images than those of the run; train again")
    if not len(getattr(data, args.split)):
        raise UserError(f"split={args.split}: has no images in {data_dir}; give another --split")
    return data

def predict_files(args: argparse.Namespace, model: nn.Module) -> int:
    """Print predictions, and write what the flags ask for; return 1 if a file is unreadable."""
    faults = []
    results = predict(model, args.files, args.tta, args.batch_size, faults)
    for error in faults:
        print(f"evaluate.py: {error}", file=sys.stderr)
    below = [(p, path) for path in args.files for p in Path(path).rglob("*") if p.is_file()]
    suffixes = {p.suffix.lower() for p, path in below if not is_hidden(p.relative_to(path))}
    if others := ", ".join(sorted(suffixes - {"", *IMAGE_SUFFIXES})):
        print(f"evaluate.py: passed over {others}; convert photos to .jpg", file=sys.stderr)
    if args.json:
        rows = [{"file": file, "top": [{"class": name, "probability": p} for name, p in top]}
                for file, top in results]  # fmt: skip
        print(json.dumps({"predictions": rows}))
    for file, top in () if args.json else results:
        print(file, *(f"  {p:7.2%}  {name:.68}" for name, p in top), sep="\n")
    if args.csv:
        header = ("image", "predicted class", "probability")
        write_table(args.csv, [header, *((file, *top[0]) for file, top in results)])
    for i, (file, top) in enumerate(results if args.save else (), 1):
        image = TF.resize(read_image(file), None, max_size=512, antialias=True)
        grid = draw_grid(image[None], ["\n".join(f"{p:.1%} {name}" for name, p in top)])
        write_file(args.save / f"{i:05}_{Path(file).stem}.png", grid)
    if args.features and results:
        write_file(args.features, draw_features(model, read_crop(results[0][0], *model.input_size)))
    return int(bool(faults))

def print_metrics(m: Metrics, args: argparse.Namespace, name: str, classes: Sequence[str]) -> None:
    """Print one JSON object, or a table and which two classes are confused most often."""
    summary, width = summarize(m, classes), max(5, min(40, max(map(len, classes))))
    if args.json:
        print(json.dumps(summary | {"tta": args.tta}))
        return
    print(f"{name} on {len(m.predicted)} {args.split} images{', averaged over flips' * args.tta}")
    top5 = f"   top-5 error {m.top5_error:.2%}" if len(classes) > 5 else ""
    print(f"loss {m.loss:.4f}   top-1 error {m.top1_error:.2%}{top5}")
    print(f"  {'class':<{width}}    error  precision   recall   images")
    keys = ("class_errors", "precision", "recall", "class_images")
    for name in classes:
        error, precision, recall, n = (summary[key][name] for key in keys)
        print(f"  {name:<{width}.{width}}  {error:7.2%}  {precision:9.2%}  {recall:7.2%}  {n:7}")
    mistakes = m.confusion - m.confusion.diag().diag()
    pair = divmod(int((mistakes + mistakes.T).argmax()), len(classes))
    print("the two classes most often confused:")
    for true, found in (pair, pair[::-1]):
        if count := mistakes[true, found].item():
            print(f"{count:7} x {classes[true]:.30} taken for {classes[found]:.30}")

def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint, or predict images.")
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run")
    parser.add_argument("files", nargs="*", metavar="image", help="files and folders to predict")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="allow this code to run")
    parser.add_argument("--dataset", choices=DATASETS, help="default: the one it was trained on")
    parser.add_argument("--data-dir", help="default: as in training")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test")
    parser.add_argument("-b", "--batch-size", type=int, default=256, help="of each process")
    parser.add_argument("-j", "--workers", type=parse_workers, default="auto", help="see train.py")
    parser.add_argument("--tta", action="store_true", help="average over each image's mirror image")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write pictures and tables")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table of the images")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the images with classes")
    parser.add_argument("--features", type=Path, metavar="PNG", help="draw maps of an image")
    args = parser.parse_intermixed_args()  # a flag may stand before the images
    if args.batch_size < 1 or (args.workers or 0) < 0:
        parser.error("expected --batch-size of at least 1 and --workers of at least 0")
    if args.report if args.files else args.csv or args.save or args.features:
        parser.error("--report takes no images; --csv, --save and --features need some")
    return args

def main() -> None:
    from train import prepare_machine, report_failures  # late, because train.py imports this file

    args = parse_args()
    with report_failures("evaluate.py"):
        accelerator = prepare_machine("no")
        checkpoint = call_on_main(accelerator, load_checkpoint, args.checkpoint)
        model = load_model(checkpoint, args.checkpoint, args.model)
        model = model.to(accelerator.device, memory_format=torch.channels_last)
        if args.files:
            sys.exit(predict_files(args, model) if accelerator.is_main_process else 0)
        data = load_split(args, checkpoint, accelerator, *model.input_size)
        images, transform = getattr(data, args.split), make_transform(model.mean, model.std)
        options = args.batch_size, choose_workers(args.workers, images), args.tta
        metrics = evaluate(accelerator, model, images, transform, len(data.classes), *options)
        if not math.isfinite(metrics.loss):
            raise UserError(f"{args.checkpoint}: its outputs are not finite")
        if args.report and accelerator.is_main_process:
            write_report(args, metrics, images, data.classes)
    if accelerator.is_main_process:
        print_metrics(metrics, args, checkpoint["name"], data.classes)
    accelerator.end_training()

if __name__ == "__main__":
    main()
