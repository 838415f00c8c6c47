"""train.py: what a run writes, that it continues exactly, that processes do not change it, that errors are one line."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import CORES, ROOT, SMALL, start_python, start_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import data
import evaluate
import train
from evaluate import Metrics
from fishnet import create_model, zero_init_last


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(a: object, b: object, where: str = "") -> None:
    """Bit for bit, through dicts and lists; times and what follows from them aside."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds", "images_per_second", "data_wait", "args"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def outcome(folder: Path) -> dict:
    """All that a run which was interrupted has in common with one that was not."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {"last": load(folder / "last.pt"), "best": load(folder / "best.pt"), "rows": rows, "scalars": scalars}


def keep_every_step(folder: Path) -> None:
    """From here on each save of last.pt is followed by a copy of the folder, folder-STEP."""
    save = train.save

    def keeping(run: train.Run, *names: str, **keep_as: str | None) -> None:
        save(run, *names, **keep_as)
        run.accelerator.wait_for_everyone()
        if "last.pt" in names and run.accelerator.is_main_process:
            shutil.copytree(folder, folder.with_name(f"{folder.name}-{run.state.step}"), dirs_exist_ok=True)

    train.save = keeping


def test_flags_are_these():
    """A flag is a promise: adding or dropping one is a decision."""
    flags = set(vars(train.parse_args([])))
    assert flags == {
        "recipe", "dataset", "data_dir", "image_size", "val_fraction", "augment", "workers", "model", "model_args",
        "pretrained", "zero_init_last", "epochs", "max_steps", "batch_size", "grad_accum_steps", "opt", "lr",
        "weight_decay", "sched", "decay_epochs", "warmup_epochs", "smoothing", "clip_grad", "patience", "seed",
        "mixed_precision", "compile", "checkpoint_activations", "output_dir", "checkpoint_every", "resume", "override",
        "log_every",
    }  # fmt: skip
    assert flags - set(train.FIXED) == {  # with which a run may go on
        "recipe", "data_dir", "workers", "model_args", "pretrained", "max_steps", "patience", "compile",
        "checkpoint_activations", "output_dir", "checkpoint_every", "resume", "override", "log_every",
    }  # fmt: skip
    source = (ROOT / "train.py").read_text()
    for flag in flags - {"recipe"}:
        assert re.search(rf"args\.{flag}\b", source), f"--{flag} is read nowhere"


def test_baseline_is_the_slides_experiment():
    args = train.parse_args([])
    assert (args.model, args.dataset, args.epochs, args.batch_size, args.patience) == (
        "fishnet99", "cifar10", 100, 256, 20,
    )  # fmt: skip
    assert (args.opt, args.lr, args.weight_decay) == ("adam", 1e-2, 1e-4)
    assert (args.val_fraction, args.augment) == (0.2, "slides")
    assert train.parse_args(["--recipe", "demo", "--lr", "3"]).lr == 3
    with pytest.raises(SystemExit):
        train.parse_args(["--model-args", "k=4", "--recipe", "no such recipe"])
    strong = train.parse_args(["--recipe", "strong"])
    assert (strong.opt, strong.lr, strong.weight_decay) == ("muon", 0.05, 0.01)
    names = "epochs", "batch_size", "val_fraction", "augment", "sched", "warmup_epochs", "smoothing", "zero_init_last"
    assert [getattr(strong, name) for name in names] == [30, 256, 0.1, "standard", "cosine", 2, 0.1, True]
    # a tenth every 30 epochs
    rates = [train.learning_rate(args, epoch * 156, 156) for epoch in (0, 29, 30, 59, 60, 99)]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-5])


def test_a_home_in_a_flag_is_the_users(monkeypatch):
    """A shell leaves the ~ of --data-dir=~/data; torchvision would download to one place and look in another."""
    monkeypatch.setenv("HOME", "/home/user")
    assert train.parse_args(["--data-dir=~/data"]).data_dir == "/home/user/data"


def test_cosine_with_warmup():
    args = train.parse_args(["--sched", "cosine", "--epochs", "10", "--warmup-epochs", "2", "--lr", "0.4"])
    rates = [train.learning_rate(args, step, 5) for step in range(50)]
    np.testing.assert_allclose(rates[:10], 0.4 * np.arange(1, 11) / 11)
    np.testing.assert_allclose(rates[10:], 0.2 * (1 + np.cos(np.pi * np.arange(40) / 40)))
    assert max(rates) == rates[10] == 0.4


def orthogonalized(x: np.ndarray) -> np.ndarray:
    """By the singular values themselves."""
    u, values, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    values = values / max(np.linalg.norm(values), 1e-12)
    for _ in range(3):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return u * values @ v


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16)])
def test_orthogonalize_is_of_the_singular_values(shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e-3
    x = [*x, x[0].T]  # shapes may differ
    result = train.orthogonalize(x)
    for matrix, of in zip(result, x):
        np.testing.assert_allclose(matrix, orthogonalized(of.numpy()), rtol=0, atol=1e-5)
    assert not train.orthogonalize([torch.zeros(shape)])[0].any()
    if shape != (16, 16):  # whose smallest singular value is too small for three steps
        values = torch.cat([torch.linalg.svdvals(matrix) for matrix in result])
        assert values.min() > 0.68 and values.max() < 1.21


def test_muon_leaves_what_has_no_gradient():
    frozen, weight = nn.Parameter(torch.ones(2, 2, 1, 1)), nn.Parameter(torch.ones(2))
    optimizer = train.Muon([{"params": [frozen]}, {"params": [weight]}], lr=0.1, weight_decay=0.5)
    weight.sum().backward()
    optimizer.step()
    assert frozen.eq(1).all() and weight.ne(1).all()


def test_the_first_step_that_is_not_finite_is_named():
    """On another process, too: all have to stop."""
    alone, finite = SimpleNamespace(reduce=lambda values, how: values), torch.tensor(1.0)
    train.require_finite(alone, [(finite, 2, 0.1)])
    with pytest.raises(FloatingPointError, match=r"at step 5, learning rate 0\.2$"):
        train.require_finite(alone, [(torch.tensor(v), s, s / 20) for v, s in ((1.0, 3), (math.nan, 4), (math.inf, 5))])
    other = SimpleNamespace(reduce=lambda values, how: values + torch.tensor([0.0, math.nan]))
    with pytest.raises(FloatingPointError, match=r"at step 8, learning rate 0\.1$"):
        train.require_finite(other, [(finite, 6, 0.1), (finite, 7, 0.1)])


def test_muon_orthogonalizes_convolutions_and_is_sgd_for_the_rest():
    torch.manual_seed(0)
    # Tall, wide, 1 x 1 and two of one shape.
    shapes = (3, 32, 3), (32, 8, 3), (8, 16, 1), (16, 16, 1), (16, 16, 1)
    layers = [layer for shape in shapes for layer in (nn.Conv2d(*shape), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 4)).to(memory_format=torch.channels_last)
    optimizer = train.make_optimizer(train.parse_args(["--opt", "muon", "--lr", "0.1", "--weight-decay", "0.5"]), model)
    convs = [p for p in model.parameters() if p.ndim == 4]
    others = [p for p in model.parameters() if p.ndim != 4]
    twins = [p.detach().clone().requires_grad_() for p in others]
    sgd = torch.optim.SGD(twins, 0.1, 0.9, nesterov=True)
    expected = [p.detach().numpy().astype(np.float64).reshape(len(p), -1) for p in convs]
    momenta = [0.0] * 5
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        for i, scale in enumerate(((32 / 27) ** 0.5, 1, 2**0.5, 1, 1)):
            gradient = convs[i].grad.numpy().reshape(expected[i].shape)
            momenta[i] = 0.9 * momenta[i] + gradient
            update = scale * orthogonalized(gradient + 0.9 * momenta[i])
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * update
        for twin, parameter in zip(twins, others):
            twin.grad = parameter.grad.clone()
        optimizer.step()
        sgd.step()
    for parameter, matrix in zip(convs, expected):
        np.testing.assert_allclose(parameter.detach().numpy().reshape(matrix.shape), matrix, rtol=0, atol=1e-4)
    torch.testing.assert_close(others, twins)


def test_adamw_decays_matrices_alone():
    model = train.create_model("fishnet_tiny")
    args = train.parse_args(["--opt", "adamw", "--lr", "0.1", "--weight-decay", "0.5"])
    optimizer = train.make_optimizer(args, model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(decays[id(p)] == (0.5 if p.ndim > 1 else 0) for p in model.parameters())


def test_cutmix_trains_on_mixed_images_and_labels(run_train, tmp_path, monkeypatch):
    images, targets, calls = [], [], []

    class Spy(data.CutMix):
        def __call__(self, *arguments):
            images.append(arguments[0].clone())
            mixed = super().__call__(*arguments)
            targets.append(mixed[1].clone())
            return mixed

    def create_model(*names, **overrides):
        model = create(*names, **overrides)
        model.register_forward_hook(lambda _, x, y: calls.append((x[0].clone(), y.detach().double().numpy())))
        return model

    create = train.create_model
    monkeypatch.setattr(data, "CutMix", Spy)
    monkeypatch.setattr(train, "create_model", create_model)
    run_train(tmp_path, "--augment", "cutmix", "--max-steps", "1", "--smoothing", "0.1")
    row = load(tmp_path / "best.pt")["state"]["history"][-1]
    part, (seen, scores) = targets[-1].double().numpy(), calls[0]  # the first targets are those of the grid
    assert (part.max(1) < 1).sum() > 4 and not torch.equal(seen, images[-1])
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    assert row["train_loss"] == pytest.approx(-((0.9 * part + 0.1 / 10) * log_p).sum(1).mean(), rel=1e-5)
    assert row["train_top1_error"] == (scores.argmax(1) != part.argmax(1)).mean()


def test_a_run_and_its_files(run_train, tmp_path):
    folder = tmp_path / "a run"
    out = run_train(folder, "--epochs", "2")
    numbers = r"\d+\.\d{3} +\d+\.\d\d%"
    assert re.search(rf"^epoch   1/2  train {numbers}  val {numbers} \(\d+\.\d\d%\)", out, re.M)
    assert f"python evaluate.py '{folder}/best.pt'" in out
    assert max(map(len, re.findall("^epoch.*", out, re.M))) < 80

    last = load(folder / "last.pt")
    assert last["name"] == "fishnet_tiny" and last["classes"][3] == "class 3" and last["mean"][0] == 0.4914
    assert last["state"]["step"] == 2 * 6 and last["state"]["epoch"] == 2  # 192 images: 6 batches of 32
    best = load(folder / "best.pt")
    assert best["state"]["epoch"] == best["state"]["best_epoch"]

    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert last["state"]["best_loss"] == min(float(row["val_loss"]) for row in rows)
    assert all(0 < float(row["data_wait"]) < 1 for row in rows)
    assert json.loads((folder / "args.json").read_text())["batch_size"] == 32
    assert_same(safetensors.torch.load(safetensors.torch.save(last["model"])), last["model"])

    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/top1_error", "lr", "images_per_second", "gradient_norm/tail", "gradient_norm/body",
        "gradient_norm/head", "val/loss", "val/top1_error", "val/top5_error", "data_wait",
    }  # fmt: skip
    assert events.Tags()["images"] == ["augmented"]
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    assert [event.value for event in events.Scalars("val/loss")] == pytest.approx([float(r["val_loss"]) for r in rows])


def test_a_tail_alone_with_final_norm_logs_its_gradients(run_train, tmp_path):
    fields = "body_depths=()", "head_depths=()", "transfer_depths=()", "k=2", "final_norm=True"
    run_train(tmp_path / "run", "--max-steps", "1", "--log-every", "1", "--model-args", *fields)
    norms = {tag for tag in EventAccumulator(str(tmp_path / "run")).Reload().Tags()["scalars"] if "gradient" in tag}
    assert norms == {"gradient_norm/tail", "gradient_norm/head"}


@pytest.mark.parametrize("opt", ["sgd", "adam", "adamw", "muon", "sgd --mixed-precision bf16"])
def test_resume_after_max_steps_is_exact(run_train, tmp_path, opt, steps=9):  # in the middle of an epoch
    flags = "-b", "32", "--epochs", "3", "--opt", *opt.split()
    run_train(tmp_path / "whole", *flags)
    run_train(tmp_path / "parts", *flags, "--max-steps", str(steps))
    out = run_train(tmp_path / "parts", *flags, "--resume", "auto")
    assert f"at step {steps}, epoch {steps // 6 + 1}" in out
    for name in ("last.pt", "best.pt"):
        assert_same(load(tmp_path / "whole" / name), load(tmp_path / "parts" / name))


@pytest.mark.parametrize("workers, steps", [("0", range(1, 10)), ("2", [4])])
def test_resume_from_every_step_is_exact(run_train, tiny_dir, tmp_path, monkeypatch, workers, steps):
    """Weights, optimizer, metrics.csv and TensorBoard's curves, of three epochs of three steps."""
    flags = ["-b", "20", "--data-dir", str(tiny_dir), "--epochs", "3", "--checkpoint-every", "1"]
    monkeypatch.setattr(train, "save", train.save)
    keep_every_step(tmp_path / "run")
    run_train(tmp_path / "run", *flags, "--workers", workers)
    monkeypatch.undo()
    expected = outcome(tmp_path / "run")
    assert [step for step, _ in expected["scalars"]["train/loss"]] == [2, 3, 4, 6, 8, 9]
    for step in steps:
        out = run_train(tmp_path / f"run-{step}", *flags, "--workers", workers, "--resume", "auto")
        assert f"at step {step}," in out
        assert_same(expected, outcome(tmp_path / f"run-{step}"))


@pytest.mark.parametrize("opt", ["sgd", "adam"])
def test_a_run_is_this_loop(run_train, cifar_dir, tmp_path, opt):
    """Written straight down: 12 steps, whose order, draws, rates and gradients are those of their epoch and step."""
    flags = ["--epochs", "2", "--seed", "3", "--augment", "slides", "--smoothing", "0.1", "--clip-grad", "1"]
    run_train(tmp_path / "run", *flags, "--opt", opt)
    args, loaded = train.parse_args(SMALL), data.load_data("cifar10", cifar_dir, 0.2, 3)
    torch.manual_seed(3)
    model = create_model("fishnet_tiny", **args.model_args).to(memory_format=torch.channels_last)
    zero_init_last(model)
    if opt == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), 1.0, 0.9, weight_decay=5e-4, nesterov=True)
    else:
        optimizer = torch.optim.Adam(model.parameters(), 1.0, weight_decay=5e-4)
    transform = data.BatchTransform(loaded.mean, loaded.std, data.train_transforms("slides", loaded.train))
    losses, norms = [], {part: {} for part in ("tail", "body", "head")}
    for step in range(12):
        epoch, i = divmod(step, 6)  # 192 images in batches of 32
        order = torch.randperm(192, generator=data.seeded_generator(3, epoch))[32 * i : 32 * i + 32]
        images = transform(loaded.train.images[order], data.seeded_generator(3, epoch, step, 0))
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, loaded.train.labels[order], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        for part, names in {"tail": ("stem", "tail"), "body": ("body",), "head": ("head", "pool", "fc")}.items():
            squares = [p.grad.square().sum() for n, p in model.named_parameters() if n.split(".")[0] in names]
            norms[part][step + 1] = sum(squares).sqrt().item()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        rate = (step + 1) / 4 if step < 3 else 0.5 * (1 + np.cos(np.pi * (step - 3) / 9))  # 3 steps of warm-up
        optimizer.param_groups[0]["lr"] = 0.02 * rate
        optimizer.step()
        losses.append(loss.item())
    last = load(tmp_path / "run" / "last.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(last["model"][name], parameter.detach(), rtol=0, atol=1e-6, msg=name)
    found = [row["train_loss"] for row in last["state"]["history"]]
    assert found == pytest.approx([np.mean(losses[:6]), np.mean(losses[6:])], rel=1e-5)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for part, expected in norms.items():
        points = {event.step: event.value for event in events.Scalars(f"gradient_norm/{part}")}
        assert points == pytest.approx({step: expected[step] for step in range(2, 13, 2)}, rel=1e-4)


def test_two_processes_train_like_one(cifar_dir, run_train, tmp_path):
    """Batch norm is taken into account by accumulation: one process that cuts each batch in two parts normalises the
    same 16 images together as each of two processes does, and sees the same pixels. Running statistics are left out:
    they are the first process's, while one process updates them twice a step. The steps are small: the last bits in
    which the sums differ grow tenfold a step at high learning rates, whatever computes them."""
    flags = ("--epochs", "4", "--max-steps", "20", "--lr", "2e-4", "--clip-grad", "1", "--augment", "slides")
    flags += ("--model-args", "channels=(64, 128, 256, 256)", "k=8")
    process = start_train(cifar_dir, tmp_path / "two", *flags, processes=2)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    run_train(tmp_path / "one", *flags, "--grad-accum-steps", "2")
    a, b = (load(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert a["state"]["step"] == b["state"]["step"] == 20
    moved = 0.0
    torch.manual_seed(0)
    start = train.create_model("fishnet_tiny")
    train.zero_init_last(start)
    start = start.state_dict()
    for name, value in a["model"].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, b["model"][name], atol=1e-5, rtol=0, msg=name)
            moved = max(moved, (value - start[name]).abs().max().item())
    assert 1e-4 < moved < 0.04  # they trained; by 20 steps of norm 2e-4, which momentum makes tenfold, at most
    for x, y in zip(a["state"]["history"], b["state"]["history"]):
        assert x["lr"] == y["lr"]  # a scheduler that each process steps would run twice as fast
        assert math.isclose(x["train_loss"], y["train_loss"], rel_tol=1e-4)


def test_resume_of_two_processes_is_exact(run_train, tiny_dir, tmp_path, monkeypatch, capsys):
    flags = ["-b", "20", "--opt", "muon", "--data-dir", str(tiny_dir), "--epochs", "2", "--checkpoint-every", "1"]
    flags += ["--seed", "2"]
    (tmp_path / "script.py").write_text(f"""
import sys
from pathlib import Path
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
import data
import train
from test_train import keep_every_step
keep_every_step(Path("run"))
train.main()
""")

    def run(folder, *more):
        process = start_python(2, "script.py", *SMALL, *flags, "--output-dir", folder, *more, cwd=tmp_path)
        out = process.communicate(timeout=300)[0]
        assert process.returncode == 0, out
        return out

    run("run")
    shutil.copytree(tmp_path / "run-5", tmp_path / "alone")
    assert "resumed run-4/last.pt at step 4, epoch 2" in run("run-4", "--resume", "auto")
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "run-4"))

    # evaluate.py finds what the run did: on its part of the training images, with the first process's batch norm.
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "run" / "last.pt"), "--split", "val", "--json"])
    evaluate.main()
    found, row = json.loads(capsys.readouterr().out), load(tmp_path / "run" / "last.pt")["state"]["history"][-1]
    assert found["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
    assert [found[f"top{k}_error"] for k in (1, 5)] == [row[f"val_top{k}_error"] for k in (1, 5)]

    # One process goes on with the sums of both, and does the same step, but for rounding.
    out = run_train(tmp_path / "alone", *flags, "--resume", "auto", "--grad-accum-steps", "2", "--override")
    assert "alone/last.pt at step 5, epoch 2" in out, out
    two, one = (load(tmp_path / name / "last.pt")["state"]["history"][-1] for name in ("run", "alone"))
    assert one["train_top1_error"] == two["train_top1_error"]
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)


def test_resume_after_signals_is_exact(run_train, tmp_path, monkeypatch):
    run_train(tmp_path / "whole", "--epochs", "2")
    for call in (6, 1, 6):  # one is asked after each step and each evaluation
        answers = itertools.chain([0] * (call - 1), [15])
        monkeypatch.setattr(train.StopSignal, "agreed", lambda *_, answers=answers: next(answers))
        with pytest.raises(SystemExit) as stop:
            run_train(tmp_path / "parts", "--epochs", "2", "--resume", "auto")
        assert stop.value.code == 143
        monkeypatch.undo()
    run_train(tmp_path / "parts", "--epochs", "2", "--resume", "auto")
    for name in ("last.pt", "best.pt"):
        assert_same(load(tmp_path / "whole" / name), load(tmp_path / "parts" / name))


def test_resume_of_another_run_is_refused(run_train, tmp_path):
    run_train(tmp_path / "run", "--epochs", "2", "--max-steps", "2")
    flags = ("--epochs", "3", "--resume", "auto", "--max-steps", "3")
    with pytest.raises(SystemExit, match=r"last.pt is of another run \(epochs 2 -> 3\)"):
        run_train(tmp_path / "run", *flags)
    run_train(tmp_path / "run", *flags, "--override")
    assert load(tmp_path / "run" / "last.pt")["state"]["step"] == 3


def test_model_args_reach_the_network_and_a_run_is_bound_to_them(run_train, tmp_path):
    flags = ("--epochs", "2", "--model-args", "k=4", "bridge=none", "channels=(32, 32, 64, 64)")
    run_train(tmp_path / "run", *flags, "--max-steps", "1")
    config = load(tmp_path / "run" / "last.pt")["config"]
    assert (config["k"], config["bridge"], config["channels"]) == (4, "none", (32, 32, 64, 64))
    with pytest.raises(SystemExit, match=r"another run \(channels \(32, .* -> \(4, .*, k 4 -> 2, bridge none -> se\)"):
        run_train(tmp_path / "run", "--epochs", "2", "--resume", "auto")
    with pytest.raises(SystemExit, match=r"last\.pt: \d+ of its weights do not fit the model: "):
        run_train(tmp_path / "run", "--epochs", "2", "--resume", "auto", "--override")
    out = run_train(tmp_path / "run", *flags, "--max-steps", "2", "--resume", "auto")
    assert "at step 1" in out
    assert train.parse_args(["--recipe", "strong", "--model-args", "k=1"]).model_args == {"final_norm": True, "k": 1}


def test_pretrained_weights_are_where_a_run_starts(run_train, tmp_path):
    source = train.create_model("fishnet_tiny", num_classes=7, channels=(4, 4, 4, 16), k=2)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    flags = ("--epochs", "2", "--lr", "0", "--pretrained", str(tmp_path / "weights.pt"))
    out = run_train(tmp_path / "run", *flags, "--max-steps", "1")
    assert "the classifier is new: 10 classes, not 7" in out
    trained = load(tmp_path / "run" / "last.pt")["model"]
    for name, parameter in source.named_parameters():
        assert name == "fc.weight" or torch.equal(parameter, trained[name]), name
    (tmp_path / "weights.pt").unlink()  # a run that goes on does not need them
    assert "resumed" in run_train(tmp_path / "run", *flags, "--max-steps", "2", "--resume", "auto")


def test_override_takes_the_new_flags_and_refuses_another_optimizer(run_train, tmp_path):
    run_train(tmp_path / "run", "--epochs", "2", "--max-steps", "2")
    flags = ("--epochs", "2", "--resume", "auto", "--max-steps", "3", "--override")
    with pytest.raises(SystemExit, match=r"opt sgd -> adam\): give its flags, --override changes neither"):
        run_train(tmp_path / "run", *flags, "--opt", "adam")
    with pytest.raises(SystemExit, match=r"--override cannot change how many steps an epoch has, which would be 12\)"):
        run_train(tmp_path / "run", *flags, "-b", "16")
    run_train(tmp_path / "run", *flags, "--weight-decay", "0.125")
    assert load(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0.125


def test_resume_does_not_write_over_another_run(run_train, tmp_path):
    for name in ("a", "b"):
        run_train(tmp_path / name, "--epochs", "2", "--max-steps", "1")
    with pytest.raises(SystemExit, match="b: holds a run"):
        run_train(tmp_path / "b", "--epochs", "2", "--resume", str(tmp_path / "a" / "last.pt"))


def test_checkpoint_inside_an_epoch(run_train, tmp_path, monkeypatch):
    saved = []
    save = train.save
    monkeypatch.setattr(train, "save", lambda run, *names: (saved.append((names, run.state.step)), save(run, *names)))
    run_train(tmp_path / "run", "--epochs", "1", "--checkpoint-every", "2")
    assert saved == [(("last.pt",), 2), (("last.pt",), 4), (("last.pt",), 6), (("best.pt", "last.pt"), 6)]


@pytest.mark.parametrize("flags", [(), ("--max-steps", "9")], ids=["epochs", "max-steps"])
@pytest.mark.parametrize("failing", ["evaluate", "log_epoch"])
def test_an_evaluation_that_fails_loses_no_step(run_train, tmp_path, monkeypatch, failing, flags):
    """The second one does, at once or after TensorBoard has its result, which is not written to it again."""
    flags = ("--epochs", "2", *flags, "--resume", "auto")  # 6 steps an epoch
    run_train(tmp_path / "whole", *flags)
    function, calls = getattr(train, failing), iter(range(9))

    def fail_once(*args):
        result, call = function(*args), next(calls)
        if call == 1:
            raise OSError("no disk")
        return result

    monkeypatch.setattr(train, failing, fail_once)
    with pytest.raises(SystemExit, match="no disk"):
        run_train(tmp_path / "parts", *flags)
    step = 9 if "--max-steps" in flags else 12
    for _ in range(2):  # the same command, until there is nothing left to do, and once more
        out = run_train(tmp_path / "parts", *flags)
        assert f"last.pt at step {step}" in out and re.search(r"best epoch [12], validation loss \d", out)
        assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def validation_losses(monkeypatch, *losses: float) -> None:
    """What the evaluations of train.py find, one after the other."""
    losses = iter(losses)
    monkeypatch.setattr(train, "evaluate", lambda *_: Metrics(next(losses), 0.5, 0.1, 48, (), ()))


def test_a_run_from_another_folder_has_a_best_of_its_own(run_train, tmp_path, monkeypatch):
    validation_losses(monkeypatch, 2.0, 3.0)
    run_train(tmp_path / "a", "--epochs", "2", "--max-steps", "6")
    run_train(tmp_path / "b", "--epochs", "2", "--resume", str(tmp_path / "a" / "last.pt"))
    best = tmp_path / "b" / "best.pt"
    assert load(best)["state"]["epoch"] == 2
    out = run_train(tmp_path / "c", "--epochs", "2", "--resume", str(tmp_path / "b" / "last.pt"))
    assert "best epoch" not in out and "nothing was left to do" in out
    assert load(tmp_path / "c" / "last.pt")["state"]["step"] == 12  # from its start on c holds the run
    assert len((tmp_path / "c" / "metrics.csv").read_text().splitlines()) == 3

    before, last = best.read_bytes(), (tmp_path / "b" / "last.pt").read_bytes()
    assert f"resumed {best} at step 12" in run_train(tmp_path / "b", "--epochs", "2", "--resume", str(best))
    run_train(tmp_path / "b", "--epochs", "2", "--resume", str(best))  # as a scheduler starts it
    assert (tmp_path / "b" / "last.pt.left").read_bytes() == last
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "b" / name).unlink()
    for flags, line in (((), "holds a run; go on"), (("--resume", "auto"), r"no whole last\.pt is left .*, or")):
        with pytest.raises(SystemExit, match=rf"{line}.* --resume {best}"):
            run_train(tmp_path / "b", "--epochs", "3", *flags)
    assert best.read_bytes() == before


def test_compile_changes_neither_names_nor_values_and_compiles_once(run_train, tmp_path, monkeypatch):
    tail = "body_depths=()", "head_depths=()", "transfer_depths=()", "k=2", "tail_depths=(1, 1, 1, 0)"
    flags = "--epochs", "2", "--model-args", *tail
    run_train(tmp_path / "eager", *flags)
    in_place, modes = nn.Module.compile, []

    def compile_eagerly(model, mode):  # minutes less
        modes.append(mode)
        in_place(model, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = run_train(tmp_path / "compiled", *flags, "--compile")
    assert len(re.findall(r"^compiled in the first step, \d+ s$", out, re.M)) == 1 and modes == [None]
    assert_same(outcome(tmp_path / "compiled"), outcome(tmp_path / "eager"))


def test_cuda_graphs_are_for_gradients_that_stay(monkeypatch):
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda model, mode: modes.append(mode))
    for device, graphs in (("cpu", True), ("cuda", True), ("cuda", False)):
        train.compile_in_place(nn.ReLU(), torch.device(device), graphs)
    assert modes == [None, "reduce-overhead", None]


def test_early_stopping_and_best_by_validation_loss(run_train, tmp_path, monkeypatch):
    validation_losses(monkeypatch, 3.0, 2.0, 2.5, 2.1, 9.9)
    out = run_train(tmp_path / "run", "--epochs", "9", "--patience", "2")
    assert "best epoch 2, validation loss 2.0000" in out
    assert load(tmp_path / "run" / "last.pt")["state"]["epoch"] == 4
    assert load(tmp_path / "run" / "best.pt")["state"]["epoch"] == 2


def test_a_compiler_of_accelerate_launch_leaves_the_names(run_train, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    run_train(tmp_path / "run", "--epochs", "1", "--max-steps", "2", "-b", "16")
    assert "fc.weight" in load(tmp_path / "run" / "best.pt")["model"]


def test_on_the_cpu_there_is_no_gpu(monkeypatch):
    """Accelerate's barrier takes GPU 1 for process 1, wherever the processes compute."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    train.make_accelerator(train.parse_args([]))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_apples_gpu_is_not_used(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # as accelerate launch says
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert train.make_accelerator(train.parse_args([])).device.type == "cpu"
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    """torchrun on a CPU, without ACCELERATE_USE_CPU: each would write to the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"^2 processes, but Accelerate knows of one: set ACCELERATE_USE_CPU=true"):
        train.check_processes(SimpleNamespace(num_processes=1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # at the first barrier NCCL would refuse them
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^2 processes on a machine with 1 GPU\(s\): expected one process for each"):
        train.check_processes(SimpleNamespace(num_processes=2, device=torch.device("cuda")))


def test_without_validation_best_is_last(run_train, tmp_path):
    run_train(tmp_path / "run", "--epochs", "1", "--val-fraction", "0")
    assert_same(load(tmp_path / "run" / "best.pt")["model"], load(tmp_path / "run" / "last.pt")["model"])
    assert "val_loss" not in (tmp_path / "run" / "metrics.csv").read_text()


def test_loss_that_is_not_finite_stops_before_saving(run_train, tmp_path):
    run_train(tmp_path / "run", "--epochs", "3", "--max-steps", "6")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"not finite at step \d+, learning rate [\d.]+e\+"):
        run_train(tmp_path / "run", "--epochs", "3", "--resume", "auto", "--override", "--lr", "1e30")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_a_validation_loss_that_is_not_finite_names_a_checkpoint_that_is_there(run_train, tmp_path, monkeypatch):
    validation_losses(monkeypatch, math.nan, 2.0, math.nan)
    with pytest.raises(SystemExit, match=r"of last\.pt, step 6, is not finite; try a lower --lr"):
        run_train(tmp_path / "first", "--epochs", "2")
    with pytest.raises(SystemExit, match=r"step 12, .* --resume .*/second/previous\.pt --override"):
        run_train(tmp_path / "second", "--epochs", "2")
    assert load(tmp_path / "second" / "previous.pt")["state"]["step"] == 6

    # From there it goes on, as often as it takes: what it comes from outlives what came to nothing.
    for step in (12, 12):
        validation_losses(monkeypatch, math.nan)
        flags = "--epochs", "2", "--resume", str(tmp_path / "second" / "previous.pt"), "--override", "--lr", "0.01"
        with pytest.raises(SystemExit, match=rf"step {step}, .* --resume .*/second/previous\.pt --override"):
            run_train(tmp_path / "second", *flags)
        assert load(tmp_path / "second" / "previous.pt")["state"]["step"] == 6


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch-size", "30", "--grad-accum-steps", "4"], "batch-size=30: expected a multiple of 4"),
        (["--batch-size", "5000"], "batch-size=5000: expected at most 192"),
        (["--lr", "-1"], "lr=-1.0: expected at least 0"),
        (["--lr", "nan"], "lr=nan"),
        (["--smoothing", "1"], "smoothing=1.0"),
        (["-b", "1"], "batch-size=1: expected at least 2 images"),
        (["--warmup-epochs", "5"], "warmup-epochs=5.0: expected less than epochs=5"),
        (["--val-fraction", "1"], "val-fraction=1.0"),
        (["--mixed-precision", "fp16"], "mixed-precision=fp16: a CPU has none"),
        (["--mixed-precision", "tf32"], "mixed-precision=tf32: a CPU has none"),
        (["--resume", "nothing.pt"], "nothing.pt: no such checkpoint"),
        (["--resume", "/dev"], "resume=/dev: a folder; to go on with its run: --output-dir /dev --resume auto"),
        (["--pretrained", "nothing.pt"], "nothing.pt: no such file of weights"),
        (["--model-args", "in_channels=1"], "in_channels=1: expected 3"),
        (["--model-args", "k=5"], "k=5: expected a divisor"),
        (["--model-args", "name=5"], "name: no field of FishNetConfig"),
        (["--model-args", "depth=5"], "depth: no field of FishNetConfig"),
        (["--model-args", "num_classes=5"], "num_classes: is the dataset's"),
        (["--data-dir", "/dev/null"], "/dev/null"),
    ],
)
def test_bad_arguments_are_one_line(run_train, tmp_path, flags, message, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(train.datasets, "download_and_extract_archive", no_network)
    with pytest.raises(SystemExit) as error:
        run_train(tmp_path / "run", *flags)
    assert str(error.value).startswith("train.py: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_resume_of_a_checkpoint_that_is_not_there_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--resume", str(tmp_path / "typo" / "last.pt")])
    with pytest.raises(SystemExit, match="no such checkpoint"):
        train.main()
    assert not list(tmp_path.iterdir())


def test_a_run_names_its_folder_and_a_checkpoint_is_enough_to_go_on_there(cifar_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["train.py", *SMALL, "--data-dir", str(cifar_dir), "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", [*flags, "--max-steps", "1"])
    train.main()
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"fishnet_tiny-cifar10-\d{8}-\d{6}", folder.name)
    folder = folder.rename(tmp_path / "moved")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", [*flags, "--max-steps", "2", "--resume", str(folder / "last.pt")])
    train.main()
    assert load(folder / "last.pt")["state"]["step"] == 2 and not list((tmp_path / "runs").iterdir())


def test_accelerate_launch(cifar_dir, tmp_path):
    flags = [*SMALL, "--data-dir", cifar_dir, "--output-dir", tmp_path / "run", "--max-steps", 1]
    process = start_python(1, "-m", "accelerate.commands.launch", "train.py", *flags)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and (tmp_path / "run" / "best.pt").exists(), out


@pytest.mark.parametrize("flags, graphs", [([], True), (["--grad-accum-steps", "2"], False)])
def test_graphs_are_for_one_process_and_whole_batches(run_train, tmp_path, monkeypatch, flags, graphs):
    seen = []
    monkeypatch.setattr(train, "compile_in_place", lambda model, device, graphs: seen.append(graphs))
    run_train(tmp_path / "run", "--max-steps", "1", "--compile", *flags)
    assert seen == [graphs]


def test_a_gpu_would_be_deterministic_and_round_only_where_it_may(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    for precision, tf32 in (("tf32", True), ("no", False)):
        args = train.parse_args(["--mixed-precision", precision])
        train.make_accelerator(args)
        assert args.mixed_precision == precision and torch.backends.cudnn.deterministic
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (tf32, tf32)
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_save_is_on_the_disk_before_it_gets_its_name_and_then_its_name_is(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replace(old, new)))
    train.write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_output_dir_with_a_run_is_not_overwritten(run_train, tmp_path):
    run_train(tmp_path / "run", "--epochs", "1", "--max-steps", "2")
    with pytest.raises(SystemExit, match="holds a run; go on with --resume auto"):
        run_train(tmp_path / "run", "--epochs", "1")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def disk_full(file):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError):
        train.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    train.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_checkpointed_activations_train_to_the_same_bits(run_train, tmp_path, monkeypatch):
    calls, checkpoint_activations = [], train.checkpoint_activations
    monkeypatch.setattr(train, "checkpoint_activations", lambda model: calls.append(checkpoint_activations(model)))
    run_train(tmp_path / "kept", "-b", "16", "--epochs", "2", "--max-steps", "3")
    run_train(tmp_path / "again", "-b", "16", "--epochs", "2", "--max-steps", "3", "--checkpoint-activations")
    assert_same(load(tmp_path / "kept" / "last.pt"), load(tmp_path / "again" / "last.pt"))
    assert len(calls) == 1
    flags = ("--epochs", "2", "--max-steps", "4", "--resume", "auto")  # and it may change in a run
    assert "resumed" in run_train(tmp_path / "again", "-b", "16", *flags)


@pytest.mark.skipif(not CORES, reason="no sched_setaffinity")
def test_all_cores_work_in_spite_of_omp_num_threads(monkeypatch, one_thread):
    """accelerate launch sets OMP_NUM_THREADS=1 on a machine without a GPU."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    try:
        train.make_accelerator(train.parse_args([]))
        assert torch.get_num_threads() == len(CORES)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(CORES)))
        evaluate.prepare_cpu(torch.device("cpu"))
        assert torch.get_num_threads() == 1
    finally:
        os.sched_setaffinity(0, mine)
