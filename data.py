"""Data: CIFAR, drawn shapes, folders of images; split, order of samples, augmentation of batches.

    python data.py --dataset shapes --grid grid.png     # images of all classes, raw and augmented
    python data.py --dataset cifar10 --stats            # mean, std, principal components of pixels
    python data.py --dataset folder --data-dir DIR --check    # counts, and unreadable images
    python data.py --dataset folder --data-dir DIR --time     # images/s, ours and ImageFolder's

Images stay uint8 (N, 3, H, W) until a batch is on its device, where a transform scales, augments
and normalises it. All randomness follows from numbers that a checkpoint knows: the order of an
epoch from (seed, epoch), the crop of a file from (seed, epoch, index), the augmentation of a batch
from (seed, epoch, step, shard). A run can therefore continue at any step.
"""

import argparse
import contextlib
import copy
import os
import pickle
import random
import signal
import sys
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2

from fishnet import UserError

DATASETS = ("cifar10", "cifar100", "shapes", "folder")
AUGMENTS = ("slides", "standard", "cutout", "cutmix", "none")
# torchvision's class, which knows the files; the key of labels in them; mean and std of the pixels.
CIFAR = {
    "cifar10": (CIFAR10, b"labels", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (CIFAR100, b"fine_labels", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000

# The usual constants for folders of images, from github.com/facebookarchive/fb.resnet.torch.
# Column i of the matrix belongs to eigenvalue i.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
IMAGENET_EIGENVECTORS = torch.tensor(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
CENTRE_RATIO = 0.875  # validation sees this part of the short side of a folder's image
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm")
IMAGE_SUFFIXES += (".tif", ".tiff", ".webp")
FOREIGN = ("lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")

class ImageSet(Dataset):
    """Images uint8 (N, 3, H, W) in memory, and their labels int64 (N,)."""
    passed_over = Counter()  # of files by suffix, in a FolderSet

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | list[int]) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    __getitems__ = __getitem__  # a whole batch at once, for a DataLoader with `collate`

    def subset(self, indices: Tensor) -> "ImageSet":
        return ImageSet(*self[indices])

def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the batch that __getitems__ made. A data worker moves it to shared memory here, since
    PyTorch does so in a thread, where nobody sees the error if /dev/shm is full."""
    return tuple(part.share_memory_() for part in batch) if get_worker_info() else batch

def count_cores() -> int:
    """Return how many CPU cores this process may use: its share, if there are several here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

def parse_workers(text: str) -> int | None:
    """Return the number of --workers, or None for "auto"."""
    return None if text == "auto" else int(text)

def choose_workers(workers: int | None, images: Dataset) -> int:
    """Return `workers`, or by default none for images in memory and one a core for a folder's."""
    return workers if workers is not None else count_cores() if isinstance(images, FolderSet) else 0

def ignore_signals(worker_id: int) -> None:
    """Leave SIGTERM and Ctrl-C to the main process, which has a step to finish and to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

@dataclass(frozen=True)
class Data:
    """A dataset: its splits, its class names in the order of labels, mean and std in [0, 1]."""
    train: "ImageSet | FolderSet"
    val: "ImageSet | FolderSet"
    test: "ImageSet | FolderSet"
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

def load_data(dataset: str, data_dir: str | Path = "data", val_fraction: float = 0.2, seed: int = 0,
              image_size: int = 224, centre_ratio: float = CENTRE_RATIO) -> Data:  # fmt: skip
    """Load a dataset; val_fraction of each class of its training images becomes the validation.
    A folder uses image_size, the side of its crops. Raises UserError for wrong values or files."""
    if not 0 <= val_fraction < 1:
        raise UserError(f"val-fraction={val_fraction}: expected 0 <= val-fraction < 1")
    data_dir = Path(data_dir).expanduser()
    if dataset == "folder":
        return load_folder(data_dir, val_fraction, seed, image_size, centre_ratio)
    if dataset == "shapes":
        train, test, classes = draw_shapes(SHAPES_TRAIN, 0), draw_shapes(SHAPES_TEST, 1), SHAPES
        mean, covariance = compute_moments(train.images)
        mean, std = tuple(mean.tolist()), tuple(covariance.diagonal().sqrt().tolist())
    elif dataset in CIFAR:
        train, test, classes = load_cifar(dataset, data_dir)
        mean, std = CIFAR[dataset][2:]
    else:
        raise UserError(f"dataset={dataset!r}: expected one of {', '.join(DATASETS)}")
    train, val = map(train.subset, stratified_split(train.labels, val_fraction, seed))
    return Data(train, val, test, classes, mean, std)

def stratified_split(labels: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return sorted indices (train, val). val gets val_fraction of each class, at least one image
    but never all. A class of one image stays in train."""
    in_val = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique() if val_fraction else ():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(round(val_fraction * len(members)), 1), len(members) - 1)
        in_val[members[:count]] = True
    return (~in_val).nonzero().flatten(), in_val.nonzero().flatten()

def describe_split(data: Data) -> dict[str, int]:
    """Return the sizes of train and val, and a checksum of a folder's names: files that are moved
    change the split, and images of the training may come into val."""
    found = {"train": len(data.train), "val": len(data.val)}
    if isinstance(data.train, FolderSet):
        names = [os.path.relpath(p, s.root) for s in (data.train, data.val) for p, _ in s.samples]
        found["names"] = zlib.crc32("\n".join(names).encode(errors="surrogateescape"))
    return found

# ------------------------------------------------------------------------------------------ CIFAR

class ArrayUnpickler(pickle.Unpickler):
    """Unpickle plain values and numpy arrays, and refuse all else: no file can run code."""

    def find_class(self, module: str, name: str) -> object:
        module = module.replace("numpy.core", "numpy._core")  # its name until numpy 2
        if f"{module}.{name}" not in (
            "numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct",
            "numpy._core.numeric._frombuffer", "_codecs.encode",
        ):  # fmt: skip
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)

def read_pickle(path: Path, *keys: bytes) -> list:
    """Return values of the dict in one of CIFAR's files, without running code from it."""
    try:
        with path.open("rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
        return [content[key] for key in keys]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; complete or remove its folder") from None
    except Exception as error:  # damaged pickles raise many kinds, some with several lines
        raise UserError(f"{path}: not a CIFAR file ({' '.join(str(error).split())})") from None

def read_batch(path: Path, label_key: bytes, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, 3, 32, 32) and labels int64 (N,) of a batch file."""
    data, labels = read_pickle(path, b"data", label_key)
    shape = len(labels) if isinstance(labels, list) else 0, 3072
    is_data = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == shape
    if not is_data or not all(type(n) is int and 0 <= n < num_classes for n in labels):
        expected = f"uint8 (N, 3072) and N labels from 0 to {num_classes - 1}"
        raise UserError(f"{path}: not a CIFAR file (expected data {expected})")
    return torch.from_numpy(data.copy()).view(-1, 3, 32, 32), torch.tensor(labels).long()

def load_cifar(name: str, data_dir: Path) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Return (train, test, class names), downloaded if the folder is not there."""
    source, label_key, _, _ = CIFAR[name]
    folder, sets = data_dir / source.base_folder, []
    if not folder.is_dir():
        if (data_dir / "train").is_dir():
            raise UserError(f"{data_dir}: holds train/, not {name}: add --dataset folder")
        try:
            download_and_extract_archive(source.url, data_dir, md5=source.tgz_md5)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder}: download failed ({error}); unpack {source.url} into "
                            f"{data_dir}, or try --dataset shapes") from None  # fmt: skip
    (names,) = read_pickle(folder / source.meta["filename"], source.meta["key"].encode())
    for files in (source.train_list, source.test_list):
        batches = [read_batch(folder / file, label_key, len(names)) for file, _ in files]
        sets.append(ImageSet(*(torch.cat(parts) for parts in zip(*batches))))
    return *sets, tuple(name.decode() for name in names)

# ------------------------------------------------------------------------------ folders of images

warnings.filterwarnings("ignore", module="PIL")  # of broken metadata
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # by default, 1 MB of metadata refuses an image

@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, and name it in the error of any decoder."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            yield image
    except IsADirectoryError:
        raise UserError(f"{path}: a folder without images such as .jpg") from None
    except Exception as error:  # decoders raise many kinds for damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason})") from None

def read_image(path: str | Path) -> Tensor:
    """Return an image file as a viewer shows it, uint8 RGB (3, H, W): the first frame, turned as
    EXIF or XMP says, 16-bit grey scaled to 8, transparency on white, other colours as in Pillow.
    Raises UserError, naming the file, if it cannot be decoded or values have no agreed white."""
    with open_image(path) as image:
        return decode(image)

def read_turn(image: Image.Image) -> int:
    """Return how an opened image file is turned, as EXIF's number: 1 is upright, 5 to 8 lie."""
    with contextlib.suppress(Exception):  # broken EXIF raises many kinds
        return image.getexif().get(0x0112, 1)
    return 1

def decode(image: Image.Image) -> Tensor:
    """Decode an opened image file to uint8 RGB (3, H, W)."""
    if isinstance(image, JpegImageFile) and image.mode in ("L", "RGB") and read_turn(image) == 1:
        image.fp.seek(0)
        content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
        with contextlib.suppress(RuntimeError, AttributeError):  # Pillow reads it, or says why not
            return torch.ops.image.decode_jpeg(content, 3, False)  # as RGB; faster
    return TF.pil_to_tensor(convert_to_rgb(image))

def read_crop(path: str | Path, size: int, ratio=CENTRE_RATIO, seeds: Sequence = ()) -> Tensor:
    """Return a crop of an image file, uint8 (3, size, size): random if there are `seeds`, else that
    of centre_crop. A JPEG is decoded at 1/8, 1/4 or 1/2 of its size if enough pixels are left."""
    with open_image(path) as image:
        turn = read_turn(image)
        is_swapped = turn in (5, 6, 7, 8) and image.format != "TIFF"  # Pillow turns a TIFF's size
        height, width = image.size if is_swapped else image.size[::-1]
        box = draw_box(height, width, seeds) if seeds else find_centre(height, width, size, ratio)
        scales = [s for s in (8, 4, 2) if min(box[2:]) >= s * size]
        if turn != 1:  # part of a pixel, where s does not divide a side, may not come first
            scales = [s for s in scales if width % s == height % s == 0]
        if scales and isinstance(image, JpegImageFile):
            image.draft(None, [side // scales[0] for side in image.size])
            top, left, rows, columns = (side / scales[0] for side in box)
            box = left, top, left + columns, top + rows
            return TF.pil_to_tensor(convert_to_rgb(image).resize([size] * 2, Image.BILINEAR, box))
        image = decode(image)
    if not seeds:
        return centre_crop(image, size, ratio)
    top, left, rows, columns = box
    crop = image[None, :, top : top + rows, left : left + columns]
    crop = crop.contiguous(memory_format=torch.channels_last)  # twice as fast
    return nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]

def find_centre(height: int, width: int, size: int, ratio: float) -> list[float]:
    """Return top, left, height and width of what centre_crop shows."""
    sides, short = (height, width), round(size / ratio)
    resized = [int(short * side / min(sides)) for side in sides]
    start = [round((new - size) / 2) * side / new for side, new in zip(sides, resized)]
    return [*start, *(size * side / new for side, new in zip(sides, resized))]

def draw_box(height: int, width: int, seeds: Sequence) -> tuple[int, int, int, int]:
    """Draw top, left, height and width as RandomResizedCrop does, but from `seeds`, and faster."""
    rng = random.Random(str(seeds))
    for _ in range(10):
        area, aspect = height * width * rng.uniform(0.08, 1), (4 / 3) ** rng.uniform(-1, 1)
        rows, columns = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if 0 < rows <= height and 0 < columns <= width:
            return rng.randint(0, height - rows), rng.randint(0, width - columns), rows, columns
    rows, columns = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - rows) // 2, (width - columns) // 2, rows, columns

def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image file."""
    is_deep = image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I")
    tags = getattr(image, "tag_v2", {})  # of a TIFF: 258 are its bits, 262 is 0 if 0 means white
    is_deep = is_deep and tags.get(258, (16,)) == (16,) and tags.get(262) != 0
    image.filename = ""  # otherwise Pillow maps a turned TIFF into memory by the wrong sides
    image.load()
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if is_deep:
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of Pillow's mode {image.mode}, expected 8 or 16 bits")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

def tell_apart(names: Sequence[str]) -> list[str]:
    """Escape names that look alike because they differ only in their Unicode normal form."""
    forms = [unicodedata.normalize("NFC", name) for name in names]
    return [ascii(name) if forms.count(form) > 1 else name for name, form in zip(names, forms)]

def is_hidden(path: Path) -> bool:
    """Return whether a part of the path begins with a dot, or is a folder of the system's."""
    return any(part[0] == "." or part in FOREIGN for part in path.parts)

class FolderSet(ImageFolder):
    """Images of root/<class>/**, cropped to uint8 (3, size, size) on access; int64 labels (N,).
    `epoch` None shows the centre, else a random crop that follows from (seed, epoch, index)."""
    epoch: int | None = None

    def __init__(self, root: Path, size: int, ratio: float, seed: int) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: not there; --data-dir is the folder that holds train/CLASS/")
        self.size, self.ratio, self.seed, self.passed_over = size, ratio, seed, Counter()
        super().__init__(root, is_valid_file=self.is_image, allow_empty=True)
        self.labels = torch.tensor(self.targets, dtype=torch.int64)
        counts = self.labels.bincount(minlength=len(self.classes)).tolist()
        if 0 in counts:
            empty = root / self.classes[counts.index(0)]
            raise UserError(f"{empty}: no images such as .jpg; fill or remove this folder")

    def find_classes(self, directory: Path) -> tuple[list[str], dict[str, int]]:
        names = sorted(p.name for p in Path(directory).iterdir() if p.is_dir() and p.name[0] != ".")
        self.passed_over.update(f"folder {name}" for name in names if name in FOREIGN)
        names = [name for name in names if name not in FOREIGN]
        if len(names) < 2:
            raise UserError(f"{directory}: {len(names)} folders, expected one for each class")
        return names, {name: label for label, name in enumerate(names)}

    def is_image(self, path: str) -> bool:
        suffix = Path(path).suffix.lower()
        if is_hidden(Path(path).relative_to(self.root)):
            return False
        if suffix not in IMAGE_SUFFIXES:
            self.passed_over[suffix or "no suffix"] += 1
        return suffix in IMAGE_SUFFIXES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        seeds = () if self.epoch is None else (self.seed, self.epoch, index)
        return read_crop(path, self.size, self.ratio, seeds), label

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.stack([self[index][0] for index in indices]), self.labels[indices]

    def subset(self, indices: Tensor) -> "FolderSet":
        subset = copy.copy(self)
        subset.samples = [self.samples[index] for index in indices.tolist()]
        subset.labels = self.labels[indices]
        return subset

def centre_crop(image: Tensor, size: int, ratio: float = CENTRE_RATIO) -> Tensor:
    """Resize the short side of uint8 (3, H, W) to size / ratio, and cut out (3, size, size)."""
    return TF.center_crop(TF.resize(image, [round(size / ratio)], antialias=True), [size, size])

def load_folder(root: Path, val_fraction: float, seed: int, size: int, ratio: float) -> Data:
    """Load root/train, root/val or root/valid (or a part of train), root/test (or nothing)."""
    splits = {"train": (train := FolderSet(root / "train", size, ratio, seed))}
    for split in ("valid", "val", "test"):
        if (root / split).exists():
            images = FolderSet(root / split, size, ratio, seed)
            if other := tell_apart(sorted(set(images.classes) ^ set(train.classes))):
                raise UserError(f"{root / split}: unlike train: add or remove {', '.join(other)}")
            train.passed_over.update(images.passed_over)
            splits["val" if split == "valid" else split] = images
    splits.setdefault("test", train.subset(torch.arange(0)))
    if "val" not in splits:
        counts = train.labels.bincount().tolist()
        if val_fraction and 1 in counts:
            single = root / "train" / train.classes[counts.index(1)]
            raise UserError(f"{single}: has one image; add one for validation, or --val-fraction 0")
        indices = stratified_split(train.labels, val_fraction, seed)
        splits["train"], splits["val"] = map(train.subset, indices)
    return Data(**splits, classes=tuple(train.classes), mean=IMAGENET_MEAN, std=IMAGENET_STD)

# ----------------------------------------------------------------------------------------- shapes

def arc(radius: float, start: float, end: float) -> np.ndarray:
    """Return points of a circle around 0 as complex numbers. Angles are in turns."""
    return radius * np.exp(2j * np.pi * np.linspace(start, end, 65))

# Outlines within the unit circle, whose points (x, y) are complex numbers x + iy.
OUTLINES = {
    "disc": arc(0.95, 0, 1),
    "ring": np.append(arc(0.95, 0, 1), arc(0.55, 1, 0)),
    "half disc": arc(0.95, 0, 0.5),
    "crescent": np.append(arc(0.95, 0.15, 0.85), 0.5 + arc(0.77, 0.76, 0.24)),
    "triangle": np.exp(2j * np.pi * np.arange(3) / 3),
    "square": np.exp(2j * np.pi * np.arange(4) / 4),
    "bar": np.array([0.95 + 0.3j, -0.95 + 0.3j, -0.95 - 0.3j, 0.95 - 0.3j]),
    "cross": np.outer(1j ** np.arange(4), [0.95 - 0.25j, 0.95 + 0.25j, 0.25 + 0.25j]).ravel(),
    "star": np.exp(1j * np.pi * np.arange(10) / 5) * np.tile([1, 0.4], 5),
    "corner": 0.1 * np.array([-7 - 7j, 7 - 7j, 7 - 2j, -2 - 2j, -2 + 7j, -7 + 7j]),
}
SHAPES = tuple(OUTLINES)

def draw_mask(shape: str, size: int, centre: complex, radius: float, angle: float) -> np.ndarray:
    """Draw a figure: (size, size), the part of each pixel that lies inside."""
    points = 4 * (centre + radius * np.exp(1j * angle) * OUTLINES[shape])  # at four times the size
    mask = Image.new("L", (4 * size, 4 * size))
    ImageDraw.Draw(mask).polygon([(z.real, z.imag) for z in points], fill=255)
    return np.asarray(mask.reduce(4)) / 255

def draw_shapes(count: int, seed: int) -> ImageSet:
    """Draw ten kinds of figures, as many of each: images uint8 (N, 3, 32, 32). Rotation, size,
    place, colours and noise are drawn alike for all classes, so only the form tells them apart."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    images = np.empty((count, 3, 32, 32), np.uint8)
    for i, label in enumerate(labels):
        radius, angle = rng.uniform(9, 13), rng.uniform(0, 2 * np.pi)
        centre = 16 + 16j + (15 - radius) * complex(*rng.uniform(-1, 1, 2))
        ground, figure = rng.uniform(0, 1, (2, 3, 1, 1))
        if np.abs(figure - ground).max() < 0.35:  # hard to see
            figure = (ground + 0.5) % 1
        mask = draw_mask(SHAPES[label], 32, centre, radius, angle)
        image = ground + (figure - ground) * mask + rng.normal(0, 0.06, (3, 32, 32))
        images[i] = (255 * image).round().clip(0, 255)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))

@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed torch's global generator from numbers such as (seed, epoch, step) inside the block, so
    that every random transform there is reproducible. (1, 2) and (1, 2, 0) are different seeds."""
    sequence = np.random.SeedSequence((len(numbers), *numbers))
    target = torch if torch.cuda.is_initialized() else torch.default_generator  # 0.2 ms less
    with torch.random.fork_rng(devices=(), device_type="cpu"):
        target.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
        yield

class EpochBatches:
    """Batches of indices, for a DataLoader's batch_sampler, in an order of (seed, epoch) alone.
    A batch is cut into `accum_steps` parts. Images that do not fill a batch are left out."""

    def __init__(self, length: int, batch_size: int, accum_steps: int = 1, seed: int = 0) -> None:
        if batch_size > length:
            raise UserError(f"batch-size={batch_size}: expected at most {length} training images")
        self.length, self.seed = length, seed
        self.batch_size = batch_size // accum_steps  # Accelerate reads it
        self.batches = length // batch_size * accum_steps
        self.epoch, self.start = 0, 0  # the loop sets both: which epoch, and its first part

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        with seeded(self.seed, self.epoch):
            order = torch.randperm(self.length).tolist()
        for i in range(self.start, self.batches):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]

# ----------------------------------------------------------------------------------- augmentation
# torchvision's random transforms draw once for a whole batch, so all its images would be cropped or
# flipped alike. The modules below draw for each image of a batch: float (N, C, H, W) in [0, 1].

class BatchRandomResizedCrop(nn.Module):
    """Crop a random square of `scale` of each image's area, and resize it to the image's size."""
    scale = (0.5, 1.0)

    def forward(self, images: Tensor) -> Tensor:
        n, _, height, width = images.shape
        area, y, x = torch.rand(3, n)
        area = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
        side = area.sqrt().round().clamp(1, min(height, width))
        top, left = (y * (height - side + 1)).floor(), (x * (width - side + 1)).floor()
        boxes = torch.zeros(n, 2, 3)  # of an image from -1 to 1: [[width, 0, x], [0, height, y]]
        boxes[:, 0, 0], boxes[:, 0, 2] = side / width, (2 * left + side) / width - 1
        boxes[:, 1, 1], boxes[:, 1, 2] = side / height, (2 * top + side) / height - 1
        boxes = boxes.to(images.device, non_blocking=True)
        grid = nn.functional.affine_grid(boxes, images.shape, align_corners=False)
        return nn.functional.grid_sample(images, grid, "bilinear", "border", align_corners=False)

class BatchRandomCrop(nn.Module):
    """Shift each image by up to `padding` pixels along each axis; black moves in."""

    def __init__(self, padding: int = 4) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        n, _, height, width = images.shape
        shift = torch.randint(2 * self.padding + 1, (2, n, 1)).to(images.device, non_blocking=True)
        padded = nn.functional.pad(images, [self.padding] * 4).permute(0, 2, 3, 1)
        sample = torch.arange(n, device=images.device)[:, None, None]
        rows = (shift[0] + torch.arange(height, device=images.device))[:, :, None]
        columns = (shift[1] + torch.arange(width, device=images.device))[:, None, :]
        return padded[sample, rows, columns].permute(0, 3, 1, 2)

class BatchRandomHorizontalFlip(nn.Module):
    """Mirror each image left to right with probability p."""
    p = 0.5

    def forward(self, images: Tensor) -> Tensor:
        flip = (torch.rand(len(images)) < self.p).to(images.device, non_blocking=True)
        return torch.where(flip[:, None, None, None], images.flip(-1), images)

def cover(size: int, start: Tensor, end: Tensor) -> Tensor:
    """Return which of `size` pixels have their centre between start and end (N, 1): (N, size)."""
    pixels = torch.arange(size, device=start.device) + 0.5
    return (start < pixels) & (pixels < end)

class BatchCutout(nn.Module):
    """Lay a grey square of `ratio` of the width on each image, centred on any of its pixels. What
    reaches over the edge is lost. DeVries and Taylor 2017, section 3.2."""
    ratio = 3 / 8

    def forward(self, images: Tensor) -> Tensor:
        n, _, height, width = images.shape
        side = int(self.ratio * width)
        centres = [torch.randint(size, (n, 1)) for size in (height, width)]
        top, left = (c.to(images.device, non_blocking=True) - side // 2 for c in centres)
        rows, columns = cover(height, top, top + side), cover(width, left, left + side)
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.5)

class BatchCutMix(nn.Module):
    """With probability p, replace a box of image i, and that part of its label, by image N - 1 - i.
    The box has the image's aspect ratio, an area drawn evenly from 0 to the whole, and any centre.
    (N, C, H, W), labels (N,) -> (N, C, H, W), targets (N, classes). Yun et al. 2019, a box each."""
    p = 0.5

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        n, _, height, width = images.shape
        area, y, x, chance = torch.rand(4, n, 1).to(images.device, non_blocking=True)
        half = area.sqrt() * (chance < self.p) / 2  # of the box's side, relative to the image's
        rows = cover(height, height * (y - half), height * (y + half))
        columns = cover(width, width * (x - half), width * (x + half))
        box = rows[:, :, None] & columns[:, None, :]
        own = nn.functional.one_hot(labels, self.classes)
        part = box.float().mean((1, 2))[:, None]
        targets = own * (1 - part) + own.flip(0) * part
        return torch.where(box[:, None], images.flip(0), images), targets

class FancyPCA(nn.Module):
    """Shift the colour of each image with probability p: AlexNet's augmentation.
    Adds sum_i p_i alpha_i lambda_i to every pixel, with alpha_i ~ N(0, std) drawn for each image.
    lambda_i are the eigenvalues (not their square roots) and p_i, in column i, the eigenvectors of
    the 3 x 3 covariance of the training set's RGB values in [0, 1]. Krizhevsky et al. 2012, 4.1."""
    std, p = 0.1, 0.5

    def __init__(self, eigenvalues: Tensor, eigenvectors: Tensor) -> None:
        super().__init__()
        self.eigenvalues, self.eigenvectors = eigenvalues.float(), eigenvectors.float()

    @classmethod
    def fit(cls, images: Tensor) -> "FancyPCA":
        """Compute the components of training images uint8 (N, 3, H, W), largest first."""
        eigenvalues, eigenvectors = torch.linalg.eigh(compute_moments(images)[1])
        return cls(eigenvalues.flip(0), eigenvectors.flip(1))

    def forward(self, images: Tensor) -> Tensor:
        alpha = torch.randn(len(images), 3) * self.std
        chosen = torch.rand(len(images), 1) < self.p
        shift = (chosen * alpha * self.eigenvalues) @ self.eigenvectors.T  # (N, 3)
        return images + shift[:, :, None, None].to(images.device, images.dtype, non_blocking=True)

def make_transform(mean: Sequence, std: Sequence, augment: str = "none",
                   train: ImageSet | FolderSet | None = None, padding: int = 4) -> v2.Compose:
    """Return the transform of batches: uint8 (N, 3, H, W) -> [0, 1] -> augmented -> normalised.
    "slides" is a random resized crop, a flip and Fancy PCA fitted on `train`; "standard" a padded
    crop and a flip; "cutout" the same and a grey square; "cutmix" is "standard", before
    BatchCutMix. A folder's images are cropped already, and use the usual PCA of ImageNet."""
    is_folder, steps = isinstance(train, FolderSet), [v2.ToDtype(torch.float32, scale=True)]
    if augment != "none" and not is_folder:
        steps.append(BatchRandomResizedCrop() if augment == "slides" else BatchRandomCrop(padding))
    if augment != "none":
        steps.append(BatchRandomHorizontalFlip())
    if augment == "cutout":
        steps.append(BatchCutout())
    if augment == "slides":
        pca = FancyPCA(IMAGENET_EIGENVALUES, IMAGENET_EIGENVECTORS)
        steps.append(pca if is_folder else FancyPCA.fit(train.images))
    return v2.Compose([*steps, v2.Normalize(mean, std, inplace=True)])

def compute_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (3,) and covariance (3, 3) of the pixels in [0, 1] of uint8 (N, 3, H, W)."""
    total, products = torch.zeros(3).double(), torch.zeros(3, 3).double()
    for chunk in images.split(100):  # parts that fit the cache
        x = chunk.transpose(0, 1).reshape(3, -1).double() / 255
        total += x.sum(1)
        products += x @ x.T
    mean, count = total / (images.numel() // 3), images.numel() // 3
    return mean, products / count - torch.outer(mean, mean)

# -------------------------------------------------------------------------------- looking at data

def pick_examples(labels: Tensor, count: int) -> list[int]:
    """Return up to `count` indices of labels (N,): the first of each class, then the second, ..."""
    order, counts = labels.argsort(stable=True), labels.bincount()
    turn = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return order[turn.argsort(stable=True)][:count].tolist()

def augment_examples(data: Data, augment: str, seed=0, padding=4) -> tuple[Tensor, list[str]]:
    """Return 64 training images, uint8, as epoch 0 may show them, and their classes' names."""
    data.train.epoch = None if augment == "none" else 0
    images, labels = data.train.__getitems__(pick_examples(data.train.labels, 64))
    with seeded(seed):
        images = make_transform((0, 0, 0), (1, 1, 1), augment, data.train, padding)(images)
        if augment == "cutmix":
            images, _ = BatchCutMix(len(data.classes))(images, labels)
    return (images.clamp(0, 1) * 255).round().byte(), [data.classes[label] for label in labels]

def to_ascii(text: str) -> str:
    """Return the text without accents, and numbers for letters that Pillow's font lacks."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(letters).encode("ascii", "backslashreplace").decode()

def draw_grid(images: Tensor, captions: Sequence[str]) -> Tensor:
    """Draw images uint8 (N, 3, H, W) in rows of eight with a caption below each: uint8 (3, H', W').
    Images below 96 pixels are enlarged by a whole number. Captions may have several lines, which
    are shortened to the width of an image. The font has English letters, see to_ascii."""
    scale = -(-96 // images.shape[-1])
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    font, (height, width) = ImageFont.load_default(size=12), images.shape[-2:]
    columns, below = min(len(images), 8), 4 + 14 * max(text.count("\n") + 1 for text in captions)
    size = columns * (width + 8), -(-len(images) // columns) * (height + below) + 4
    draw = ImageDraw.Draw(picture := Image.new("RGB", size, "white"))
    for i, (image, text) in enumerate(zip(images, captions, strict=True)):
        x, y = 4 + i % columns * (width + 8), 4 + i // columns * (height + below)
        picture.paste(TF.to_pil_image(image), (x, y))
        for row, line in enumerate(to_ascii(text).split("\n")):
            while font.getlength(line) > width:
                line = f"{line[: len(line) // 2 - 1]}…{line[len(line) // 2 + 1 :]}"
            draw.text((x, y + height + 14 * row), line, "black", font)
    return TF.pil_to_tensor(picture)

def save_grid(data: Data, augment: str, path: Path) -> None:
    """Draw 64 training images of all classes with their labels: left raw, right augmented."""
    halves = []
    for how, caption in (("none", "as in validation"), (augment, "augmented")):
        images, names = augment_examples(data, how)
        halves.append(draw_grid(images, [f"{name}\n{caption}" for name in names]))
    TF.to_pil_image(torch.cat(halves, 2)).save(path, "PNG")
    print(f"wrote {path}")

def count_images(data: Data) -> list[str]:
    """Return lines that say how many images each class and split has, and what was passed over."""
    splits, names = (data.train, data.val, data.test), [*tell_apart(data.classes), "all classes"]
    counts = torch.stack([images.labels.bincount(minlength=len(data.classes)) for images in splits])
    counts = torch.cat([counts, counts.sum(1, keepdim=True)], 1).T.tolist()
    rows = [f"{n[0]:>9}{n[1]:>9}{n[2]:>9}  {name:.68}" for n, name in zip(counts, names)]
    others = ", ".join(f"{n} {what}" for what, n in data.train.passed_over.most_common())
    return ["    train      val     test", *rows, *[f"passed over: {others}"] * bool(others)]

def print_stats(data: Data) -> None:
    """Print counts, and the mean, std and principal components that training uses."""
    print(*count_images(data), sep="\n")
    *_, pca, _ = make_transform(data.mean, data.std, "slides", data.train).transforms
    components = zip(pca.eigenvalues.tolist(), pca.eigenvectors.T.tolist())
    rows = [(f"eigenvalue {value:.4f}, eigenvector", vector) for value, vector in components]
    for name, values in (("mean", data.mean), ("std", data.std), *rows):
        print(f"{name:<32}" + "  ".join(f"{value:7.4f}" for value in values))

def print_faults(data: Data) -> int:
    """Print a line for each file of a folder that cannot be read; return their number."""
    files = [path for path, _ in data.train.samples + data.val.samples + data.test.samples]

    def find_fault(path: str) -> UserError | None:
        try:
            read_image(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:  # decoders run side by side
        faults = list(filter(None, pool.map(find_fault, files)))
    print(*faults, f"{len(files)} images, {len(faults)} of them cannot be read", sep="\n")
    return len(faults)

def print_speed(data: Data) -> None:
    """Print images/s of our crops and of ImageFolder's on one thread, which take turns."""
    torch.set_num_threads(1)
    train, size, examples = data.train, data.train.size, pick_examples(data.train.labels, 64)

    def time_reads(kind: type) -> float:
        return timeit(lambda: [kind.__getitem__(train, index) for index in examples], number=1)

    centre = [transforms.Resize(round(size / train.ratio)), transforms.CenterCrop(size)]
    for steps in ([transforms.RandomResizedCrop(size)], centre):
        train.transform = transforms.Compose([*steps, transforms.PILToTensor()])  # ImageFolder's
        seconds = []
        while np.sum(seconds) < 10:
            train.epoch = None if steps is centre else len(seconds)
            seconds.append([time_reads(FolderSet), time_reads(ImageFolder)])
        ours, pillow = len(examples) / np.mean(seconds, 0)
        speeds = f"{ours:.1f} images/s, ImageFolder {pillow:.1f}, ratio {ours / pillow:.2f}"
        print(f"{type(steps[-1]).__name__}: {speeds}")

def main() -> None:
    parser = argparse.ArgumentParser(description="Look at a dataset.")
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="cifar10")
    add("--data-dir", default="data", help="where the files are (default: data)")
    add("--augment", choices=AUGMENTS, default="slides", help="for --grid")
    add("--grid", metavar="PNG", help="write 64 images of all classes, raw and augmented")
    add("--stats", action="store_true", help="print mean, std and principal components of pixels")
    add("--check", action="store_true", help="count a folder's images, list unreadable ones")
    add("--time", action="store_true", help="images/s of a folder, ours and ImageFolder's")
    args = parser.parse_args()
    if not (args.grid or args.stats or args.check or args.time):
        parser.error("nothing to do: give --grid PNG, --stats, --check or --time")
    if (args.check or args.time) and args.dataset != "folder":
        parser.error("--check and --time: give --dataset folder")
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        data = load_data(args.dataset, args.data_dir, val_fraction=0)
        if args.grid:
            save_grid(data, args.augment, Path(args.grid).expanduser())
        if args.stats:
            print_stats(data)
        if args.time:
            print_speed(data)
        if args.check:
            print(*count_images(data), sep="\n")
            sys.exit(min(print_faults(data), 1))
    except (UserError, OSError) as error:
        sys.exit(f"data.py: {error}")

if __name__ == "__main__":
    main()
