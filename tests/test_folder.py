"""Folders of images: layout, crops, exact resume, unreadable files, predictions; against torchvision and by hand."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from accelerate.state import AcceleratorState
from conftest import start_python, start_train
from PIL import Image
from test_train import assert_same, load
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import data
import evaluate as evaluation
import train
from data import load_data, random_box, seeded_generator
from fishnet import create_model

COLOURS = {"apple": (200, 40, 40), "banana": (220, 200, 40), "cherry leaf": (40, 140, 60)}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def draw(path: Path, colour=(128, 128, 128), height=50, width=40, seed=0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 30, (height, width, 3))
    Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three classes of 8 training and 3 validation images of many sizes; no test images. Do not write to it."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 8), ("val", 3)):
        for name, colour in COLOURS.items():
            for i in range(count):
                draw(root / split / name / f"{i}.png", colour, 40 + 9 * i, 90 - 7 * i, seed=i)
    return root


@pytest.fixture
def copy(photos, tmp_path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def pixels(path: str | Path) -> torch.Tensor:
    """uint8 (3, H, W), by numpy alone."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)


# --------------------------------------------------------------------------------------------------------------- layout


def test_the_layout_is_read(tmp_path):
    hidden = "b/.hidden.png", "b/.trash/3.png", ".git/4.png"
    for name in ("b/1.png", "b/deep/er/0.JPG", "b/2.Tiff", "A b/x.webp", *hidden):
        draw(tmp_path / "train" / name)
    draw(tmp_path / "train" / "loose.png")
    (tmp_path / "train" / "b" / "notes.txt").write_text("")
    (tmp_path / "train" / "b" / "folder.png").mkdir()
    draw(tmp_path / "elsewhere" / "9.png")
    (tmp_path / "train" / "b" / "link").symlink_to(tmp_path / "elsewhere")
    for split in ("val", "test"):
        for name in ("b", "A b"):
            draw(tmp_path / split / name / "0.png")
    found = load_data("folder", tmp_path, val_fraction=0.9, image_size=32)
    assert found.classes == ("A b", "b")
    files = [Path(file).relative_to(tmp_path / "train").as_posix() for file in found.train.files]
    assert files == ["A b/x.webp", "b/1.png", "b/2.Tiff", "b/deep/er/0.JPG"]
    assert found.train.labels.tolist() == [0, 1, 1, 1] and found.train.labels.dtype == torch.int64
    assert found.val.labels.tolist() == found.test.labels.tolist() == [0, 1]
    assert "test" in found.test.files[0] and found.mean == (0.485, 0.456, 0.406) and found.std == (0.229, 0.224, 0.225)


def remove(name):
    return lambda root: shutil.rmtree(root / name)


def rename(old, new):
    return lambda root: (root / old).rename(root / new)


@pytest.mark.parametrize(
    "change, error, fragments",
    [
        (remove("train"), OSError, ("/train is not there", "a folder of images for each class")),
        (remove("."), OSError, ("/train is not there",)),
        (lambda root: [shutil.rmtree(root / "train" / name) for name in COLOURS], ValueError, ("/train: 0 folders",)),
        (lambda root: [shutil.rmtree(root / "train" / name) for name in list(COLOURS)[1:]], ValueError, ("1 folders",)),
        (lambda root: (root / "train" / "empty").mkdir(), ValueError, ("train/empty: no images in it", ".jpg")),
        (lambda root: (root / "val" / "apple").joinpath("..", "x").mkdir(), ValueError, ("val/x: no images",)),
        (rename("val/apple", "val/Apple"), ValueError, ("/val: ", "missing: apple; unknown: Apple")),
        (remove("val/apple"), ValueError, ("/val: ", "train (missing: apple)")),
        (rename("val/banana", "val/.banana"), ValueError, ("train (missing: banana)",)),
        (lambda root: draw(root / "val" / "date" / "0.png"), ValueError, ("train (unknown: date)",)),
        (lambda root: (root / "train" / "fig").symlink_to(root / "gone"), OSError, ("fig: a link to what is not",)),
        (lambda root: [(root / "test").symlink_to(root / "gone"), (root / "train" / ".#x").symlink_to(root / "gone")],
         OSError, ("/test is not there",)),
        (lambda root: [draw(root / "test" / name / "0.png") for name in "ab"], ValueError,
         ("/test: ", "missing: apple, banana, cherry leaf; unknown: a, b")),
    ],
)  # fmt: skip
def test_faults_of_the_layout_are_one_line(copy, change, error, fragments):
    change(copy)
    with pytest.raises(error) as caught:
        load_data("folder", copy, image_size=32)
    assert "\n" not in str(caught.value) and all(fragment in str(caught.value) for fragment in fragments)


def test_a_subfolder_that_cannot_be_read_is_named(copy, monkeypatch):
    (copy / "train" / "apple" / "more").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="train/apple/more"):
        load_data("folder", copy, image_size=32)


@pytest.mark.skipif(sys.platform == "darwin", reason="its disks refuse such names")
def test_a_name_that_is_no_utf8_is_printed_with_escapes(copy, monkeypatch):
    (copy / "train" / "apple" / os.fsdecode(b"caf\xe9.png")).write_text("no image")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    process = start_python(1, "data.py", "--dataset", "folder", "--data-dir", copy, "--check")
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "caf\\udce9.png" in out and "Traceback" not in out, out


def test_without_val_a_part_of_each_class_is_set_apart(copy):
    whole = load_data("folder", copy, image_size=32).train.files
    shutil.rmtree(copy / "val")
    split, other = (load_data("folder", copy, val_fraction=0.25, seed=seed, image_size=32) for seed in (1, 2))
    assert sorted(split.train.files + split.val.files) == whole and len(split.test) == 0
    assert split.val.labels.tolist() == [0, 0, 1, 1, 2, 2] and split.train.labels.bincount().tolist() == [6, 6, 6]
    for images in (split.train, split.val):
        assert [list(COLOURS)[label] for label in images.labels] == [Path(file).parent.name for file in images.files]
    assert split.val.files == load_data("folder", copy, 0.25, 1, 32).val.files != other.val.files
    few = load_data("folder", copy, val_fraction=0.01, image_size=32)
    assert few.val.labels.tolist() == [0, 1, 2]
    for file in sorted((copy / "train" / "banana").rglob("*.*"))[1:]:
        file.unlink()
    with pytest.raises(ValueError, match="train/banana: one image in it, expected at least 2"):
        load_data("folder", copy, val_fraction=0.01, image_size=32)
    assert len(load_data("folder", copy, val_fraction=0, image_size=32).val) == 0


# ---------------------------------------------------------------------------------------------------------------- crops


def test_random_boxes_are_torchvisions():
    """From the same state of the generator, also where no box fits and the middle is taken."""
    sizes = [(224, 224), (300, 500), (37, 1000), (1000, 37), (1, 60), (60, 1), (1, 1), (3, 2)]
    for height, width in sizes:
        for seed in range(50):
            generator = seeded_generator(seed)
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(generator.get_state())
                crop = torchvision.transforms.RandomResizedCrop
                expected = crop.get_params(torch.empty(3, height, width), (0.08, 1.0), (3 / 4, 4 / 3))
            assert random_box(height, width, generator) == tuple(expected)


def test_a_training_crop_is_torchvisions_and_follows_from_seed_epoch_index(photos):
    images = load_data("folder", photos, seed=5, image_size=48).train
    images.epoch = 3
    for index in (0, 7, 20):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(seeded_generator(5, 3, index).get_state())
            expected = v2.RandomResizedCrop(48, antialias=True)(pixels(images.files[index]))
        found, label = images[index]
        assert torch.equal(found, expected) and found.dtype == torch.uint8 and label == index // 8


def crops(images, order, workers=0) -> dict[int, torch.Tensor]:
    """{index: crop} by a loader that reads in this order."""
    loader = DataLoader(images, batch_sampler=[order[:5], order[5:]], num_workers=workers, collate_fn=images.collate)
    return dict(zip(order, torch.cat([batch for batch, _ in loader])))


def test_crops_do_not_depend_on_workers_order_or_what_was_read_before(photos):
    def loaded(seed, epoch):
        images = load_data("folder", photos, seed=seed, image_size=32).train
        images.epoch = epoch
        return images

    first = crops(loaded(0, 2), [3, 9, 1, 0, 23, 11, 4])
    again = crops(loaded(0, 2), [11, 0, 1, 3, 4, 9, 23], workers=2)
    assert all(torch.equal(first[index], again[index]) for index in first)
    for other in (loaded(1, 2), loaded(0, 1), loaded(2, 0)):
        assert not any(torch.equal(first[index], other[index][0]) for index in first)
    images = loaded(0, 0)  # one object, as the loop uses it: its workers see the epoch that was set last
    before = crops(images, list(range(8)), workers=2)
    images.epoch = 2
    after = crops(images, list(range(8)), workers=2)
    assert torch.equal(after[3], first[3]) and not torch.equal(after[3], before[3])


@pytest.mark.parametrize("size, short", [(32, 37), (224, 256), (48, 55)])
def test_validation_pixels_are_torchvisions_resize_and_centre_crop(photos, size, short):
    loaded = load_data("folder", photos, image_size=size)
    for images in (loaded.val, loaded.train):  # --augment none leaves train's epoch at None
        for index in (0, len(images) - 1):
            resized = v2.Resize(short, antialias=True)(pixels(images.files[index]))
            assert min(resized.shape[1:]) == short
            assert torch.equal(images[index][0], v2.CenterCrop(size)(resized))


def test_a_line_of_pixels_does_not_fill_the_memory(tmp_path, monkeypatch):
    draw(tmp_path / "line.png", height=1, width=3_000)
    resized, resize = [], data.TF.resize
    monkeypatch.setattr(data.TF, "resize", lambda *a, **k: resized.append(resize(*a, **k)) or resized[-1])
    assert data.centre_crop(data.read_image(tmp_path / "line.png"), 224).shape == (3, 224, 224)
    assert max(resized[0].shape) == 8 * 256


def test_augmentation_on_the_device_has_imagenets_colours(photos):
    train_set = load_data("folder", photos, image_size=32).train
    assert [type(t).__name__ for t in data.train_transforms("standard", train_set)] == ["RandomHorizontalFlip"]
    assert data.train_transforms("cutmix", train_set) == data.train_transforms("standard", train_set)
    assert data.train_transforms("cutout", train_set) == [data.RandomHorizontalFlip(), data.Cutout(12)]
    assert data.train_transforms("none", train_set) == []
    flip, pca = data.train_transforms("slides", train_set)
    assert (flip.p, pca.std, pca.p) == (0.5, 0.1, 0.5)
    pca.p = 1
    shift = pca(torch.zeros(20_000, 3, 1, 1), seeded_generator(0)).flatten(1).numpy()
    p1, p2, p3 = [-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]
    for vector, value in zip((p1, p2, p3), (0.2175, 0.0188, 0.0045)):
        assert (shift @ vector).std() == pytest.approx(0.1 * value, rel=0.03)


# ------------------------------------------------------------------------------------------------------ train, evaluate


FOLDER = ("--dataset", "folder", "--image-size", "32", "-b", "8", "--augment", "slides")


@pytest.fixture
def run_folder(run_train, tmp_path):
    """run_folder(data_dir, name, *flags): trains on the folder, images of 32 pixels; returns what it printed."""

    def run(data_dir: Path, name: str, *flags: str) -> str:
        return run_train(tmp_path / name, "--data-dir", str(data_dir), *FOLDER, *flags)

    return run


@pytest.fixture
def run_evaluate(monkeypatch, capsys):
    """run_evaluate(*arguments): evaluate.py's main; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        code = 0
        try:
            evaluation.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_resume_inside_an_epoch_is_exact(run_folder, photos, tmp_path):
    flags = ("--epochs", "2", "--workers", "2")
    run_folder(photos, "whole", *flags)
    run_folder(photos, "parts", *flags, "--max-steps", "4")  # 3 steps an epoch
    with pytest.raises(SystemExit, match=r"of another run \(image-size 32 -> 64\)"):
        run_folder(photos, "parts", *flags, "--resume", "auto", "--image-size", "64")
    run_folder(photos, "parts", "--epochs", "2", "--resume", "auto")  # and without workers
    assert_same(load(tmp_path / "whole" / "last.pt"), load(tmp_path / "parts" / "last.pt"))


def test_a_runs_crops_are_its_epochs(run_folder, photos, monkeypatch):
    read, seen = data.FolderSet.__getitems__, []

    def noted(images, indices):
        seen.append((len(images), images.epoch))
        return read(images, indices)

    monkeypatch.setattr(data.FolderSet, "__getitems__", noted)
    for augment, epochs in (("slides", {0, 1}), ("none", {None})):
        seen.clear()
        run_folder(photos, augment, "--epochs", "2", "--augment", augment)
        assert set(seen) == {(24, epoch) for epoch in epochs} | {(9, None)}  # in training, and in validation


@pytest.mark.parametrize("size", ["40", "8", "0", "-16", "8589934592"])
def test_image_size_must_suit_the_model(run_folder, photos, size):
    with pytest.raises(SystemExit, match=f"^train.py: image-size={size}: expected a multiple of 16, the stride"):
        run_folder(photos, "run", "--image-size", size)


def test_image_size_is_of_folders_alone(monkeypatch, tmp_path):
    assert train.parse_args(["--dataset", "folder"]).image_size == 224
    assert train.parse_args(["--dataset", "shapes"]).image_size is None
    flags = ["--recipe", "demo", "--image-size", "64", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit, match=r"^train\.py: image-size=64: for --dataset folder, images of shapes have a"):
        train.main()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_image_stops_the_run_with_one_line(run_folder, copy, tmp_path, workers):
    run_folder(copy, "run", "--epochs", "2", "--max-steps", "3")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    broken = copy / "train" / "banana" / "5.png"
    broken.write_bytes(broken.read_bytes()[:200])
    flags = ("--epochs", "2", "--resume", "auto", "--workers", workers)
    if workers == "0":
        with pytest.raises(SystemExit) as stop:
            run_folder(copy, "run", *flags)
        message = stop.value.code
    else:  # in a process of its own, which must not wait for its workers at its exit
        process = start_train(copy, tmp_path / "run", *FOLDER, *flags)
        message = process.communicate(timeout=60)[0].splitlines()[-1]
        assert process.returncode == 1
    assert message.startswith(f"train.py: {broken}: cannot be read as an image (") and "\n" not in message
    assert f"python data.py --dataset folder --data-dir {copy} --check" in message and "--resume auto" in message
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_an_unreadable_image_of_the_validation_does_not_hang_its_workers(copy, tmp_path):
    broken = next(path for path in sorted((copy / "val").rglob("*")) if path.is_file())
    broken.write_bytes(broken.read_bytes()[:50])
    process = start_train(copy, tmp_path / "run", *FOLDER, "--epochs", "1", "--workers", "2")
    message = process.communicate(timeout=60)[0].splitlines()[-1]
    assert process.returncode == 1 and message.startswith(f"train.py: {broken}: cannot be read as an image (")


def test_a_run_is_bound_to_its_classes(run_folder, copy):
    run_folder(copy, "run", "--epochs", "2", "--max-steps", "3")
    for part in ("train", "val"):
        (copy / part / "banana").rename(copy / part / "zebra")
    with pytest.raises(SystemExit, match=r"\(other classes\): give its flags, --override changes neither classes nor"):
        run_folder(copy, "run", "--epochs", "2", "--resume", "auto", "--override")


def test_a_split_that_is_no_longer_the_runs_is_refused(run_folder, run_evaluate, copy, tmp_path):
    """Without val/ a part of train/ would be taken for it, which the run was trained on."""
    run_folder(copy, "run", "--epochs", "2", "--max-steps", "3")
    shutil.rmtree(copy / "val")
    code, _, _ = run_evaluate(tmp_path / "run" / "best.pt", "--split", "val")
    assert code.startswith(f"evaluate.py: split=val: {copy} has other images, {{'train': 18, 'val': 6}}, than the run,")
    with pytest.raises(SystemExit, match=r"images \{'train': 24, 'val': 9\} -> "):
        run_folder(copy, "run", "--epochs", "2", "--resume", "auto")


def test_six_images_are_a_dataset(run_folder, tmp_path):
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"):
        draw(tmp_path / "train" / name)
    large = "--image-size", "120", "--model-args", "stem_stride=1"
    out = run_folder(tmp_path, "run", "-b", "4", "--epochs", "1", *large)
    assert "keeps maps of 120 x 120, which is slow" in out
    assert "4 training and 2 validation images" in out  # a fifth of three is nearest to one


def test_train_evaluate_and_predict(run_folder, run_evaluate, copy, tmp_path):
    out = run_folder(copy, "run", "--epochs", "1", "--max-steps", "2")
    best = tmp_path / "run" / "best.pt"
    assert "24 training and 9 validation images" in out and f"python evaluate.py {best} --split val" in out
    trained = load(best)
    assert trained["args"]["image_size"] == 32 and trained["classes"] == list(COLOURS)

    code, _, _ = run_evaluate(best)
    assert code == f"evaluate.py: split=test: empty, since {copy}/test is not there; take --split val"
    model = create_model(trained["name"], **trained["config"]).eval()
    model.load_state_dict(trained["model"])
    losses, predicted = [], {}
    for label, name in enumerate(COLOURS):
        for file in sorted((copy / "val" / name).iterdir()):
            image = v2.CenterCrop(32)(v2.Resize(37, antialias=True)(pixels(file))) / 255
            with torch.no_grad():
                predicted[str(file)] = model(((image - MEAN) / STD)[None])[0].softmax(0)
            losses.append(-math.log(predicted[str(file)][label]))
    code, out, _ = run_evaluate(best, "--split", "val", "--json")
    assert code == 0 and json.loads(out)["loss"] == pytest.approx(np.mean(losses), rel=1e-4)

    code, out, _ = run_evaluate(best, "--json", *predicted)
    predictions = json.loads(out)["predictions"]
    assert code == 0 and [p["file"] for p in predictions] == list(predicted)
    for prediction in predictions:
        assert_top(prediction["top"], predicted[prediction["file"]], list(COLOURS))

    shutil.copytree(copy / "val", copy / "test")
    (copy / "test" / "apple" / "1.png").write_text("no image")
    code, _, _ = run_evaluate(best)
    assert code.startswith(f"evaluate.py: {copy}/test/apple/1.png: cannot be read") and "--check" in code
    for split in ("train", "val", "test"):
        (copy / split / "apple").rename(copy / split / "pear")
    code, _, _ = run_evaluate(best)
    assert code.startswith("evaluate.py: dataset=folder: its classes are not those of")


def test_a_checkpoint_sees_the_files_of_a_folder_as_it_saw_its_dataset(run_train, run_evaluate, cifar_dir, tmp_path):
    """CIFAR's test images as PNG files: the same loss, not that of an enlarged centre."""
    run_train(tmp_path / "run", "--epochs", "1", "--max-steps", "2")
    test = load_data("cifar10", cifar_dir).test
    for i, (image, label) in enumerate(test):
        for split in ("train", "val", "test"):
            path = tmp_path / "png" / split / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    best = tmp_path / "run" / "best.pt"
    code, out, _ = run_evaluate(best, "--json")
    assert code == 0
    code, of_files, _ = run_evaluate(best, "--json", "--dataset", "folder", "--data-dir", tmp_path / "png")
    assert code == 0 and json.loads(of_files)["loss"] == pytest.approx(json.loads(out)["loss"], rel=1e-4)


def assert_top(top: list[dict], probabilities: torch.Tensor, classes: list[str]) -> None:
    """The first five, or all, in falling order."""
    order = probabilities.argsort(descending=True)[:5].tolist()
    assert [entry["class"] for entry in top] == [classes[label] for label in order]
    assert [entry["probability"] for entry in top] == pytest.approx(probabilities[order].tolist(), rel=1e-4)


def test_predictions_of_a_cifar_checkpoint(run_evaluate, tmp_path):
    torch.manual_seed(0)
    model = create_model("fishnet_tiny").eval()
    model.fc.weight.data /= 100  # untrained, it would be sure of one class
    classes = [f"class {i}" for i in range(9)] + ["a name that goes on and on" * 5]
    checkpoint = {
        "format": 1, "name": "fishnet_tiny", "config": vars(model.config), "model": model.state_dict(),
        "classes": classes, "mean": [0.5] * 3, "std": [0.25] * 3, "state": {},
        "args": {"dataset": "cifar10", "data_dir": "data", "val_fraction": 0.2, "seed": 0},
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "a.pt")
    files = [tmp_path / "wide.png", tmp_path / "small.jpg"]
    draw(files[0], (200, 90, 30), height=60, width=100)
    draw(files[1], (20, 90, 230), height=20, width=16, seed=1)
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    code, out, err = run_evaluate(tmp_path / "a.pt", files[0], broken, tmp_path, files[1], "--json")
    assert code == 1
    assert [line.partition(": cannot")[0] for line in err.splitlines()] == [
        f"evaluate.py: {path}" for path in (broken, tmp_path)
    ]
    predictions = json.loads(out)["predictions"]
    assert [p["file"] for p in predictions] == [str(file) for file in files]
    for prediction in predictions:
        image = v2.CenterCrop(32)(v2.Resize(32, antialias=True)(pixels(prediction["file"]))) / 255
        with torch.no_grad():
            expected = model((image[None] - 0.5) / 0.25)[0].softmax(0)
        assert_top(prediction["top"], expected, classes)

    code, out, _ = run_evaluate(tmp_path / "a.pt", files[1])
    name, *lines = out.splitlines()
    assert code == 0 and name == str(files[1]) and len(lines) == 5 and max(map(len, lines)) < 80
    first = predictions[1]["top"][0]
    assert lines[0].split() == [f"{first['probability']:.2%}", *first["class"][:68].split()]


@pytest.mark.parametrize(
    "flags", [("--dataset", "shapes"), ("--split", "test"), ("--data-dir", "x"), ("-b", "8"), ("-j", "1")]
)
def test_flags_of_an_evaluation_are_refused_with_files(run_evaluate, flags):
    code, _, err = run_evaluate("a.pt", "image.png", *flags)
    assert code == 2 and "for evaluating a dataset, while image files are given" in err and "Traceback" not in err


def test_a_folder_checkpoint_must_have_its_image_size(tmp_path):
    arguments = {"dataset": "folder", "data_dir": "data", "val_fraction": 0.2, "seed": 0}
    checkpoint = {"format": 1, "name": "", "config": {}, "model": {}, "classes": [], "mean": [0.5] * 3,
                  "std": [0.5] * 3, "state": {}, "args": arguments}  # fmt: skip
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: wrong or missing: image_size"):
        evaluation.load_checkpoint(tmp_path / "a.pt")
    arguments["image_size"] = 32
    torch.save(checkpoint, tmp_path / "a.pt")
    evaluation.load_checkpoint(tmp_path / "a.pt")


# -------------------------------------------------------------------------------------------------------------- data.py


@pytest.fixture
def run_data(monkeypatch, capsys):
    """run_data(folder, *arguments): data.py's main; returns (exit code, stdout, stderr)."""

    def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["data.py", "--dataset", "folder", "--data-dir", str(folder), *arguments])
        code = 0
        try:
            data.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_check_lists_what_cannot_be_read(run_data, copy):
    shutil.copytree(copy / "val", copy / "test")
    assert run_data(copy, "--check")[:2] == (0, "42 images, 0 of them cannot be read\n")
    broken = [copy / "train" / "apple" / "3.png", copy / "val" / "banana" / "0.png", copy / "test" / "apple" / "2.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    code, out, _ = run_data(copy, "--check")
    assert code == 1 and out.endswith("\n42 images, 3 of them cannot be read\n")
    named = [line.partition(": cannot be read as an image (")[0] for line in out.splitlines()]
    assert named[:3] == list(map(str, broken))


def test_stats_and_grid(run_data, photos, tmp_path):
    code, out, _ = run_data(photos, "--stats", "--grid", str(tmp_path / "grid.png"))
    assert code == 0 and "24 training and 9 validation images, 3 classes" in out and "      8  cherry leaf" in out
    assert "0.4850   0.4560   0.4060" in out and "0.2290   0.2240   0.2250" in out
    assert "eigenvalue 0.2175, eigenvector -0.5675  -0.5808  -0.5836" in out
    picture = pixels(tmp_path / "grid.png")
    x, y = 4, 24  # of the first image on the left, as draw_grid places it
    assert torch.equal(picture[:, y : y + 224, x : x + 224], load_data("folder", photos).val[0][0])


@pytest.mark.parametrize("dataset, flag", [("folder", "--time"), ("shapes", "--check")])
def test_what_does_not_suit_a_dataset_is_refused(run_data, photos, dataset, flag):
    code, _, err = run_data(photos, "--dataset", dataset, flag)
    assert code == 2 and f"error: {flag}: " in err
