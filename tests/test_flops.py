"""The costs against published figures, PyTorch's own counter, arithmetic by hand and a training step on the CPU."""

import json
import multiprocessing
import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import RegNet_Y_400MF_Weights, ResNet50_Weights

import flops
from fishnet import create_model, model_names


def meta_model(name, **overrides):
    with torch.device("meta"):
        return create_model(name, **overrides)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments): what the command prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["flops.py", *arguments])
        flops.main()
        return capsys.readouterr().out

    return run


# -------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("fishnet99", 17_918_784, "1.25006"),
        ("fishnet150", 28_806_464, "1.88330"),
        ("fishnet73", 15_991_616, "1.06735"),
        ("resnet50", 2_999_626, "0.27467"),
    ],
)
def test_parameters_and_macs(name, params, macs):
    counts = flops.count(meta_model(name))
    assert counts.params == params
    assert f"{counts.macs / 1e9:.5f}" == macs


def test_cost_table_of_the_slides():
    fishnet, resnet = flops.count(meta_model("fishnet99")), flops.count(meta_model("resnet50"))
    assert (f"{fishnet.flops / 1e9:.2f}", f"{fishnet.params / 1e6:.2f}") == ("2.53", "17.92")
    assert (f"{resnet.flops / 1e9:.2f}", f"{resnet.params / 1e6:.2f}") == ("0.56", "3.00")
    # To the last operation, from hooks on the modules of the slides' networks; they also count ResNet50's 10 biases.
    assert fishnet.flops == 2_526_549_312
    assert resnet.flops + 2 * 10 == 558_188_564


@pytest.mark.parametrize("name", model_names())
def test_macs_are_those_of_pytorchs_counter(name, image_size=96):
    model = meta_model(name).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    assert 2 * flops.count(model, image_size).macs == counter.get_total_flops()


@pytest.mark.parametrize("groups", [1, 4])
def test_macs_of_a_transposed_convolution_are_those_of_pytorchs_counter(groups):
    net, x = nn.ConvTranspose2d(16, 8, 3, stride=2, groups=groups, bias=False), torch.rand(1, 16, 5, 6)
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert 2 * flops.measure(net, x).macs == counter.get_total_flops()


@pytest.mark.parametrize("inplace", [True, False])
def test_small_net_by_hand(inplace):
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),  # 8 x 4 x 4 outputs of 2 * 3 * 3 multiply-adds
        nn.BatchNorm2d(8),  # 128 elements
        nn.ReLU(inplace),  # 128
        nn.MaxPool2d(2),  # 128 in, 32 out
        nn.Upsample(scale_factor=2),  # 128 out
        nn.AdaptiveAvgPool2d(1),  # 128 in
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    counts = flops.measure(net, torch.zeros(1, 4, 4, 4))
    assert counts.params == (8 * 18 + 8) + 16 + (40 + 5)
    assert counts.macs == 128 * 18 + 40
    assert counts.flops == 2 * (counts.macs + 2 * 128 + 128 + 128 + 128 + 128)
    # Image, batch norm's input, ReLU's output, linear's input; the max-pool keeps 32 int64 indices.
    assert counts.activation_bytes == 4 * (64 + 128 + 128 + 8) + 8 * 32


def saved_bytes(model, batch_size):
    """What autograd keeps of a training step on the CPU, by address."""
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model.train()(torch.rand(batch_size, 3, 32, 32))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}.values())


@pytest.mark.parametrize("preact", [True, False])
def test_activations_of_a_training_step(preact, one_thread):
    model = create_model("fishnet_tiny", tail_depths=(1, 1, 1, 0), preact=preact)
    two_images = saved_bytes(model, 4) - saved_bytes(model, 2)
    assert flops.count(model).activation_bytes == two_images / 2


def test_counting_leaves_the_model_alone():
    model = create_model("fishnet_tiny").double()
    model.stem.eval()
    model.fc.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        assert flops.count(model) == flops.count(meta_model("fishnet_tiny"))
        assert flops.count_stages(model) == flops.count_stages(meta_model("fishnet_tiny"))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert not any(module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------------------- stages


def test_layer_table_of_the_slides():
    rows = flops.count_stages(meta_model("fishnet99"))
    assert [(row.stage, row.size, row.blocks, row.layers) for row in rows] == [
        ("stem", 32, 2, 7),
        ("T1", 32, 3, 9),
        ("T2", 16, 4, 12),
        ("T3", 8, 6, 18),
        ("T4", 4, 3, 11),
        ("B4", 8, 1, 6),
        ("B3", 16, 1, 6),
        ("B2", 32, 1, 6),
        ("H1", 16, 1, 6),
        ("H2", 8, 1, 6),
        ("H3", 4, 1, 6),
        ("H4", 1, 1, 6),
        ("fc", 1, 0, 0),
    ]


@pytest.mark.parametrize(
    ("name", "overrides", "layers"),
    [
        ("fishnet99", {}, 99),
        ("fishnet99", {"preact": False}, 98),  # no convolution before the stem's two bottlenecks
        ("fishnet150", {}, 150),
        ("fishnet73", {}, 66),
        ("resnet50", {}, 7 + 3 * (3 + 4 + 6 + 3)),
        ("resnet50", {"final_norm": True}, 7 + 3 * (3 + 4 + 6 + 3)),
        ("fishnet_tiny", {}, 1 + 3 * (2 + 3 + 3 + 2 + 1) + 2 + 7 * 3),
    ],
)
def test_stages_add_up(name, overrides, layers):
    model = meta_model(name, **overrides)
    rows, counts = flops.count_stages(model, 48), flops.count(model, 48)
    assert sum(row.layers for row in rows) == layers
    assert sum(row.params for row in rows) == counts.params
    assert sum(row.macs for row in rows) == counts.macs


def test_stage_sizes_follow_image_and_stem():
    sizes = {row.stage: row.size for row in flops.count_stages(meta_model("fishnet_tiny"), 64)}
    assert [sizes[stage] for stage in ("stem", "T1", "T4", "B2", "H1", "H4")] == [32, 32, 4, 32, 16, 1]


# ------------------------------------------------------------------------------------------------------------ command


def test_table(run):
    out = run()
    assert [line.split()[0] for line in out.splitlines()] == ["network", *model_names()]
    assert "fishnet99            17,918,784     1,250.06     2,526.55 " in out
    assert max(map(len, out.splitlines())) < 80
    assert max(map(len, run("fishnet150", "--image-size", "16384").splitlines())) < 80
    numbers = r"\| ([\d,]+) \| ([\d,.]+) \| ([\d,.]+) \|$"
    readme = re.findall(rf"^\| `(\w+)`.*? {numbers}", (ROOT / "README.md").read_text(), re.M)
    assert [list(row) for row in readme] == [line.split()[:4] for line in out.splitlines()[1:]]


def test_stage_table(run):
    lines = run("--stages", "fishnet99").splitlines()
    assert [line.split()[0] for line in lines[: len(flops.STAGES) + 3]] == ["stage", *flops.STAGES, "fc", "sum"]
    assert lines[len(flops.STAGES) + 2].split() == ["sum", "99", "17,918,784", "1,250.06"]
    assert max(map(len, lines)) < 80


def test_json(run):
    networks = json.loads(run("--json", "--image-size", "64", "resnet50", "fishnet_tiny"))
    assert [network.pop("name") for network in networks] == ["resnet50", "fishnet_tiny"]
    assert flops.Counts(**networks[0]) == flops.count(meta_model("resnet50"), 64)
    stages = json.loads(run("--json", "--stages", "fishnet_tiny"))
    assert [flops.StageCounts(**stage) for stage in stages] == flops.count_stages(meta_model("fishnet_tiny"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "model='nonsense'"),
        (["--stages", "nonsense"], "model='nonsense'"),
        (["--stages", ""], "model=''"),
        (["fishnet99", "--stages", "fishnet73"], "--stages fishnet73"),
        (["fishnet99", "--image-size", "30"], "30 x 30, expected multiples of 8"),
        (["fishnet99", "--image-size", "0"], "image-size=0"),
        (["fishnet99", "--image-size", "-32"], "image-size=-32"),
        (["fishnet99", "--image-size", "1000000000"], "image-size=1000000000"),
    ],
)
def test_wrong_arguments(run, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code.startswith("flops.py: ")
    assert message in error.value.code
    assert "\n" not in error.value.code


@pytest.mark.parametrize(
    ("name", "macs", "flops_of_authors"),
    [("fishnet99_imagenet", 4.264, 4.30), ("fishnet150_imagenet", 6.398, 6.45), ("fishnet201_imagenet", 10.514, 10.58)],
)
def test_the_papers_networks_cost_what_their_authors_say(name, macs, flops_of_authors):
    """At 224 x 224. What the authors' README calls FLOPs are MACs and the elements of the other layers."""
    with torch.device("meta"):
        counts = flops.count(create_model(name))
    assert counts.macs / 1e9 == pytest.approx(macs, abs=5e-4)
    assert counts.flops / 2e9 == pytest.approx(flops_of_authors, abs=5e-3)


def test_i_convs_are_those_without_which_nothing_passes(run):
    with torch.device("meta"):
        models = {name: create_model(name) for name in ("fishnet99", "fishnet99_direct", "fishnet99_imagenet")}
    stem = ["stem.0", *(f"stem.{i}.conv{j}" for i in (1, 2) for j in (1, 2, 3))]
    assert flops.i_convs(models["fishnet99"]) == [*stem, *(f"tail.{i}.0.shortcut" for i in range(3))]
    assert flops.i_convs(models["fishnet99_direct"]) == stem
    assert flops.i_convs(models["fishnet99_imagenet"]) == [
        "stem.0", "stem.3", "stem.6", *(f"tail.{i}.0.shortcut.2" for i in range(3)), "tail.3.score.2", "tail.3.score.5",
        "tail.3.units.0.shortcut.2", "head.3.resample.2",
    ]  # fmt: skip
    out = run("--stages", "fishnet99_direct")
    assert "7 I-convs: stem.0, " in out and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("weights", [ResNet50_Weights, RegNet_Y_400MF_Weights])
def test_another_packages_network_has_its_published_counts(weights):
    """RegNets compute while they are made."""
    meta = weights.IMAGENET1K_V1.meta
    with torch.device("meta"):
        name = weights.__name__.removesuffix("_Weights").lower()
        counts = flops.count(flops.make_model(f"torchvision.models:{name}"))
    assert counts.params == meta["num_params"] and round(counts.macs / 1e9, 3) == meta["_ops"]


# --------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("flag", [None, *flops.FLAGS])
def test_a_setting_is_what_is_timed(monkeypatch, one_thread, flag):
    called, seen = [], []
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.register_forward_hook(
        lambda net, x, y: seen.append((x[0].is_contiguous(memory_format=torch.channels_last), y.dtype))
    )
    monkeypatch.setattr(flops, "make_model", lambda name: model)
    for name in ("compile_in_place", "checkpoint_activations"):
        monkeypatch.setattr(flops, name, lambda net, *_, name=name: called.append((name, net)))
    flags = dict.fromkeys(flops.FLAGS, "no") | ({flag: "bf16" if flag == "mixed_precision" else "yes"} if flag else {})
    setting = flops.Setting("any", **flags, train=True, batch_size=2, image_size=8, device="cpu")
    flops.make_step(setting, torch.device("cpu"))()
    expected = {"compile": ["compile_in_place"], "checkpoint_activations": ["checkpoint_activations"]}.get(flag, [])
    assert called == [(name, model) for name in expected]
    assert seen == [(flag == "channels_last", torch.bfloat16 if flag == "mixed_precision" else torch.float32)]


def test_the_columns_of_time(monkeypatch):
    class Fake(Mock):  # set-up takes 7 s, a product 1 s, a step 0.5 + 1 + 0.5 s
        def ask(self):
            if not self.ready:
                self.ready = True
                return 7.0
            return ([1.0] if self.setting.name == flops.PRODUCT else [0.5, 1.0, 0.5]), 100

    monkeypatch.setattr(flops, "Worker", lambda setting: Fake(setting=setting, ready=False))
    setting = flops.Setting("net", "no", "yes", "no", "no", True, 4, 32, "cpu")
    (row,) = flops.time_settings([setting], {"net": 10**9}, 3)
    assert (row["images_per_second"], row["step_seconds"], row["setup_seconds"]) == (2, 2, 7)
    assert row["flops_per_second"] == 6 * 10**9 * 2
    assert row["product_share"] == pytest.approx(12e9 / (2 * 2048**3))


def test_time(run):
    """Two settings of a training step, in processes of their own."""
    flags = ("--time", "--train", "--batch-size=4", "--image-size=16", "--rounds=1", "--device=cpu", "--json")
    rows = json.loads(run("fishnet_tiny", *flags, "--checkpoint-activations", "no", "yes"))
    assert [row["checkpoint_activations"] for row in rows] == ["no", "yes"]
    macs = flops.count(meta_model("fishnet_tiny"), 16).macs
    for row in rows:
        assert (row["name"], row["compile"], row["channels_last"], row["mixed_precision"]) == (
            "fishnet_tiny", "no", "yes", "no",
        )  # fmt: skip
        assert (row["train"], row["batch_size"], row["image_size"], row["device"]) == (True, 4, 16, "cpu")
        assert min(value for key, value in row.items() if re.search("second|bytes|ratio|share", key)) > 0
        assert len(row) == 9 + 10
        assert row["images_per_second"] == pytest.approx(4 / row["step_seconds"])
        assert row["flops_per_second"] == pytest.approx(6 * macs * row["images_per_second"])
        assert row["forward_seconds"] + row["backward_seconds"] < row["step_seconds"]
    assert rows[0]["step_ratio"] == rows[0]["peak_ratio"] == 1


@pytest.mark.parametrize("train", [False, True])
def test_a_step_has_these_parts(train, one_thread):
    setting = flops.Setting("fishnet_tiny", "no", "no", "bf16", "no", train, 2, 16, "cpu")
    moments = flops.make_step(setting, torch.device("cpu"))()
    assert len(moments) == (4 if train else 2) and moments == sorted(moments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile"], "--compile: expected with --time"),
        (["--batch-size", "8"], "--batch-size: expected with --time"),
        (["--train"], "--train: expected with --time"),
        (["--time"], "--time: expected names of networks"),
        (["--time", "--stages", "fishnet99"], "--time: expected names of networks, and no --stages"),
        (["fishnet99", "--time", "--batch-size", "0"], "batch-size=0: expected at least 1"),
        (["fishnet99", "--time", "--rounds", "0"], "rounds=0: expected at least 1"),
        (["fishnet99", "--time", "--device", "abacus"], "device=abacus: expected one of cpu"),
        (["fishnet99", "--time", "--device", "cuda:99"], "device=cuda:99: expected one of cpu"),
        (["fishnet99", "--time", "--device", "cpu", "--mixed-precision", "no", "fp16"], "mixed-precision=fp16: a CPU"),
        (["fishnet99", "--time", "--device", "cpu", "--mixed-precision", "tf32"], "mixed-precision=tf32: a CPU has"),
        (["fishnet99", "--time", "--mixed-precision"], "mixed-precision: expected one or several of no, tf32"),
        (["fishnet99", "--time", "--checkpoint-activations"], "checkpoint-activations=yes: expected with --train"),
        (["fishnet99", "--time", "--image-size", "30"], "30 x 30, expected multiples of 8"),
        (["nonsense", "--time"], "model='nonsense'"),
        (["nonsense:make"], "nonsense:make: expected MODULE:FUNCTION that makes a network (No module named"),
        (["json:nothing", "--time"], "json:nothing: expected MODULE:FUNCTION that makes a network (module 'json' has"),
        (["torchvision.models:list_models"], "list_models: expected MODULE:FUNCTION that makes a network, not a list"),
        (["torchvision.models:alexnet", "--image-size", "32"], "AlexNet takes no image of 32 x 32 pixels ("),
        (["--stages", "torchvision.models:resnet50"], "expected one network of fishnet.py"),
    ],
)
def test_wrong_arguments_of_time(run, arguments, message):
    test_wrong_arguments(run, arguments, message)


@pytest.mark.parametrize(
    ("answer", "reason"), [("no memory", "no memory"), (None, "its process ended with exit code -9: out of memory?")]
)
def test_a_worker_that_fails_is_named(answer, reason):
    worker = flops.Worker.__new__(flops.Worker)
    worker.setting = flops.Setting("fishnet99", "no", "yes", "bf16", "yes", True, 2, 32, "cpu")
    worker.process = SimpleNamespace(join=lambda: None, exitcode=-9)
    worker.pipe, theirs = multiprocessing.Pipe()
    if answer:
        theirs.send(answer)
    else:
        theirs.close()
    flags = "--compile no --channels-last yes --mixed-precision bf16 --checkpoint-activations yes"
    with pytest.raises(ValueError) as error:
        worker.ask()
    assert str(error.value) == f"fishnet99 {flags}: {reason}"
