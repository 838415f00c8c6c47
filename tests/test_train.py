"""Test train.py: what a run computes and writes, and that it continues exactly."""

import csv
import itertools
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import CORES, SMALL, start_python, start_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import data
import evaluate
import train
from fishnet import UserError, create_model, zero_init_last

def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)

def assert_same(a: object, b: object, where: str = "") -> None:
    """Compare bit for bit, through dicts and lists. Times and flags are left out."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        times = {"seconds", "data_seconds", "images_per_second", "data_wait", "args"}
        for key in (key for key in a.keys() - times if "speed/" not in str(key)):
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where

def read_rows(folder: Path) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))

def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return TensorBoard's curves as {tag: {step: value}}."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}

def outcome(folder: Path) -> dict:
    """Return all that an interrupted run must have in common with one that was not."""
    checkpoints = {name: load(folder / name) for name in ("last.pt", "best.pt")}
    return checkpoints | {"rows": read_rows(folder), "scalars": read_scalars(folder)}

def keep_every_step(folder: Path) -> None:
    """Copy the folder to folder-STEP after each save of last.pt from here on."""
    save = train.save

    def save_and_copy(run: train.Run, *names: str) -> None:
        save(run, *names)
        run.accelerator.wait_for_everyone()
        if "last.pt" in names and run.accelerator.is_main_process:
            copy = folder.with_name(f"{folder.name}-{run.state.step}")
            shutil.copytree(folder, copy, dirs_exist_ok=True)

    train.save = save_and_copy

def set_validation_losses(monkeypatch, *losses: float) -> None:
    none, matrix = torch.zeros(48, dtype=torch.long), torch.zeros(10, 10, dtype=torch.long)
    results = (evaluate.Metrics(loss, 0.5, 0.1, matrix, none, none.double()) for loss in losses)
    monkeypatch.setattr(train, "evaluate", lambda *_: next(results))

def test_flags_are_these():
    """A flag is a promise: adding or dropping one is a decision."""
    free = "recipe data_dir workers model_args pretrained max_steps patience compile resume"
    free += " checkpoint_activations output_dir checkpoint_every override log_every"
    bound = "dataset image_size val_fraction augment model zero_init_last epochs batch_size seed"
    bound += " grad_accum_steps opt lr weight_decay sched decay_epochs warmup_epochs smoothing"
    bound += " clip_grad mixed_precision padding whiten freeze progressive_resize"
    assert set(train.FREE) == set(free.split())
    assert set(vars(train.parse_args([]))) == {*free.split(), *bound.split()}

def test_recipes_are_these():
    names = "model dataset epochs mixed_precision patience opt lr weight_decay val_fraction augment"
    names = [*names.split(), "sched", "warmup_epochs", "smoothing", "zero_init_last"]
    slides = ["fishnet99", "cifar10", 100, None, 20, "adam", 1e-2, 1e-4, 0.2, "slides", "step"]
    strong = ["fishnet99", "cifar10", 30, "auto", 0, "muon", 0.05, 0.01, 0.1, "standard", "cosine"]
    expected = {"baseline": [*slides, 0, 0, False], "strong": [*strong, 2, 0.1, True]}
    for recipe, values in expected.items():
        args = train.parse_args(["--recipe", recipe])
        assert [getattr(args, name) for name in names] == values
    args = train.parse_args(["--recipe", "strong", "--model-args", "k=1", "bridge=none"])
    assert args.model_args == {"final_norm": True, "k": 1, "bridge": "none"}

def test_learning_rates():
    args = train.parse_args([])  # a tenth every 30 epochs
    rates = [train.compute_lr(args, epoch * 156, 156) for epoch in (0, 29, 30, 59, 60, 99)]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-5])
    flags = "--sched cosine --epochs 10 --warmup-epochs 2 --lr 0.4"
    rates = [train.compute_lr(train.parse_args(flags.split()), step, 5) for step in range(50)]
    np.testing.assert_allclose(rates[:10], 0.4 * np.arange(1, 11) / 11)
    np.testing.assert_allclose(rates[10:], 0.2 * (1 + np.cos(np.pi * np.arange(40) / 40)))

def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    """A shell leaves the ~ of --data-dir=~/data alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = "data-dir", "output-dir", "resume", "pretrained"
    args = train.parse_args([f"--{name}=~/x" for name in names])
    assert {getattr(args, name.replace("-", "_")) for name in names} == {f"{tmp_path}/x"}
    torch.save({"a": 1}, tmp_path / "a.pt")
    assert evaluate.load_file("~/a.pt") == {"a": 1}

def orthogonalize_by_svd(x: np.ndarray) -> np.ndarray:
    u, values, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    values = values / max(np.linalg.norm(values), 1e-12)
    for _ in range(3):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return u * values @ v

@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16)])
def test_orthogonalize_changes_singular_values_alone(shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e-3
    matrices = [*x, x[0].T]  # shapes may differ
    results = train.orthogonalize(matrices)
    for result, matrix in zip(results, matrices):
        np.testing.assert_allclose(result, orthogonalize_by_svd(matrix.numpy()), rtol=0, atol=1e-5)
    assert not train.orthogonalize([torch.zeros(shape)])[0].any()
    if shape != (16, 16):  # whose smallest singular value is too small for three steps
        values = torch.cat([torch.linalg.svdvals(result) for result in results])
        assert values.min() > 0.68 and values.max() < 1.21

def test_muon_orthogonalizes_convolutions_and_is_sgd_for_the_rest():
    torch.manual_seed(0)
    shapes = (3, 32, 3), (32, 8, 3), (8, 16, 1), (16, 16, 1), (16, 16, 1), (16, 16, 1)
    layers = [layer for shape in shapes for layer in (nn.Conv2d(*shape), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 4))
    model = model.to(memory_format=torch.channels_last)
    args = train.parse_args(["--opt", "muon", "--lr", "0.1", "--weight-decay", "0.5"])
    optimizer = train.make_optimizer(args, model)
    convs = [p for p in model.parameters() if p.ndim == 4]
    convs[5].requires_grad_(False)  # which must leave it as it is
    others = [p for p in model.parameters() if p.ndim != 4]
    twins = [p.detach().clone().requires_grad_() for p in others]
    sgd = torch.optim.SGD(twins, 0.1, 0.9, nesterov=True)
    expected = [p.detach().double().numpy().reshape(len(p), -1) for p in convs]
    momenta = [0.0] * 5
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        for i, scale in enumerate(((32 / 27) ** 0.5, 1, 2**0.5, 1, 1)):
            gradient = convs[i].grad.numpy().reshape(expected[i].shape)
            momenta[i] = 0.9 * momenta[i] + gradient
            update = scale * orthogonalize_by_svd(gradient + 0.9 * momenta[i])
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * update
        for twin, parameter in zip(twins, others):
            twin.grad = parameter.grad.clone()
        optimizer.step()
        sgd.step()
    for conv, matrix in zip(convs, expected):
        found = conv.detach().numpy().reshape(matrix.shape)
        np.testing.assert_allclose(found, matrix, rtol=0, atol=1e-4)
    torch.testing.assert_close(others, twins)

def test_adamw_decays_matrices_alone():
    args = train.parse_args(["--opt", "adamw", "--weight-decay", "0.5"])
    optimizer = train.make_optimizer(args, create_model("fishnet_tiny"))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert all(group["weight_decay"] == (0.5 if p.ndim > 1 else 0) for p in group["params"])

@pytest.mark.parametrize("opt", ["sgd", "adam"])
def test_a_run_is_this_loop(run_train, cifar_dir, tmp_path, opt):
    """Eighteen steps written straight down: their order, draws, rates, gradients and updates."""
    flags = ["--epochs", "3", "--seed", "3", "--smoothing", "0.1", "--clip-grad", "1"]
    flags += ["--augment", "slides", *["--progressive-resize"] * (opt == "adam")]
    run_train(tmp_path, *flags, "--opt", opt)
    loaded = data.load_data("cifar10", cifar_dir, 0.2, 3)
    torch.manual_seed(3)
    model = create_model("fishnet_tiny", **train.parse_args(SMALL).model_args)
    model = model.to(memory_format=torch.channels_last)
    zero_init_last(model)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=5e-4)
    if opt == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), 1, 0.9, weight_decay=5e-4, nesterov=True)
    transform = data.make_transform(loaded.mean, loaded.std, "slides", loaded.train)
    losses, norms = [], {stage: {} for stage, m in model.named_children() if list(m.parameters())}
    for step in range(18):
        epoch, i = divmod(step, 6)  # 192 images in batches of 32
        with data.seeded(3, epoch):
            order = torch.randperm(192)[32 * i : 32 * i + 32]
        with data.seeded(3, epoch, step, 0):
            images = transform(loaded.train.images[order])
        if opt == "adam":
            images = F.interpolate(images, 16 + 8 * epoch, mode="bilinear", antialias=True)
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, loaded.train.labels[order], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        for stage in norms:
            gradients = [p.grad for p in getattr(model, stage).parameters()]
            norms[stage][step + 1] = sum(g.square().sum() for g in gradients).sqrt().item()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        rate = (step + 1) / 4 if step < 3 else 0.5 * (1 + np.cos(np.pi * (step - 3) / 15))
        optimizer.param_groups[0]["lr"] = 0.02 * rate  # the first 3 steps are warm-up
        optimizer.step()
        losses.append(loss.item())
    last, scalars = load(tmp_path / "last.pt"), read_scalars(tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(last["model"][name], parameter.detach(), rtol=0, atol=1e-6)
    found = [row["train_loss"] for row in last["state"]["history"]]
    assert found == pytest.approx(np.reshape(losses, (3, 6)).mean(1), rel=1e-5)
    for stage, expected in norms.items():
        expected = {step: expected[step] for step in range(2, 19, 2)}
        assert scalars[f"gradient_norm/{stage}"] == pytest.approx(expected, rel=1e-4)

def test_cutmix_trains_on_mixed_images_and_labels(run_train, tmp_path, monkeypatch):
    mixes, calls = [], []

    class Spy(data.BatchCutMix):
        def forward(self, *batch):
            mixes.append((batch[0].clone(), *super().forward(*batch)))
            return mixes[-1][1:]

    def create_spied(*args, **overrides):
        model = create_model(*args, **overrides)
        model.register_forward_hook(lambda _, x, y: calls.append((x[0].clone(), y.detach())))
        return model

    monkeypatch.setattr(train, "BatchCutMix", Spy)
    monkeypatch.setattr(train, "create_model", create_spied)
    run_train(tmp_path, "--augment", "cutmix", "--max-steps", "1", "--smoothing", "0.1")
    (row,), (before, mixed, target), (seen, logits) = read_rows(tmp_path), mixes[0], calls[0]
    assert torch.equal(seen, mixed) and not torch.equal(seen, before)
    assert (target.amax(1) < 1).sum() > 4
    loss = -((0.9 * target + 0.1 / 10) * logits.log_softmax(1)).sum(1).mean()
    assert float(row["train_loss"]) == pytest.approx(loss.item(), rel=1e-5)
    errors = (logits.argmax(1) != target.argmax(1)).float().mean()
    assert float(row["train_top1_error"]) == pytest.approx(errors.item())

def test_two_processes_train_like_one(cifar_dir, run_train, tmp_path):
    """One process that cuts each batch in two parts normalises the same 16 images together as each
    of two processes. It updates running statistics twice a step, so these are left out. The rate
    is small, since high ones make rounding grow."""
    flags = ["--epochs", "4", "--max-steps", "20", "--lr", "2e-4", "--clip-grad", "1"]
    flags += ["--augment", "slides", "--model-args", "channels=(32, 64, 128, 256)", "k=8"]
    process = start_train(cifar_dir, tmp_path / "two", *flags, processes=2)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    run_train(tmp_path / "one", *flags, "--grad-accum-steps", "2")
    one, two = (load(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert one["state"]["step"] == two["state"]["step"] == 20
    torch.manual_seed(0)
    start = create_model("fishnet_tiny")
    for name, _ in start.named_parameters():
        torch.testing.assert_close(one["model"][name], two["model"][name], atol=1e-5, rtol=0)
    assert (one["model"]["fc.weight"] - start.fc.weight).abs().max() > 1e-4  # they trained
    for a, b in zip(one["state"]["history"], two["state"]["history"]):
        assert a["lr"] == b["lr"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)

def test_a_run_and_its_files(run_train, tmp_path):
    folder = tmp_path / "a run"
    out = run_train(folder, "--epochs", "2")
    numbers = r"loss \d\.\d\d  error \d+\.\d\d%"
    assert re.search(rf"^epoch 1/2  train {numbers}  val {numbers}  \d+ s$", out, re.M)
    assert f"python evaluate.py '{folder}/best.pt'" in out
    assert max(len(line) for line in out.splitlines() if str(folder) not in line) < 80

    last = load(folder / "last.pt")
    assert last["name"] == "fishnet_tiny" and last["classes"][3] == "class 3"
    assert (last["state"]["step"], last["state"]["epoch"]) == (12, 2)  # 192 images: 6 batches of 32
    assert_same(safetensors.torch.load(safetensors.torch.save(last["model"])), last["model"])
    assert json.loads((folder / "args.json").read_text())["batch_size"] == 32

    rows, scalars = read_rows(folder), read_scalars(folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert last["state"]["best_loss"] == min(float(row["val_loss"]) for row in rows)
    assert all(0 < float(row["data_wait"]) < 1 for row in rows)
    tags = "loss/train loss/val error/train error/val error/val_top5 lr"
    tags += " speed/images_per_second speed/data_wait"
    stages = "stem t1 t2 t3 t4 bridge b4 b3 b2 h1 h2 h3 h4 pool fc"
    tags = {*tags.split(), *(f"gradient_norm/{stage}" for stage in stages.split())}
    assert scalars.keys() == tags
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    assert {tag: len(events.Images(tag)) for tag in events.Tags()["images"]} == {
        "training images": 1, "predictions: true class, predicted class": 2, "confusion": 2,
    }  # fmt: skip
    text = events.Tensors("command/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("python ") and str(folder) in text
    results = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"weight_decay" in results and not [p for p in folder.iterdir() if p.is_dir()]
    assert list(scalars["loss/train"]) == [2, 4, 6, 8, 10, 12]
    losses = {int(row["step"]): float(row["val_loss"]) for row in rows}
    assert scalars["loss/val"] == pytest.approx(losses)

def test_the_batch_size_suits_the_number_of_images():
    args = train.parse_args(["--recipe", "strong"])
    for images, parts, size in ((50000, 1, 256), (2560, 2, 256), (2559, 1, 128), (224, 1, 16),
                                (48, 1, 8), (48, 8, 16), (48, 3, None)):  # fmt: skip
        if size:
            assert train.choose_batch_size(args, images, parts) == size
        else:
            with pytest.raises(UserError, match="batch-size=256: expected 3 parts"):
                train.choose_batch_size(args, images, parts)
    assert train.choose_batch_size(train.parse_args(["-b", "128"]), 224, 1) == 128

@pytest.mark.parametrize("features, expected", [
    ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_f": True}, "no"),
])  # fmt: skip
def test_auto_is_bf16_where_the_hardware_has_it(tmp_path, monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    flags = "--recipe", "strong", "--output-dir", str(tmp_path), "--resume", "auto"
    choose = lambda *more: train.choose_precision(train.parse_args([*flags, *more]))[0]  # noqa: E731
    assert choose() == expected and choose("--mixed-precision", "no") == "no"
    assert choose("--recipe", "baseline") == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert choose() == choose("--recipe", "baseline") == "fp16"
    (tmp_path / "args.json").write_text('{"mixed_precision": "tf32"}')  # the run began elsewhere
    assert choose() == "tf32" and choose("--recipe", "baseline") == "fp16"

def test_best_is_by_validation_loss_and_training_stops_early(run_train, tmp_path, monkeypatch):
    set_validation_losses(monkeypatch, 3.0, 2.0, 2.5, 2.1, 9.9)
    run_train(tmp_path, "--epochs", "9", "--patience", "2")
    assert load(tmp_path / "last.pt")["state"]["epoch"] == 4
    assert load(tmp_path / "best.pt")["state"]["epoch"] == 2

def test_without_validation_best_is_last(run_train, tmp_path):
    run_train(tmp_path, "--epochs", "1", "--val-fraction", "0")
    assert_same(*(load(tmp_path / name)["model"] for name in ("best.pt", "last.pt")))
    assert "val_loss" not in read_rows(tmp_path)[0]

def test_pretrained_weights_are_where_a_run_starts(run_train, tmp_path):
    source = create_model("fishnet_tiny", num_classes=7, channels=(4, 4, 4, 16), k=2)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    flags = "--lr", "0", "--pretrained", str(tmp_path / "weights.pt"), "--max-steps", "1"
    assert "the classifier is new, for 10 classes" in run_train(tmp_path / "run", *flags)
    trained = load(tmp_path / "run" / "last.pt")["model"]
    for name, parameter in source.named_parameters():
        assert name == "fc.weight" or torch.equal(parameter, trained[name]), name

def make_network(num_classes: int, channels: tuple[int, ...], k: int) -> nn.Module:
    return create_model("fishnet_tiny", num_classes=num_classes, channels=channels, k=k)

def make_mistake(**fields: object) -> nn.Module:
    raise ValueError("a mistake in the network")

def test_a_network_of_ones_own_runs_only_if_it_is_named(run_train, tmp_path, monkeypatch):
    flags = "--epochs", "2", "--model", "test_train:make_network"
    out = run_train(tmp_path, *flags, "--max-steps", "6")
    assert re.search(r"evaluate\.py \S*best\.pt --model test_train:make_network", out)
    assert "at step 6" in run_train(tmp_path, *flags, "--resume", "auto")
    command = ["evaluate.py", str(tmp_path / "best.pt"), "--split", "val"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="--model test_train:make_network"):
        evaluate.main()
    monkeypatch.setattr(sys, "argv", [*command, "--model", "test_train:make_network"])
    evaluate.main()
    (tmp_path / "broken.py").write_text("import sys\nsys.nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, error in (("test_train:make_mistake", ValueError), ("broken:make", AttributeError)):
        with pytest.raises(error, match=r"a mistake|nothing"):  # with its traceback
            run_train(tmp_path / "new", "--model", name)

@pytest.mark.parametrize("opt, workers, steps", [
    ("sgd", "0", range(1, 10)), ("sgd", "2", [4]), ("sgd --mixed-precision bf16", "0", [5]),
    ("adam", "0", [5]), ("adamw", "0", [5]), ("muon", "0", [5]),
])  # fmt: skip
def test_resume_from_every_step_is_exact(
    run_train, tiny_dir, tmp_path, monkeypatch, opt, workers, steps
):
    """Compare weights, optimizer, metrics.csv and curves of three epochs of three steps."""
    flags = ["-b", "20", "--epochs", "3", "--checkpoint-every", "1", "--workers", workers]
    flags += ["--data-dir", str(tiny_dir), "--opt", *opt.split()]
    monkeypatch.setattr(train, "save", train.save)  # so that undo restores it
    keep_every_step(tmp_path / "run")
    run_train(tmp_path / "run", *flags)
    monkeypatch.undo()
    expected = outcome(tmp_path / "run")
    assert list(expected["scalars"]["loss/train"]) == [2, 3, 4, 6, 8, 9]
    for step in steps:
        out = run_train(tmp_path / f"run-{step}", *flags, "--resume", "auto")
        assert f"at step {step}," in out
        assert_same(expected, outcome(tmp_path / f"run-{step}"))

def test_resume_of_two_processes_is_exact(run_train, tiny_dir, tmp_path, monkeypatch, capsys):
    flags = ["-b", "20", "--opt", "muon", "--epochs", "2", "--checkpoint-every", "1", "--seed", "2"]
    flags += ["--data-dir", str(tiny_dir)]
    (tmp_path / "script.py").write_text("""
from test_train import Path, keep_every_step, train
keep_every_step(Path("run"))
train.main()
""")

    def run(folder, *more):
        arguments = "script.py", *SMALL, *flags, "--output-dir", folder, *more
        process = start_python(2, *arguments, cwd=tmp_path)
        out = process.communicate(timeout=300)[0]
        assert process.returncode == 0, out
        return out

    run("run")
    shutil.copytree(tmp_path / "run-5", tmp_path / "alone")
    assert "resumed run-4/last.pt at step 4, epoch 2" in run("run-4", "--resume", "auto")
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "run-4"))
    # evaluate.py finds the errors of the run, with the first process's batch norm.
    path = tmp_path / "run" / "last.pt"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(path), "--split", "val", "--json"])
    evaluate.main()
    found, row = json.loads(capsys.readouterr().out), load(path)["state"]["history"][-1]
    assert found["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
    assert [found[f"top{k}_error"] for k in (1, 5)] == [row[f"val_top{k}_error"] for k in (1, 5)]

    # One process continues with the sums of both, and does the same step, except for rounding.
    more = "--resume", "auto", "--grad-accum-steps", "2", "--override"
    assert "alone/last.pt at step 5, epoch 2" in run_train(tmp_path / "alone", *flags, *more)
    one = load(tmp_path / "alone" / "last.pt")["state"]["history"][-1]
    assert one["train_top1_error"] == row["train_top1_error"]
    assert one["train_loss"] == pytest.approx(row["train_loss"], rel=1e-4)

def test_resume_after_signals_is_exact(run_train, tmp_path, monkeypatch):
    run_train(tmp_path / "whole", "--epochs", "2")
    for call in (6, 1, 5):  # each step asks once
        answers = iter([0] * (call - 1) + [15])
        answer = lambda *_, answers=answers: next(answers)  # noqa: E731
        monkeypatch.setattr(train.StopSignal, "agree", answer)
        with pytest.raises(SystemExit) as stop:
            run_train(tmp_path / "parts", "--epochs", "2", "--resume", "auto")
        assert stop.value.code == 143
        monkeypatch.undo()
    run_train(tmp_path / "parts", "--epochs", "2", "--resume", "auto")
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))

def test_times_of_an_epoch_survive_a_resume(run_train, tmp_path, monkeypatch):
    """By a clock that moves on by a second whenever it is read."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__, strftime=time.strftime)
    monkeypatch.setattr(train, "time", clock)
    run_train(tmp_path / "whole", "--epochs", "1")
    for steps in ("4", "0"):
        run_train(tmp_path / "parts", "--epochs", "1", "--resume", "auto", "--max-steps", steps)
    (row,), (again,) = read_rows(tmp_path / "whole"), read_rows(tmp_path / "parts")
    assert row == again
    assert float(row["images_per_second"]) * float(row["seconds"]) == pytest.approx(6 * 32)

@pytest.mark.parametrize("flags", [(), ("--max-steps", "9")], ids=["epochs", "max-steps"])
@pytest.mark.parametrize("failing", ["evaluate", "log_epoch"])
def test_an_evaluation_that_fails_loses_no_step(run_train, tmp_path, monkeypatch, failing, flags):
    """The second one fails, before or after TensorBoard has its result."""
    flags = "--epochs", "2", *flags, "--resume", "auto"
    run_train(tmp_path / "whole", *flags)
    function, calls = getattr(train, failing), itertools.count(1)

    def fail_once(*args):
        result = function(*args)
        if next(calls) == 2:
            raise UserError("no disk")
        return result

    monkeypatch.setattr(train, failing, fail_once)
    with pytest.raises(SystemExit, match="no disk"):
        run_train(tmp_path / "parts", *flags)
    step = 9 if "--max-steps" in flags else 12
    for _ in range(2):  # until nothing is left to do, and once more
        assert f"last.pt at step {step}" in run_train(tmp_path / "parts", *flags)
        assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))

def test_resume_with_other_settings_is_refused(run_train, tmp_path):
    run_train(tmp_path / "run", "--epochs", "1")
    resume = "--resume", str(tmp_path / "run" / "last.pt")
    for more, message in (
        (("--epochs", "2"), r"settings: epochs 1 -> 2; repeat them, or add --override"),
        (("--model-args", "bridge=none"), "settings: bridge se -> none; "),
        (("--override", "--opt", "adam"), "has other --opt: start a run with it as --pretrained"),
        (("--override", "--freeze", "tail"), "has other --freeze: start a run"),
        (("--override", "-b", "16"), "has other epoch length: start a run"),
        (("--override", "--model-args", "bridge=none"), "do not fit the model"),
    ):
        with pytest.raises(SystemExit, match=rf"last\.pt.*{message}"):
            run_train(tmp_path / "refused", "--epochs", "1", *resume, *more)
    assert not (tmp_path / "refused").exists()
    old = load(tmp_path / "run" / "last.pt")
    del old["args"]["whiten"]  # a flag that did not exist then
    torch.save(old, tmp_path / "run" / "last.pt")
    run_train(tmp_path / "run", "--resume", "auto", "--epochs", "1")
    more = "--override", "--epochs", "2", "--weight-decay", "0.125"
    run_train(tmp_path / "run", "--resume", "auto", *more)
    last = load(tmp_path / "run" / "last.pt")
    assert last["state"]["step"] == 12
    assert last["optimizer"]["param_groups"][0]["weight_decay"] == 0.125

@pytest.mark.parametrize("flags, message", [
    ("--batch-size 30 --grad-accum-steps 4", "batch-size=30: expected 4 parts"),
    ("--batch-size 5000", "batch-size=5000: expected at most 192"),
    ("--lr nan", "lr=nan: expected"),
    ("--output-dir /dev/null/run", "/dev/null/run: Not a directory"),
    ("--mixed-precision fp16", "mixed-precision=fp16: use bf16 or no on a CPU"),
    ("--resume nothing.pt", "nothing.pt: No such file"),
    ("--resume /dev", "/dev: Is a directory"),
    ("--pretrained nothing.pt", "nothing.pt: No such file"),
    ("--model-args k=5", "k=5: expected a divisor"),
    ("--model-args depth=5", "depth: not a field of FishNetConfig"),
    ("--model-args num_classes=5", "num_classes is the dataset's"),
    ("--freeze neck", "freeze=neck: the network has no part 'neck'"),
    ("--whiten --pretrained a.pt", "--pretrained would replace these filters"),
    ("--progressive-resize --model-args stem_stride=4", "a multiple of 128 with --progressive"),
    ("--model no_such_module:make", "no_such_module"),
    ("--model test_train:nothing", "nothing"),
    ("--data-dir /dev/null", "/dev/null"),
])  # fmt: skip
def test_bad_arguments_are_one_line_and_leave_no_folder(run_train, tmp_path, flags, message):
    with pytest.raises(SystemExit) as error:
        run_train(tmp_path / "run", *flags.split())
    text = str(error.value)
    assert text.startswith("train.py: ") and message in text and "\n" not in text
    assert not (tmp_path / "run").exists()

def test_a_run_may_continue_in_another_folder(run_train, tmp_path, monkeypatch):
    set_validation_losses(monkeypatch, 2.0, 3.0)
    run_train(tmp_path / "a", "--epochs", "2", "--max-steps", "6")
    run_train(tmp_path / "b", "--epochs", "2", "--resume", str(tmp_path / "a" / "last.pt"))
    assert not (tmp_path / "b" / "best.pt").exists()  # the best epoch was before
    run_train(tmp_path / "c", "--epochs", "2", "--resume", str(tmp_path / "b" / "last.pt"))
    assert load(tmp_path / "c" / "last.pt")["state"]["step"] == 12  # though nothing was left to do
    for flags in ((), ("--resume", str(tmp_path / "a" / "last.pt"))):
        with pytest.raises(SystemExit, match="b: holds a run; add --resume auto"):
            run_train(tmp_path / "b", *flags)

def test_a_run_names_its_folder_and_continues_there(cifar_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train.py", *SMALL, "--data-dir", str(cifar_dir), "--max-steps"]
    monkeypatch.setattr(sys, "argv", [*command, "1"])
    train.main()
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"fishnet_tiny-cifar10-\d{8}-\d{6}", folder.name)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", [*command, "2", "--resume", str(folder / "last.pt")])
    train.main()
    assert load(folder / "last.pt")["state"]["step"] == 2
    assert list((tmp_path / "runs").iterdir()) == [folder]

def test_checkpointed_activations_train_to_the_same_bits(run_train, tmp_path, monkeypatch):
    calls, original = [], train.checkpoint_activations
    monkeypatch.setattr(train, "checkpoint_activations", lambda m: calls.append(original(m)))
    run_train(tmp_path / "kept", "--max-steps", "3")
    run_train(tmp_path / "again", "--max-steps", "3", "--checkpoint-activations")
    assert_same(*(load(tmp_path / name / "last.pt") for name in ("kept", "again")))
    assert len(calls) == 1
    assert "at step 3" in run_train(tmp_path / "again", "--max-steps", "4", "--resume", "auto")

def test_compile_changes_nothing_and_happens_once(run_train, tmp_path, monkeypatch):
    tail_alone = "body_depths=()", "head_depths=()", "transfer_depths=()"
    flags = "--epochs", "2", "--model-args", *tail_alone
    run_train(tmp_path / "eager", *flags)
    run = nn.Module.compile  # with a backend that takes minutes less
    monkeypatch.setattr(nn.Module, "compile", lambda m, mode, dynamic: run(m, backend="eager"))
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        run_train(tmp_path / "compiled", *flags, "--compile")
    assert_same(*(load(tmp_path / name / "last.pt") for name in ("compiled", "eager")))
    assert "gradient_norm/b4" not in read_scalars(tmp_path / "eager")

def test_accelerate_launch(cifar_dir, tmp_path):
    """Its compiler is not used, because it would change the names of the weights."""
    launch = "-m", "accelerate.commands.launch", "--dynamo_backend", "eager", "train.py"
    flags = [*SMALL, "--data-dir", cifar_dir, "--output-dir", tmp_path / "run", "--max-steps", 1]
    process = start_python(1, *launch, *flags)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    assert "fc.weight" in load(tmp_path / "run" / "last.pt")["model"]

def test_processes_on_the_cpu_see_no_gpu_and_must_know_of_each_other(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **_: None)
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun sets these
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"2 processes .*: set ACCELERATE_USE_CPU=true"):
        train.prepare_machine("no")
    monkeypatch.delenv("LOCAL_RANK")
    values = {"WORLD_SIZE": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "0"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    train.prepare_machine("no")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # accelerate launch --num_processes 2
    monkeypatch.setenv("MASTER_PORT", "29500")  # sets these on a CPU, and starts one process
    with pytest.raises(UserError, match="started one process: use torchrun"):
        train.prepare_machine("no")

def test_a_gpu_is_deterministic_and_rounds_only_with_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    for precision, tf32 in (("tf32", True), ("no", False)):
        train.prepare_machine(precision)
        assert torch.backends.cudnn.deterministic
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
        AcceleratorState._reset_state(reset_partial_state=True)

@pytest.mark.skipif(not CORES, reason="no sched_setaffinity")
def test_all_cores_work_although_accelerate_launch_asks_for_one(monkeypatch, one_thread):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        for processes in (1, len(CORES)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
            train.prepare_machine("no")
            assert torch.get_num_threads() == len(CORES) // processes
    finally:
        os.sched_setaffinity(0, mine)

@pytest.mark.parametrize("flag", ["max-steps", "patience", "log-every", "checkpoint-every", "lr"])
def test_processes_that_would_wait_for_one_another_are_refused(cifar_dir, monkeypatch, flag):
    found, flags = [], [*SMALL, "--data-dir", str(cifar_dir)]
    monkeypatch.setattr(train, "gather_object", lambda own: found.extend(own) or found)
    process = SimpleNamespace(is_local_main_process=True)
    train.load_same_data(train.parse_args([*flags, "--workers", "2"]), process)
    train.load_same_data(train.parse_args(flags), process)
    with pytest.raises(UserError, match="have different flags"):
        train.load_same_data(train.parse_args([*flags, f"--{flag}", "7"]), process)

def test_whitening_makes_patches_white_and_stays_so(run_train, cifar_dir, tmp_path):
    run_train(tmp_path, "--whiten", "--max-steps", "2", "--model-args", "channels=(64,4,4,16)")
    loaded = data.load_data("cifar10", cifar_dir, 0.2, 0)
    images = data.make_transform(loaded.mean, loaded.std)(loaded.train.images)
    weight = load(tmp_path / "last.pt")["model"]["stem.0.weight"]
    outputs = F.conv2d(images, weight, stride=3).transpose(0, 1).flatten(1)  # (64, patches)
    products = outputs @ outputs.T / outputs.shape[1]
    expected = torch.eye(27)
    torch.testing.assert_close(products[:27, :27], expected, atol=0.02, rtol=0)
    torch.testing.assert_close(products[27:54, :27], -expected, atol=0.02, rtol=0)
