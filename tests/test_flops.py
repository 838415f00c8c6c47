"""Compare the costs with published figures, arithmetic by hand and a real training step."""

import copy
import json
import re
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torchvision.models import RegNet_Y_400MF_Weights, ResNet50_Weights

import flops
from fishnet import CONFIGS, create_model

def meta_model(name, **overrides):
    with torch.device("meta"):
        return create_model(name, **overrides)

@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs flops.py with arguments and returns what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["flops.py", *arguments])
        flops.main()
        return capsys.readouterr().out

    return run

def test_costs_are_those_that_the_slides_print():
    fishnet, resnet = flops.count(meta_model("fishnet99")), flops.count(meta_model("resnet50"))
    assert (f"{fishnet.flops / 1e9:.2f}", f"{fishnet.params / 1e6:.2f}") == ("2.53", "17.92")
    assert (f"{resnet.flops / 1e9:.2f}", f"{resnet.params / 1e6:.2f}") == ("0.56", "3.00")
    # Hooks on the modules of the slides' own networks count these, with ResNet50's ten biases.
    assert fishnet.flops == 2_526_549_312
    assert resnet.flops + 2 * 10 == 558_188_564

@pytest.mark.parametrize(
    ("name", "macs", "flops_of_authors"),
    [("fishnet99", 4.264, 4.30), ("fishnet150", 6.398, 6.45), ("fishnet201", 10.514, 10.58)],
)
def test_the_papers_networks_cost_what_their_authors_say(name, macs, flops_of_authors):
    """The "FLOPs" of the authors' README are MACs plus the elements of the other layers."""
    counts = flops.count(meta_model(f"{name}_imagenet"))
    assert counts.macs / 1e9 == pytest.approx(macs, abs=5e-4)
    assert counts.flops / 2e9 == pytest.approx(flops_of_authors, abs=5e-3)

@pytest.mark.parametrize("weights", [ResNet50_Weights, RegNet_Y_400MF_Weights])
def test_another_packages_network_has_its_published_counts(run, weights):
    """RegNets compute with tensors while they are made."""
    meta = weights.IMAGENET1K_V1.meta
    name = weights.__name__.removesuffix("_Weights").lower()
    (counts,) = json.loads(run("--json", f"torchvision.models:{name}"))
    assert counts["params"] == meta["num_params"] and round(counts["macs"] / 1e9, 3) == meta["_ops"]

@pytest.mark.parametrize("inplace", [True, False])
def test_costs_of_a_small_net_equal_those_computed_by_hand(inplace):
    net = nn.Sequential(
        nn.Conv2d(3, 9, 3, padding=1, groups=3),  # 9 x 4 x 4 outputs of 1 x 3 x 3 multiply-adds
        nn.BatchNorm2d(9),  # 144 elements
        nn.ReLU(inplace),  # 144
        nn.MaxPool2d(2),  # 144 in, 36 out
        nn.Upsample(scale_factor=2),  # 144 out
        nn.AdaptiveAvgPool2d(1),  # 144 in
        nn.Flatten(),
        nn.Linear(9, 5),
    )
    counts = flops.count(net, 4)
    assert counts.params == (9 * 9 + 9) + 18 + (45 + 5)
    assert counts.macs == 144 * 9 + 45
    assert counts.flops == 2 * (counts.macs + 2 * 144 + 4 * 144)
    # Kept are the image, the inputs of batch norm, of the max-pool (the ReLU's output) and of the
    # linear layer, and the max-pool's 36 indices of 8 bytes.
    assert counts.activation_bytes == 4 * (3 * 16 + 144 + 144 + 9) + 8 * 36

def count_saved_bytes(model, batch_size):
    """Return how many bytes autograd keeps of a training step on the CPU."""
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model.train()(torch.rand(batch_size, 3, 32, 32))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    return sum(storages.values())

@pytest.mark.parametrize("preact", [True, False])
def test_activations_are_those_of_a_real_training_step(preact, one_thread):
    model = create_model("fishnet_tiny", tail_depths=(1, 1, 1, 0), preact=preact)
    two_images = count_saved_bytes(model, 4) - count_saved_bytes(model, 2)
    assert flops.count(model).activation_bytes == two_images / 2

def test_counting_leaves_the_model_alone():
    model = create_model("fishnet_tiny").double()
    model.stem.eval()
    before = copy.deepcopy(model)
    with torch.no_grad():
        assert flops.count(model) == flops.count(meta_model("fishnet_tiny"))
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]

def test_layer_table_of_the_slides(run):
    rows = flops.count_stages(meta_model("fishnet99"))
    assert [(row.stage, row.size, row.blocks, row.layers) for row in rows] == [
        ("stem", 32, 2, 7), ("T1", 32, 3, 9), ("T2", 16, 4, 12), ("T3", 8, 6, 18), ("T4", 4, 3, 11),
        ("B4", 8, 1, 6), ("B3", 16, 1, 6), ("B2", 32, 1, 6),
        ("H1", 16, 1, 6), ("H2", 8, 1, 6), ("H3", 4, 1, 6), ("H4", 1, 1, 6), ("fc", 1, 0, 0),
    ]  # fmt: skip
    lines = run("--stages", "fishnet99").splitlines()
    assert lines[14].split() == ["sum", "99", "17,918,784", "1,250.06"]
    assert lines[16].startswith("10 I-convs: stem.0, ")

@pytest.mark.parametrize(
    ("name", "overrides", "layers"),
    [
        ("fishnet99", {"preact": False}, 98),  # no convolution before the stem's two bottlenecks
        ("fishnet150", {}, 150), ("fishnet73", {}, 66),
        ("resnet50", {"final_norm": True}, 7 + 3 * (3 + 4 + 6 + 3)),
        ("fishnet_tiny", {}, 1 + 3 * (1 + 2 + 3 + 2 + 1) + 2 + 7 * 3),
    ],
)  # fmt: skip
def test_stages_add_up_to_the_network(name, overrides, layers):
    model = meta_model(name, **overrides)
    rows, counts = flops.count_stages(model, 64), flops.count(model, 64)
    assert sum(row.layers for row in rows) == layers
    assert sum(row.params for row in rows) == counts.params
    assert sum(row.macs for row in rows) == counts.macs
    assert rows[0].size == rows[1].size == 64 // model.config.stem_stride

def test_i_convs_are_those_without_which_no_gradient_passes():
    stem = ["stem.0", *(f"stem.{i}.conv{j}" for i in (1, 2) for j in (1, 2, 3))]
    shortcuts = ["t1.0.shortcut", "t2.0.shortcut", "t3.0.shortcut"]
    assert flops.find_i_convs(meta_model("fishnet99")) == [*stem, *shortcuts]
    assert flops.find_i_convs(meta_model("fishnet99_direct")) == stem
    assert flops.find_i_convs(meta_model("fishnet99_imagenet")) == [
        "stem.0", "stem.3", "stem.6", *(f"{shortcut}.2" for shortcut in shortcuts),
        "bridge.score.2", "bridge.score.5", "bridge.units.0.shortcut.2", "pool.2",
    ]  # fmt: skip

def test_table_and_documents_agree(run):
    lines = run().splitlines()
    assert [line.split()[0] for line in lines] == ["network", *CONFIGS]
    assert "fishnet99            17,918,784     1,250.06     2,526.55 " in lines[1]
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    number = r"([\d,]+\.\d\d)"
    rows = re.findall(rf"^\| `(\w+)`.*? \| ([\d,]+) \| {number} \| {number} \|$", text, re.M)
    assert rows and {*rows} <= {tuple(line.split()[:4]) for line in lines}

def test_json(run):
    networks = json.loads(run("--json", "--image-size", "64", "resnet50", "fishnet_tiny"))
    assert [network.pop("name") for network in networks] == ["resnet50", "fishnet_tiny"]
    assert flops.Counts(**networks[0]) == flops.count(meta_model("resnet50"), 64)
    rows = [flops.StageCounts(**r) for r in json.loads(run("--json", "--stages", "fishnet_tiny"))]
    assert rows == flops.count_stages(meta_model("fishnet_tiny"))

@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "model='nonsense'"),
        (["fishnet99", "--image-size", "30"], "image-size=30: .*multiples of 8"),
        (["fishnet99", "--image-size", "1000000000"], "image-size=1000000000: expected"),
        (["nonsense:make"], "model=nonsense:make: No module named"),
        (["torchvision.models:alexnet", "--image-size", "32"], "image-size=32: does not fit"),
        (["--stages", "torchvision.models:resnet50"], "--stages: expected a network of fishnet"),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert re.match(rf"flops\.py: {message}", error.value.code) and "\n" not in error.value.code
