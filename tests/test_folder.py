"""Test folders of images, from the files to a trained network, against torchvision and numpy."""

import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import start_train
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from test_train import assert_same, load
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import data
import evaluate
import train
from data import UserError, load_data, seeded
from fishnet import create_model

COLOURS = {"apple": (200, 40, 40), "banana": (220, 200, 40), "cherry leaf": (40, 140, 60)}

def draw(path: Path, colour=(128, 128, 128), height=50, width=40, seed=0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 30, (height, width, 3))
    Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(path)

@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three classes of 8 training and 3 validation images of many sizes. Do not write to it."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 8), ("val", 3)):
        for name, colour in COLOURS.items():
            for i in range(count):
                draw(root / split / name / f"{i}.png", colour, 40 + 9 * i, 90 - 7 * i, seed=i)
    return root

@pytest.fixture
def copy(photos, tmp_path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "photos"))

def read_pixels(path: str | Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)

def list_files(images) -> list[str]:
    root = Path(images.root).parent
    return [Path(path).relative_to(root).as_posix() for path, _ in images.samples]

# ----------------------------------------------------------------------------------------- layout

def test_the_layout_is_read(tmp_path):
    seen = ["train/A b/x.webp", "train/b/1.png", "train/b/2.Tiff", "train/b/deep/er/0.JPG"]
    seen_later = ["val/A b/0.png", "val/b/0.png", "test/A b/0.png", "test/b/0.png"]
    ignored = ["train/b/.hidden.png", "train/b/.trash/3.png", "train/.git/4.png", "train/loose.png"]
    for name in (*seen, *seen_later, *ignored):
        draw(tmp_path / name)
    (tmp_path / "train" / "b" / "notes.txt").write_text("")
    found = load_data("folder", tmp_path, val_fraction=0.9, image_size=32)
    assert found.classes == ("A b", "b") and list_files(found.train) == seen
    assert found.train.labels.tolist() == [0, 1, 1, 1] and found.train.labels.dtype == torch.int64
    assert list_files(found.val) + list_files(found.test) == seen_later
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

def remove(*names):
    return lambda root: [shutil.rmtree(root / name) for name in names]

def test_what_is_passed_over_is_counted_by_suffix(copy):
    draw(copy / "train" / "lost+found" / "0.png")
    draw(copy / "train" / "apple" / "__MACOSX" / "0.png")
    for name in ("train/apple/1.HEIC", "train/banana/2.heic", "val/apple/notes", "val/apple/3.txt"):
        (copy / name).touch()
    _, *rows, total, others = data.count_images(load_data("folder", copy))
    assert [row.split(maxsplit=3) for row in rows] == [["8", "3", "0", name] for name in COLOURS]
    assert total.split(maxsplit=3) == ["24", "9", "0", "all classes"]
    found = others.removeprefix("passed over: ").split(", ")
    assert found[0] == "2 .heic"
    assert sorted(found[1:]) == ["1 .txt", "1 folder lost+found", "1 no suffix"]

@pytest.mark.parametrize("change, fragment", [
    (remove("train"), "/train: not there; --data-dir is the folder that holds train/CLASS/"),
    (remove("train/apple", "train/banana"), "/train: 1 folders"),
    (lambda root: (root / "train" / "date").mkdir(), "/train/date: no images such as .jpg; fill"),
    (lambda root: (root / "val" / "date").mkdir(), "/val/date: no images"),
    (remove("val/apple"), "/val: .*remove apple$"),
    (lambda root: draw(root / "val" / "date" / "0.png"), "/val: .*remove date$"),
    (lambda root: (root / "val" / "apple").rename(root / "val" / "Apple"), "/val: .*[aA]pple, "),
    (lambda root: [draw(root / "test" / name / "0.png") for name in "ab"], "/test: .*apple"),
    (lambda root: [draw(root / name / "0.png") for name in ("train/caf\u00e9", "val/cafe\u0301")],
     r"/val: .*remove 'cafe\\u0301', 'caf\\xe9'$"),  # one name in two Unicode forms
])  # fmt: skip
def test_faults_of_the_layout_are_one_line(copy, change, fragment):
    change(copy)
    with pytest.raises(UserError, match=f"^{copy}{fragment}.*$"):
        load_data("folder", copy, image_size=32)

def test_without_val_a_part_of_each_class_is_set_apart(copy):
    whole = list_files(load_data("folder", copy, image_size=32).train)
    shutil.rmtree(copy / "val")
    split, again, other = (load_data("folder", copy, 0.25, seed, 32) for seed in (1, 1, 2))
    assert sorted(list_files(split.train) + list_files(split.val)) == whole
    assert split.val.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(split.test) == 0
    for images in (split.train, split.val):
        names = [Path(file).parent.name for file in list_files(images)]
        assert [list(COLOURS)[label] for label in images.labels] == names
    assert list_files(split.val) == list_files(again.val) != list_files(other.val)
    assert load_data("folder", copy, val_fraction=0.01).val.labels.tolist() == [0, 1, 2]
    for file in sorted((copy / "train" / "banana").iterdir())[1:]:
        file.unlink()
    with pytest.raises(UserError, match="/train/banana: has one image"):
        load_data("folder", copy, val_fraction=0.01)
    assert len(load_data("folder", copy, val_fraction=0).val) == 0

# ------------------------------------------------------------------------------------------ crops

def load_train(photos, seed, epoch, size=32):
    images = load_data("folder", photos, seed=seed, image_size=size).train
    images.epoch = epoch
    return images

def test_a_training_crop_is_torchvisions_resized_crop(photos):
    images = load_train(photos, seed=5, epoch=3, size=48)
    for index in range(0, 24, 5):
        whole = read_pixels(images.samples[index][0])
        box = data.draw_box(*whole.shape[1:], (5, 3, index))
        found, label = images[index]
        assert torch.equal(found, v2.functional.resized_crop(whole, *box, [48, 48]))
        assert found.dtype == torch.uint8 and label == index // 8

@pytest.mark.parametrize("sides", [(300, 400), (6, 8), (9, 100), (1, 1), (400, 4)])
def test_boxes_are_distributed_like_torchvisions(sides):
    image, samples = torch.empty(1, *sides, device="meta"), []
    with seeded(0):
        theirs = [v2.RandomResizedCrop(8).make_params([image]).values() for _ in range(4000)]
    for boxes in ([data.draw_box(*sides, (0, 1, i)) for i in range(4000)], map(tuple, theirs)):
        top, left, rows, columns = np.array([*boxes]).T
        places = top / (sides[0] - rows + 1), left / (sides[1] - columns + 1), top * left
        samples.append([top, left, rows, columns, rows * columns, rows / columns, *places])
    for a, b in zip(*samples):  # Kolmogorov-Smirnov: in 997 of 1000 cases the gap is below 0.04
        ranks = [np.sort(v).searchsorted([*a, *b], "right") / 4000 for v in (a, b)]
        assert np.abs(ranks[0] - ranks[1]).max() < 0.04

def read_crops(images, order, workers=0) -> dict[int, torch.Tensor]:
    options = dict(batch_sampler=[order[:5], order[5:]], num_workers=workers)
    loader = DataLoader(images, collate_fn=data.collate, **options)
    return dict(zip(order, torch.cat([batch for batch, _ in loader])))

def test_crops_follow_from_seed_epoch_and_index_not_from_workers_or_order(photos):
    first = read_crops(load_train(photos, 0, 2), [3, 9, 1, 0, 23, 11, 4])
    again = read_crops(load_train(photos, 0, 2), [11, 0, 1, 3, 4, 9, 23], workers=2)
    assert all(torch.equal(first[index], again[index]) for index in first)
    for other in (load_train(photos, 1, 2), load_train(photos, 0, 1), load_train(photos, 2, 0)):
        assert not any(torch.equal(first[index], other[index][0]) for index in first)
    images = load_train(photos, 0, 0)  # the workers of a loop see the epoch that was set last
    before = read_crops(images, list(range(8)), workers=2)
    images.epoch = 2
    after = read_crops(images, list(range(8)), workers=2)
    assert torch.equal(after[3], first[3]) and not torch.equal(after[3], before[3])

@pytest.mark.parametrize("size, short", [(32, 37), (224, 256), (48, 55)])
def test_validation_pixels_are_torchvisions_resize_and_centre_crop(photos, size, short):
    loaded = load_data("folder", photos, image_size=size)
    for images in (loaded.val, loaded.train):  # also those of training, with --augment none
        for index in (0, len(images) - 1):
            resized = v2.Resize(short)(read_pixels(images.samples[index][0]))
            assert torch.equal(images[index][0], v2.CenterCrop(size)(resized))

def test_batches_are_not_cropped_again_and_have_imagenets_colours(photos):
    images = load_train(photos, 0, 0)
    for augment, kinds in (("standard", []), ("cutout", [data.BatchCutout])):
        steps = data.make_transform((0,) * 3, (1,) * 3, augment, images).transforms[1:-1]
        assert [type(step) for step in steps] == [data.BatchRandomHorizontalFlip, *kinds]
    _, flip, pca, _ = data.make_transform((0,) * 3, (1,) * 3, "slides", images).transforms
    assert (flip.p, pca.std, pca.p) == (0.5, 0.1, 0.5)
    pca.p = 1
    with seeded(0):
        shift = pca(torch.zeros(20_000, 3, 1, 1)).flatten(1).numpy()
    p1, p2, p3 = (-0.5675, -0.5808, -0.5836), (0.7192, -0.0045, -0.6948), (0.4009, -0.8140, 0.4203)
    for vector, value in zip((p1, p2, p3), (0.2175, 0.0188, 0.0045)):
        assert (shift @ vector).std() == pytest.approx(0.1 * value, rel=0.03)

@pytest.mark.parametrize("sides, turn, mode, factors", [
    ((640, 800), 1, "RGB", {8, 4, 2}), ((643, 805), 1, "L", {8, 4, 2}),
    ((640, 800), 6, "RGB", {8, 4, 2}), ((800, 644), 3, "CMYK", {4, 2}),
    ((643, 805), 8, "RGB", set()),  # if it is turned, the factor must divide its sides
])  # fmt: skip
def test_crops_of_a_reduced_jpeg_look_whole(tmp_path, monkeypatch, sides, turn, mode, factors):
    file, exif, rng = tmp_path / "a.jpg", Image.Exif(), np.random.default_rng(0)
    colours = v2.functional.resize(torch.from_numpy(rng.random((3, 32, 40))), sides)
    pixels = 255 * colours.permute(1, 2, 0).numpy() + rng.normal(0, 5, (*sides, 1))
    exif[0x0112] = turn
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)
    image.save(file, quality=90, exif=b"" if turn == 6 else exif)  # 6 stands in XMP alone
    xmp = b'http://ns.adobe.com/xap/1.0/\0tiff:Orientation="%d"' % turn  # a segment before EXIF's
    content = file.read_bytes()
    file.write_bytes(content[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2) + xmp + content[2:])
    whole = v2.functional.pil_to_tensor(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
    assert whole.shape[1:] == (sides[::-1] if turn in (6, 8) else sides)
    draft, used = JpegImageFile.draft, set()
    monkeypatch.setattr(JpegImageFile, "draft", lambda image, mode, size: (
        used.add(image.width // size[0]), draft(image, mode, size)))  # fmt: skip
    for size, epoch in itertools.product((16, 40, 80), range(6)):
        box = data.draw_box(*whole.shape[1:], (1, epoch, 2))
        expected = v2.functional.resized_crop(whole, *box, [size, size])
        centre = v2.CenterCrop(size)(v2.Resize(round(size / 0.875))(whole))
        crops = data.read_crop(file, size, seeds=(1, epoch, 2)), data.read_crop(file, size)
        for found, other in zip(crops, (expected, centre)):
            difference = (found.int() - other.int()).abs().float()
            assert difference.mean() < 2.5 and difference.max() < 25
    assert used == factors

# -------------------------------------------------------------------------------- train, evaluate

FOLDER = ("--dataset", "folder", "--image-size", "32", "-b", "8", "--augment", "slides")
FOLDER += ("--workers", "0")

@pytest.fixture
def run_folder(run_train, tmp_path):
    """Return run(data_dir, name, *flags), which trains on a folder and returns what is printed."""

    def run(data_dir: Path, name: str, *flags: str) -> str:
        return run_train(tmp_path / name, "--data-dir", str(data_dir), *FOLDER, *flags)

    return run

@pytest.fixture
def call(monkeypatch, capsys):
    """Return call(program, *arguments), which returns its exit code, stdout and stderr."""

    def call(program, *arguments: object) -> tuple[int | str, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)])
        code = 0
        try:
            program.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call

def test_resume_inside_an_epoch_is_exact(run_folder, photos, tmp_path):
    flags = ("--epochs", "2", "--workers", "2")
    run_folder(photos, "whole", *flags)
    run_folder(photos, "parts", *flags, "--max-steps", "4")  # an epoch has 3 steps
    with pytest.raises(SystemExit, match="image_size 32 -> 64"):
        run_folder(photos, "parts", *flags, "--resume", "auto", "--image-size", "64")
    run_folder(photos, "parts", "--epochs", "2", "--resume", "auto")  # without workers
    assert_same(load(tmp_path / "whole" / "last.pt"), load(tmp_path / "parts" / "last.pt"))

def test_a_run_crops_training_images_alone_and_by_epoch(run_folder, photos, monkeypatch):
    read, seen = data.FolderSet.__getitems__, set()

    def note(images, indices):
        seen.add((len(images), images.epoch))
        return read(images, indices)

    monkeypatch.setattr(data.FolderSet, "__getitems__", note)
    for augment, epochs in (("slides", {0, 1}), ("none", {None})):
        seen.clear()
        run_folder(photos, augment, "--epochs", "2", "--augment", augment)
        assert seen == {(24, epoch) for epoch in epochs} | {(9, None)}

@pytest.mark.parametrize("size", ["36", "4", "0", "-8"])
def test_image_size_must_suit_the_model(run_folder, photos, size):
    with pytest.raises(SystemExit, match=f"^train.py: image-size={size}: expected"):
        run_folder(photos, "run", "--image-size", size)

def test_image_size_is_for_folders_alone(run_train, tmp_path):
    sizes = [train.parse_args(["--dataset", name]).image_size for name in ("folder", "shapes")]
    assert sizes == [224, None]
    with pytest.raises(SystemExit, match=r"^train\.py: image-size=64: .*--dataset folder"):
        run_train(tmp_path / "run", "--image-size", "64")

@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_image_ends_the_run_with_one_line(run_folder, copy, workers):
    run_folder(copy, "run", "--epochs", "2", "--max-steps", "3")
    broken = copy / "train" / "banana" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(SystemExit, match=rf"^train\.py: {broken}: cannot be read .*$"):
        run_folder(copy, "run", "--epochs", "2", "--resume", "auto", "--workers", workers)

def test_an_unreadable_image_of_the_validation_does_not_hang_its_workers(copy, tmp_path):
    broken = copy / "val" / "banana" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    process = start_train(copy, tmp_path / "run", *FOLDER, "--epochs", "1", "--workers", "2")
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in out
    assert out.splitlines()[-1].startswith(f"train.py: {broken}: cannot be read as an image (")

def test_a_run_is_bound_to_its_classes_and_its_split(run_folder, call, copy, tmp_path):
    run_folder(copy, "run", "--epochs", "2", "--max-steps", "3")
    image = copy / "train" / "apple" / "0.png"
    image.rename(image.with_name("9.png"))  # with val inside train, this could move it there
    code, _, _ = call(evaluate, tmp_path / "run" / "last.pt", "--split", "val")
    assert code == "evaluate.py: split=val: other images than those of the run; train again"
    (copy / "val").rename(copy / "away")  # a part of the training images would take its place
    assert call(evaluate, tmp_path / "run" / "last.pt", "--split", "val")[0] == code
    with pytest.raises(SystemExit, match=r"last\.pt has other images, other epoch length"):
        run_folder(copy, "run", "--epochs", "2", "--resume", "auto", "--override")
    (copy / "train" / "banana").rename(copy / "train" / "zebra")
    with pytest.raises(SystemExit, match="other classes"):
        run_folder(copy, "run", "--epochs", "2", "--resume", "auto", "--override")

def compute_probabilities(checkpoint: dict, image: torch.Tensor) -> torch.Tensor:
    model = create_model(checkpoint["name"], **checkpoint["config"]).eval()
    model.load_state_dict(checkpoint["model"])
    mean, std = (torch.tensor(checkpoint[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        return model(((image / 255 - mean) / std)[None])[0].softmax(0)

def assert_top(prediction: dict, probabilities: torch.Tensor, classes: list[str]) -> None:
    order, top = probabilities.argsort(descending=True)[:5].tolist(), prediction["top"]
    assert [entry["class"] for entry in top] == [classes[label] for label in order]
    expected = pytest.approx(probabilities[order].tolist(), rel=1e-4)
    assert [entry["probability"] for entry in top] == expected

def test_a_network_trains_is_evaluated_and_predicts(run_folder, call, copy, tmp_path):
    out = run_folder(copy, "run", "--epochs", "1", "--max-steps", "2")
    best = tmp_path / "run" / "last.pt"
    assert "24 training and 9 validation images" in out
    assert f"evaluate.py {best} --report report --split val" in out
    trained = load(best)
    assert trained["classes"] == list(COLOURS)
    losses, expected = [], {}
    for label, name in enumerate(COLOURS):
        for file in sorted((copy / "val" / name).iterdir()):
            image = v2.CenterCrop(32)(v2.Resize(37)(read_pixels(file)))
            expected[str(file)] = compute_probabilities(trained, image)
            losses.append(-math.log(expected[str(file)][label]))
    code, out, _ = call(evaluate, best, "--split", "val", "--json")
    assert code == 0 and json.loads(out)["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    code, out, _ = call(evaluate, best, "--json", *expected)
    predictions = json.loads(out)["predictions"]
    assert code == 0 and [p["file"] for p in predictions] == list(expected)
    for prediction in predictions:
        assert_top(prediction, expected[prediction["file"]], trained["classes"])

    assert call(evaluate, best)[0].startswith(f"evaluate.py: split=test: has no images in {copy}")
    shutil.copytree(copy / "val", copy / "test")
    broken = copy / "test" / "apple" / "1.png"
    broken.write_text("no image")
    assert call(evaluate, best)[0].startswith(f"evaluate.py: {broken}: cannot be read")
    for split in ("train", "val", "test"):
        (copy / split / "apple").rename(copy / split / "pear")
    assert "dataset=folder: has other classes than" in call(evaluate, best)[0]

def test_sixty_images_end_in_a_useful_network(monkeypatch, capsys, tmp_path):
    for name, colour in COLOURS.items():
        for i in range(20):
            draw(tmp_path / "photos" / "train" / name / f"{i}.png", colour, seed=i)
    flags = "--recipe strong --model fishnet_tiny --epochs 4 --model-args channels=(4,4,4,16) k=2"
    flags += f" --dataset folder --image-size 32 --workers 0 --data-dir {tmp_path / 'photos'}"
    flags += f" --output-dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()
    assert "6 batches of 8 images, 6 left out, others each time" in capsys.readouterr().out
    assert load(tmp_path / "run" / "best.pt")["state"]["history"][-1]["val_top1_error"] == 0

def test_a_cifar_checkpoint_takes_files(run_train, call, cifar_dir, tmp_path):
    run_train(tmp_path / "run", "--epochs", "1", "--max-steps", "2")
    best = tmp_path / "run" / "last.pt"
    # CIFAR's own images as PNG files have the same loss: they are not enlarged and cropped.
    for i, (image, label) in enumerate(load_data("cifar10", cifar_dir).test):
        for split in ("train", "val", "test"):
            path = tmp_path / "png" / split / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    flags = "--dataset", "folder", "--data-dir", tmp_path / "png"
    code, out, _ = call(evaluate, best, "--json", *flags)
    loss = json.loads(call(evaluate, best, "--json")[1])["loss"]
    assert code == 0 and json.loads(out)["loss"] == pytest.approx(loss, rel=1e-4)

    wide, small, broken = tmp_path / "wide.png", tmp_path / "small.png", tmp_path / "broken.png"
    draw(wide, (200, 90, 30), height=60, width=100)
    draw(small, (20, 90, 230), height=20, width=16)
    broken.write_text("no image")
    code, out, err = call(evaluate, best, wide, broken, small, tmp_path / "none.png", "--json")
    faults = [line.partition(": cannot be read")[0] for line in err.splitlines()]
    assert code == 1 and faults == [f"evaluate.py: {p}" for p in (broken, tmp_path / "none.png")]
    trained = load(best)
    for file, prediction in zip((wide, small), json.loads(out)["predictions"], strict=True):
        image = v2.CenterCrop(32)(v2.Resize(32)(read_pixels(file)))
        assert_top(prediction, compute_probabilities(trained, image), trained["classes"])
    name, first, *others = call(evaluate, best, small)[1].splitlines()
    assert name == str(small) and len(others) == 4
    top = prediction["top"][0]
    assert first.split(maxsplit=1) == [f"{top['probability']:.2%}", top["class"]]

# --------------------------------------------------------------------------------- looking at data

def test_check_lists_what_cannot_be_read(call, copy):
    flags = "--dataset", "folder", "--data-dir", copy, "--check"
    shutil.copytree(copy / "val", copy / "test")
    (copy / "val" / "apple" / "caf\udce9.HEIC").touch()
    code, out, _ = call(data, *flags)
    rows = ["        8        3        3  banana", "       24        9        9  all classes"]
    assert code == 0 and rows == out.splitlines()[2:5:2]
    assert out.endswith("\npassed over: 1 .heic\n42 images, 0 of them cannot be read\n")
    broken = [copy / name for name in ("train/apple/3.png", "val/banana/0.png", "test/apple/2.png")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    code, out, _ = call(data, *flags)
    *faults, last = out.splitlines()[-4:]
    assert code == 1 and last == "42 images, 3 of them cannot be read"
    found = [line.partition(": cannot be read as an image (")[0] for line in faults]
    assert found == list(map(str, broken))

def test_stats_and_grid(call, photos, tmp_path):
    flags = "--dataset", "folder", "--data-dir", photos, "--stats", "--grid", tmp_path / "grid.png"
    code, out, _ = call(data, *flags)
    assert code == 0 and "        8        3        0  cherry leaf" in out
    assert "0.4850   0.4560   0.4060" in out and "0.2290   0.2240   0.2250" in out
    assert "eigenvalue 0.2175, eigenvector  -0.5675  -0.5808  -0.5836" in out
    first = v2.CenterCrop(224)(v2.Resize(256)(read_pixels(photos / "train/apple/0.png")))
    assert torch.equal(read_pixels(tmp_path / "grid.png")[:, 4:228, 4:228], first)
