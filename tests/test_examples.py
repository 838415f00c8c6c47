"""examples/: tables against arithmetic by hand, detection against numpy, programs in short runs."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import benchmark
import numpy as np
import pytest
import study
import torch
from accelerate import Accelerator
from conftest import start_python
from detect_figures import average_precision, draw_scene, evaluate, mask_iou
from probe_pixels import CLASSES, Probe, compute_iou, draw_scenes, find_classes, train_probe
from resnet18 import resnet18
from torch import nn

import data
import fishnet
from flops import count

def test_a_run_of_the_study_is_its_last_epoch(tmp_path):
    rows = "val_top1_error,train_top1_error,seconds", "0.9,0.8,10", "0.125,0.0625,12"
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    assert study.read_run(tmp_path) == {"val_error": 12.5, "train_error": 6.25, "seconds": 22}

def test_the_intervals_of_the_study_are_those_of_the_paired_t_test():
    """For two variants, the two-way table and the t-test of the paired differences agree."""
    errors = np.array([[30.0, 31, 32], [31.0, 33, 35]])  # differences 1, 2, 3
    assert study.compute_interval(errors) * 2**0.5 == pytest.approx(4.30 / 3**0.5)
    _, _, *lines = study.make_table(["slides", "no SE unit"], errors)
    slides, no_se = (line[2:-2].split(" | ") for line in lines)
    parameters = sum(p.numel() for p in study.make_model("slides").parameters())
    assert slides == ["slides", f"{parameters:,}", "13.1", "30.00, 31.00, 32.00", "31.00", ""]
    assert no_se[4:] == ["33.00", "+2.00 ± 2.48"]
    assert np.isnan(study.compute_interval(errors[:, :1]))  # one seed tells nothing about noise

def test_a_finished_run_of_the_study_is_not_taken_for_another(tmp_path):
    flags = study.make_flags("both", 1, ["--compile"])
    done = json.dumps([*flags, "--data-dir", str(tmp_path.resolve())])
    (tmp_path / "done.json").write_text(done)
    study.train(flags, tmp_path, tmp_path)  # returns at once
    with pytest.raises(fishnet.UserError, match="a run with other flags or data"):
        study.train(flags, tmp_path, "elsewhere")

def test_iou_is_that_of_sets_of_pixels():
    found, truth = torch.randint(CLASSES, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    ratios = []
    for c in range(CLASSES):
        own, other = ({tuple(p) for p in (x == c).nonzero().tolist()} for x in (found, truth))
        ratios.append(len(own & other) / len(own | other))
    assert compute_iou(found, truth) == pytest.approx(np.mean(ratios))

class Pixels(nn.Module):
    """A network whose map tells which pixels are white, times a weight."""
    feature_info, mean, std = {"X": fishnet.Feature(1, 1)}, (0.5,) * 3, (0.25,) * 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward_features(self, x, names):
        return dict.fromkeys(names, (x == 2).all(1, keepdim=True) * self.weight)

@pytest.mark.parametrize("tune", [False, True])
def test_a_probe_finds_white_images_on_coloured_ground(tune):
    white = torch.full((4, 3, 32, 32), 255, dtype=torch.uint8)
    scenes, truth = draw_scenes(data.ImageSet(white, torch.full((4,), 6)), 50, seed=0)
    assert ((scenes == 255).all(1) == (truth == 7)).all() and truth.unique().tolist() == [0, 7]
    probe = Probe(Pixels(), ("X",))
    nn.utils.vector_to_parameters(torch.zeros(2 * CLASSES), probe.conv.parameters())
    train_probe(probe, scenes, truth, epochs=10, tune=tune)
    assert (find_classes(probe, scenes) == truth).float().mean() > 0.99
    assert (probe.model.weight == 1).all() != tune  # the network learns only if it may

def test_average_precision_is_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, hits = rng.permutation(30) / 30, rng.random(30) < rng.random()
        objects = hits.sum() + rng.integers(1, 5)
        found = np.cumsum(hits[np.argsort(-scores)])
        recall, precision = np.append(0, found / objects), found / np.arange(1, 31)
        area = sum(precision[i:].max() * (recall[i + 1] - recall[i]) for i in range(30))
        result = average_precision(torch.from_numpy(scores), torch.from_numpy(hits), objects)
        assert result == pytest.approx(area)

@pytest.mark.parametrize(("shift", "expected"), [(0, (1.0, 1.0)), (32, (0.0, 0.0))])
def test_a_detector_that_knows_the_answers_is_perfect(shift, expected):
    seeds = iter(range(12))
    class Oracle(nn.Module):
        def forward(self, images):
            _, target = draw_scene(next(seeds))
            masks = target["masks"].roll(shift, 2)[:, None].float()
            boxes, scores = target["boxes"] + shift, torch.ones(len(masks))
            return [target | {"boxes": boxes, "masks": masks, "scores": scores}]
    assert evaluate(Oracle(), scenes=12) == pytest.approx(expected)
    found, truth = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
    found[0, :2], found[1, 3], truth[0, 1:3] = True, True, True
    assert mask_iou(found, truth).flatten().tolist() == pytest.approx([4 / 12, 0])

def make_setting(name="fishnet_tiny", batch_size=2, flops=1, **flags):
    flags = {flag: values[0] for flag, values in benchmark.FLAGS.items()} | flags
    return benchmark.Setting(name, *flags.values(), True, batch_size, 16, flops)

def run(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments.split()])
    benchmark.main()

@pytest.mark.parametrize("flag", [None, *benchmark.FLAGS])
def test_each_flag_changes_what_is_timed(monkeypatch, flag):
    seen, called = [], []
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[0].register_forward_hook(lambda net, x, y: seen.extend((x[0].stride(1) == 1, y.dtype)))
    monkeypatch.setattr(benchmark, "create_model", lambda name: model)
    monkeypatch.setattr(benchmark, "checkpoint_activations", lambda net: called.append(flag))
    monkeypatch.setattr(model, "compile", lambda **options: called.append(flag))
    value = {"mixed_precision": "bf16", "channels_last": "no"}.get(flag, "yes")
    setting = make_setting(**{flag: value} if flag else {})
    accelerator = Accelerator(cpu=True, mixed_precision=setting.mixed_precision)
    times = benchmark.make_step(setting, accelerator)()
    assert len(times) == 4 and times == sorted(times)
    dtype = torch.bfloat16 if flag == "mixed_precision" else torch.float32
    assert seen == [flag != "channels_last", dtype]
    assert called == ([flag] if flag in ("compile", "checkpoint_activations") else [])

def test_the_columns_of_step(monkeypatch, capsys):
    def answer(settings, rounds):  # a step takes 0.5 + 1 + 0.5 s and 100 MiB, a product 1 s
        parts = [[1.0] if s.name == benchmark.PRODUCT else [0.5, 1.0, 0.5] for s in settings]
        return [[(own, 100 * 2**20, 7.0)] * rounds for own in parts]
    monkeypatch.setattr(benchmark, "run_rounds", answer)
    benchmark.print_timings([make_setting(batch_size=4, flops=2048**3, compile="yes")], 3)
    _, name, numbers = capsys.readouterr().out.splitlines()
    assert name == "fishnet_tiny --compile yes"
    assert " ".join(numbers.split()) == "2.0 500.0 1000.0 2000.0 1.00 100 1.00 4.3 25.0% 7.0"

def test_steps_are_timed_in_processes_of_their_own(monkeypatch, capsys):
    flags = "--batch-size=4 --image-size=16 --rounds=1 --compile no yes"
    run(monkeypatch, f"step plain:fishnet_tiny {flags}")
    header, name, numbers = capsys.readouterr().out.splitlines()
    assert name == "plain:fishnet_tiny --channels-last no"  # a plain network is never compiled
    row = dict(zip(header.split(), map(float, numbers.replace("%", "").split())))
    assert all(value > 0 for name, value in row.items() if name != "set-up") and row["x"] == 1
    assert row["forward"] + row["backward"] < row["step"]
    macs = count(fishnet.create_model("fishnet_tiny"), 16).macs
    assert row["GFLOP/s"] == pytest.approx(6 * macs * row["images/s"] / 1e9, abs=0.1)

def test_a_failure_names_its_setting_and_a_programming_error_is_not_hidden(monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    monkeypatch.setattr(benchmark, "time_round", Mock(side_effect=[MemoryError, TypeError]))
    with pytest.raises(fishnet.UserError, match=r"^fishnet_tiny --compile yes: out of memory"):
        benchmark.run_rounds([make_setting(compile="yes")], 1)
    with pytest.raises(TypeError):
        benchmark.run_rounds([make_setting()], 1)

def test_the_table_of_the_roofline():
    costs = {"conv": [4, 2.0, 100e9, 1e9], "add": [6, 1.0, 0, 5e9]}
    _, _, conv, add = benchmark.make_table(costs, 2, peak=100e9, bandwidth=10e9)
    assert conv == "| `conv` | 2 | 1,000.0 | 66.7% | 50.0 | 0.5 | 50% | arithmetic |"
    assert add == "| `add` | 3 | 500.0 | 33.3% |  | 5.0 | 50% | memory |"

def test_the_roofline_counts_arithmetic_and_bytes(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # restored after the test
    monkeypatch.setattr(benchmark, "time_in_turns", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(benchmark, "make_table", lambda costs, *_: [json.dumps(costs)])
    run(monkeypatch, "roofline fishnet_tiny --batch-size=2 --image-size=16 --rounds=1")
    costs = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = fishnet.create_model("fishnet_tiny")
    images = 2 * 16 * 16 * model.stem[0].weight.numel()  # images need no gradient
    flops = sum(flops for _, _, flops, _ in costs.values())
    assert flops == 6 * 2 * count(model, 16).macs - 2 * images
    x = torch.zeros(8, 8)
    with benchmark.OperatorCosts() as mode:
        x.view(64)
        x + x
        x.add_(x.mm(x))
    costs = {name: [calls, flops, size] for name, (calls, _, flops, size) in mode.costs.items()}
    assert costs == {"add": [1, 0, 512], "mm": [1, 2 * 8**3, 512], "add_": [1, 0, 768]}

@pytest.mark.parametrize(("arguments", "message"), [
    ("step nonsense", "model='nonsense': expected one of "),
    ("step fishnet99 --mixed-precision fp16", "mixed-precision: tf32 and fp16 need a GPU"),
    ("forward fishnet73 --image-size 30", "image-size=30: does not fit"),
])  # fmt: skip
def test_a_wrong_argument_is_one_line(monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=rf"\Abenchmark\.py: {message}.*\Z"):
        run(monkeypatch, arguments)

def test_resnet18_trains_and_is_evaluated(tiny_dir, tmp_path):
    assert sum(p.numel() for p in resnet18().parameters()) == 11_173_962  # as is published
    assert not any(unit.bn2.weight.any() for unit in resnet18().layer1)
    model = ["--model", "examples.resnet18:resnet18"]
    flags = ["--recipe", "demo", "--dataset", "cifar10", "--data-dir", tiny_dir, "--max-steps", 1]
    for arguments in (
        ["train.py", *flags, *model, "-b", 8, "--output-dir", tmp_path],
        ["evaluate.py", tmp_path / "last.pt", *model, "--json"],
    ):
        process = start_python(1, *arguments)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    network = resnet18().eval()
    network.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True)["model"])
    test, (mean, std) = data.load_data("cifar10", tiny_dir).test, data.CIFAR["cifar10"][2:]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        logits = network((test.images / 255 - mean) / std)
    loss = nn.functional.cross_entropy(logits, test.labels).item()
    assert json.loads(output)["loss"] == pytest.approx(loss, rel=1e-5)
