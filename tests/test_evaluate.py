"""Test evaluate.py: every image counts once, the command, and checkpoints that are refused."""

import contextlib
import csv
import json
import re
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, start_python
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.functional import to_pil_image

import evaluate as evaluation
import train
from data import ImageSet, load_data, make_transform
from evaluate import DamagedFileError, Metrics, draw_confusion, evaluate
from evaluate import load_checkpoint, load_file, load_model, predict, summarize
from fishnet import UserError, create_model

SIZES, BATCHES = (1, 2, 7, 9, 999), (1, 3, 64)
HALVES = make_transform((0.5,) * 3, (0.25,) * 3)

class Linear(nn.Module):
    """Logits from pixels by one seeded matrix, which numpy multiplies as well below."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        weight = np.random.RandomState(1).standard_normal((classes, 48)).astype(np.float32)
        self.weight = nn.Parameter(torch.from_numpy(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.T

def make_images(count: int, classes: int) -> ImageSet:
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (count, 3, 4, 4)).astype(np.uint8)
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(rng.randint(0, classes, count)))

def counted(accelerator: Accelerator, count: int, batch_size: int, classes: int = 12) -> list:
    """Return the counts and the loss that evaluate finds."""
    model, images = Linear(classes).to(accelerator.device), make_images(count, classes)
    m = evaluate(accelerator, model, images, HALVES, classes, batch_size)
    top1, top5 = round(m.top1_error * count), round(m.top5_error * count)
    return [top1, top5, m.confusion.tolist(), m.predicted.tolist(), m.probability.tolist(), m.loss]

def by_numpy(count: int, classes: int = 12) -> list:
    """Return what `counted` must return."""
    images = make_images(count, classes)
    x = ((images.images.numpy() / 255 - 0.5) / 0.25).reshape(count, -1)
    logits = x @ Linear(classes).weight.detach().numpy().T.astype(np.float64)
    labels = images.labels.numpy()
    own = logits[np.arange(count), labels]
    rank = (logits > own[:, None]).sum(1)  # the number of classes before the right one
    total, predicted = np.exp(logits).sum(1), logits.argmax(1)
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, predicted), 1)
    top1, top5 = int((rank > 0).sum()), int((rank > 4).sum())
    probability, loss = np.exp(logits.max(1)) / total, (np.log(total) - own).mean()
    return [top1, top5, confusion.tolist(), predicted.tolist(), probability.tolist(), loss]

def test_every_image_counts_once(tmp_path):
    """On one process, and on three, whose shares differ and may be empty."""
    (tmp_path / "script.py").write_text(f"""
import json, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
from test_evaluate import *
accelerator = Accelerator()
assert accelerator.num_processes == 3
results = [[n, counted(accelerator, n, b)] for n in SIZES for b in BATCHES]
if accelerator.is_main_process:
    open("results.json", "w").write(json.dumps(results))
accelerator.end_training()
""")
    process = start_python(3, "script.py", cwd=tmp_path)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    results = json.loads((tmp_path / "results.json").read_text())
    results += [[n, counted(Accelerator(cpu=True), n, b)] for n in SIZES for b in BATCHES]
    assert len(results) == 2 * len(SIZES) * len(BATCHES)
    for count, (*counts, probability, loss) in results:
        *expected_counts, expected_probability, expected_loss = by_numpy(count)
        assert counts == expected_counts
        assert probability == pytest.approx(expected_probability, rel=1e-4)
        assert loss == pytest.approx(expected_loss, rel=1e-5)

def test_top5_of_three_classes_and_a_class_without_images():
    images = ImageSet(make_images(8, 3).images, torch.full((8,), 2))
    m = evaluate(Accelerator(cpu=True), Linear(3), images, HALVES, 3, batch_size=7)
    summary = summarize(m, "abc")
    assert m.top5_error == 0 and summary["class_images"] == {"a": 0, "b": 0, "c": 8}
    assert summary["class_errors"] == {"a": 0, "b": 0, "c": m.top1_error}

def test_precision_recall_and_f1():
    """By the definitions, on counts made up by hand; b is never predicted."""
    confusion = torch.tensor([[3, 0, 1], [2, 0, 0], [0, 0, 4]])
    summary = summarize(Metrics(0.0, 0.3, 0.0, confusion, torch.zeros(10), torch.zeros(10)), "abc")
    assert summary["precision"] == pytest.approx({"a": 3 / 5, "b": 0, "c": 4 / 5})
    assert summary["recall"] == pytest.approx({"a": 3 / 4, "b": 0, "c": 1})
    assert summary["f1"] == pytest.approx({"a": 2 / (5 / 3 + 4 / 3), "b": 0, "c": 2 / (5 / 4 + 1)})

def test_no_device_needs_float64(run_train, tmp_path, monkeypatch):
    """Apple's GPU has none."""

    class RefuseDoubles(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            dtypes = {getattr(x, "dtype", None) for x in tree_leaves(result)}
            assert torch.float64 not in dtypes, function
            return result

    train_epoch = train.train_epoch

    def train_without_doubles(run):
        with RefuseDoubles():
            return train_epoch(run)

    monkeypatch.setattr(train, "train_epoch", train_without_doubles)
    run_train(tmp_path, "--max-steps", "2", "--augment", "slides", "--clip-grad", "1")
    monkeypatch.setattr(evaluation, "gather_object", sys.exit)  # the host, too, may use float64
    with pytest.raises(SystemExit), RefuseDoubles():
        evaluate(Accelerator(cpu=True), Linear(3), make_images(20, 3), HALVES, 3)

@pytest.fixture(scope="module")
def checkpoint() -> dict:
    torch.manual_seed(0)
    model = create_model("fishnet_tiny")
    args = {"dataset": "cifar10", "data_dir": "data", "val_fraction": 0.2, "seed": 0}
    return {
        "format": 2, "name": "fishnet_tiny", "config": vars(model.config), "args": args,
        "model": model.state_dict(), "optimizer": {}, "scaler": None, "state": {},
        "classes": [f"class {i}" for i in range(10)], "images": {"train": 192, "val": 48},
        "mean": [0.5] * 3, "std": [0.25] * 3,
    }  # fmt: skip

@pytest.fixture
def run_evaluate(cifar_dir, tmp_path, monkeypatch, capsys):
    """Return run(checkpoint, *flags), which calls evaluate.main and returns what it printed."""

    def run(checkpoint: dict, *flags: str) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.save(checkpoint, tmp_path / "a.pt")
        command = ["evaluate.py", str(tmp_path / "a.pt"), "--data-dir", str(cifar_dir), *flags]
        monkeypatch.setattr(sys, "argv", command)
        evaluation.main()
        return capsys.readouterr().out

    return run

def test_command(checkpoint, run_evaluate):
    result = json.loads(run_evaluate(checkpoint, "--json"))
    assert result["images"] == sum(result["class_images"].values()) == 37
    names = "top1_error top5_error loss images tta class_errors class_images precision recall f1"
    assert set(result) == set(names.split())
    out = run_evaluate(checkpoint, "--split", "val")
    assert "on 48 val images" in out and "class 9" in out

def test_another_dataset_than_the_checkpoints_is_refused(checkpoint, run_evaluate):
    folder = checkpoint["args"] | {"dataset": "folder", "image_size": 64}
    huge = torch.full_like(checkpoint["model"]["fc.weight"], 3e38)
    for change, flags, message in (
        ({"classes": ["cat"] * 10}, (), "has other classes"),
        ({"images": {"train": 100, "val": 20}}, ("--split", "val"), "split=val: other images"),
        ({"args": folder}, ("--dataset", "cifar10"), "32 x 32 pixels, but .* takes 64 x 64"),
        ({"model": checkpoint["model"] | {"fc.weight": huge}}, (), "outputs are not finite"),
    ):
        with pytest.raises(SystemExit, match=rf"^evaluate\.py: .*{message}[^\n]*$"):
            run_evaluate(checkpoint | change, *flags)

def test_tta_averages_an_image_and_its_mirror_image(checkpoint, run_evaluate, cifar_dir):
    out = run_evaluate(checkpoint, "--tta")
    assert "fishnet_tiny on 37 test images, averaged over flips" in out
    test = load_data("cifar10", cifar_dir).test
    x = (test.images.float() / 255 - 0.5) / 0.25
    model = load_model(checkpoint, "a.pt").eval()
    logits = (model(x) + model(x[..., list(range(31, -1, -1))])) / 2
    loss = -logits.double().log_softmax(1)[range(37), test.labels].mean().item()
    assert float(re.search(r"loss (\S+)", out)[1]) == pytest.approx(loss, rel=1e-6)
    error = (logits.argmax(1) != test.labels).double().mean().item()
    assert f"top-1 error {error:.2%}" in out

def test_a_report_starts_with_the_surest_mistakes(checkpoint, run_evaluate, cifar_dir, tmp_path):
    text = "epoch,train_loss,train_top1_error,val_loss,val_top1_error\n1,2,0.9,,\n2,1,0.5,0.8,0.4\n"
    (tmp_path / "metrics.csv").write_text(text)
    folder, names = tmp_path / "new" / "report", checkpoint["classes"]
    shown = json.loads(run_evaluate(checkpoint, "--json", "--report", str(folder)))
    labels = load_data("cifar10", cifar_dir).test.labels
    _, *rows = csv.reader((folder / "predictions.csv").open())
    assert sorted(int(row[0]) for row in rows) == list(range(37))
    keys, confusion = [], np.zeros((10, 10), int)
    for index, true, found, probability in rows:
        assert true == names[labels[int(index)]]
        keys.append((true == found, -float(probability)))
        confusion[names.index(true), names.index(found)] += 1
    assert keys == sorted(keys) and not keys[0][0]
    report = json.loads((folder / "report.json").read_text())
    assert report == shown | {"confusion": confusion.tolist()}
    for name in ("confusion", "mistakes", "curves"):
        assert min(Image.open(folder / f"{name}.png").size) > 200

@pytest.mark.parametrize("classes", [2, 20, 100, 1500])
def test_a_confusion_matrix_is_dark_where_it_is_large(classes):
    names = ["a class with quite a long name: \u00e9\u732b"] * classes
    picture = draw_confusion(torch.eye(classes, dtype=torch.int64) * 9, names)
    assert picture.dtype == torch.uint8 and max(picture.shape) < 2000
    dark = (picture == torch.tensor([[[8]], [[48]], [[107]]])).all(0)[:, :-130]  # not the scale
    rows, columns = (dark.nonzero() - dark.nonzero().min(0).values).unbind(1)
    assert len(rows) > 500 and (rows - columns).abs().max() < 60
    assert rows.max() == columns.max()

def test_predict_takes_a_path_or_a_model_and_images_or_paths(checkpoint, cifar_dir, tmp_path):
    images = load_data("cifar10", cifar_dir).test.images[:5]
    for name, image in zip(("b/1.png", "b/a/x.PNG", "c.png", "b/.no.png", "b/.a/no.png"), images):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(tmp_path / name)
    torch.save(checkpoint, tmp_path / "a.pt")
    results = predict(tmp_path / "a.pt", [tmp_path / "c.png", str(tmp_path / "b")], batch_size=2)
    files = [str(tmp_path / name) for name in ("c.png", "b/1.png", "b/a/x.PNG")]
    assert [file for file, _ in results] == files
    model, images = load_model(checkpoint, "a.pt"), images[[2, 0, 1]]
    with torch.no_grad():
        expected = model.eval()((images / 255 - 0.5) / 0.25).softmax(1).sort(descending=True)
    for (i, top), (_, same), (k, *_) in zip(predict(model, images), results, expected.indices):
        assert top[0][0] == same[0][0] == f"class {k}"
        assert [p for _, p in top + same] == pytest.approx(2 * expected.values[i, :5].tolist())
    (tmp_path / "empty").mkdir()
    for name, reason in (("none.jpg", "cannot be read"), ("empty", "a folder without images")):
        with pytest.raises(UserError, match=rf"/{name}: {reason}"):
            predict(model, [tmp_path / name])

def test_predictions_are_written(checkpoint, run_evaluate, cifar_dir, tmp_path, capsys):
    image, out = load_data("cifar10", cifar_dir).test.images[0], tmp_path / "out"
    to_pil_image(image).save(tmp_path / "0.png")
    (tmp_path / "0.1 seconds").mkdir()
    (tmp_path / "0.1 seconds/1.HEIC").touch()
    flags = "--csv", out / "a.csv", "--save", out, "--features", out / "f.png", "--json"
    with pytest.raises(SystemExit, match=r"^0$"):
        run_evaluate(checkpoint, *map(str, (tmp_path / "0.png", tmp_path, *flags)))
    assert "passed over .heic, .pt; convert" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["00001_0.png", "00002_0.png", "a.csv", "f.png"]
    _, (name, found, probability), _ = csv.reader((out / "a.csv").open())
    top = predict(load_model(checkpoint, "a.pt"), image[None])[0][1][0]
    assert (name, found) == (str(tmp_path / "0.png"), top[0])
    assert float(probability) == pytest.approx(top[1]) and Image.open(out / "f.png").width > 800

def test_an_evaluation_is_in_float32(checkpoint, run_evaluate, monkeypatch):
    """Whatever accelerate launch was set to, and though PyTorch lets convolutions round to tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = run_evaluate(checkpoint, "--json")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_evaluate(checkpoint, "--json") == before

def test_damaged_files_are_refused_by_name(tmp_path):
    """torch.load alone reads a flipped bit as another weight, or raises a RuntimeError."""
    path, weight = tmp_path / "a.pt", torch.arange(9.0)
    torch.save({"weight": weight}, path)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(DamagedFileError):  # unless the bit has no meaning
            assert torch.equal(load_file(path)["weight"], weight), bit
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"a\.pt: damaged"):
            load_file(path)

class Exit:
    def __reduce__(self) -> tuple:
        return sys.exit, ("a file ran code",)

def test_checkpoints_run_no_code(checkpoint, tmp_path):
    for content, message in (
        (checkpoint | {"state": Exit()}, "holds objects other than tensors"),
        ([1], "not a checkpoint"),
        (checkpoint | {"format": 1}, "not a checkpoint of this version"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match=rf"a\.pt: {message}"):
            load_checkpoint(tmp_path / "a.pt")

def test_weights_that_do_not_fit_are_named(checkpoint):
    weight = checkpoint["model"]["fc.weight"]
    for change, message in (
        ({"fc.weight": weight * torch.nan}, r"fc\.weight is not finite"),
        ({"fc.weight": weight[:5]}, r"fc\.weight is \(5, .*\), expected \(10, .*\)"),
        ({"odd": weight}, "odd is not the model's"),
    ):
        with pytest.raises(UserError, match=rf"a\.pt: 1 weights do not fit the model: {message}"):
            load_model(checkpoint | {"model": checkpoint["model"] | change}, "a.pt")

def test_a_model_from_a_checkpoint_gives_the_logits_of_the_one_that_was_saved(checkpoint):
    """Though its config is not that of its name."""
    fields = {"channels": (16, 24, 32, 48), "k": 2, "tail_shortcut": "repeat", "bridge": "none"}
    source = create_model("fishnet_tiny", **fields).eval()
    content = checkpoint | {"config": vars(source.config), "model": source.state_dict()}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_model(content, "a.pt").eval()(images), source(images))

def test_the_weights_that_ship_know_pictures_and_their_size():
    path = ROOT / "weights/fishnet_tiny_cifar10.pt"
    assert path.stat().st_size < 8e6
    found = predict(path, [ROOT / "docs/cat.jpg", ROOT / "docs/horse.png"])
    assert [top[0][0] for _, top in found] == ["cat", "horse"]
