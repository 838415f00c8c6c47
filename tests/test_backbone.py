"""Check weights from files, the README's examples, and networks as backbones of detectors."""

import copy
import json
import math
import re
import shlex
import shutil
import sys
import zlib
from collections import OrderedDict
from pathlib import Path

import convert_weights
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, start_python
from convert_weights import AUTHORS, PYTORCHCV, rename
from torch import nn
from torchvision.models.detection import MaskRCNN

import data
import evaluate
import flops
import train
from evaluate import load_pretrained
from fishnet import FishNetFPN, UserError, create_model

NARROW = {"channels": (16, 32, 64, 128), "k": 2}

# ---------------------------------------------------------------- names of weights in other files

# These functions write down the layers' names in the files of two other implementations. Each
# tensor gets numbers that follow from its name in the file, and golden_pretrained.json has the
# logits that those implementations compute from them. So a weight that is converted to a wrong
# name, or a name that their files do not have, changes the logits.
GOLDEN = json.loads(Path(__file__).with_name("golden_pretrained.json").read_text())
DEPTHS = {  # units of the ten stages, and of the six transfer blocks
    "fishnet99_imagenet": ((2, 2, 6, 2, 1, 1, 1, 1, 2, 2), (1, 1, 1, 1, 1, 4)),
    "fishnet150_imagenet": ((2, 4, 8, 4, 2, 2, 2, 2, 2, 4), (2, 2, 2, 2, 2, 4)),
}

def list_authors_layers(name: str) -> list[str]:
    depths, transfers = DEPTHS[name]
    unit = ("bn1", "conv1", "bn2", "conv2", "bn3", "conv3")
    layers = [f"conv{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]
    for i, depth in enumerate(depths):
        prefix = f"fish.fish.{i}.{2 if i == 3 else 0}"
        layers += [f"{prefix}.{block}.{layer}" for block in range(depth) for layer in unit]
        layers += [f"{prefix}.0.shortcut.{j}" for j in (0, 2) if i < 4]
    for i, depth in enumerate(transfers, start=4):
        layers += [f"fish.fish.{i}.1.{block}.{layer}" for block in range(depth) for layer in unit]
    layers += [f"fish.fish.3.0.{j}" for j in (0, 2, 3)] + ["fish.fish.3.1"]
    layers += [f"fish.fish.3.3.0.{j}" for j in (0, 3, 5)]
    return [*layers, *(f"fish.fish.9.3.{j}" for j in (0, 2, 3)), "fish.fish.9.4.1"]

def list_pytorchcv_layers(name: str) -> list[str]:
    depths, transfers = DEPTHS[name]
    layers = [f"features.init_block.conv{i}.{layer}" for i in (1, 2, 3) for layer in ("conv", "bn")]
    parts = ("down1_seq", 1, 2, 3), ("skip1_seq", 4), ("up_seq", 1, 2, 3), ("down2_seq", 1, 2, 3)
    parts += ("skip1_seq", 3, 2, 1), ("skip2_seq", 3, 2, 1)
    units = [f"{part}.unit{i}" for part, *numbers in parts for i in numbers]
    for unit, depth in zip(units, (*depths, *transfers), strict=True):
        for block in range(1, depth + 1):
            prefix = f"features.hg.{unit}.blocks.block{block}"
            layers += [f"{prefix}.body.conv{i}.{x}" for i in (1, 2, 3) for x in ("bn", "conv")]
            if block == 1 and (unit.startswith("down1") or unit == "skip1_seq.unit4"):
                layers += [f"{prefix}.identity_conv.{layer}" for layer in ("bn", "conv")]
    bridge = "features.hg.skip1_seq.unit4"
    layers += [f"{bridge}.conv{i}.{layer}" for i in (1, 2) for layer in ("bn", "conv")]
    layers += [f"{bridge}.se.{layer}" for layer in ("bn", "conv1", "conv2")]
    final = [f"features.final_block.{layer}" for layer in ("conv1.bn", "conv1.conv", "preactiv.bn")]
    return [*layers, *final, "output.final_conv"]

def make_numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return weights, of a size that suits any network, that follow from their name."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        draw *= math.sqrt(2 * shape[0] / draw.size)
    elif name.endswith("running_var"):
        draw = np.exp(draw / 10)
    else:
        draw = draw / 10 + name.endswith("weight")
    return torch.from_numpy(draw).float()

def make_file(name: str, layers: list[str], table: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return a state_dict with the names of the layers and the shapes of our network."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in create_model(name).state_dict().items()}
    content = {}
    for layer in layers:
        for kind in ("weight", "bias", "running_mean", "running_var"):
            ours, theirs = rename(f"{layer}.{kind}", table), f"{layer}.{kind}"
            if ours in shapes:
                shape = tuple(shapes[ours]) + ((1, 1) if ours == "fc.weight" else ())
                content[theirs] = make_numbers(theirs, shape)
    return content

def make_welltrained(content: dict) -> dict:
    """Return weights under the names of the authors' "welltrained" file."""
    changes = {
        "fish.fish.3.0.2.": "fish.fish.3.1.0.", "fish.fish.3.0.3.": "fish.fish.3.1.1.",
        "fish.fish.3.1.": "fish.fish.3.1.3.", "fish.fish.9.3.2.": "fish.fish.9.4.0.",
        "fish.fish.9.3.3.": "fish.fish.9.4.1.", "fish.fish.9.4.1.": "fish.fish.9.4.4.",
    }  # fmt: skip

    def change(name):
        for old in filter(name.startswith, changes):
            return name.replace(old, changes[old])
        return name

    return {change(name): value for name, value in content.items()}

def run_converter(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
    convert_weights.main()

@pytest.mark.parametrize(
    ("form", "name"),
    [("authors", "fishnet99_imagenet"), ("welltrained", "fishnet150_imagenet"),
     ("pytorchcv", "fishnet150_imagenet")],
)  # fmt: skip
def test_converted_weights_give_the_logits_of_their_network(tmp_path, monkeypatch, capsys, form, name):
    source, classes = tmp_path / "source.pth", 10 if form == "authors" else 1000
    if form == "pytorchcv":
        content = make_file(name, list_pytorchcv_layers(name), PYTORCHCV)
        torch.save({f"_orig_mod.{key}": x for key, x in content.items()}, source)
    else:
        content = make_file(name, list_authors_layers(name), AUTHORS)
        content |= {key: content[key][:classes] for key in content if "fish.fish.9.4.1." in key}
        content = make_welltrained(content) if form == "welltrained" else content
        content = {f"module.{key}": x for key, x in content.items()}
        content = {"epoch": 100, "best_prec1": torch.tensor(78.0), "state_dict": content}
        # With False PyTorch writes files as it did in 2018.
        torch.save(content, source, _use_new_zipfile_serialization=form == "welltrained")
    run_converter(monkeypatch, source, tmp_path / "converted.pt")
    command = capsys.readouterr().out.splitlines()[-1].partition("train.py ")[2]
    args = train.parse_args(shlex.split(command))
    model = create_model(args.model, num_classes=classes)
    assert args.model == name and "new" not in load_pretrained(model, args.pretrained)
    image = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, 224, 224))).float()
    with torch.no_grad():
        logits = model.eval()(image)[0, :10]
    golden = GOLDEN["pytorchcv" if form == "pytorchcv" else "authors"][name]
    np.testing.assert_allclose(logits, golden, rtol=1e-3, atol=1e-3 * np.abs(golden).max())

class Touch:
    """Unpickling an instance would create the file "canary" in the current folder."""

    def __reduce__(self):
        return Path.touch, (Path("canary"),)

@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fish.fish.3.1.weight": Touch()}, ".*(other|more) than tensors"),
        ({"state_dict": 1}, "holds no state_dict"),
        ({"layer1.0.conv1.weight": torch.zeros(1)}, "holds no weights of the paper's authors"),
        ({"fish.fish.3.1.weight": torch.zeros(1)}, "does not fit fishnet99_imagenet, .*bias is miss"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, monkeypatch, content, message, is_zip):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "source.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(SystemExit, match=rf"^convert_weights\.py: source\.pth: {message}.*$"):
        run_converter(monkeypatch, "source.pth", "converted.pt")
    hint = r"python examples/convert_weights\.py source\.pth OUT\.pt$"
    with pytest.raises(UserError, match="not fit the model" if "layer1" in str(content) and is_zip else hint):
        load_pretrained(create_model("fishnet_tiny"), "source.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]

# --------------------------------------------------------------------------------- load_pretrained

@pytest.fixture(scope="module")
def source():
    return create_model("fishnet_tiny").state_dict()

def test_another_number_of_classes_leaves_the_classifier_alone(tmp_path, source):
    torch.save({"model": source}, tmp_path / "file.pt")
    model = create_model("fishnet_tiny", num_classes=3)
    before = copy.deepcopy(model.state_dict())
    line = load_pretrained(model, tmp_path / "file.pt")
    assert f"{len(before) - 1} of {len(before)} tensors" in line and "new, for 3 classes" in line
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key == "fc.weight" else source[key]), key

@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("stem.0.weight"), "1 weights .*: stem.0.weight is missing$"),
        (lambda state: state.update(other=torch.zeros(1)), "other is not the model's$"),
        (lambda state: state.update({"fc.weight": torch.zeros(10, 7)}), r"is \(10, 7\), expected \("),
        (lambda state: state["fc.weight"].fill_(torch.nan), "fc.weight is not finite$"),
        (lambda state: [state.pop(key) for key in list(state)[:9]], "9 weights [^;]*;[^;]*;[^;]*$"),
    ],
)
def test_misfits_are_listed_and_change_nothing(tmp_path, source, change, message):
    state = copy.deepcopy(source)
    change(state)
    torch.save(state, tmp_path / "file.pt")
    model = create_model("fishnet_tiny")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=rf"file\.pt: {message}"):
        load_pretrained(model, tmp_path / "file.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

def test_a_damaged_file_is_named(tmp_path, source):
    path = tmp_path / "file.pt"
    torch.save(source, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a weight, so that a checksum no longer fits
    path.write_bytes(content)
    for name, message in (("file.pt", "damaged"), ("nothing.pt", "No such file")):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            load_pretrained(create_model("fishnet_tiny"), tmp_path / name)

# ---------------------------------------------------------------------------- README and programs

README = (ROOT / "README.md").read_text()

def test_the_readmes_python_runs_and_has_its_sizes():
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(snippet, "README.md", "exec"), names)
    names |= names.get("maps", {})
    for name, shape in (
        ("logits", (2, 100)), ("pixels", (2, 21, 224, 224)), ("H1", (2, 320, 56, 56)),
        ("H2", (2, 832, 28, 28)), ("H3", (2, 1600, 14, 14)), ("H4", (2, 2112, 7, 7)),
    ):  # fmt: skip
        assert name not in names or names[name].shape == shape

def test_the_readmes_commands_of_train_py_have_its_flags():
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README.replace("\\\n", " "), re.S))
    commands = re.findall(r"^[^#$\n]*(?<!examples/)\btrain\.py\b([^#&$\n]*)$", blocks, re.M)
    assert len(commands) >= 3
    for command in commands:
        train.parse_args(shlex.split(command))

@pytest.mark.parametrize("program", [train, evaluate, data, flops, convert_weights])
def test_help(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        program.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith(f"usage: {program.__name__}.py ")

def test_fishnet_py_needs_no_other_file(tmp_path):
    shutil.copy(ROOT / "fishnet.py", tmp_path)
    process = start_python(1, "-c", "import fishnet; print(fishnet.__file__)", cwd=tmp_path)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and str(tmp_path) in out, out

def test_create_model_calls_your_own_function(tmp_path, monkeypatch):
    code = "import torch\ndef make(num_classes, width):\n    return torch.nn.Linear(width, num_classes)"
    (tmp_path / "own_networks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert create_model("own_networks:make", num_classes=7, width=2).weight.shape == (7, 2)
    for name in ("own_networks:other", "no_networks:make"):
        with pytest.raises(UserError, match=f"^model={name}: "):
            create_model(name)

# ---------------------------------------------------------------------------- regions and pixels

@pytest.mark.parametrize("name", ["fishnet_tiny", "fishnet99_imagenet", "resnet50"])
def test_pyramid_keeps_torchvisions_contract(name):
    model = create_model(name, **NARROW)
    backbone = FishNetFPN(model, out_channels=24)
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert isinstance(maps, OrderedDict) and list(maps) == ["0", "1", "2", "3", "pool"]
    stride = model.config.stem_stride
    for level in range(4):
        assert maps[str(level)].shape == (1, 24, 64 // stride >> level, 96 // stride >> level)
    assert backbone.out_channels == 24

def draw_scene(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a noisy image (3, 64, 64) of a bright rectangle, and torchvision's target."""
    rng = np.random.RandomState(seed)
    left, top, width, height = rng.randint(10, 30, 4).tolist()
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, top : top + height, left : left + width] = 1
    image = torch.from_numpy(rng.uniform(0, 0.3, (3, 64, 64))).float() + 0.6 * mask
    boxes = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
    return image, {"boxes": boxes, "labels": torch.tensor([1]), "masks": mask}

def test_a_detector_trains_and_detects():
    """Train Mask R-CNN, which is Faster R-CNN with masks."""
    torch.manual_seed(0)
    backbone = FishNetFPN(create_model("fishnet_tiny"), out_channels=32)
    before = copy.deepcopy(backbone.model.pool.state_dict())
    model = MaskRCNN(
        backbone, num_classes=2, min_size=64, max_size=64, box_batch_size_per_image=32,
        rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=50,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    images, targets = zip(*(draw_scene(seed) for seed in range(2)))
    losses = []
    for _ in range(4):
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unused = {name for name, p in backbone.named_parameters() if p.grad is None}
    assert unused == {"model.fc.weight", "model.pool.0.weight", "model.pool.0.bias"}
    assert all(p.requires_grad == (name not in unused) for name, p in backbone.named_parameters())
    assert all(torch.equal(x, before[key]) for key, x in backbone.model.pool.state_dict().items())
    with torch.no_grad():
        found = model.eval()(list(images))
    for detections in found:
        assert {"boxes", "labels", "scores"} <= detections.keys()
        assert detections["boxes"].shape[1] == 4 and detections["masks"].shape[2:] == (64, 64)

class Segmenter(nn.Module):
    """Find figures with a 1x1 convolution on H1. images (N, 3, 64, 64) -> scores (N, 1, 64, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = create_model("fishnet_tiny")
        self.head = nn.Conv2d(self.model.feature_info["H1"].channels, 1, 1)
        for name in ("h2", "h3", "h4", "pool", "fc"):
            getattr(self.model, name).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.model.forward_features(x, names=("H1",))
        return F.interpolate(self.head(maps["H1"]), scale_factor=2)

def test_a_head_on_the_finest_map_segments_without_the_later_stages(tmp_path):
    """DistributedDataParallel raises if a weight that is not frozen gets no gradient."""
    torch.manual_seed(0)
    model, calls = Segmenter(), set()
    for name, stage in model.model.named_children():
        stage.register_forward_hook(lambda *_, name=name: calls.add(name))
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    images, targets = zip(*(draw_scene(seed) for seed in range(4)))
    images, masks = torch.stack(images), torch.stack([target["masks"] for target in targets]).float()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(20):
            scores = wrapped(images)
            loss = F.binary_cross_entropy_with_logits(scores, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    assert calls == {"stem", "t1", "t2", "t3", "t4", "bridge", "b4", "b3", "b2", "h1"}
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    inside = scores > 0
    iou = ((inside & (masks > 0)).sum() / (inside | (masks > 0)).sum()).item()
    assert iou > 0.6
