"""Data: CIFAR, drawn shapes, folders of images; the split, the order of samples, augmentation of whole batches.

    python data.py --dataset shapes --grid grid.png      # the first 64 images, raw and augmented, with class names
    python data.py --dataset cifar10 --stats             # mean, std and principal components of the pixels
    python data.py --dataset cifar10 --time              # images/s of the augmentation, beside torchvision's
    python data.py --dataset folder --data-dir DIR --check   # read every image; list those that cannot be read

Images stay uint8 (N, 3, H, W) until a batch is on its device. There a `BatchTransform` scales them to [0, 1], augments
them with one random draw an image, and normalises them. Images of a folder differ in size: they are cropped where they
are read. Nothing random has a state: the order of an epoch follows from (seed, epoch), the crop of a file from (seed,
epoch, index), a batch's augmentation from (seed, epoch, step, shard), so a run can continue at any step.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C in them is no traceback

import argparse
import contextlib
import errno
import math
import os
import pickletools
import re
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2

# ---------------------------------------------------------------------------------------------------------- facts


@dataclass(frozen=True)
class CifarFacts:
    """Of a CIFAR: torchvision's class, which knows its files; the labels' key; mean and std of the training pixels."""

    source: type[CIFAR10]
    label_key: bytes
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR = {
    "cifar10": CifarFacts(CIFAR10, b"labels", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": CifarFacts(CIFAR100, b"fine_labels", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
DATASETS = (*CIFAR, "shapes", "folder")
SHAPES = ("disc", "ring", "half disc", "crescent", "triangle", "square", "bar", "cross", "star", "corner")
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000

# Of ImageNet's pixels in [0, 1], for every folder of images: mean, std, and for FancyPCA eigenvalues and, as columns,
# eigenvectors.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_EIGENVALUES = (0.2175, 0.0188, 0.0045)
IMAGENET_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
CENTRE_RATIO = 0.875  # of a folder's images: the part of the short side that validation sees


class ImageSet(Dataset):
    """Images uint8 (N, 3, H, W) in memory and labels int64 (N,); a list of indices gives a whole batch at once.

    What a loader and the loop need of any set: its length, `labels`, `epoch`, a batch by its indices, `collate`.
    """

    epoch: int | None = None  # FolderSet crops by it; whole images are cropped later, by the batch

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    def subset(self, indices: Tensor) -> "ImageSet":
        return ImageSet(self.images[indices], self.labels[indices])

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """For a DataLoader's collate_fn: __getitems__ already made a batch."""
        return batch


@dataclass(frozen=True)
class Data:
    """A dataset, split; class names in the order of the labels; mean and std of RGB in [0, 1]."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_data(
    dataset: str,
    data_dir: str | Path = "data",
    val_fraction: float = 0.2,
    seed: int = 0,
    image_size: int | None = 224,
    centre_ratio: float = CENTRE_RATIO,
) -> Data:
    """The dataset by its name, a stratified val_fraction of its training images set apart by the seed.

    Only a folder reads image_size, the side of its crops, and centre_ratio, `centre_crop`'s; one that has val/ keeps
    train/ whole. ValueError or OSError with one clear line: unknown dataset, fraction outside [0, 1), missing or wrong
    files.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val-fraction={val_fraction}: expected 0 <= val-fraction < 1")
    if dataset == "folder":
        return load_folder(Path(data_dir), val_fraction, seed, image_size, centre_ratio)
    if dataset == "shapes":
        train, test, classes = draw_shapes(SHAPES_TRAIN, seed=0), draw_shapes(SHAPES_TEST, seed=1), SHAPES
        mean, std = pixel_mean_std(train.images)
    elif dataset in CIFAR:
        train, test, classes = load_cifar(dataset, Path(data_dir))
        mean, std = CIFAR[dataset].mean, CIFAR[dataset].std
    else:
        raise ValueError(f"dataset={dataset!r}: expected one of {', '.join(DATASETS)}")
    train, val = map(train.subset, stratified_split(train.labels, val_fraction, seed))
    return Data(train, val, test, classes, mean, std)


def stratified_split(labels: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (train, val) of labels (N,), in their order, with val_fraction of every class in val.

    Unless val_fraction is 0, each class has at least one image in train and, if it has two, one in val.
    """
    generator = torch.Generator().manual_seed(seed)
    in_val = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(round(val_fraction * len(members)), 1), len(members) - 1) if val_fraction else 0
        in_val[members[:count]] = True
    return (~in_val).nonzero().flatten(), in_val.nonzero().flatten()


# ---------------------------------------------------------------------------------------------------------- CIFAR


def one_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing: the libraries' errors may be long."""
    return str(error).partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around a program: once nobody reads its output, as after `| head`, it ends as SIGPIPE would end it, silently.

    Where a disk is too full for its output, it ends with one line. Names that are no UTF-8 are printed with escapes.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not None, as where it was closed from the start, nor a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes at its exit
        left = error.errno == errno.EPIPE
        sys.exit(128 + signal.SIGPIPE if left else f"{Path(sys.argv[0]).name}: standard output: {error.strerror}")


def parse_pickle(pickled: bytes, names: dict[str, object]) -> object:
    """What a pickle holds. "module name" in it stands for names["module name"]: nothing else is looked up or called.

    Python's unpickler, however its names are restricted, is crashed or kept busy for ever by a small file: by numpy's
    functions with lying arguments, by nested tuples as a key, by a memo of a billion places. Here keys are strings,
    bytes and small numbers, the opcodes those of honest files, and what they make is no larger than `check_size`
    allows. Anything else: ValueError, or what a broken pickle raises.
    """
    stack, marks, memo = [], [], {}

    def popped() -> list:  # what lies above the last mark
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def look_up(name: str) -> object:
        if name not in names:
            raise ValueError(f"it asks for {name.replace(' ', '.')}, which no honest file contains")
        return names[name]

    def set_items(items: list) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bytes, int):
                raise ValueError(f"a key in it is a {type(key).__name__}")
            stack[-1][key] = value

    for opcode, value, _ in pickletools.genops(pickled):
        match opcode.name:
            case ("BININT1" | "BININT2" | "BININT" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT" | "SHORT_BINBYTES"
                  | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8"):  # fmt: skip
                stack.append(value)
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "SHORT_BINSTRING" | "BINSTRING":  # Python 2's str; pickletools decodes it
                stack.append(value.encode("latin-1"))
            case "LONG1" if value.bit_length() <= 64:
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE":
                stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(popped()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode.name == "APPEND" else popped()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                set_items([stack.pop(-2), stack.pop()] if opcode.name == "SETITEM" else popped())
            case "GLOBAL":
                stack.append(look_up(value))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(look_up(module + " " + name))  # a TypeError where they are no strings
            case "BINPERSID":
                stack.append(look_up("persistent id")(stack.pop()))
            case "REDUCE":  # nothing but a value of `names` can be called
                arguments = stack.pop()
                if type(arguments) is not tuple or len(arguments) > 8:  # each call copies them
                    raise ValueError("it calls something with odd arguments")
                stack.append(stack.pop()(*arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].set_state(state)
            case "PROTO" if value <= 5:
                pass
            case "FRAME":
                pass
            case "STOP":
                check_size(stack[-1])
                return stack.pop()
            case _:
                raise ValueError(f"it has a {opcode.name}, which no honest file contains")
    raise ValueError("it has no end")


def check_size(content: object, most: int = 10**7, depth: int = 32) -> None:
    """ValueError: more values and letters, counted wherever they stand, or a deeper nest, than honest files have.

    A pair of twice a pair of twice a pair ... takes three bytes a level in a pickle, and for ever to print.
    """
    level, count = [content], 0
    for _ in range(depth):
        below = []
        for value in level:
            items = [*value, *value.values()] if isinstance(value, dict) else value
            if isinstance(items, (list, tuple, str, bytes)):
                count += len(items)
            if count > most:
                raise ValueError(f"it stands for more than {most:,} values and letters")
            if isinstance(items, (list, tuple)):
                below += items
        level = below
    if level:
        raise ValueError(f"it has values in one another, {depth} deep")


class _Dtype:
    """numpy.dtype in a pickle: of numbers, by its code."""

    def __init__(self, code: str | bytes, *flags: bool) -> None:
        code = code.decode() if isinstance(code, bytes) else code  # bytes: from Python 2
        if not re.fullmatch("[biuf][1248]", code):
            raise ValueError(f"an array in it is of {code!r}")
        self.code = code

    def set_state(self, state: tuple) -> None:
        if state[0] != 3 or state[1] not in ("|", "<", b"|", b"<") or state[2:] != (None, None, None, -1, -1, 0):
            raise ValueError(f"an array in it is of {self.code!r} in an odd layout")


class _Array:
    """numpy.ndarray in a pickle: its values are bytes of the file, whatever the file says of them."""

    values: np.ndarray | None = None

    def set_state(self, state: tuple) -> None:
        version, shape, dtype, fortran, content = state
        if version != 1 or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError("an array in it has no shape")
        self.values = np.frombuffer(content, dtype.code).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: None, shape: tuple, code: bytes) -> _Array:
    if (shape, code) != ((0,), b"b"):
        raise ValueError("an array in it begins oddly")
    return _Array()


def _from_buffer(content: bytes, dtype: _Dtype, shape: tuple, order: str, axes: None = None) -> _Array:
    array = _Array()
    array.set_state((1, shape, dtype, order == "F", content))
    return array


def read_pickle(path: Path) -> dict:
    """The dict in a batch file, parsed without executing it. ValueError, naming the file: anything else."""

    encoded = {}  # as large as the file at most, however often it says the same

    def encode(text: str, codec: str) -> bytes:  # how Python 3 writes bytes in protocol 2
        if type(text) is not str or codec != "latin1":
            raise ValueError("bytes in it are not written as Python does")
        if text not in encoded:
            encoded[text] = text.encode("latin-1")
        return encoded[text]

    names = {"_codecs encode": encode, "numpy ndarray": None, "numpy dtype": _Dtype}
    for core in ("numpy.core", "numpy._core"):  # numpy renamed it
        names[f"{core}.multiarray _reconstruct"] = _reconstruct
        names[f"{core}.numeric _frombuffer"] = _from_buffer
    pickled = path.read_bytes()
    try:
        content = parse_pickle(pickled, names)
    except Exception as error:  # a broken pickle raises anything, from IndexError to MemoryError
        raise ValueError(f"{path}: not a CIFAR file ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__.strip('_')}, expected a dict")
    return content


def read_batch(path: Path, label_key: bytes, num_classes: int) -> tuple[Tensor, Tensor]:
    """One batch file -> images uint8 (N, 3, 32, 32), labels int64 (N,). ValueError, naming the file and the fault."""
    content = read_pickle(path)
    for key in (b"data", label_key):
        if key not in content:
            raise ValueError(f"{path}: has no {key.decode()!r}, expected 'data' and {label_key.decode()!r}")
    data, labels = content[b"data"], content[label_key]
    if isinstance(data, _Array):
        data = data.values
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: 'data' is {found}, expected uint8 (rows, 3072)")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: {label_key.decode()!r} is not a list of integers")
    if len(labels) != len(data) or not labels:
        raise ValueError(f"{path}: {len(data)} rows of data and {len(labels)} labels, expected as many, and not none")
    if min(labels) < 0 or max(labels) >= num_classes:
        raise ValueError(f"{path}: labels from {min(labels)} to {max(labels)}, expected 0 to {num_classes - 1}")
    return torch.from_numpy(data.copy()).view(-1, 3, 32, 32), torch.tensor(labels)


def load_cifar(name: str, data_dir: Path) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """(train, test, class names) of CIFAR-10 or -100 in the official python layout, downloaded if it is not there."""
    facts, source = CIFAR[name], CIFAR[name].source
    folder = data_dir / source.base_folder
    if not folder.is_dir():
        download(source, data_dir)
    train, test = ([folder / file for file, _ in files] for files in (source.train_list, source.test_list))
    meta, key = folder / source.meta["filename"], source.meta["key"]
    for file in (*train, *test, meta):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: complete the folder, or remove it to download it")
    sets = []
    for files in (train, test):
        batches = [read_batch(file, facts.label_key, facts.num_classes) for file in files]
        images, labels = (torch.cat(parts) for parts in zip(*batches))
        sets.append(ImageSet(images, labels))
    names = read_pickle(meta).get(key.encode())
    if not isinstance(names, list) or len(names) != facts.num_classes or not all(type(n) is bytes for n in names):
        raise ValueError(f"{meta}: {key!r} is not {facts.num_classes} names")
    return *sets, tuple(n.decode(errors="replace") for n in names)


def download(source: type[CIFAR10], data_dir: Path) -> None:
    """Its archive, with the right MD5, unpacked into data_dir. FileNotFoundError, with a way out: it does not work."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # a silent server must not hang the run
    try:
        download_and_extract_archive(source.url, data_dir, md5=source.tgz_md5)
    except Exception as error:  # whatever went wrong, the way out is the same
        raise FileNotFoundError(
            f"{data_dir / source.base_folder} is not there and its download failed ({error}): unpack {source.url} "
            f"into {data_dir}, or train on --dataset shapes, which needs no files"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


# ---------------------------------------------------------------------------------------------------- image files

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 64 * 2**20
MAX_SIDE = 2**14  # of what a network is given


class ImageFileError(ValueError):
    """A file that cannot be read as an image; one line.

    A DataLoader's worker hands an exception on with its traceback as the message: of that, the last line.
    """

    def __str__(self) -> str:
        return super().__str__().rstrip().rpartition("\n")[2].rpartition("ImageFileError: ")[2]


def read_image(path: str | Path) -> Tensor:
    """An image file as its viewer shows it: uint8 RGB (3, H, W). ImageFileError, naming the file: it cannot.

    The first frame of an animation, turned as EXIF says; 12- and 16-bit grey is scaled to 8 bits; transparent
    pixels lie on white; CMYK, palettes and other colours become RGB by Pillow's formulas, without colour profiles.
    Refused: formats other than IMAGE_FORMATS, more than MAX_PIXELS, floating point and 32-bit values, which have no
    agreed white.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("not a file")  # a pipe would be waited for
        # Broken metadata does not warn, nor does it refuse what can be decoded in spite of it.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # before the decoder asks for the memory
                raise ValueError(f"{image.width} x {image.height} pixels, expected at most {MAX_PIXELS} in all")
            deep = image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I")
            key = image.info.get("transparency")  # of a grey PNG: the value that is transparent, as in the file
            if isinstance(key, int) and image.mode == "L":
                image.info["transparency"] = key * {"L;2": 85, "L;4": 17}.get(image.tile[0].args, 1)
            if isinstance(key, tuple) and image.tile[0].args == "RGB;16B":  # Pillow keeps the upper bits
                image.info["transparency"] = tuple(value >> 8 for value in key)
            tags = getattr(image, "tag_v2", {})  # a TIFF's: 258 is the number of bits, and where 262 is 0, so is white
            top, negative = 4095 if tags.get(258) == (12,) else 65535, tags.get(262) == 0
            image.filename = ""  # else Pillow maps a TIFF into memory, by the sides that it has once it is turned
            image.load()  # a decoder's error is raised once: whoever calls it again gets the rows before the damage
            with contextlib.suppress(Exception):
                image = ImageOps.exif_transpose(image)
            if deep:
                values = np.asarray(image).astype(np.uint16)
                grey = (values * (255 / top)).round().astype(np.uint8)
                image = Image.fromarray(255 - grey if negative else grey)
                if isinstance(key, int):
                    image.putalpha(Image.fromarray(values != key))
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of Pillow's mode {image.mode}, expected 8 or 16 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return TF.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # decoders raise many kinds for damaged files
        name = str(path).replace("\n", "\\n")
        raise ImageFileError(f"{name}: cannot be read as an image ({one_line(error)})") from None


def image_fault(path: str | Path) -> str | None:
    """Why a file cannot be read as an image, in one line that names it; None: it can."""
    try:
        read_image(path)
    except ImageFileError as error:
        return str(error)


# ------------------------------------------------------------------------------------------------ folders of images


def list_images(folder: Path) -> dict[str, list[str]]:
    """{class: its files} of folder/<class>/**, both sorted; whatever has a name that begins with a dot is left out.

    OSError or ValueError, naming the folder: not there or not readable, fewer than two classes, a class without images.
    """

    def refuse(error: OSError) -> None:  # os.walk would pass over what it cannot read
        raise error

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: expected a folder of images for each class in it")
    classes = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not entry.exists():
            raise FileNotFoundError(f"{entry}: a link to what is not there; mend or remove it")
        if not entry.is_dir():
            continue
        files = []
        for path, folders, names in os.walk(entry, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            names = [name for name in names if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES]
            files += [os.path.join(path, name) for name in names]
        if not files:
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise ValueError(f"{entry}: no images in it, expected {suffixes}; fill it, or remove the class everywhere")
        classes[entry.name] = sorted(files)
    if len(classes) < 2:
        raise ValueError(f"{folder}: {len(classes)} folders in it, expected one for each of two classes or more")
    return classes


def load_folder(root: Path, val_fraction: float, seed: int, size: int, ratio: float) -> Data:
    """root/train/<class>/**, the same in root/val or else a part of train, and in root/test, or else an empty set.

    OSError or ValueError, naming the folder: a fault that list_images finds, or other classes than train's.
    """
    found = {"train": list_images(root / "train"), "val": {}, "test": {}}
    classes = tuple(found["train"])
    for split in ("val", "test"):
        if not os.path.lexists(root / split):
            continue
        found[split] = list_images(root / split)
        faults = {"missing": set(classes) - set(found[split]), "unknown": set(found[split]) - set(classes)}
        if any(faults.values()):
            text = "; ".join(f"{fault}: {', '.join(sorted(names))}" for fault, names in faults.items() if names)
            raise ValueError(f"{root / split}: its classes are not those of {root / 'train'} ({text})")
    sets = {}
    for split, files in found.items():
        labels = [label for label, name in enumerate(files) for _ in files[name]]
        paths = [path for name in files for path in files[name]]
        sets[split] = FolderSet(root, paths, torch.tensor(labels, dtype=torch.int64), size, ratio, seed)
    if not found["val"]:
        single = [name for name, files in found["train"].items() if len(files) == 1]
        if val_fraction and single:
            raise ValueError(
                f"{root / 'train' / single[0]}: one image in it, expected at least 2, to keep one for validation; "
                f"or {root / 'val'}, or --val-fraction 0"
            )
        sets["train"], sets["val"] = map(
            sets["train"].subset, stratified_split(sets["train"].labels, val_fraction, seed)
        )
    return Data(**sets, classes=classes, mean=IMAGENET_MEAN, std=IMAGENET_STD)


class FolderSet(ImageSet):
    """Files (N,) of images and labels int64 (N,): not in memory, an image is read and cropped when it is asked for.

    Its crop uint8 (3, size, size) is `centre_crop`'s while `epoch` is None. In an epoch it is a random part of the
    image that follows from (seed, epoch, index) alone, whichever process reads it and whatever was read before.
    ImageFileError, naming the file: it cannot be read.
    """

    def __init__(self, root: Path, files: list[str], labels: Tensor, size: int, ratio: float, seed: int) -> None:
        self.root = root
        self.files = files
        self.labels = labels
        self.size = size
        self.ratio = ratio
        self.seed = seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        try:
            image = read_image(self.files[index])
        except ImageFileError as error:
            check = f"python data.py --dataset folder --data-dir {shlex.quote(str(self.root))} --check"
            raise ImageFileError(f"{error}; {check} lists all such files") from None
        if self.epoch is None:
            return centre_crop(image, self.size, self.ratio), self.labels[index]
        box = random_box(*image.shape[1:], seeded_generator(self.seed, self.epoch, index))
        return TF.resized_crop(image, *box, [self.size, self.size], antialias=True), self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(self[index] for index in indices))
        return torch.stack(images), torch.stack(labels)

    def subset(self, indices: Tensor) -> "FolderSet":
        files = [self.files[index] for index in indices.tolist()]
        return FolderSet(self.root, files, self.labels[indices], self.size, self.ratio, self.seed)


def centre_crop(image: Tensor, size: int, ratio: float = CENTRE_RATIO) -> Tensor:
    """uint8 (3, H, W), its short side resized to size / ratio, antialiased -> the centre (3, size, size)."""
    height, width = image.shape[1:]
    # A line of 1 x 10^6 pixels would grow to gigabytes: of what is longer than 8 squares, the middle.
    image = TF.center_crop(image, [min(height, 8 * width), min(width, 8 * height)])
    image = TF.resize(image, [round(size / ratio)], antialias=True)
    return TF.center_crop(image, [size, size])


def random_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part of an image: torchvision's RandomResizedCrop, draw for draw.

    8 to 100 % of the area at an aspect of 3/4 to 4/3, drawn anew up to ten times until it fits into the image; then
    the largest part from the middle that has such an aspect.
    """
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(0.08, 1, generator=generator).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).item())
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = (torch.randint(room + 1, (1,), generator=generator).item() for room in (height - h, width - w))
            return top, left, h, w
    h, w = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


# --------------------------------------------------------------------------------------------------------- shapes


def draw_shapes(count: int, seed: int) -> ImageSet:
    """`count` images uint8 (N, 3, 32, 32) of ten kinds of figures, equally many of each, from a seed.

    Each has a rotation, a size, a place, a colour and the background's, all drawn alike for every class, and noise:
    only the form tells the classes apart.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    angle = rng.uniform(0, 2 * np.pi, count)
    radius = rng.uniform(9, 13, count)
    centre = rng.uniform(-1, 1, (2, count)) * (15 - radius) + 16
    background = rng.uniform(0, 1, (count, 3))
    colour = rng.uniform(0, 1, (count, 3))
    near = np.abs(colour - background).max(1, keepdims=True) < 0.35  # too near to be seen: take the far side
    colour = np.where(near, (background + 0.5) % 1, colour)

    images = np.empty((count, 3, 32, 32), np.uint8)
    grid = (np.arange(64, dtype=np.float32) + 0.5) / 2  # two samples a pixel and axis, for smooth edges
    for label in range(len(SHAPES)):
        for index in np.array_split(np.flatnonzero(labels == label), 8):  # in parts: they fit the cache
            x, y = ((grid - c[index, None]).astype(np.float32) for c in centre)
            x, y = x[:, None, :], y[:, :, None]
            cos, sin = ((f(angle) / radius)[index, None, None].astype(np.float32) for f in (np.cos, np.sin))
            inside = inside_figure(SHAPES[label], cos * x + sin * y, cos * y - sin * x)  # (n, 64, 64)
            cover = inside.reshape(-1, 32, 2, 32, 2).mean((2, 4), dtype=np.float32)[:, None]
            image = background[index, :, None, None] * (1 - cover) + colour[index, :, None, None] * cover
            noise = rng.standard_normal(image.shape, np.float32) * 0.06
            images[index] = np.clip((image + noise) * 255, 0, 255).round()
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))


def inside_figure(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where points (x, y) lie in the figure, which lies in the unit circle."""
    ax, ay = np.abs(x), np.abs(y)
    if shape in ("disc", "ring", "half disc", "crescent"):
        r2 = x * x + y * y
        disc = r2 < 0.9
        return {
            "disc": disc,
            "ring": disc & (r2 > 0.3),
            "half disc": disc & (y > 0),
            "crescent": disc & ((x - 0.5) ** 2 + y * y > 0.6),
        }[shape]
    if shape == "triangle":
        return (y > -0.5) & (0.866 * ax + 0.5 * y < 0.5)
    if shape == "square":
        return np.maximum(ax, ay) < 0.7
    if shape == "bar":
        return (ax < 0.95) & (ay < 0.3)
    if shape == "cross":
        return (np.maximum(ax, ay) < 0.95) & (np.minimum(ax, ay) < 0.25)
    if shape == "corner":
        return (np.maximum(ax, ay) < 0.7) & (np.minimum(x, y) < -0.2)
    sector = np.pi / 5  # star: the points of a fifth are mirrored into one edge, from tip (1, 0) to notch (0.4, sector)
    angle = np.abs(np.mod(np.arctan2(y, x), 2 * sector) - sector)
    u, v = np.hypot(x, y) * np.cos(sector - angle), np.hypot(x, y) * np.sin(sector - angle)
    notch = 0.4 * np.cos(sector), 0.4 * np.sin(sector)
    return (u - 1) * notch[1] + v * (1 - notch[0]) < 0


# ------------------------------------------------------------------------------------------------- order, randomness


class EpochBatches:
    """One epoch's batches of indices in an order that follows from (seed, epoch) alone; a DataLoader's batch_sampler.

    A global batch is cut into `accum_steps` micro-batches. What does not fill a global batch is left out, anew each
    epoch. `seek` chooses the epoch and the micro-batch to start at. ValueError: not one global batch in `length`.
    """

    def __init__(self, length: int, batch_size: int, accum_steps: int = 1, seed: int = 0) -> None:
        if batch_size > length:
            raise ValueError(f"batch-size={batch_size}: expected at most {length}, the number of training images")
        self.length = length
        self.batch_size = batch_size // accum_steps  # of a micro-batch: Accelerate reads it
        self.batches = length // batch_size * accum_steps
        self.seed = seed
        self.seek(0)

    def seek(self, epoch: int, start: int = 0) -> None:
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return self.batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.length, generator=seeded_generator(self.seed, self.epoch)).tolist()
        for i in range(self.start, self.batches):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]


def seeded_generator(*entropy: int) -> torch.Generator:
    """A CPU generator that depends on all the numbers, e.g. (seed, epoch, step, shard), and on how many they are.

    Distinct for numbers below 2**32: a larger one counts as two.
    """
    sequence = np.random.SeedSequence((len(entropy), *entropy))  # by itself it takes (1, 2) and (1, 2, 0, 0) as equal
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


# ----------------------------------------------------------------------------------------------------- augmentation
# Each takes float images (N, 3, H, W) in [0, 1], CutMix their labels, too, and a CPU generator: the same draws on every
# device.

Transform = Callable[[Tensor, torch.Generator], Tensor]


def crop_and_resize(images: Tensor, top: Tensor, left: Tensor, side: Tensor, size: int) -> Tensor:
    """A square box of each image, resized bilinearly with antialiasing: (N, C, H, W) -> (N, C, size, size).

    top, left and side (N,) are whole pixels and the boxes lie inside the images. The values are those of torchvision's
    resized_crop(..., antialias=True) on each image. Bilinear resizing is linear and separable, so an image's crop is
    rows @ (image @ columns^T) with two small matrices: whole batches are two matrix products.
    """
    n, channels, height, width = images.shape

    def weights(start: Tensor, length: int) -> Tensor:  # (N, size, length)
        scale = (side / size)[:, None]
        reach = scale.clamp(min=1)  # of a triangle to each side of its centre
        pixels = torch.arange(length, device=images.device) + 0.5 - start[:, None]  # centres, from the box's edge
        outside = (pixels < 0) | (pixels > side[:, None])  # only the box counts, as if cut out first
        pixels = (pixels / reach).masked_fill(outside, torch.inf)
        centres = (torch.arange(size, device=images.device) + 0.5) * scale / reach
        triangle = (1 - (pixels[:, None] - centres[:, :, None]).abs_()).clamp_(min=0)
        return triangle.div_(triangle.sum(-1, keepdim=True))

    top, left, side = (t.to(images.device, images.dtype, non_blocking=True) for t in (top, left, side))
    columns = images.reshape(n, channels * height, width) @ weights(left, width).mT  # (N, C * H, size)
    return weights(top, height)[:, None] @ columns.view(n, channels, height, size)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random square of `scale` of the image's area, resized to (size, size): torchvision's, with aspect 1."""

    size: int
    scale: tuple[float, float] = (0.5, 1.0)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        area, y, x = torch.rand(3, n, generator=generator)
        area = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
        side = area.sqrt().round().clamp(1, min(height, width))
        return crop_and_resize(images, (y * (height - side + 1)).floor(), (x * (width - side + 1)).floor(), side,
                               self.size)


@dataclass(frozen=True)
class RandomCrop:
    """The image moved by up to `padding` pixels along each axis, black moving in: torchvision's RandomCrop(padding)."""

    padding: int = 4

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        shift = torch.randint(2 * self.padding + 1, (2, n, 1), generator=generator)
        shift = shift.to(images.device, non_blocking=True)
        padded = torch.nn.functional.pad(images, [self.padding] * 4)
        rows = shift[0] + torch.arange(height, device=images.device)  # (N, H)
        columns = shift[1] + torch.arange(width, device=images.device)  # (N, W)
        sample = torch.arange(n, device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Each image mirrored left to right with probability p."""

    p: float = 0.5

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        flip = (torch.rand(len(images), generator=generator) < self.p).to(images.device, non_blocking=True)
        return torch.where(flip[:, None, None, None], images.flip(-1), images)


@dataclass(frozen=True)
class Cutout:
    """A grey square of `side` pixels on each image, centred on any of its pixels: DeVries and Taylor 2017, section 3.2.

    What reaches over the edge is lost, so some images keep nearly all of their pixels.
    """

    side: int

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape

        def inside(size: int) -> Tensor:  # (N, size): rows or columns of the square
            centre = torch.randint(size, (n, 1), generator=generator).to(images.device, non_blocking=True)
            offset = torch.arange(size, device=images.device) - centre + self.side // 2
            return (offset >= 0) & (offset < self.side)

        rows, columns = inside(height), inside(width)
        return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.5)


@dataclass(frozen=True)
class CutMix:
    """With probability p a box of an image is replaced by another image's, and so is that part of its label.

    Yun et al. 2019, arXiv 1905.04899, but drawn for each image by itself: image i is mixed with image N - 1 - i. The
    box has the image's aspect ratio, an area drawn evenly from 0 to the whole, and any point for its centre; what
    reaches over the edge is lost. images (N, 3, H, W), labels (N,) -> images, and (N, classes) the part of the pixels
    that comes from an image of each class.
    """

    classes: int
    p: float = 0.5

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n, _, height, width = images.shape
        area, y, x, chance = torch.rand(4, n, 1, generator=generator).to(images.device, non_blocking=True)
        side = area.sqrt() * (chance < self.p)  # of the box, as a part of the image's

        def inside(size: int, centre: Tensor) -> Tensor:  # (N, size): rows or columns of the box
            pixels = (torch.arange(size, device=images.device) + 0.5) / size
            return (pixels - centre).abs() < side / 2

        box = inside(height, y)[:, :, None] & inside(width, x)[:, None, :]
        own = torch.nn.functional.one_hot(labels, self.classes)
        part = box.float().mean((1, 2))[:, None]
        return torch.where(box[:, None], images.flip(0), images), own * (1 - part) + own.flip(0) * part


class FancyPCA:
    """AlexNet's colour augmentation (Krizhevsky et al. 2012, section 4.1), with probability p an image.

    Adds sum_i p_i * alpha_i * lambda_i to every pixel of an image, alpha_i ~ N(0, std) drawn once an image, lambda_i
    and p_i the eigenvalues (not their square roots) and eigenvectors of the 3 x 3 covariance of the training set's RGB
    values in [0, 1]. The sum is not clipped. eigenvalues (3,), eigenvectors (3, 3) with p_i as column i.

    Takes a batch (N, 3, H, W) with one draw an image, or one image (3, H, W).
    """

    def __init__(self, eigenvalues: Sequence, eigenvectors: Sequence, std: float = 0.1, p: float = 0.5) -> None:
        self.eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float32)
        self.eigenvectors = torch.as_tensor(eigenvectors, dtype=torch.float32)
        self.std = std
        self.p = p

    @classmethod
    def fit(cls, images: Tensor, std: float = 0.1, p: float = 0.5) -> "FancyPCA":
        """From the pixels of a training set, uint8 (N, 3, H, W); eigenvalues from high to low."""
        eigenvalues, eigenvectors = torch.linalg.eigh(pixel_moments(images)[1])
        return cls(eigenvalues.flip(0), eigenvectors.flip(1), std, p)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        n = len(images) if images.ndim == 4 else 1
        alpha = torch.randn(n, 3, generator=generator) * self.std
        apply = torch.rand(n, 1, generator=generator) < self.p
        shift = (apply * alpha * self.eigenvalues) @ self.eigenvectors.T  # (N, 3)
        shift = shift.view(*images.shape[:-3], 3, 1, 1)
        return images + shift.to(images.device, images.dtype, non_blocking=True)


class BatchTransform:
    """uint8 (N, 3, H, W) -> [0, 1] -> the transforms, in order -> (x - mean) / std, float32 (N, 3, H', W').

    It works where the images are, with numbers drawn on the CPU, and asks a GPU for no values.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], transforms: Sequence[Transform] = ()) -> None:
        self.mean_std = torch.tensor([list(mean), list(std)]).view(2, 3, 1, 1)
        self.transforms = transforms

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        images = TF.to_dtype(images, torch.float32, scale=True)
        for transform in self.transforms:
            images = transform(images, generator)
        self.mean_std = self.mean_std.to(images.device)  # at the first batch
        mean, std = self.mean_std
        return images.sub_(mean).div_(std)


AUGMENTS = ("slides", "standard", "cutout", "cutmix", "none")


def train_transforms(augment: str, train: ImageSet) -> list[Transform]:
    """`slides`: random resized crop, flip, Fancy PCA fitted on train. `standard`: padded crop and flip. `cutout`: these
    and a grey square of three eighths of the side, 12 of 32 pixels. `cutmix`: those of `standard`, before
    `train_mix`'s. `none`.

    A FolderSet has cropped its images already: `slides` is flip and ImageNet's PCA, `standard` and `cutmix` the flip,
    `cutout` the flip and the square.
    """
    folder = isinstance(train, FolderSet)
    size = train.size if folder else train.images.shape[-1]
    if augment == "slides" and folder:
        return [RandomHorizontalFlip(), FancyPCA(IMAGENET_EIGENVALUES, IMAGENET_EIGENVECTORS)]
    if augment == "slides":
        return [RandomResizedCrop(size), RandomHorizontalFlip(), FancyPCA.fit(train.images)]
    if augment == "cutout":
        return [*train_transforms("standard", train), Cutout(3 * size // 8)]
    if augment in ("standard", "cutmix"):
        return [RandomHorizontalFlip()] if folder else [RandomCrop(), RandomHorizontalFlip()]
    if augment == "none":
        return []
    raise ValueError(f"augment={augment!r}: expected one of {', '.join(AUGMENTS)}")


def train_mix(augment: str, classes: int) -> CutMix | None:
    """What comes after the transforms, with their generator, and changes the labels, too."""
    return CutMix(classes) if augment == "cutmix" else None


def pixel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (3,) and covariance (3, 3), float64, of the RGB values in [0, 1] of uint8 images (N, 3, H, W)."""
    count, total, products = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for chunk in images.split(100):  # in parts: they fit the cache
        x = chunk.transpose(0, 1).reshape(3, -1).double() / 255
        count += x.shape[1]
        total += x.sum(1)
        products += x @ x.T
    mean = total / count
    return mean, products / count - mean[:, None] * mean


def pixel_mean_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel in [0, 1] of uint8 images (N, 3, H, W)."""
    mean, covariance = pixel_moments(images)
    return tuple(mean.tolist()), tuple(covariance.diagonal().sqrt().tolist())


# ----------------------------------------------------------------------------------------------------- what it shows


def first_augmented(data: Data, augment: str, seed: int = 0) -> Tensor:
    """The first 64 training images, or all, as epoch 0 may show them to a model: float (N, 3, H, W) in [0, 1]."""
    data.train.epoch = None if augment == "none" else 0
    images, labels = data.train.__getitems__(list(range(min(64, len(data.train)))))
    transform = BatchTransform((0, 0, 0), (1, 1, 1), train_transforms(augment, data.train))
    generator = seeded_generator(seed)
    images = transform(images, generator)
    if mix := train_mix(augment, len(data.classes)):
        images, _ = mix(images, labels, generator)
    return images.clamp(0, 1)


def draw_grid(data: Data, augment: str) -> Image.Image:
    """The first 64 training images with their class names: on the left as in validation, on the right augmented."""
    n = min(64, len(data.train))
    images, labels = data.train.__getitems__(list(range(n)))
    halves = images, (first_augmented(data, augment) * 255).round().byte()
    side, line = max(64, images.shape[-1]), 14
    width, height = 8 * (side + 8), math.ceil(n / 8) * (side + line + 4)
    picture = Image.new("RGB", (2 * width + 24, height + 24), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=10)
    for half, title in enumerate(("as in validation", "augmented")):
        x0 = half * (width + 24) + 4
        draw.text((x0, 4), title, "black", ImageFont.load_default(size=14))
        for i, (image, label) in enumerate(zip(halves[half], labels.tolist())):
            x, y = x0 + i % 8 * (side + 8), 24 + i // 8 * (side + line + 4)
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(tile, (x, y))
            draw.text((x, y + side), data.classes[label][:12], "black", font)
    return picture


def time_augmentation(data: Data, rounds: int = 30) -> tuple[float, float]:
    """Images/s on one thread of `slides` on whole batches of 256, and of torchvision v2 image by image without the PCA.

    Medians of the rounds; each round does one batch both ways. The first, which warms up, does not count.
    """
    images = data.train.images[:256]
    batches = BatchTransform(data.mean, data.std, train_transforms("slides", data.train))
    single = v2.Compose([
        v2.RandomResizedCrop(images.shape[-1], scale=(0.5, 1.0), ratio=(1.0, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(data.mean, data.std),
    ])  # fmt: skip
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(rounds + 1):
        start = time.perf_counter()
        batches(images)
        middle = time.perf_counter()
        torch.stack([single(image) for image in images])
        seconds.append((middle - start, time.perf_counter() - middle))
    torch.set_num_threads(threads)
    return tuple((len(images) / np.median(seconds[1:], axis=0)).tolist())


def print_stats(dataset: str, data: Data) -> None:
    """Counts, and the constants of normalisation and Fancy PCA: the training pixels' own, for a folder ImageNet's."""
    folder = dataset == "folder"
    mean, std = (data.mean, data.std) if folder else pixel_mean_std(data.train.images)
    pca = train_transforms("slides", data.train)[-1]
    sets = {"training": data.train, "validation": data.val, "test": data.test}
    sizes = " and ".join(f"{len(images)} {name}" for name, images in sets.items() if len(images))
    counts = data.train.labels.bincount(minlength=len(data.classes)).tolist()
    print(f"{dataset}: {sizes} images, {len(data.classes)} classes")
    print(f"images a class  {min(counts)} to {max(counts)}")
    for label, name in enumerate(data.classes):
        print(f"  {counts[label]:>7}  {name:.70}")
    if folder:
        print("of ImageNet, as training uses them:")
    print("mean            " + "  ".join(f"{v:7.4f}" for v in mean))
    print("std             " + "  ".join(f"{v:7.4f}" for v in std))
    for value, vector in zip(pca.eigenvalues.tolist(), pca.eigenvectors.T.tolist()):
        print(f"eigenvalue {value:.4f}, eigenvector " + "  ".join(f"{v:7.4f}" for v in vector))


def print_faults(data: Data) -> int:
    """A line for each file of a folder that cannot be read, then the counts; returns how many they are."""
    files = [file for images in (data.train, data.val, data.test) for file in images.files]
    faults = 0
    try:
        with ProcessPoolExecutor() as pool:
            for fault in filter(None, pool.map(image_fault, files, chunksize=16)):
                print(fault, flush=True)
                faults += 1
    except BrokenProcessPool:
        sys.exit("data.py: a process that reads images died, perhaps for lack of memory: free some and try again")
    print(f"{len(files)} images, {faults} of them cannot be read")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description="Look at a dataset.")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10")
    parser.add_argument(
        "--data-dir", type=os.path.expanduser, default="data", help="where the files are (default: %(default)s)"
    )
    parser.add_argument("--augment", choices=AUGMENTS, default="slides", help="for --grid")
    parser.add_argument("--grid", metavar="PNG", help="write the first 64 images, raw and augmented")
    parser.add_argument("--stats", action="store_true", help="print mean, std and principal components of the pixels")
    parser.add_argument("--time", action="store_true", help="print images/s of the `slides` augmentation")
    parser.add_argument("--check", action="store_true", help="read all images of a folder, list those that cannot be")
    args = parser.parse_args()
    if not (args.grid or args.stats or args.time or args.check):
        parser.error("nothing to do: give --grid PNG, --stats, --time or --check")
    if args.grid and not args.grid.lower().endswith(".png"):
        parser.error(f"--grid {args.grid}: expected a name that ends in .png")
    if args.time and args.dataset == "folder":
        parser.error("--time: measures images in memory; take another --dataset")
    if args.check and args.dataset != "folder":
        parser.error("--check: reads image files; take --dataset folder")
    try:
        data = load_data(args.dataset, args.data_dir, val_fraction=0)
        if args.grid:
            draw_grid(data, args.augment).save(args.grid)
            print(f"{args.grid}: the first {min(64, len(data.train))} of {len(data.train)} training images")
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    if args.stats:
        print_stats(args.dataset, data)
    if args.time:
        batches, single = time_augmentation(data)
        print(f"augmentation on one thread, images/s: whole batches {batches:,.0f}, torchvision image by image "
              f"{single:,.0f}, ratio {batches / single:.1f}")
    if args.check:
        sys.exit(1 if print_faults(data) else 0)


if __name__ == "__main__":
    with reader_may_leave():
        main()
