"""The data against files written here, numpy formulas, and torchvision image by image."""

import itertools
import os
import pickle
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import start_python
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

import data
from data import (
    BatchTransform,
    CutMix,
    Cutout,
    EpochBatches,
    FancyPCA,
    ImageSet,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    crop_and_resize,
    draw_shapes,
    load_data,
    read_batch,
    seeded_generator,
    stratified_split,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def random_images(n, height=32, width=32, seed=0):
    """uint8 images whose channels are correlated and unlike each other."""
    mixture = np.array([[0.6, 0.3, 0.0], [0.2, 0.3, 0.2], [0.3, 0.0, 0.6]])
    independent = np.random.default_rng(seed).random((n, 3, height, width))
    return torch.from_numpy((255 * np.einsum("ij,njhw->nihw", mixture, independent)).astype(np.uint8))


def as_set(images):
    return ImageSet(images, torch.zeros(len(images), dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------------- CIFAR files


class Python2Pickler(pickle._Pickler):
    """Writes str and bytes as Python 2 wrote its str."""

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}


def write_as_python2(path, content):
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))


def write_as_protocol(protocol):
    return lambda path, content: path.write_bytes(pickle.dumps(content, protocol=protocol))


LAYOUT = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta",
                b"labels", b"label_names", 10),
    "cifar100": ("cifar-100-python", ["train"], "test", "meta", b"fine_labels", b"fine_label_names", 100),
}  # fmt: skip


def write_cifar(root, name, write):
    """A small CIFAR; returns the arrays of (training images, training labels, test images, test labels), names."""
    directory, train_files, test_file, meta, label_key, names_key, classes = LAYOUT[name]
    folder = root / directory
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, labels = {}, {}
    for i, file in enumerate([*train_files, test_file]):
        rows = rng.integers(0, 256, (4 + i, 3072), dtype=np.uint8)
        images[file] = rows.reshape(-1, 3, 32, 32)
        labels[file] = [0, classes - 1, *rng.integers(classes, size=2 + i).tolist()]
        content = {b"batch_label": b"x", label_key: labels[file], b"data": rows, b"filenames": [b"a.png"] * len(rows)}
        write(folder / file, content)
    names = [f"name {i}" for i in range(classes)]
    write(folder / meta, {names_key: [n.encode() for n in names], b"num_vis": 3072})
    train = [np.concatenate([part[file] for file in train_files]) for part in (images, labels)]
    return *train, images[test_file], labels[test_file], names


@pytest.mark.parametrize("name", LAYOUT)
@pytest.mark.parametrize("form", ["python 2", 2, 3, 4, 5])
def test_cifar_files_are_read(tmp_path, monkeypatch, name, form):
    for old_name in ("numpy.core", "numpy.core.multiarray"):  # a later numpy may not have them
        monkeypatch.setitem(sys.modules, old_name, None)
    write = write_as_python2 if form == "python 2" else write_as_protocol(form)
    train_images, train_labels, test_images, test_labels, names = write_cifar(tmp_path, name, write)
    module = b"numpy.core.multiarray" if form == "python 2" else b"numpy._core."
    assert module in (tmp_path / LAYOUT[name][0] / LAYOUT[name][2]).read_bytes()

    loaded = load_data(name, tmp_path, val_fraction=0)
    assert loaded.train.images.dtype == loaded.test.images.dtype == torch.uint8
    assert loaded.train.labels.dtype == torch.int64
    np.testing.assert_array_equal(loaded.train.images, train_images)
    np.testing.assert_array_equal(loaded.train.labels, train_labels)
    np.testing.assert_array_equal(loaded.test.images, test_images)
    np.testing.assert_array_equal(loaded.test.labels, test_labels)
    assert loaded.classes == tuple(names) and len(loaded.val) == 0


GOOD = {b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 4, 9]}


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(("function", "code"), [(os.system, "touch '{}'"), (eval, "open('{}', 'w').close()")])
def test_a_file_that_runs_code_is_refused(tmp_path, function, code, protocol):
    path, canary = tmp_path / "data_batch_1", tmp_path / "canary"
    content = GOOD | {b"filenames": Call(function, code.format(canary))}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError) as error:
        read_batch(path, b"labels", 10)
    assert str(path) in str(error.value) and f".{function.__name__}, " in str(error.value)
    assert not canary.exists()
    pickle.loads(path.read_bytes())
    assert canary.exists()  # it would have run


@pytest.mark.parametrize(
    ("module", "name"),
    [("numpy", "load"), ("numpy", "ndarray.tofile"), ("numpy.core.multiarray", "fromfile"), ("_codecs", "decode"),
     ("builtins", "getattr"), ("numpy._core.numeric", "_frombuffer.__globals__"), ("subprocess", "Popen")],
)  # fmt: skip
def test_other_names_are_refused(tmp_path, module, name):
    path = tmp_path / "data_batch_1"
    strings = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name))
    path.write_bytes(b"\x80\x04" + strings + b"\x93.")  # STACK_GLOBAL
    with pytest.raises(ValueError) as error:
        read_batch(path, b"labels", 10)
    assert str(path) in str(error.value) and f"{module}.{name}" in str(error.value)


def pickled(value):
    """As a part of a pickle of protocol 4."""
    return pickle.dumps(value, protocol=2)[2:-1]


# 60 tuples, each of twice the one before.
DOUBLED = b")q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60))
LATIN = b"X\x06\x00\x00\x00latin1"
# Each crashes Python's unpickler with numpy's functions, or keeps it busy for ever, or takes gigabytes, in less than a
# megabyte or two; and why it is refused.
BOMBS = {
    "a deep key": (b"})" + b"\x85" * 300_000 + b"K\x01s.", "a key in it is a tuple"),
    "a key that doubles": (b"}" + DOUBLED + b"K\x01s.", "a key in it is a tuple"),
    "a value that doubles": (b"}U\x04data" + DOUBLED + b"s.", "values and letters"),
    "a deep value": (b"}U\x04data)" + b"\x85" * 300_000 + b"s.", "32 deep"),
    "a name that doubles": (DOUBLED + b"\x8c\x01x\x93.", "can only concatenate tuple"),
    "a text that doubles": (b"c_codecs\nencode\n" + DOUBLED + LATIN + b"\x86R.", "not written as Python does"),
    "a full memo": (b"}r\xff\xff\xff\xff0", "a POP"),
    "a long": (b"}U\x04data\x8b\xff\xff\xff\x7f", "not enough data"),
    "an array of pointers": (b"}U\x04datacnumpy\nndarray\n" + pickled(((1,), "O", b"A" * 8)) + b"Rs.",
                             "not callable"),
    "a type that lies": (b"}U\x04datacnumpy\ndtype\n" + pickled(("V8",)) + b"R"
                         + pickled((3, "|", None, ("a",), {"a": (None, 0)}, 8, 1, 0)) + b"bs.", "is of 'V8'"),
    "a large array": (b"}U\x04datacnumpy\nndarray\n" + pickled(((2**40, 3072), "u1")) + b"Rs.", "not callable"),
    "many copies": (b"}U\x04data](c_codecs\nencode\nq\x00X\x00\x00\x10\x00" + b"A" * 2**20 + LATIN + b"\x86q\x01R"
                    + b"h\x00h\x01R" * 10_000 + b"es.", "values and letters"),
    "many codecs": (b"}U\x04data](c_codecs\nencode\nq\x00X\x00\x00\x08\x00" + b"A" * 2**19 + b"q\x01"
                    + b"".join(b"h\x00h\x01M%c%c\x86R" % divmod(i, 256)[::-1] for i in range(60_000)) + b"es.",
                    "not written as Python does"),
    "many arguments": (b"}U\x04data](cnumpy\ndtype\nq\x00(U\x02u1" + b"N" * 400_000 + b"tq\x01R"
                       + b"h\x00h\x01R" * 100_000 + b"es.", "odd arguments"),
}  # fmt: skip

READ_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from data import read_batch
pages = int(Path("/proc/self/statm").read_text().split()[0])
for limit, value in (resource.RLIMIT_AS, pages * resource.getpagesize() + 2**30), (resource.RLIMIT_CPU, 60):
    resource.setrlimit(limit, (value, value))
for path in sys.argv[1:]:
    try:
        read_batch(Path(path), b"labels", 10)
    except ValueError as error:
        print(error, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the memory that a process takes")
def test_a_small_file_can_neither_crash_nor_delay(tmp_path):
    """All files are refused in one process of a minute and a gigabyte at most."""
    paths = [tmp_path / case for case in BOMBS]
    for path in paths:
        path.write_bytes(b"\x80\x02" + BOMBS[path.name][0])
    process = start_python(1, "-c", READ_IN_LITTLE_MEMORY, *paths)
    lines = process.communicate(timeout=300)[0].splitlines()
    assert process.returncode == 0 and len(lines) == len(paths), lines[-1]
    for path, line in zip(paths, lines):
        assert line.startswith(f"{path}: not a CIFAR file (") and BOMBS[path.name][1] in line, line


BROKEN = {
    "no data": ({b"labels": [0, 4, 9]}, "'data'"),
    "no labels": ({b"data": GOOD[b"data"], b"fine_labels": [0, 4, 9]}, "'labels'"),
    "str keys": ({"data": GOOD[b"data"], "labels": [0, 4, 9]}, "'data'"),
    "float data": (GOOD | {b"data": np.zeros((3, 3072))}, "float64 (3, 3072)"),
    "narrow data": (GOOD | {b"data": np.zeros((3, 3071), np.uint8)}, "uint8 (3, 3071)"),
    "shaped data": (GOOD | {b"data": np.zeros((3, 3, 32, 32), np.uint8)}, "uint8 (3, 3, 32, 32)"),
    "list data": (GOOD | {b"data": [[0] * 3072]}, "'data' is list"),
    "array labels": (GOOD | {b"labels": np.array([0, 4, 9])}, "'labels'"),
    "float labels": (GOOD | {b"labels": [0, 4, 9.0]}, "'labels'"),
    "bool labels": (GOOD | {b"labels": [0, 4, True]}, "'labels'"),
    "too few labels": (GOOD | {b"labels": [0, 4]}, "3 rows of data and 2 labels"),
    "no rows": ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "0 rows"),
    "label too high": (GOOD | {b"labels": [0, 4, 10]}, "0 to 10"),
    "label too low": (GOOD | {b"labels": [-1, 4, 9]}, "-1 to 9"),
    "a list": ([GOOD], "list"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_batch_is_named(tmp_path, case):
    content, fragment = BROKEN[case]
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError) as error:
        read_batch(path, b"labels", 10)
    assert str(error.value).startswith(f"{path}: ") and fragment in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_file_is_named(tmp_path, length):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(GOOD, protocol=2)[:length])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_batch(path, b"labels", 10)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_missing_or_wrong_file_of_the_folder_is_named(tmp_path, file):
    write_cifar(tmp_path, "cifar10", write_as_protocol(2))
    path = tmp_path / "cifar-10-batches-py" / file
    path.write_bytes(pickle.dumps({b"label_names": [b"one"]}))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_data("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(OSError, match=re.escape(str(path))):
        load_data("cifar10", tmp_path)


@pytest.mark.parametrize("name", LAYOUT)
def test_no_files_and_no_network_leave_one_clear_line(tmp_path, monkeypatch, capsys, name):
    def unreachable(url, folder, md5):
        raise OSError("no route to host")

    monkeypatch.setattr(data, "download_and_extract_archive", unreachable)
    with pytest.raises(OSError) as error:
        load_data(name, tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(tmp_path / LAYOUT[name][0]), "no route to host", "https://www.cs.toronto", "--dataset shapes"):
        assert part in message

    monkeypatch.setattr(sys, "argv", ["data.py", "--dataset", name, "--data-dir", str(tmp_path), "--stats"])
    with pytest.raises(SystemExit) as stop:
        data.main()
    assert stop.value.code == f"data.py: {message}"  # a string: it goes to stderr and the status is 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ({"dataset": "mnist"}, ("dataset='mnist'", "cifar10, cifar100, shapes, folder")),
        ({"dataset": "shapes", "val_fraction": 1.0}, ("val-fraction=1.0", "< 1")),
        ({"dataset": "shapes", "val_fraction": -0.1}, ("val-fraction=-0.1", "0 <=")),
        ({"dataset": "shapes", "val_fraction": float("nan")}, ("val-fraction=nan", "0 <=")),
    ],
)
def test_wrong_arguments_of_load_data(arguments, fragments):
    with pytest.raises(ValueError) as error:
        load_data(**arguments)
    assert all(fragment in str(error.value) for fragment in fragments)


# -------------------------------------------------------------------------------------------------------- split, shapes


@pytest.mark.parametrize("fraction", [0, 0.1, 0.2, 0.5, 0.99])
def test_split_is_stratified(fraction):
    labels = torch.tensor([0] * 10 + [2] * 7 + [5] * 1 + [3] * 100)[torch.randperm(118, generator=seeded_generator(0))]
    train, val = stratified_split(labels, fraction, seed=1)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(118))
    for label, count in ((0, 10), (2, 7), (5, 1), (3, 100)):
        exact = min(max(fraction * count, fraction > 0), count - 1)  # at least one on each side
        assert abs((labels[val] == label).sum().item() - exact) <= 0.5
    again, other = (stratified_split(labels, fraction, seed=seed)[1] for seed in (1, 2))
    assert torch.equal(val, again) and (fraction == 0 or not torch.equal(val, other))


def test_load_data_splits_the_training_set(monkeypatch):
    monkeypatch.setattr(data, "SHAPES_TRAIN", 200)
    monkeypatch.setattr(data, "SHAPES_TEST", 30)
    split, whole = load_data("shapes", val_fraction=0.2, seed=3), load_data("shapes", val_fraction=0)
    assert (len(split.train), len(split.val), len(split.test)) == (160, 40, 30)
    assert split.val.labels.bincount().tolist() == [4] * 10
    joined = torch.cat([split.train.images, split.val.images]).flatten(1).float().mean(1).sort().values
    assert torch.equal(joined, whole.train.images.flatten(1).float().mean(1).sort().values)
    assert split.mean == whole.mean == data.pixel_mean_std(whole.train.images)[0]
    assert len(split.classes) == 10


def test_shapes_follow_from_the_seed():
    first, again, other = draw_shapes(120, seed=5), draw_shapes(120, seed=5), draw_shapes(120, seed=6)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images) and not torch.equal(first.labels, other.labels)
    assert first.images.dtype == torch.uint8 and first.images.shape == (120, 3, 32, 32)
    assert first.labels.bincount().tolist() == [12] * 10


def test_shapes_cannot_be_told_by_their_colour():
    train, test = draw_shapes(2000, seed=0), draw_shapes(1000, seed=1)
    colours, test_colours = (s.images.float().mean((2, 3)) for s in (train, test))
    means = torch.stack([colours[train.labels == label].mean(0) for label in range(10)])
    found = torch.cdist(test_colours, means).argmin(1)
    assert (found == test.labels).float().mean() < 0.16  # chance is 0.1, and 0.16 is six standard errors above
    deviation = (means - colours.mean(0)) / (colours.std(0) / 200**0.5)
    assert deviation.abs().max() < 4  # standard errors of a class's mean


def lens(r, s, d):
    """Common area of circles of radius r and s, their centres d apart."""
    a, b = np.arccos((d * d + r * r - s * s) / (2 * d * r)), np.arccos((d * d + s * s - r * r) / (2 * d * s))
    return r * r * (a - np.sin(2 * a) / 2) + s * s * (b - np.sin(2 * b) / 2)


AREAS = {
    "disc": np.pi * 0.9,
    "ring": np.pi * (0.9 - 0.3),
    "half disc": np.pi * 0.9 / 2,
    "crescent": np.pi * 0.9 - lens(0.9**0.5, 0.6**0.5, 0.5),
    "triangle": 3**0.5 * 0.75,  # sides of 3 ** 0.5
    "square": 1.4**2,
    "bar": 1.9 * 0.6,
    "cross": 2 * 1.9 * 0.5 - 0.5**2,
    "star": 5 * 0.4 * np.sin(np.pi / 5),  # ten triangles between the radii 1 and 0.4
    "corner": 1.4**2 - 0.9**2,
}


@pytest.mark.parametrize("shape", AREAS)
def test_figures_have_their_areas(shape):
    assert set(AREAS) == set(data.SHAPES)
    x, y = np.meshgrid(*[(np.arange(1000) + 0.5) / 500 - 1] * 2)
    inside = data.inside_figure(shape, x, y)
    assert inside.mean() * 4 == pytest.approx(AREAS[shape], rel=0.005)
    assert np.hypot(x, y)[inside].max() <= 1.001


# --------------------------------------------------------------------------------------------------------- order, seeds


@pytest.mark.parametrize("accum_steps", [1, 2, 4])
def test_an_epoch_visits_every_index_once_in_an_order_free_of_the_micro_batches(accum_steps):
    sampler = EpochBatches(103, 20, accum_steps, seed=7)
    left_out, orders = [], []
    for epoch in range(4):
        sampler.seek(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 5 * accum_steps
        assert {len(batch) for batch in batches} == {20 // accum_steps} == {sampler.batch_size}
        orders.append(list(itertools.chain(*batches)))
        assert len(set(orders[-1])) == 100 and set(orders[-1]) < set(range(103))
        left_out.append(tuple(sorted(set(range(103)) - set(orders[-1]))))
        whole = EpochBatches(103, 20, seed=7)
        whole.seek(epoch)
        assert orders[-1] == list(itertools.chain(*whole))
    assert len(set(left_out)) == 4 and len(set(map(tuple, orders))) == 4
    assert orders[0] != list(itertools.chain(*EpochBatches(103, 20, seed=8)))
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("start", [0, 1, 7, 10])
def test_seek_continues_inside_an_epoch(start):
    whole, continued = EpochBatches(103, 20, accum_steps=2, seed=7), EpochBatches(103, 20, accum_steps=2, seed=7)
    whole.seek(3)
    continued.seek(3, start)
    assert list(continued) == list(whole)[start:] and len(continued) == 10 - start


def test_a_batch_must_fit_the_dataset():
    assert len(EpochBatches(20, 20)) == 1
    with pytest.raises(ValueError, match=r"batch-size=21.*20"):
        EpochBatches(20, 21)


def test_a_data_loader_gives_whole_batches():
    images = ImageSet(random_images(50), torch.arange(50))
    loader = DataLoader(images, batch_sampler=EpochBatches(50, 16, seed=1), collate_fn=ImageSet.collate)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [16, 16, 16]
    for pixels, labels in batches:
        assert torch.equal(pixels, random_images(50)[labels])
    assert torch.equal(images[7][0], random_images(50)[7]) and images[7][1] == 7


ENTROPIES = [(0, 3, 4, 1), (1, 3, 4, 1), (0, 2, 4, 1), (0, 3, 5, 1), (0, 3, 4, 0), (3, 0, 4, 1), (0, 3), (0, 3, 0, 0)]


def test_the_same_numbers_give_the_same_pixels_and_others_do_not():
    images = random_images(8)
    transform = BatchTransform((0.5,) * 3, (0.25,) * 3, data.train_transforms("slides", as_set(images)))
    outputs = [transform(images, seeded_generator(*entropy)) for entropy in ENTROPIES]
    for i, entropy in enumerate(ENTROPIES):
        assert torch.equal(outputs[i], transform(images, seeded_generator(*entropy)))
        assert not any(torch.equal(outputs[i], outputs[j]) for j in range(i))


@pytest.mark.parametrize("augment", ["slides", "standard", "cutout"])
def test_every_image_of_a_batch_has_its_own_draws(augment):
    images = random_images(1).expand(100, -1, -1, -1)
    transform = BatchTransform((0, 0, 0), (1, 1, 1), data.train_transforms(augment, as_set(images)))
    assert len(transform(images, seeded_generator(0)).flatten(1).unique(dim=0)) > 60


@pytest.mark.parametrize("augment", ["slides", "standard", "cutout"])
def test_a_gpus_images_stay_there(augment):
    """A fake GPU knows shapes, types and devices, and refuses to tell values."""
    transforms = data.train_transforms(augment, as_set(random_images(8)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        output = BatchTransform((0, 0, 0), (1, 1, 1), transforms)(images, torch.Generator())
        mixed, targets = CutMix(10)(output, torch.zeros(4, dtype=torch.int64, device="cuda"), torch.Generator())
    for x, shape in ((output, images.shape), (mixed, images.shape), (targets, (4, 10))):
        assert (x.device.type, x.dtype, x.shape) == ("cuda", torch.float32, shape)


# ------------------------------------------------------------------------------------------------- geometric transforms


@pytest.mark.parametrize("size", [1, 20, 24, 32, 45])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (36, 33)])
def test_crop_and_resize_is_torchvisions(size, height, width):
    rng = np.random.default_rng(size)
    images = torch.from_numpy(rng.random((40, 3, height, width), dtype=np.float32))
    side = rng.integers(10, min(height, width) + 1, 40)
    top, left = (np.floor(rng.random(40) * (length - side + 1)).astype(int) for length in (height, width))
    found = crop_and_resize(images, *(torch.from_numpy(v) for v in (top, left, side)), size)
    assert found.shape == (40, 3, size, size)
    for image, output, t, le, s in zip(images, found, *(v.tolist() for v in (top, left, side))):
        expected = TF.resized_crop(image, t, le, s, s, [size, size], antialias=True)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def ramps(n, size=32):
    """Images whose channels are x, y and 1: what a transform leaves of them says where it looked."""
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float32)] * 2, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).expand(n, -1, -1, -1)


def boxes(ramp):
    """(left, top, side) of the boxes of which resized ramps are the images; their insides are linear in the pixel."""
    x, y = ramp[:, 0, 16, :], ramp[:, 1, :, 16]
    scale = (x[:, 24] - x[:, 8]) / 16
    left, top = (v[:, 8] + 0.5 - 8.5 * scale for v in (x, y))
    return left, top, scale * 32


def test_random_resized_crop_draws_areas_and_places():
    found = torch.stack(boxes(RandomResizedCrop(32, (0.5, 1.0))(ramps(4000), seeded_generator(0))))
    left, top, side = found.round()
    torch.testing.assert_close(found, torch.stack([left, top, side]), rtol=0, atol=1e-3)  # whole pixels
    assert left.min() == top.min() == 0 and max((left + side).max(), (top + side).max()) == 32
    assert side.unique().tolist() == list(range(23, 33))  # 23 ** 2 is 0.52 of the area
    for s in range(23, 33):  # the area is uniform from 512 to 1024, and its root is rounded
        expected = (min((s + 0.5) ** 2, 1024) - max((s - 0.5) ** 2, 512)) / 512
        assert (side == s).float().mean() == pytest.approx(expected, abs=0.02)
    small = side == 23
    for place in (left[small], top[small]):
        assert place.unique().tolist() == list(range(10))
        assert place.mean() == pytest.approx(4.5, abs=0.6)
    assert abs(np.corrcoef(left[small], top[small])[0, 1]) < 0.25

    small = RandomResizedCrop(32, (0.1, 0.1))(ramps(50), seeded_generator(0))
    assert boxes(small)[2].round().unique().tolist() == [10]  # 10 ** 2 is nearest to a tenth of 32 ** 2


def test_random_resized_crop_is_torchvisions_at_the_same_boxes():
    images, crop = random_images(60).float() / 255, RandomResizedCrop(32)
    left, top, side = (v.round().int().tolist() for v in boxes(crop(ramps(60), seeded_generator(4))))
    for image, output, le, t, s in zip(images, crop(images, seeded_generator(4)), left, top, side):
        expected = TF.resized_crop(image, t, le, s, s, [32, 32], antialias=True)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_random_crop_is_torchvisions_pad_and_crop():
    images, crop = random_images(2000).float() / 255, RandomCrop(padding=4)
    middle = crop(ramps(2000), seeded_generator(1))[:, :, 16, 16].int() - 16  # the shift, as nothing black is there
    for image, output, (x, y, _) in zip(images, crop(images, seeded_generator(1)), middle.tolist()):
        assert torch.equal(output, TF.crop(TF.pad(image, [4] * 4), y + 4, x + 4, 32, 32))
    shifts = set(map(tuple, middle[:, :2].tolist()))
    assert shifts == {(x, y) for x in range(-4, 5) for y in range(-4, 5)}


@pytest.mark.parametrize("side", [3, 4])
def test_cutout_greys_a_square_round_any_pixel_as_far_as_it_is_inside(side):
    images = torch.rand(3000, 3, 8, 6)
    cut = Cutout(side)(images, seeded_generator(5))
    changed = (cut != images).numpy()
    assert (cut.numpy()[changed] == 0.5).all() and (changed == changed[:, :1]).all()  # the same pixels of R, G and B
    expected = np.zeros((8, 6, 8, 6), bool)
    for y, x in np.ndindex(8, 6):
        top, left = y - side // 2, x - side // 2
        expected[y, x, max(top, 0) : top + side, max(left, 0) : left + side] = True
    assert {mask.tobytes() for mask in changed[:, 0]} == {mask.tobytes() for mask in expected.reshape(48, 8, 6)}


def test_cutmix_takes_a_box_and_as_much_of_the_label_from_one_other_image():
    n, height, width = 2000, 12, 16
    images = torch.rand(n, 1, 1, 1).expand(-1, 3, height, width)  # an image is one colour
    labels = torch.arange(n) % 5
    mixed, targets = CutMix(5)(images, labels, seeded_generator(3))
    box = (mixed != images).numpy()
    assert np.array_equal(mixed.numpy(), np.where(box, images.numpy()[::-1], images.numpy()))
    assert (box == box[:, :1]).all()
    rows, columns = box[:, 0].any(2), box[:, 0].any(1)
    assert (box[:, 0] == rows[:, :, None] & columns[:, None, :]).all()
    for lines in rows, columns:  # no gaps
        assert (np.diff(np.pad(lines.astype(int), ((0, 0), (1, 1)))) == 1).sum(1).max() == 1
    part = box[:, 0].mean((1, 2))
    expected = np.zeros((n, 5))
    for i in range(n):
        expected[i, i % 5] += 1 - part[i]
        expected[i, (n - 1 - i) % 5] += part[i]
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    # A box of area a and centre (y, x), as far as it is inside: the mean is that of the formula for p = 0.5.
    side, centre = (np.arange(1000) + 0.5)[:, None] ** 0.5 / 1000**0.5, (np.arange(1000) + 0.5) / 1000
    length = np.minimum(centre + side / 2, 1) - np.maximum(centre - side / 2, 0)
    assert part.mean() == pytest.approx(0.5 * (length.mean(1) ** 2).mean(), abs=0.015)
    assert (part == 0).mean() == pytest.approx(0.5, abs=0.05)


def test_the_grid_of_cutmix_shows_boxes_of_other_images():
    images = as_set(random_images(30))
    shown = data.Data(images, images, images, ("a",), (0, 0, 0), (1, 1, 1))
    standard, mixed = (data.first_augmented(shown, augment) for augment in ("standard", "cutmix"))
    changed = (mixed != standard).any(1, keepdim=True)
    assert torch.equal(mixed, torch.where(changed, standard.flip(0), standard))
    assert 5 < changed.any((1, 2, 3)).sum() < 25


@pytest.mark.parametrize("p", [0, 0.25, 0.5, 1])
def test_flip_mirrors_an_image_or_leaves_it(p):
    images = random_images(1000).float()
    flipped = RandomHorizontalFlip(p)(images, seeded_generator(2))
    same, mirrored = (flipped == images).all((1, 2, 3)), (flipped == TF.hflip(images)).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert mirrored.float().mean() == pytest.approx(p, abs=0.06 if 0 < p < 1 else 0)


# ------------------------------------------------------------------------------------------------------- colours, scale


def pixels(images):
    """numpy (3, N * H * W) in [0, 1] of uint8 images."""
    return images.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255


def test_fancy_pca_fits_the_training_pixels():
    images = random_images(250)
    covariance = np.cov(pixels(images), bias=True)
    pca = FancyPCA.fit(images)
    eigenvalues, eigenvectors = pca.eigenvalues.numpy(), pca.eigenvectors.numpy()
    np.testing.assert_allclose(eigenvalues, np.linalg.eigvalsh(covariance)[::-1], rtol=1e-5)
    np.testing.assert_allclose(covariance @ eigenvectors, eigenvectors * eigenvalues, atol=1e-6)
    np.testing.assert_allclose(eigenvectors.T @ eigenvectors, np.eye(3), atol=1e-6)


@pytest.mark.parametrize("std", [0.1, 0.5])
def test_fancy_pca_shifts_by_eigenvalue_times_eigenvector(std):
    """The shift sum p_i alpha_i lambda_i has the covariance P diag((std lambda_i)^2) P^T: the pixels' squared."""
    images = random_images(250)
    covariance = np.cov(pixels(images), bias=True)
    batch = torch.zeros(50_000, 3, 1, 2)
    shift = FancyPCA.fit(images, std=std, p=1)(batch, seeded_generator(0))
    assert torch.equal(shift[..., 0], shift[..., 1])
    shift = shift[..., 0].flatten(1).numpy()
    expected = std**2 * covariance @ covariance
    np.testing.assert_allclose(np.cov(shift.T), expected, atol=0.03 * expected.max())
    along = shift @ np.linalg.eigh(covariance)[1]  # uncorrelated, each std * lambda_i wide
    np.testing.assert_allclose(along.std(0), std * np.linalg.eigvalsh(covariance), rtol=0.02)
    np.testing.assert_allclose(along.mean(0) / along.std(0), 0, atol=0.02)
    kurtosis = (along**4).mean(0) / (along**2).mean(0) ** 2
    np.testing.assert_allclose(kurtosis, 3, atol=0.15)  # normal


@pytest.mark.parametrize(("p", "tolerance"), [(0, 0), (0.5, 0.04), (1, 0)])
def test_fancy_pca_shifts_the_chosen_images_as_a_whole(p, tolerance):
    images = random_images(3000, 8, 8).double() / 255
    shift = FancyPCA.fit(random_images(50), p=p)(images, seeded_generator(0)) - images
    assert shift.dtype == torch.float64
    np.testing.assert_allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-12)
    assert (shift[:, :, 0, 0].abs().amax(1) > 1e-9).double().mean() == pytest.approx(p, abs=tolerance)


def test_fancy_pca_takes_one_image():
    pca, image = FancyPCA.fit(random_images(50), p=1), random_images(1)[0].float() / 255
    shifted = pca(image, seeded_generator(3))
    assert shifted.shape == image.shape and (shifted - image).abs().max() > 1e-4
    assert torch.equal(shifted, pca(image[None], seeded_generator(3))[0])


def test_pixel_mean_and_std():
    images = random_images(1234)  # not a multiple of a part
    mean, std = data.pixel_mean_std(images)
    np.testing.assert_allclose(mean, pixels(images).mean(1), rtol=1e-9)
    np.testing.assert_allclose(std, pixels(images).std(1), rtol=1e-9)


def test_batch_transform_scales_and_normalises():
    images, mean, std = random_images(20), [0.1, 0.5, 0.7], [0.2, 0.3, 0.4]
    before = images.clone()
    found = BatchTransform(mean, std)(images)
    expected = (images.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert found.dtype == torch.float32 and torch.equal(images, before)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_batch_transform_applies_the_transforms_to_scaled_pixels_in_order():
    images = random_images(5)
    steps = [lambda x, generator: x + torch.rand(1, generator=generator), lambda x, generator: 2 * x]
    found = BatchTransform((1,) * 3, (4,) * 3, steps)(images, seeded_generator(9))
    draw = torch.rand(1, generator=seeded_generator(9)).item()
    np.testing.assert_allclose(found, (2 * (images.numpy() / 255 + draw) - 1) / 4, atol=1e-6)


def test_train_transforms_by_name():
    images = random_images(10)
    found = {name: data.train_transforms(name, as_set(images)) for name in data.AUGMENTS}
    kinds = {name: [type(t) for t in transforms] for name, transforms in found.items()}
    assert kinds["slides"] == [RandomResizedCrop, RandomHorizontalFlip, FancyPCA]
    assert kinds["standard"] == [RandomCrop, RandomHorizontalFlip] and kinds["none"] == []
    assert kinds["cutmix"] == kinds["standard"]
    assert kinds["cutout"] == [RandomCrop, RandomHorizontalFlip, Cutout] and found["cutout"][-1].side == 12
    crop, flip, pca = found["slides"]
    assert (crop.size, crop.scale, flip.p, pca.std, pca.p) == (32, (0.5, 1.0), 0.5, 0.1, 0.5)
    with pytest.raises(ValueError, match=r"augment='all'.*slides, standard, cutout, cutmix, none"):
        data.train_transforms("all", as_set(images))


# -------------------------------------------------------------------------------------------------------- what it shows


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments): what `python data.py --dataset shapes ...` prints, with 300 images."""

    def run(*arguments):
        monkeypatch.setattr(data, "SHAPES_TRAIN", 300)
        monkeypatch.setattr(data, "SHAPES_TEST", 20)
        monkeypatch.setattr(sys, "argv", ["data.py", "--dataset", "shapes", *arguments])
        data.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("augment", ["slides", "none"])
def test_grid_command_draws_the_first_images(run, tmp_path, augment):
    output = run("--grid", str(tmp_path / "grid.png"), "--augment", augment)
    assert "grid.png" in output and "64 of 300" in output
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert 8 * 64 < picture.shape[0] < 1000 and 16 * 64 < picture.shape[1] < 1500
    images = draw_shapes(300, seed=0).images.numpy().transpose(0, 2, 3, 1)
    windows = np.lib.stride_tricks.sliding_window_view(picture, (64, 64), axis=(0, 1))
    for i in (0, 7, 63):  # somewhere in the left half, each pixel doubled, and on the right where it is not augmented
        tile = images[i].repeat(2, 0).repeat(2, 1)
        rows, columns = np.nonzero((windows[:, :, :, 0, 0] == tile[0, 0]).all(2))
        places = [(r, c) for r, c in zip(rows, columns) if (picture[r : r + 64, c : c + 64] == tile).all()]
        halves = [int(column > picture.shape[1] / 2) for _, column in places]
        assert sorted(halves) == ([0, 1] if augment == "none" else [0])


def test_stats_command_prints_what_numpy_finds(run):
    output = run("--stats")
    values = pixels(draw_shapes(300, seed=0).images)
    for name, expected in (("mean", values.mean(1)), ("std", values.std(1))):
        line = re.search(rf"^{name} +(.*)$", output, re.MULTILINE)[1]
        np.testing.assert_allclose([float(v) for v in line.split()], expected, atol=6e-5)
    eigenvalues = [float(v) for v in re.findall(r"^eigenvalue (\S+),", output, re.MULTILINE)]
    np.testing.assert_allclose(eigenvalues, np.linalg.eigvalsh(np.cov(values))[::-1], atol=2e-4)
    assert "300 training" in output and "20 test" in output and "30 to 30" in output


def test_time_command_prints_both_rates_and_their_ratio(run, monkeypatch):
    measure = data.time_augmentation
    monkeypatch.setattr(data, "time_augmentation", lambda loaded: measure(loaded, rounds=1))
    torch.set_num_threads(2)
    found = re.search(r"whole batches ([\d,]+), torchvision image by image ([\d,]+), ratio ([\d.]+)", run("--time"))
    batches, single, ratio = (float(v.replace(",", "")) for v in found.groups())
    assert batches > 0 and single > 0 and batches / single == pytest.approx(ratio, abs=0.06)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("arguments", [(), ("--grid", "missing-folder/grid.png"), ("--grid", "grid.unknown")])
def test_commands_that_cannot_be_done(run, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    message = capsys.readouterr().err if stop.value.code == 2 else stop.value.code
    expected = "give --grid PNG, --stats, --time or --check" if not arguments else "data.py: "
    assert expected in message and "Traceback" not in message
