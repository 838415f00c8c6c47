"""Check weights from files, the README's examples, and networks as backbones of detectors."""

import copy
import importlib
import json
import re
import shlex
import shutil
import sys
import zlib
from dataclasses import asdict
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

import train
from evaluate import load_model, load_pretrained
from fishnet import FishNet, FishNetFPN, UserError, create_model

README = (ROOT / "README.md").read_text()
GOLDEN = json.loads(Path(__file__).with_name("golden_pretrained.json").read_text())
SOURCE = create_model("fishnet_tiny").state_dict()

# --------------------------------------------------------------------------- weights from elsewhere

# The next functions write down the names of weights in the files of two other implementations.
# Each weight gets numbers that follow from its name there, and golden_pretrained.json has the
# logits that those implementations compute from them. So a wrong name changes the logits.
DEPTHS = {  # units of the ten stages, and of the six transfer blocks
    "fishnet99_imagenet": ((2, 2, 6, 2, 1, 1, 1, 1, 2, 2), (1, 1, 1, 1, 1, 4)),
    "fishnet150_imagenet": ((2, 4, 8, 4, 2, 2, 2, 2, 2, 4), (2, 2, 2, 2, 2, 4)),
    "fishnet201_imagenet": ((3, 4, 12, 4, 2, 2, 2, 2, 3, 10), (2, 2, 2, 2, 2, 9)),
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
    others = "3.0.0 3.0.2 3.0.3 3.1 3.3.0.0 3.3.0.3 3.3.0.5 9.3.0 9.3.2 9.3.3 9.4.1"
    return layers + [f"fish.fish.{layer}" for layer in others.split()]

def list_pytorchcv_layers(name: str) -> list[str]:
    depths, transfers = DEPTHS[name]
    layers = [f"features.init_block.conv{i}.{x}" for i in (1, 2, 3) for x in ("conv", "bn")]
    parts = ("down1_seq", 1, 2, 3), ("skip1_seq", 4), ("up_seq", 1, 2, 3), ("down2_seq", 1, 2, 3)
    parts += ("skip1_seq", 3, 2, 1), ("skip2_seq", 3, 2, 1)
    units = [f"features.hg.{part}.unit{i}" for part, *numbers in parts for i in numbers]
    for unit, depth in zip(units, (*depths, *transfers)):
        for block in (f"{unit}.blocks.block{i + 1}" for i in range(depth)):
            layers += [f"{block}.body.conv{i}.{x}" for i in (1, 2, 3) for x in ("bn", "conv")]
            if unit in units[:4] and block.endswith("block1"):
                layers += [f"{block}.identity_conv.{x}" for x in ("bn", "conv")]
    bridge = "conv1.bn conv1.conv conv2.bn conv2.conv se.bn se.conv1 se.conv2"
    layers += [f"{units[3]}.{layer}" for layer in bridge.split()]
    final = "features.final_block.conv1.bn features.final_block.conv1.conv"
    return [*layers, *final.split(), "features.final_block.preactiv.bn", "output.final_conv"]

def make_numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return numbers that follow from a weight's name, of a size that suits its kind."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        return torch.from_numpy(draw * np.sqrt(2 * shape[0] / draw.size)).float()
    is_variance, is_weight = name.endswith("running_var"), name.endswith("weight")
    return torch.from_numpy(np.exp(draw / 10) if is_variance else draw / 10 + is_weight).float()

def make_file(name: str, layers: list[str], table: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return a state_dict with the names of the layers and the shapes of our network."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in create_model(name).state_dict().items()}
    kinds, content = ("weight", "bias", "running_mean", "running_var"), {}
    for theirs in (f"{layer}.{kind}" for layer in layers for kind in kinds):
        if (ours := rename(theirs, table)) in shapes:
            shape = tuple(shapes[ours]) + ((1, 1) if ours == "fc.weight" else ())
            content[theirs] = make_numbers(theirs, shape)
    return content

def make_welltrained(content: dict) -> dict:
    """Return weights under the names of the authors' "welltrained" file."""
    changes = {
        "fish.fish.3.0.2.": "fish.fish.3.1.0.", "fish.fish.3.0.3.": "fish.fish.3.1.1.",
        "fish.fish.3.1.": "fish.fish.3.1.3.", "fish.fish.9.3.2.": "fish.fish.9.4.0.",
        "fish.fish.9.3.3.": "fish.fish.9.4.1.", "fish.fish.9.4.1.": "fish.fish.9.4.4.", "": "",
    }  # fmt: skip
    starts = {name: next(filter(name.startswith, changes)) for name in content}
    return {name.replace(old, changes[old], 1): content[name] for name, old in starts.items()}

def run_converter(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
    convert_weights.main()

FILES = "authors 99", "welltrained 150", "welltrained 201", "pytorchcv 150"

@pytest.mark.parametrize("file", FILES)
def test_converted_weights_give_the_logits_of_their_network(tmp_path, monkeypatch, capsys, file):
    form, layers = file.split()
    name, classes = f"fishnet{layers}_imagenet", 1000
    if form == "pytorchcv":
        content = make_file(name, list_pytorchcv_layers(name), PYTORCHCV)
    elif form == "welltrained":
        content = make_welltrained(make_file(name, list_authors_layers(name), AUTHORS))
    else:
        classes = 10
        content = make_file(name, list_authors_layers(name), AUTHORS)
        content |= {key: x[:classes] for key, x in content.items() if "fish.fish.9.4.1." in key}
    content = {"epoch": 9, "state_dict": {f"module.{key}": x for key, x in content.items()}}
    # PyTorch writes the old file as it did in 2018.
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=form != "authors")
    run_converter(monkeypatch, tmp_path / "old.pt", tmp_path / "new.pt")
    args = train.parse_args(shlex.split(capsys.readouterr().out.splitlines()[-1])[2:])
    model = create_model(args.model, num_classes=classes)
    assert args.model == name and "new," not in load_pretrained(model, args.pretrained)
    image = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, 224, 224))).float()
    with torch.no_grad():
        logits = model.eval()(image)[0, :10]
    golden = GOLDEN["pytorchcv" if form == "pytorchcv" else "authors"][name]
    np.testing.assert_allclose(logits, golden, rtol=1e-3, atol=1e-3 * np.abs(golden).max())

class Touch:
    def __reduce__(self):  # unpickling an instance would create a file
        return Path.touch, (Path("canary"),)

@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fish.fish.3.1.weight": Touch()}, ".*(other|more) than tensors"),
        ([torch.zeros(1)], "holds no state_dict"),
        ({"model": "resnet", "state_dict": {"conv1.weight": torch.zeros(1)}}, "holds no weights"),
        ({"fish.fish.3.1.weight": torch.zeros(1)}, "does not fit fishnet99_imagenet, .*is missing"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, monkeypatch, content, message, is_zip):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "old.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(SystemExit, match=rf"^convert_weights\.py: old\.pt: {message}.*$"):
        run_converter(monkeypatch, "old.pt", "new.pt")
    with pytest.raises(UserError, match=r"python examples/convert_weights\.py old\.pt OUT\.pt$"):
        load_pretrained(create_model("fishnet_tiny"), "old.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]

def test_another_number_of_classes_leaves_the_classifier_alone(tmp_path):
    torch.save({"model": SOURCE}, tmp_path / "file.pt")
    model = create_model("fishnet_tiny", num_classes=3)
    before = copy.deepcopy(model.state_dict())
    line = load_pretrained(model, tmp_path / "file.pt")
    assert f"{len(before) - 1} of {len(before)} tensors" in line and "new, for 3 classes" in line
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key == "fc.weight" else SOURCE[key]), key

@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(other=torch.zeros(1)), ".* other is not the model's$"),
        (lambda state: state.update({"fc.weight": torch.zeros(10, 7)}), r".*\(10, 7\), expected"),
        (lambda state: state["fc.weight"].fill_(torch.nan), ".* fc.weight is not finite$"),
        (lambda state: list(map(state.pop, list(state)[:9])), "9 weights .* missing(;[^;]*){2}$"),
    ],
)
def test_misfits_are_listed_and_change_nothing(tmp_path, change, message):
    state, model = copy.deepcopy(SOURCE), create_model("fishnet_tiny")
    before = copy.deepcopy(model.state_dict())
    change(state)
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(UserError, match=rf"file\.pt: {message}"):
        load_pretrained(model, tmp_path / "file.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(SOURCE, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a weight, so that a checksum no longer fits
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"file\.pt: damaged"):
        load_pretrained(create_model("fishnet_tiny"), path)

# ---------------------------------------------------------------------------- README and programs

def test_the_readmes_python_runs_and_has_its_sizes():
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(snippet, "README.md", "exec"), names)
    names |= names.get("maps", {})
    sizes = {"logits": (2, 100), "H1": (2, 320, 56, 56), "H4": (2, 2112, 7, 7)}
    for name in sizes.keys() & names.keys():
        assert names[name].shape == sizes[name]

@pytest.mark.parametrize("page", ["README.md", "docs/images.md", "docs/machines.md"])
def test_the_commands_of_train_py_have_its_flags(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S))
    commands = re.findall(r'^[^#$"\n]*(?<!/)\btrain\.py\b([^$"\n]*)$', blocks, re.M)
    assert len(commands) >= 2
    for command in commands:
        train.parse_args(shlex.split(command, comments=True))

@pytest.mark.parametrize("program", ["train", "evaluate", "data", "flops", "convert_weights"])
def test_help(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{program}.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        importlib.import_module(program).main()
    assert capsys.readouterr().out.startswith(f"usage: {program}.py ")

def test_fishnet_py_needs_no_other_file(tmp_path):
    shutil.copy(ROOT / "fishnet.py", tmp_path)
    process = start_python(1, "-c", "import fishnet; print(fishnet.__file__)", cwd=tmp_path)
    assert str(tmp_path / "fishnet.py") in process.communicate(timeout=300)[0]

def test_create_model_calls_your_own_function(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text("def make(**overrides):\n    return overrides\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert create_model("own_networks:make", num_classes=7) == {"num_classes": 7}
    for name in ("own_networks:other", "no_networks:make"):
        with pytest.raises(UserError, match=f"^model={name}: "):
            create_model(name)

# ------------------------------------------------------------------------------ regions and pixels

@pytest.mark.parametrize("name", ["fishnet99", "fishnet99_imagenet", "resnet50"])
def test_the_pyramid_keeps_torchvisions_contract(name):
    model = create_model(name, channels=(16, 32, 64, 128))
    maps = FishNetFPN(model, out_channels=24)(torch.randn(1, 3, 64, 96))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    strides = [model.config.stem_stride << level for level in range(4)]
    assert [x.shape for x in maps.values()][:4] == [(1, 24, 64 // n, 96 // n) for n in strides]

def draw_scene(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a noisy image (3, 64, 64) of a bright rectangle, and torchvision's target."""
    rng = np.random.RandomState(seed)
    left, top, width, height = rng.randint(10, 30, 4).tolist()
    mask = torch.zeros(1, 64, 64)
    mask[:, top : top + height, left : left + width] = 1
    image = torch.from_numpy(rng.uniform(0, 0.3, (3, 64, 64))).float() + 0.6 * mask
    boxes = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
    return image, {"boxes": boxes, "labels": torch.tensor([1]), "masks": mask}

def test_a_detector_trains_and_detects():
    torch.manual_seed(0)
    backbone = FishNetFPN(create_model("fishnet_tiny"), out_channels=32)
    model = MaskRCNN(backbone, 2, 64, 64, rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=50)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    images, targets = zip(*(draw_scene(seed) for seed in range(2)))
    losses = []
    for _ in range(4):
        losses.append(sum(model(list(images), list(targets)).values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    unused = {name for name, p in backbone.named_parameters() if p.grad is None}
    assert unused == {"model.fc.weight", "model.pool.0.weight", "model.pool.0.bias"}
    assert all(p.requires_grad == (name not in unused) for name, p in backbone.named_parameters())
    assert backbone.model.pool[0].num_batches_tracked == 0
    with torch.no_grad():
        found = model.eval()(list(images))
    assert all(x["boxes"].shape[1:] == (4,) and x["masks"].shape[2:] == (64, 64) for x in found)

def train_segmentation(rank: int, folder: Path) -> None:
    """Train a head on H1 in one of two processes; save losses and weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_model("fishnet_tiny")
    del model.h2, model.h3, model.h4, model.pool, model.fc  # DDP would wait for their gradients
    model.head = nn.Conv2d(model.feature_info["H1"].channels, 1, 1)
    model.forward = lambda x: model.head(model.forward_features(x, names=("H1",))["H1"])
    image, target = draw_scene(rank)
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(8):
        scores = wrapped(image[None])
        losses.append(F.binary_cross_entropy_with_logits(scores, target["masks"][None]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    torch.save((torch.stack(losses), list(model.parameters())), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()

def test_a_head_on_the_finest_map_trains_in_two_processes(tmp_path):
    start = "start_processes(train_segmentation, (Path(sys.argv[1]),), 2, start_method='fork')"
    code = f"from test_backbone import *; torch.multiprocessing.{start}"  # imports once, then forks
    process = start_python(1, "-c", code, tmp_path, cwd=ROOT / "examples")
    assert "Error" not in process.communicate(timeout=300)[0]
    (losses, one), (others, two) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert losses[-1] < losses[0] / 2 and others[-1] < others[0] / 2
    assert all(map(torch.equal, one, two))

@pytest.mark.parametrize("name", ["fishnet99", "fishnet99_imagenet", "resnet50"])
def test_networks_are_saved_for_the_hub_with_their_labels(name, tmp_path, monkeypatch):
    labels = {"classes": ["dog", "café"], "mean": [0.1, 0.2, 0.3], "std": [0.7, 0.8, 0.9]}
    source = create_model(name, channels=(16, 32, 64, 128), num_classes=2)
    checkpoint = {"name": name, "config": asdict(source.config), "model": source.state_dict()}
    checkpoint |= labels | {"args": {"dataset": "folder", "image_size": 32}}
    model, images = load_model(checkpoint).eval(), torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("fishnet.snapshot_download", lambda *_, **options: tmp_path)
    for found in map(FishNet.from_pretrained, (tmp_path, "somebody/network")):
        assert torch.equal(found(images), model(images)) and found.config == model.config
        assert {key: getattr(found, key) for key in labels} == labels
        assert list(found.input_size) == [32, 0.875]
    assert "FishNet.from_pretrained" in (tmp_path / "README.md").read_text()
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(UserError, match=r"expected the config\.json of a network"):
        FishNet.from_pretrained(tmp_path)

@pytest.mark.parametrize("name", ["fishnet99", "fishnet99_imagenet", "resnet50"])
def test_onnxruntime_computes_the_same_logits_for_any_batch_and_size(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime, dim = pytest.importorskip("onnxruntime"), torch.export.Dim
    model = create_model(name, channels=(16, 32, 64, 128), tail_depths=(1, 1, 1, 1)).eval()
    stride, path = model.config.stride, tmp_path / "model.onnx"
    shape = {0: dim("n"), 2: stride * dim("h"), 3: stride * dim("w")}
    images = torch.randn(5, 3, 3 * stride, 2 * stride)
    torch.onnx.export(model, (images[:2].mT,), path, input_names=["x"], dynamic_shapes=(shape,))
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"x": images.numpy()})
    np.testing.assert_allclose(logits, model(images).detach(), rtol=1e-4, atol=1e-4)
