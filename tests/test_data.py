"""Test data.py against files written here, numpy's formulas, and torchvision image by image."""

import itertools
import pickle
import re
import struct
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

import data
from data import BatchCutMix, BatchCutout, BatchRandomCrop, BatchRandomHorizontalFlip
from data import BatchRandomResizedCrop, EpochBatches, FancyPCA, ImageSet, UserError, collate
from data import draw_shapes, load_data, make_transform, read_batch, seeded, stratified_split

def random_images(n, size=32):
    """Return uint8 images whose channels are correlated and unlike each other."""
    mixture = np.array([[0.6, 0.3, 0.0], [0.2, 0.3, 0.2], [0.3, 0.0, 0.6]])
    values = np.random.default_rng(0).random((n, 3, size, size))
    return torch.from_numpy((255 * np.einsum("ij,njhw->nihw", mixture, values)).astype(np.uint8))

def as_set(images):
    return ImageSet(images, torch.zeros(len(images), dtype=torch.int64))

def apply(transform, *inputs, numbers=(0,)):
    with seeded(*numbers):
        return transform(*inputs)

# ------------------------------------------------------------------------------------ CIFAR files

class Python2Pickler(pickle._Pickler):
    """Write str and bytes as Python 2 wrote its str."""

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}

def write_pickle(path, content, form):
    """Write a file in a protocol of pickle, or as Python 2 and its numpy did."""
    if form == "python 2":
        with path.open("wb") as file:
            Python2Pickler(file, protocol=2).dump(content)
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))
    else:
        path.write_bytes(pickle.dumps(content, protocol=form))

def write_cifar(root, name, form=2):
    """Write a small CIFAR; return the training images and labels, the test ones, and the names."""
    source, classes = getattr(datasets, name.upper()), int(name.removeprefix("cifar"))
    folder, label_key = root / source.base_folder, b"labels" if classes == 10 else b"fine_labels"
    folder.mkdir()
    rng, images, labels = np.random.default_rng(0), [], []
    for file, _ in source.train_list + source.test_list:
        rows = rng.integers(0, 256, (4 + len(images), 3072), dtype=np.uint8)
        images.append(rows.reshape(-1, 3, 32, 32))
        labels.append([0, classes - 1, *rng.integers(classes, size=len(rows) - 2).tolist()])
        write_pickle(folder / file, {b"filename": b"x", label_key: labels[-1], b"data": rows}, form)
    names = [f"name {i}" for i in range(classes)]
    meta = {source.meta["key"].encode(): [n.encode() for n in names], b"num_vis": 3072}
    write_pickle(folder / source.meta["filename"], meta, form)
    train = [np.concatenate(parts[:-1]) for parts in (images, labels)]
    return *train, images[-1], labels[-1], names

@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("form", ["python 2", 2, 3, 4, 5])
def test_cifar_files_are_read(tmp_path, monkeypatch, name, form):
    for old_name in ("numpy.core", "numpy.core.multiarray"):  # a later numpy may not have them
        monkeypatch.setitem(sys.modules, old_name, None)
    *expected, names = write_cifar(tmp_path, name, form)
    module = b"numpy.core.multiarray" if form == "python 2" else b"numpy._core."
    assert all(module in path.read_bytes() for path in tmp_path.glob("*/*test*"))

    found = load_data(name, tmp_path, val_fraction=0)
    arrays = found.train.images, found.train.labels, found.test.images, found.test.labels
    assert [array.dtype for array in arrays] == [torch.uint8, torch.int64] * 2
    assert all(map(np.array_equal, arrays, expected))
    assert found.classes == tuple(names) and len(found.val) == 0

GOOD = {b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 4, 9]}

@pytest.mark.parametrize("module, name, argument", [
    ("os", "system", "touch {}"), ("builtins", "eval", "open('{}', 'w')"),
])  # fmt: skip
def test_a_file_that_runs_code_is_refused(tmp_path, module, name, argument):
    path, canary = tmp_path / "data_batch_1", tmp_path / "canary"
    path.write_text(f"c{module}\n{name}\n(V{argument.format(canary)}\ntR.")  # a call
    with pytest.raises(UserError, match=rf"{path}: .*{module}\.{name}"):
        read_batch(path, b"labels", 10)
    assert not canary.exists()
    pickle.loads(path.read_bytes())
    assert canary.exists()  # the code does run if it is allowed to

@pytest.mark.parametrize("name", [
    "numpy load", "numpy ndarray.tofile", "numpy._core.multiarray fromfile", "_codecs decode",
    "numpy._core.numeric _frombuffer.__globals__", "builtins getattr", "subprocess Popen",
])  # fmt: skip
def test_other_names_are_refused(tmp_path, name):
    strings = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in name.split())
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04" + strings + b"\x93.")  # STACK_GLOBAL
    with pytest.raises(UserError, match=f"{tmp_path}/data_batch_1: .*{name.replace(' ', '.')}"):
        read_batch(tmp_path / "data_batch_1", b"labels", 10)

@pytest.mark.parametrize("key, value", [
    ("data", None), ("data", [[0] * 3072] * 3), ("data", np.zeros((3, 3072))),
    ("data", np.zeros((3, 3071), np.uint8)), ("labels", None), ("labels", [0, 4]),
    ("labels", [0, 4, 9.0]), ("labels", [0, 4, 10]), ("labels", [-1, 4, 9]),
    ("", b""), ("", pickle.dumps(GOOD, protocol=2)[:-1]), ("", pickle.dumps([0, 4, 9])),
])  # fmt: skip
def test_a_wrong_or_truncated_file_is_named(tmp_path, key, value):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(GOOD | {key.encode(): value}) if key else value)
    with pytest.raises(UserError, match=rf"^{path}: .*{key}.*$"):
        read_batch(path, b"labels", 10)

@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_wrong_or_missing_file_of_the_folder_is_named(tmp_path, file):
    write_cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / file
    for spoil in (lambda: write_pickle(path, {b"num_vis": 3072}, form=2), path.unlink):
        spoil()
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_data("cifar10", tmp_path)

def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    fail = Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr(data, "download_and_extract_archive", fail)
    monkeypatch.setattr(sys, "argv", ["data.py", "--stats", "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        data.main()
    message = stop.value.code  # a string is printed to stderr, and the status is 1
    assert message.startswith(f"data.py: {tmp_path}/cifar-10-batches-py: ") and "\n" not in message
    assert all(p in message for p in ("no route to host", "www.cs.toronto", "--dataset shapes"))
    (tmp_path / "train").mkdir()  # nothing is downloaded into a folder of photos
    with pytest.raises(UserError, match=r"holds train/, not cifar10: add --dataset folder$"):
        load_data("cifar10", tmp_path)

def test_wrong_arguments_of_load_data_are_named():
    with pytest.raises(UserError, match=r"dataset='mnist': .* cifar100, shapes, folder"):
        load_data("mnist")
    for fraction in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=f"val-fraction={fraction}: .* < 1"):
            load_data("shapes", val_fraction=fraction)

# ---------------------------------------------------------------------------------- split, shapes

@pytest.mark.parametrize("fraction", [0, 0.1, 0.2, 0.5, 0.99])
def test_the_split_takes_a_part_of_each_class(fraction):
    labels = torch.tensor([0] * 10 + [2] * 7 + [5] * 1 + [3] * 100)
    labels = labels[np.random.default_rng(0).permutation(118)]
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
    split, whole = load_data("shapes", val_fraction=0.2, seed=3), draw_shapes(200, seed=0).images
    assert (len(split.train), len(split.val), len(split.test)) == (160, 40, 30)
    joined = torch.cat([split.train.images, split.val.images])
    assert torch.equal(joined.flatten(1).unique(dim=0), whole.flatten(1).unique(dim=0))

def test_shapes_follow_from_the_seed():
    first, again, other = (draw_shapes(120, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert first.labels.bincount().tolist() == [12] * 10

def test_shapes_cannot_be_told_by_their_colour():
    train, test = draw_shapes(2000, seed=0), draw_shapes(1000, seed=1)
    colours, test_colours = (s.images.float().mean((2, 3)) for s in (train, test))
    means = torch.stack([colours[train.labels == label].mean(0) for label in range(10)])
    found = torch.cdist(test_colours, means).argmin(1)
    assert (found == test.labels).float().mean() < 0.16  # chance, 0.1, plus six standard errors

def lens(r, s, d):
    """Return the common area of circles of radius r and s whose centres are d apart."""
    a = np.arccos((d * d + r * r - s * s) / (2 * d * r))
    b = np.arccos((d * d + s * s - r * r) / (2 * d * s))
    return r * r * (a - np.sin(2 * a) / 2) + s * s * (b - np.sin(2 * b) / 2)

AREAS = {
    "disc": np.pi * 0.95**2, "ring": np.pi * (0.95**2 - 0.55**2), "half disc": np.pi * 0.95**2 / 2,
    "crescent": np.pi * 0.95**2 - lens(0.95, 0.77, 0.5),
    "triangle": 3**0.5 * 0.75,  # its sides are 3 ** 0.5
    "square": 2, "corner": 1.4**2 - 0.9**2,
    "bar": 1.9 * 0.6, "cross": 2 * 1.9 * 0.5 - 0.5**2,
    "star": 5 * 0.4 * np.sin(np.pi / 5),  # ten triangles between the radii 1 and 0.4
}  # fmt: skip

@pytest.mark.parametrize("shape", data.SHAPES)
def test_figures_have_their_areas(shape):
    masks = [data.draw_mask(shape, 256, 128 + 128j, 120, angle) for angle in (0, 1)]
    y, x = np.mgrid[:256, :256] + 0.5 - 128
    for mask in masks:
        assert mask.sum() / 120**2 == pytest.approx(AREAS[shape], rel=0.02)
        assert np.hypot(x, y)[mask > 0].max() <= 122
    assert (shape in ("disc", "ring")) == (np.abs(masks[0] - masks[1]).max() < 0.5)

# ------------------------------------------------------------------------------- order, randomness

def list_epoch(epoch, accum_steps=1, seed=7, start=0):
    batches = EpochBatches(103, 20, accum_steps, seed)
    batches.epoch, batches.start = epoch, start
    assert len(list(batches)) == len(batches)
    return list(batches)

@pytest.mark.parametrize("accum_steps", [1, 2, 4])
def test_each_epoch_visits_every_index_once_in_an_order_free_of_the_accumulation(accum_steps):
    epochs = [list_epoch(epoch, accum_steps) for epoch in range(4)]
    assert {len(batch) for batch in itertools.chain(*epochs)} == {20 // accum_steps}
    orders = [list(itertools.chain(*batches)) for batches in epochs]
    assert orders == [list(itertools.chain(*list_epoch(epoch))) for epoch in range(4)]
    assert all(len(set(indices)) == 100 and set(indices) < set(range(103)) for indices in orders)
    assert len(set(map(frozenset, orders))) == 4  # other indices are left out each time
    assert epochs[0] != list_epoch(0, accum_steps, seed=8) and orders[0] != sorted(orders[0])

def test_an_epoch_continues_at_its_start():
    for start in (0, 1, 7, 10):
        assert list_epoch(3, accum_steps=2, start=start) == list_epoch(3, accum_steps=2)[start:]

def test_one_batch_must_fit_the_dataset():
    assert len(EpochBatches(20, 20)) == 1
    with pytest.raises(UserError, match=r"batch-size=21.*20"):
        EpochBatches(20, 21)

def collate_and_look(batch):
    return *collate(batch), [part.is_shared() for part in collate(batch)]

@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_a_loader_are_whole_and_a_workers_in_shared_memory(workers):
    images = ImageSet(random_images(50), torch.arange(50))
    order = EpochBatches(50, 16, seed=1)
    options = dict(batch_sampler=order, num_workers=workers, collate_fn=collate_and_look)
    batches = list(DataLoader(images, **options))
    assert [labels.tolist() for _, labels, _ in batches] == list(order)
    for pixels, labels, are_shared in batches:
        assert torch.equal(pixels, images.images[labels])
        assert are_shared == [workers > 0] * 2

def test_seeded_draws_the_same_for_the_same_numbers_alone():
    numbers = [(0, 3, 4, 1), (1, 3, 4, 1), (0, 2, 4, 1), (0, 3, 5, 1), (0, 3, 4, 0), (3, 0, 4, 1)]
    numbers += [(0, 3), (0, 3, 0), (0, 3, 0, 0)]
    draws = [tuple(apply(torch.rand, 3, numbers=case).tolist()) for case in numbers * 2]
    assert draws[:9] == draws[9:] and len(set(draws)) == 9

def test_seeded_restores_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with pytest.raises(KeyError), seeded(1, 2):
        torch.rand(100)
        raise KeyError
    assert torch.equal(torch.rand(4), expected)

@pytest.mark.parametrize("transform", [
    v2.ColorJitter(0.5, 0.5, 0.5, 0.2), v2.RandomAffine(30), v2.RandomErasing(p=1),
    v2.ElasticTransform(), v2.RandAugment(), v2.GaussianNoise(),
], ids=lambda transform: type(transform).__name__)  # fmt: skip
def test_any_random_transform_of_torchvision_is_reproducible(transform):
    batch = random_images(4).float() / 255
    first, again, other = (apply(transform, batch, numbers=(n,)) for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)

# ----------------------------------------------------------------------------------- augmentation

@pytest.mark.parametrize("augment", ["slides", "standard", "cutout"])
def test_a_gpus_images_stay_there(augment):
    """A fake GPU knows shapes, types and devices, and refuses to tell values."""
    transform = make_transform((0, 0, 0), (1, 1, 1), augment, as_set(random_images(8)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        output = transform(images)
        mixed, targets = BatchCutMix(10)(output, torch.zeros(4, dtype=torch.int64, device="cuda"))
    for x, shape in ((output, images.shape), (mixed, images.shape), (targets, (4, 10))):
        assert (x.device.type, x.dtype, x.shape) == ("cuda", torch.float32, shape)

def ramps(n):
    """Return images whose channels are x, y and 1, so that their values tell where they were."""
    y, x = torch.meshgrid(*[torch.arange(32, dtype=torch.float32)] * 2, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)]).expand(n, -1, -1, -1)

def find_boxes(resized):
    """Return (left, top, side) of the boxes of ramps that were resized to these images."""
    x, y = resized[:, 0, 16, :], resized[:, 1, :, 16]
    scale = (x[:, 24] - x[:, 8]) / 16  # inside, they are linear in the pixel
    left, top = (v[:, 8] + 0.5 - 8.5 * scale for v in (x, y))
    return torch.stack([left, top, scale * 32])

def test_random_resized_crop_is_torchvisions():
    images, crop = random_images(100).float() / 255, BatchRandomResizedCrop()
    boxes = find_boxes(apply(crop, ramps(100))).round().int().T.tolist()
    for image, output, (left, top, side) in zip(images, apply(crop, images), boxes):
        expected = v2.functional.resized_crop(image, top, left, side, side, [32, 32])
        # Both interpolate between pixels; only ours goes on doing so at the border of the box.
        torch.testing.assert_close(output[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1])

def test_random_resized_crop_draws_areas_and_places():
    found = find_boxes(apply(BatchRandomResizedCrop(), ramps(4000)))
    left, top, side = boxes = found.round()
    torch.testing.assert_close(found, boxes, rtol=0, atol=1e-3)  # whole pixels
    assert side.unique().tolist() == list(range(23, 33))  # 23 ** 2 is 0.52 of the area
    for s in range(23, 33):  # the area is uniform from 512 to 1024, and its root is rounded
        expected = (min((s + 0.5) ** 2, 1024) - max((s - 0.5) ** 2, 512)) / 512
        assert (side == s).float().mean() == pytest.approx(expected, abs=0.02)
    smallest = side == 23
    for place in (left[smallest], top[smallest]):
        assert place.unique().tolist() == list(range(10))
    assert abs(np.corrcoef(left[smallest], top[smallest])[0, 1]) < 0.25

def test_random_crop_is_torchvisions_pad_and_crop():
    images, crop = random_images(2000).float() / 255, BatchRandomCrop()
    shifts = apply(crop, ramps(2000))[:, :2, 16, 16].int() - 16  # the middle never turns black
    padded = v2.functional.pad(images, [4] * 4)
    for image, output, (x, y) in zip(padded, apply(crop, images), shifts.tolist()):
        assert torch.equal(output, v2.functional.crop(image, y + 4, x + 4, 32, 32))
    assert set(map(tuple, shifts.tolist())) == {(x, y) for x in range(-4, 5) for y in range(-4, 5)}

@pytest.mark.parametrize("p", [0, 0.25, 0.5, 1])
def test_flip_mirrors_an_image_or_leaves_it(p):
    images, flip = random_images(1000).float(), BatchRandomHorizontalFlip()
    flip.p = p
    flipped = apply(flip, images)
    same, mirrored = ((flipped == x).all((1, 2, 3)) for x in (images, v2.functional.hflip(images)))
    assert (same ^ mirrored).all()
    assert mirrored.float().mean() == pytest.approx(p, abs=0.06 if 0 < p < 1 else 0)

@pytest.mark.parametrize("side", [3, 4])
def test_cutout_greys_the_part_inside_the_image_of_a_square_round_any_pixel(side):
    images, cutout = apply(torch.rand, 3000, 3, 8, 6), BatchCutout()
    cutout.ratio = side / 6
    cut = apply(cutout, images)
    changed = (cut != images).numpy()
    assert (cut.numpy()[changed] == 0.5).all() and (changed == changed[:, :1]).all()
    expected = np.zeros((8, 6, 8, 6), bool)
    for y, x in np.ndindex(8, 6):
        top, left = y - side // 2, x - side // 2
        expected[y, x, max(top, 0) : top + side, max(left, 0) : left + side] = True
    masks = {mask.tobytes() for mask in changed[:, 0]}
    assert masks == {mask.tobytes() for mask in expected.reshape(48, 8, 6)}

def test_cutmix_takes_a_box_and_its_part_of_the_label_from_one_other_image():
    images = apply(torch.rand, 2000, 1, 1, 1).expand(-1, 3, 12, 16)  # an image is one colour
    labels = torch.arange(2000) % 5
    mixed, targets = apply(BatchCutMix(5), images, labels)
    box = (mixed != images).numpy()
    assert np.array_equal(mixed.numpy(), np.where(box, images.numpy()[::-1], images.numpy()))
    assert (box == box[:, :1].any(3, keepdims=True) & box[:, :1].any(2, keepdims=True)).all()
    part, own = box.mean((1, 2, 3))[:, None], np.eye(5)[labels]
    np.testing.assert_allclose(targets, own * (1 - part) + own[::-1] * part, atol=1e-6)
    # Half of the images have a box of any area and centre, of which the part inside counts.
    side, centre = ((np.arange(1000) + 0.5)[:, None] / 1000) ** 0.5, (np.arange(1000) + 0.5) / 1000
    length = np.minimum(centre + side / 2, 1) - np.maximum(centre - side / 2, 0)
    assert part.mean() == pytest.approx(0.5 * (length.mean(1) ** 2).mean(), abs=0.015)
    assert (part == 0).mean() == pytest.approx(0.5, abs=0.05)

def pixels(images):
    """Return numpy (3, N * H * W) in [0, 1] of uint8 images."""
    return images.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255

def test_moments_are_numpys():
    images = random_images(1234)  # not a multiple of a part
    mean, covariance = data.compute_moments(images)
    np.testing.assert_allclose(mean, pixels(images).mean(1), rtol=1e-9)
    np.testing.assert_allclose(covariance, np.cov(pixels(images), bias=True), rtol=1e-9)

@pytest.mark.parametrize("std", [0.1, 0.5])
def test_fancy_pca_shifts_by_eigenvalue_times_eigenvector(std):
    """The covariance of the shifts is P diag((std lambda)^2) P^T: that of pixels, squared."""
    images = random_images(250)
    covariance = np.cov(pixels(images), bias=True)
    pca = FancyPCA.fit(images)
    pca.std, pca.p = std, 1
    shift = apply(pca, torch.zeros(50_000, 3, 1, 1)).flatten(1).numpy()
    expected = std**2 * covariance @ covariance
    np.testing.assert_allclose(np.cov(shift.T), expected, atol=0.03 * expected.max())
    along = shift @ np.linalg.eigh(covariance)[1]  # normally distributed along each eigenvector
    np.testing.assert_allclose(along.mean(0) / along.std(0), 0, atol=0.02)
    np.testing.assert_allclose((along**4).mean(0) / (along**2).mean(0) ** 2, 3, atol=0.15)

@pytest.mark.parametrize("p, tolerance", [(0, 0), (0.5, 0.04), (1, 0)])
def test_fancy_pca_shifts_the_chosen_images_as_a_whole(p, tolerance):
    images, pca = random_images(3000, 8).double() / 255, FancyPCA.fit(random_images(50))
    pca.p = p
    shift = apply(pca, images) - images
    assert shift.dtype == torch.float64
    np.testing.assert_allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-12)
    chosen = shift[:, :, 0, 0].abs().amax(1) > 1e-9
    assert chosen.double().mean() == pytest.approx(p, abs=tolerance)

def test_a_transform_scales_and_normalises():
    images, mean, std = random_images(20), (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    before = images.clone()
    found = make_transform(mean, std)(images)
    expected = (images.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert found.dtype == torch.float32 and torch.equal(images, before)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

@pytest.mark.parametrize("augment, kinds", [
    ("slides", [BatchRandomResizedCrop, BatchRandomHorizontalFlip, FancyPCA]),
    ("standard", [BatchRandomCrop, BatchRandomHorizontalFlip]),
    ("cutmix", [BatchRandomCrop, BatchRandomHorizontalFlip]),
    ("cutout", [BatchRandomCrop, BatchRandomHorizontalFlip, BatchCutout]), ("none", []),
])  # fmt: skip
def test_a_transform_has_its_modules_in_order_and_draws_for_each_image(augment, kinds):
    images = random_images(1).expand(100, -1, -1, -1)
    transform = make_transform((0, 0, 0), (1, 1, 1), augment, as_set(images))
    assert [type(module) for module in transform.transforms] == [v2.ToDtype, *kinds, v2.Normalize]
    unlike = len(apply(transform, images).flatten(1).unique(dim=0))
    assert unlike > 60 if kinds else unlike == 1

# -------------------------------------------------------------------------------- looking at data

@pytest.fixture
def run(monkeypatch, capsys):
    """Return run(*arguments): what data.py prints about 300 drawn images."""

    def run(*arguments):
        monkeypatch.setattr(data, "SHAPES_TRAIN", 300)
        monkeypatch.setattr(data, "SHAPES_TEST", 20)
        monkeypatch.setattr(sys, "argv", ["data.py", "--dataset", "shapes", *arguments])
        data.main()
        return capsys.readouterr().out

    return run

@pytest.mark.parametrize("augment", ["slides", "cutmix", "none"])
def test_grid_draws_all_classes_raw_and_augmented(run, tmp_path, augment):
    run("--grid", str(tmp_path / "grid.png"), "--augment", augment)
    picture, shapes = np.asarray(Image.open(tmp_path / "grid.png")), draw_shapes(300, seed=0)
    for i in (0, 7, 63):
        index = (shapes.labels == i % 10).nonzero()[i // 10, 0]
        expected = shapes.images[index].numpy().transpose(1, 2, 0).repeat(3, 0).repeat(3, 1)
        y, x = 4 + i // 8 * 128, 4 + i % 8 * 104
        raw, augmented = (picture[y : y + 96, x + right : x + right + 96] for right in (0, 832))
        assert (raw == expected).all() and (augmented == expected).all() == (augment == "none")

def test_examples_come_from_all_classes_in_turn():
    labels = torch.tensor([3, 3, 0, 3, 0, 1])
    assert data.pick_examples(labels, 4) == [2, 5, 0, 4]
    assert data.pick_examples(labels, 9) == [2, 5, 0, 4, 1, 3]

def test_captions_are_below_their_images_and_cut_at_their_width():
    images = torch.zeros(9, 3, 40, 50, dtype=torch.uint8)
    texts = "\n", "\u00ef" * 99 + "\n" + "W" * 99, "i" * 99 + "\n" + "W" * 99
    blank, named, plain = (data.draw_grid(images, [text] * 8 + [""]) for text in texts)
    changed = (blank != named).any(0)
    assert torch.equal(named, plain) and changed.shape == (4 + 2 * (80 + 4 + 14 * 2), 8 * 108)
    assert changed.sum() > 500 and not changed[:84].any() and not changed[112:].any()
    assert not changed.reshape(-1, 8, 108)[:, :, 104:].any()
    assert data.to_ascii("e\u0301\u00eb \u732b") == r"ee \u732b"

def test_stats_are_what_numpy_finds(run):
    output = run("--stats")
    values = pixels(draw_shapes(300, seed=0).images)
    for name, expected in (("mean", values.mean(1)), ("std", values.std(1))):
        line = re.search(rf"^{name} +(.*)$", output, re.MULTILINE)[1]
        np.testing.assert_allclose([float(v) for v in line.split()], expected, atol=6e-5)
    eigenvalues = [float(v) for v in re.findall(r"^eigenvalue (\S+),", output, re.MULTILINE)]
    np.testing.assert_allclose(eigenvalues, np.linalg.eigvalsh(np.cov(values))[::-1], atol=2e-4)
    assert "       30        0        2  half disc\n" in output

@pytest.mark.parametrize("arguments, fragment", [
    ((), "give --grid PNG, --stats, --check or --time"), (("--check",), "give --dataset folder"),
    (("--grid", "missing/a.png"), "missing/a.png"),
])  # fmt: skip
def test_wrong_commands_are_one_line(run, tmp_path, monkeypatch, capsys, arguments, fragment):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    message = capsys.readouterr().err if stop.value.code == 2 else stop.value.code
    assert "data.py: " in message and fragment in message
