"""examples/: the study's table and the roofline by hand, the detectors' average precision against numpy."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import plain
import pytest
import resnet18
import roofline
import study
import torch
import torchvision
from conftest import start_python
from detect_figures import average_precision, draw_scene, evaluate, mask_iou
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import data
from fishnet import create_model
from flops import count, make_image, make_step


def write_run(folder, error, norms):
    """What summarise reads of a run: the last row of metrics.csv, and norms of the gradient by part."""
    with SummaryWriter(folder) as writer:
        for part, values in norms.items():
            for i, value in enumerate(values):
                writer.add_scalar(f"gradient_norm/{part}", value, 10 * (i + 1))
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["epoch", "val_top1_error"], [1, 0.9], [2, error]])


def test_a_row_and_the_table_of_the_study(tmp_path):
    rows = []
    for seed in range(3):
        for variant, error in (("slides", 0.30 + 0.01 * seed), ("no SE unit", 0.31 + 0.02 * seed), ("tail alone", 0.4)):
            folder = tmp_path / f"{variant}-{seed}"
            folder.mkdir()
            parts = ("tail", "head") if variant == "tail alone" else ("tail", "body", "head")
            write_run(folder, error, {part: [1.0, 3.0, 5.0, 9.0] for part in parts})
            rows.append(study.summarise(variant, seed, folder))
    body = sum(p.numel() for p in study.make_model("slides").body.parameters())
    assert rows[0]["body_first_half"] == pytest.approx(1e3 * 2 / math.sqrt(body))
    assert rows[0]["body_second_half"] == pytest.approx(1e3 * 7 / math.sqrt(body)) and "body_first_half" not in rows[2]

    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in study.table(rows)]
    header, _, slides, no_se, tail = lines
    assert [row[0] for row in (slides, no_se, tail)] == ["slides", "no SE unit", "tail alone"]
    by_name = dict(zip(header, no_se))
    assert dict(zip(header, slides))["parameters"] == "964,304" and dict(zip(header, slides))["against slides"] == ""
    assert (by_name["seeds"], by_name["error, %"], by_name["std"]) == ("3", "33.00", "2.00")
    assert by_name["against slides"] == "+2.00 ± 2.48"  # of 1, 2, 3: t = 4.30, times 1 / sqrt(3)
    first, second = (1e3 * norm / math.sqrt(body) for norm in (2, 7))
    assert dict(zip(header, slides))["body"] == f"{first:.2f} to {second:.2f}" and dict(zip(header, tail))["body"] == ""


def test_a_finished_run_of_the_study_is_not_trained_again_nor_taken_for_another(tmp_path):
    flags = study.flags_of("both", 1, ["--compile"])
    assert "bridge='none'" in flags and flags[-1] == "--compile"
    (tmp_path / "done.json").write_text(json.dumps([*flags, "--data-dir", str(Path("nowhere").resolve())]))
    study.train(flags, tmp_path, "nowhere")
    for others, data_dir in (study.flags_of("both", 1, []), "nowhere"), (flags, "elsewhere"):
        with pytest.raises(ValueError, match="a run with other flags or data"):
            study.train(others, tmp_path, data_dir)


def test_ctrl_c_waits_until_train_py_has_saved(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import pathlib, signal, time\n"
        "def save(*_): time.sleep(1); pathlib.Path('saved').touch(); raise SystemExit(130)\n"
        "signal.signal(signal.SIGINT, save); print('ready', flush=True); time.sleep(60)\n"
    )
    code = "import pathlib, study; study.TRAIN = 'slow.py'; study.train([], pathlib.Path('run'), 'data')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(study.__file__).parent)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # by now the study waits for it
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(60) != 0 and (tmp_path / "saved").exists()


@pytest.mark.parametrize("flags", [["--model-args", "k=4"], ["--dataset=cifar100"]])
def test_the_study_refuses_flags_that_change_its_networks(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["study.py", "--", *flags])
    with pytest.raises(SystemExit, match=r"^study\.py: --\S+: this program chooses it"):
        study.main()


def test_average_precision_is_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, hits = rng.permutation(30) / 30, rng.random(30) < rng.random()
        objects = hits.sum() + rng.integers(1, 5)
        ordered = hits[np.argsort(-scores)]
        recall, precision = np.cumsum(ordered) / objects, np.cumsum(ordered) / np.arange(1, 31)
        area = sum(precision[i:].max() * (recall[i] - (recall[i - 1] if i else 0)) for i in range(30))
        assert average_precision(torch.from_numpy(scores), torch.from_numpy(hits), objects) == pytest.approx(area)


def test_iou_of_masks():
    found, truth = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
    found[0, :2], found[1, 3], truth[0, 1:3] = True, True, True
    assert mask_iou(found, truth).flatten().tolist() == pytest.approx([4 / 12, 0])


@pytest.mark.parametrize(("shift", "expected"), [(0, (1.0, 1.0)), (32, (0.0, 0.0))])
def test_a_detector_that_knows_the_answers(shift, expected):
    class Oracle(nn.Module):
        seed = 0

        def forward(self, images):
            _, target = draw_scene(self.seed)
            self.seed += 1
            masks = target["masks"].roll(shift, 2)[:, None].float()
            return [target | {"boxes": target["boxes"] + shift, "masks": masks, "scores": torch.ones(len(masks))}]

    assert evaluate(Oracle(), scenes=12) == pytest.approx(expected)


def test_the_plain_network_is_ours(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "relu", torch.nn.functional.relu)  # put back after the test
    monkeypatch.setattr(plain, "set_malloc_thresholds", lambda **_: None)  # this process keeps its allocator's settings
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    ours = create_model("fishnet_tiny").double().eval()
    expected = ours(images)
    theirs = plain.fishnet_tiny().to(torch.float64, memory_format=torch.channels_last).eval()
    theirs.model.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(images), expected)
    assert all(weight.is_contiguous() for weight in theirs.parameters())
    assert make_image(theirs, None).shape[-1] == 32  # as large as ours when it is timed


def test_the_roofline_counts_a_steps_arithmetic_and_bytes():
    step = make_step(roofline.setting("fishnet_tiny", batch_size=2, image_size=16), torch.device("cpu"))
    with roofline.OperatorCosts() as mode:
        step()
    model = create_model("fishnet_tiny")
    images = 2 * 8 * 8 * model.stem[0].weight.numel()  # MACs of the first convolution: images need no gradient
    assert sum(flops for _, _, flops, _ in mode.costs.values()) == 6 * 2 * count(model, 16).macs - 2 * images

    x = torch.zeros(8, 8)
    with roofline.OperatorCosts() as mode:
        x.view(64)
        x + x
        x.add_(x.mm(x))
    assert {name: (calls, flops, size) for name, (calls, _, flops, size) in mode.costs.items()} == {
        "add": (1, 0, 2 * x.nbytes), "mm": (1, 2 * 8**3, 2 * x.nbytes), "add_": (1, 0, 3 * x.nbytes),
    }  # fmt: skip


def test_the_roofline_as_a_program(monkeypatch, capsys, one_thread):
    monkeypatch.setattr(sys, "argv", ["roofline.py", "fishnet_tiny", "--batch-size", "2", "--steps", "1"])
    monkeypatch.setattr(roofline, "measure_roofs", lambda: (100e9, 10e9))
    roofline.main()
    head, _, columns, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("fishnet_tiny, batch 2, float32") and columns.startswith("| operator | calls |")
    assert len(rows) == roofline.SHOWN + 1 and any(row.startswith("| `convolution 3 x 3` | ") for row in rows)


def test_the_table_of_the_roofline():
    costs = {"conv": [4, 2.0, 100e9, 1e9], "add": [6, 1.0, 0, 5e9]}
    _, _, conv, add = roofline.table(costs, 2, peak=100e9, bandwidth=10e9)
    assert conv == "| `conv` | 2 | 1,000.0 | 66.7% | 50.0 | 0.5 | 50% | arithmetic |"
    assert add == "| `add` | 3 | 500.0 | 33.3% |  | 5.0 | 50% | memory |"


def test_resnet18_is_the_usual_one_in_both_programs(tiny_dir, tmp_path):
    model = resnet18.create_model("", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # as is published for images of 32 x 32 pixels
    resnet18.zero_init_last(model)
    assert not any(unit.bn2.weight.any() for unit in model.tail.layer1)

    flags = ["--recipe", "demo", "--dataset", "cifar10", "--data-dir", tiny_dir, "--max-steps", 1, "-b", 8]
    process = start_python(1, "examples/resnet18.py", "train", *flags, "--output-dir", tmp_path / "run")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and output.startswith("resnet18, 11,173,962 parameters; cifar10"), output
    assert output.endswith("of ResNet-18: python examples/resnet18.py evaluate\n")
    process = start_python(1, "examples/resnet18.py", "evaluate", tmp_path / "run" / "last.pt", "--json")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    weights = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    network = torchvision.models.resnet18(num_classes=10)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    network.load_state_dict({name.removeprefix("tail."): value for name, value in weights.items()})
    test, facts = data.load_data("cifar10", tiny_dir).test, data.CIFAR["cifar10"]
    mean, std = (np.array(values, dtype=np.float32).reshape(3, 1, 1) for values in (facts.mean, facts.std))
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy((test.images.numpy().astype(np.float32) / 255 - mean) / std))
    loss = (logits.logsumexp(1) - logits.gather(1, test.labels[:, None])[:, 0]).mean().item()
    assert json.loads(output)["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([], "expected train or evaluate as the first word"),
        (["train", "--model-args", "k=2"], "resnet18.py: --model-args: is for FishNets"),
        (["train", "--pretrained=x.pt"], "resnet18.py: --pretrained=x.pt: is for FishNets"),
    ],
)
def test_resnet18_refuses_what_is_a_fishnets(arguments, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["resnet18.py", *arguments])
    with pytest.raises(SystemExit, match=line):
        resnet18.main()
