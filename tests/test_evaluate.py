"""evaluate.py: every image counted once, against numpy; checkpoints that are not ones; the command."""

import json
import math
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, start_python
from PIL import Image
from torch import nn

import evaluate as evaluation
from data import BatchTransform, ImageSet, load_data
from evaluate import evaluate, load_checkpoint, load_model, predict
from fishnet import create_model, load_pretrained
from train import newest_checkpoint

SIZES, BATCHES = (1, 2, 7, 9, 999), (1, 3, 64)


class Linear(nn.Module):
    """Logits from pixels by one seeded matrix: the same in numpy below."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        weight = np.random.RandomState(1).standard_normal((classes, 3 * 4 * 4)).astype(np.float32)
        self.weight = nn.Parameter(torch.from_numpy(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.T


def images(count: int, classes: int) -> ImageSet:
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (count, 3, 4, 4)).astype(np.uint8)
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(rng.randint(0, classes, count)))


def counted(accelerator: Accelerator, count: int, batch_size: int, classes: int = 12) -> list:
    transform = BatchTransform((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = Linear(classes).to(accelerator.device)
    m = evaluate(accelerator, model, images(count, classes), transform, classes, batch_size)
    hits = [round(error * n) for error, n in zip(m.class_errors, m.class_images)]
    return [m.images, round(m.top1_error * count), round(m.top5_error * count), list(m.class_images), hits, m.loss]


def by_numpy(count: int, classes: int = 12) -> list:
    data = images(count, classes)
    x = ((data.images.numpy() / 255 - 0.5) / 0.25).reshape(count, -1)
    logits = x @ np.random.RandomState(1).standard_normal((classes, 48)).astype(np.float32).T.astype(np.float64)
    labels = data.labels.numpy()
    rank = (logits > logits[np.arange(count), labels][:, None]).sum(1)  # how many classes come before the right one
    per_class = [int((labels == c).sum()) for c in range(classes)]
    misses = [int((rank[labels == c] > 0).sum()) for c in range(classes)]
    loss = (np.log(np.exp(logits).sum(1)) - logits[np.arange(count), labels]).mean()
    return [count, int((rank > 0).sum()), int((rank > 4).sum()), per_class, misses, loss]


def test_every_image_is_counted_once(tmp_path):
    """On one process; on three, whose shares differ and may be empty."""
    script = f"""
import sys, json
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_evaluate import *
accelerator = Accelerator()
assert accelerator.num_processes == 3
results = [[n, b, counted(accelerator, n, b)] for n in SIZES for b in BATCHES]
if accelerator.is_main_process:
    open("results.json", "w").write(json.dumps(results))
evaluation.leave(accelerator)
"""
    (tmp_path / "script.py").write_text(script)
    process = start_python(3, "script.py", cwd=tmp_path)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    results = json.loads((tmp_path / "results.json").read_text())
    results += [[n, b, counted(Accelerator(cpu=True), n, b)] for n in SIZES for b in BATCHES]
    assert len(results) == 2 * len(SIZES) * len(BATCHES)
    for count, _, result in results:
        expected = by_numpy(count)
        assert result[:5] == expected[:5]
        assert result[5] == pytest.approx(expected[5], rel=1e-5)


def test_top5_with_three_classes_and_mode_is_kept():
    model = Linear(3).train()
    m = evaluate(Accelerator(cpu=True), model, images(20, 3), BatchTransform((0, 0, 0), (1, 1, 1)), 3)
    assert m.top5_error == 0 and model.training


def test_modules_are_left_in_the_mode_that_they_had():
    model = nn.Sequential(nn.BatchNorm2d(3), Linear(3)).train()
    model[0].eval()  # frozen for fine-tuning
    evaluate(Accelerator(cpu=True), model, images(20, 3), BatchTransform((0, 0, 0), (1, 1, 1)), 3)
    assert [module.training for module in model] == [False, True]
    predict(Accelerator(cpu=True), model, images(1, 3).images[0], BatchTransform((0, 0, 0), (1, 1, 1)), list("abc"))
    assert [module.training for module in model] == [False, True]


def test_a_class_without_images_has_no_errors():
    one = ImageSet(images(8, 3).images, torch.full((8,), 2))
    m = evaluate(Accelerator(cpu=True), Linear(3), one, BatchTransform((0, 0, 0), (1, 1, 1)), 3, batch_size=7)
    assert m.class_images == (0, 0, 8) and m.class_errors[:2] == (0, 0) and m.class_errors[2] == m.top1_error


@pytest.fixture(scope="module")
def checkpoint() -> dict:
    torch.manual_seed(0)
    model = create_model("fishnet_tiny")
    return {
        "format": 1, "name": "fishnet_tiny", "config": vars(model.config), "model": model.state_dict(),
        "classes": [f"class {i}" for i in range(10)], "mean": [0.5] * 3, "std": [0.25] * 3, "state": {},
        "args": {"dataset": "cifar10", "data_dir": "data", "val_fraction": 0.2, "seed": 0},
    }  # fmt: skip


def test_command(checkpoint, cifar_dir, tmp_path, monkeypatch, capsys):
    torch.save(checkpoint, tmp_path / "a.pt")
    arguments = ["evaluate.py", str(tmp_path / "a.pt"), "--data-dir", str(cifar_dir)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    evaluation.main()
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == sum(result["class_images"].values()) == 37 and set(result) == {
        "top1_error", "top5_error", "loss", "images", "tta", "class_errors", "class_images",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*arguments, "--split", "val"])
    evaluation.main()
    out = capsys.readouterr().out
    assert "on 48 val images" in out and "class 9" in out

    checkpoint = checkpoint | {"classes": ["cat"] * 10}
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(SystemExit, match="its classes are not those of"):
        evaluation.main()

    wide = checkpoint | {"args": checkpoint["args"] | {"dataset": "folder", "image_size": 64}}
    torch.save(wide, tmp_path / "a.pt")
    monkeypatch.setattr(sys, "argv", [*arguments, "--dataset", "cifar10"])
    with pytest.raises(SystemExit, match=r"dataset=cifar10: 32 x 32 pixels; \S*a\.pt takes 64 x 64$"):
        evaluation.main()


def test_tta_averages_an_image_and_its_mirror_image(checkpoint, cifar_dir, tmp_path, monkeypatch, capsys):
    torch.save(checkpoint, tmp_path / "a.pt")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "a.pt"), "--data-dir", str(cifar_dir), "--tta"])
    evaluation.main()
    out = capsys.readouterr().out
    assert "fishnet_tiny, flip-averaged, on 37 test images" in out

    test = load_data("cifar10", cifar_dir, 0.2, 0).test
    x = (test.images.float() / 255 - 0.5) / 0.25
    model = load_model(checkpoint).eval()
    with torch.no_grad():
        logits = (model(x) + model(x[..., list(range(31, -1, -1))])) / 2
    loss = -logits.double().log_softmax(1)[range(37), test.labels].mean().item()
    assert float(re.search(r"loss (\S+)", out)[1]) == pytest.approx(loss, rel=1e-6, abs=1e-4)
    errors = (logits.argmax(1) != test.labels).double().mean().item()
    assert float(re.search(r"top-1 error (\S+)%", out)[1]) == pytest.approx(100 * errors, abs=0.01)


def test_damaged_checkpoints_are_refused_by_name(checkpoint, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(checkpoint, path)
    whole = path.read_bytes()
    load_checkpoint(path)
    weights = whole.find(checkpoint["model"]["fc.weight"].numpy().tobytes()[:64])
    assert weights > 0
    flipped = bytearray(whole)
    flipped[weights] ^= 1  # torch.load alone reads this as another weight
    for content in (bytes(flipped), whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pt: damaged, or not a checkpoint"):
            load_checkpoint(path)
    with pytest.raises(OSError, match=r"b\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r": a folder; expected a checkpoint, such as .*best\.pt"):
        load_checkpoint(tmp_path)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_checkpoints_run_no_code_and_must_have_their_keys(checkpoint, tmp_path):
    path, canary = tmp_path / "a.pt", tmp_path / "canary"
    torch.save(checkpoint | {"state": Canary(canary)}, path)
    with pytest.raises(ValueError, match=r"a\.pt"):
        load_checkpoint(path)
    assert not canary.exists()
    without = {key: value for key, value in checkpoint.items() if key != "model"}
    for wrong in (checkpoint | {"classes": "cat"}, without, [1], {"a": 1}):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=r"a\.pt: .*; expected a checkpoint of train\.py"):
            load_checkpoint(path)


def rewritten(path: Path, change, compression: int = zipfile.ZIP_STORED) -> None:
    """The archive with other records, [(name, content)], and right checksums."""
    with zipfile.ZipFile(path) as archive:
        records = change([(name, archive.read(name)) for name in archive.namelist()])
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # a name twice
        for name, content in records:
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda records: [(n, b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s." if "pkl" in n else c) for n, c in records],
         "a key in it is a tuple"),  # torch.load dies of it
        (lambda records: [*records, records[0]], "its records overlap"),
        (lambda records: [*records, ("other/data.pkl", records[0][1])], "not in one folder"),
        (lambda records: [*records, (records[0][0].replace("data.pkl", "DATA.pkl"), b"")], "its records overlap"),
        (lambda records: [(n, c[: len(c) // 2] if n.endswith("/data/0") else c) for n, c in records], "size"),
    ],
)  # fmt: skip
def test_tricks_of_an_archive_are_refused(checkpoint, tmp_path, change, reason):
    torch.save(checkpoint, tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", list)
    load_checkpoint(tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", change)
    with pytest.raises(ValueError, match=rf"a\.pt: damaged, or not a checkpoint \(.*{reason}"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_small_file_that_unpacks_to_much_is_refused(checkpoint, tmp_path):
    torch.save(checkpoint["model"] | {"zeros": torch.zeros(2**23)}, tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", list, zipfile.ZIP_DEFLATED)
    assert "zeros" in torch.load(tmp_path / "a.pt", weights_only=True)
    for load in load_checkpoint, lambda path: load_pretrained(create_model("fishnet_tiny"), path):
        with pytest.raises(ValueError, match=r"a\.pt: damaged.*compressed"):
            load(tmp_path / "a.pt")


def doubled(value: tuple, times: int = 60) -> tuple:
    """A few bytes in a pickle, 2^60 values when it is printed or compared."""
    for _ in range(times):
        value = (value, value)
    return value


def wide_weights() -> tuple[dict, dict]:
    """Config and weights of gigabytes, each of which is one number in the file."""
    with torch.device("meta"):
        model = create_model("fishnet_tiny", channels=(64, 128, 256, 2**15))
    weights = {name: torch.zeros((), dtype=x.dtype).expand(x.shape) for name, x in model.state_dict().items()}
    return vars(model.config), weights


def test_a_small_checkpoint_is_not_a_large_one(checkpoint, tmp_path):
    config, weights = wide_weights()
    shadowed = create_model("fishnet_tiny").state_dict()
    shadowed.keys = 1
    numbers, letters = torch.zeros(9), "a" * 2**20
    checkpoint = checkpoint | {"model": {}}  # and so each file is small
    for change, reason in [
        ({"config": checkpoint["config"] | {"preact": doubled(())}}, "values"),
        ({"config": checkpoint["config"] | {"structure": [letters] * 99}}, "letters"),
        ({"args": checkpoint["args"] | {"augment": doubled(())}}, "values"),
        ({"state": {"sums": doubled((0.5,), 40)}}, "values"),
        ({"state": {"sums": [{letters: 1} for _ in range(99)]}}, "letters"),
        ({"config": config, "model": weights}, "one number in it stands for many"),
        ({"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(()).expand(2**35)}}}}, "one number"),
        ({"model": {"a": numbers[:5], "b": numbers[4:]}}, "two tensors in it share"),
        ({"state": checkpoint["state"] | {"sums": numbers}}, "wrong or missing: state;"),
        ({"args": checkpoint["args"] | {"lr": numbers}}, "wrong or missing: args;"),
        ({"config": checkpoint["config"] | {"num_classes": numbers}}, "wrong or missing: config;"),
        ({"model": shadowed}, "attributes"),
    ]:
        torch.save(checkpoint | change, tmp_path / "a.pt")
        assert (tmp_path / "a.pt").stat().st_size < 2**23
        with pytest.raises(ValueError, match=rf"a\.pt: .*{reason}"):
            load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("shape", [(3 * 10**8, "a"), (10**7, [None]), (1,) * 9])
def test_a_shape_that_costs_more_than_its_file_is_refused(shape):
    tensor = evaluation.pickled_names()["torch._utils _rebuild_tensor_v2"]
    with pytest.raises(ValueError, match="one number in it stands for many"):
        tensor(10**9, 0, shape)


def test_what_lies_before_an_archive_is_refused(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"PK\3\4" + (tmp_path / "a.pt").read_bytes())
    with pytest.raises(ValueError, match=r"b\.pt: damaged.*something lies before its first record"):
        load_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize("key, value", [("seed", 2**63), ("seed", -1), ("mean", [math.nan] * 3), ("std", [0.0] * 3)])
def test_numbers_that_no_run_has_are_refused(checkpoint, tmp_path, key, value):
    where = checkpoint["args"] if key == "seed" else {}
    torch.save(checkpoint | {key: value, "args": where | {key: value}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt: wrong or missing: .*{key}"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"channels": (2**40,) * 4}, {"tail_depths": (10**9, 1, 1, 1)}, {"stem_depth": 10**9}, {"k": "2"}, {"odd": 1},
        {"k": 3}, {"transfer_depths": (10**9,) * 7},
        {"structure": "paper", "stem_stride": 4, "transfer_depths": (10**9, 1, 1, 1, 1, 1)},
    ],
)  # fmt: skip
def test_a_config_that_is_no_network_is_refused(checkpoint, change):
    with pytest.raises(ValueError, match=r"checkpoint: its config does not fit \(.*\)$"):
        load_model(checkpoint | {"config": checkpoint["config"] | change})


def test_a_disk_that_fails_is_no_damaged_checkpoint(checkpoint, tmp_path, monkeypatch):
    if Path("/proc/self/mem").exists():
        (tmp_path / "last.pt").symlink_to("/proc/self/mem")  # whose first bytes are an I/O error
        with pytest.raises(OSError, match=r"Input/output error: '\S*last\.pt'"):
            newest_checkpoint(tmp_path)
        with pytest.raises(OSError, match=r"Input/output error: '\S*last\.pt'"):
            load_pretrained(create_model("fishnet_tiny"), tmp_path / "last.pt")
        assert (tmp_path / "last.pt").is_symlink()  # not left aside as damaged
    torch.save(checkpoint, tmp_path / "a.pt")
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(evaluation, "read_archive", lambda path, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            load_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_from_before_a_field_means_its_default(checkpoint, tmp_path):
    """The stem had two bottlenecks before it had a depth, fishnet_tiny's too."""
    model = create_model("fishnet_tiny", stem_depth=2)
    config = {name: value for name, value in vars(model.config).items() if name != "stem_depth"}
    torch.save(checkpoint | {"config": config, "model": model.state_dict()}, tmp_path / "a.pt")
    assert load_model(load_checkpoint(tmp_path / "a.pt")).config == model.config


def test_float32_is_float32(checkpoint, cifar_dir, tmp_path, monkeypatch, capsys):
    """PyTorch lets a GPU's convolutions round to 10 bits; training without tf32 does not, nor may its evaluation.

    Nor does that depend on what accelerate launch was set to.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.save(checkpoint, tmp_path / "a.pt")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "a.pt"), "--data-dir", str(cifar_dir), "--json"])
    evaluation.main()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    AcceleratorState._reset_state(reset_partial_state=True)
    before = capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    evaluation.main()
    assert capsys.readouterr().out == before


def test_outputs_that_are_not_finite_are_no_result(checkpoint, cifar_dir, tmp_path, monkeypatch):
    weights = checkpoint["model"] | {"fc.weight": torch.full_like(checkpoint["model"]["fc.weight"], 3e38)}
    torch.save(checkpoint | {"model": weights}, tmp_path / "a.pt")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    for flags in (["--data-dir", str(cifar_dir), "--json"], [str(tmp_path / "red.png")]):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "a.pt"), *flags])
        with pytest.raises(SystemExit, match=r"^evaluate\.py: \S*a\.pt: .* not finite$"):
            evaluation.main()


def test_another_split_than_the_runs_is_refused(checkpoint, cifar_dir, tmp_path, monkeypatch):
    torch.save(checkpoint | {"images": {"train": 100, "val": 20}}, tmp_path / "a.pt")
    arguments = ["evaluate.py", str(tmp_path / "a.pt"), "--data-dir", str(cifar_dir)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--split", "val"])
    with pytest.raises(SystemExit, match="what is val now may have been trained on"):
        evaluation.main()


def test_only_a_checkpoint_is_required(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises(SystemExit):
        evaluation.main()
    assert capsys.readouterr().err.endswith("the following arguments are required: checkpoint\n")


def test_weights_that_do_not_fit_are_named(checkpoint):
    weights = checkpoint["model"]
    nan = weights["fc.weight"].clone()
    nan[0, 0] = torch.nan
    sparse = weights["fc.weight"].to_sparse()
    for name, value in (
        ("fc.weight", sparse), ("fc.weight", nan), ("fc.weight", weights["fc.weight"][:5]), ("fc.weight", 3),
        ("odd", nan),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"checkpoint: 1 of its weights do not fit the model: {name} is "):
            load_model(checkpoint | {"model": weights | {name: value}})


def test_a_model_from_a_checkpoint_gives_the_logits_of_the_one_that_was_saved(checkpoint):
    """Its config is not that of the name."""
    overrides = {"channels": (16, 24, 32, 48), "k": 2, "tail_shortcut": "repeat", "bridge": "none"}
    source = create_model("fishnet_tiny", **overrides).eval()
    content = checkpoint | {
        "name": "fishnet_tiny", "config": vars(source.config), "model": source.state_dict(),
    }  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_model(content).eval()(images), source(images))


def test_the_last_of_several_processes_ends_with_one_line():
    class Alone:
        def wait_for_everyone(self):
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(SystemExit, match="another process is gone before the end; what is written is whole"):
        evaluation.leave(Alone())
