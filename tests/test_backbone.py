"""Weights from elsewhere, and the feature pyramid under torchvision's detectors."""

import json
import math
import re
import shlex
import shutil
import sys
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, start_python
from detect_figures import draw_scene
from torch import nn
from torchvision.models.detection import MaskRCNN

import data
import evaluate
import flops
import train
from fishnet import AUTHORS_NAMES, PYTORCHCV_NAMES, FishNetFPN, create_model, load_pretrained, rename

# ------------------------------------------------------------------------------------------------ names of other files
# The names of the layers of two other implementations, written down from their files. Each tensor gets numbers that
# follow from its name; golden_pretrained.json has the logits that those implementations give with these numbers. So a
# layer that is read under another's name, or a name that their files do not have, changes the logits.

GOLDEN = json.loads(Path(__file__).with_name("golden_pretrained.json").read_text())
DEPTHS = {  # units of the ten stages, and of the six transfer blocks
    "fishnet99_imagenet": ((2, 2, 6, 2, 1, 1, 1, 1, 2, 2), (1, 1, 1, 1, 1, 4)),
    "fishnet150_imagenet": ((2, 4, 8, 4, 2, 2, 2, 2, 2, 4), (2, 2, 2, 2, 2, 4)),
}


def authors_layers(name: str) -> list[str]:
    depths, transfers = DEPTHS[name]
    unit = ("bn1", "conv1", "bn2", "conv2", "bn3", "conv3")
    layers = [f"conv{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]
    for i, depth in enumerate(depths):
        trunk = 2 if i == 3 else 0
        layers += [f"fish.fish.{i}.{trunk}.{block}.{layer}" for block in range(depth) for layer in unit]
        layers += [f"fish.fish.{i}.{trunk}.0.shortcut.{j}" for j in (0, 2) if i < 4]
    for i, depth in enumerate(transfers, start=4):
        layers += [f"fish.fish.{i}.1.{block}.{layer}" for block in range(depth) for layer in unit]
    layers += [f"fish.fish.3.0.{j}" for j in (0, 2, 3)] + ["fish.fish.3.1"]
    layers += [f"fish.fish.3.3.0.{j}" for j in (0, 3, 5)]
    return [*layers, *(f"fish.fish.9.3.{j}" for j in (0, 2, 3)), "fish.fish.9.4.1"]


def pytorchcv_layers(name: str) -> list[str]:
    depths, transfers = DEPTHS[name]
    layers = [f"features.init_block.conv{i}.{layer}" for i in (1, 2, 3) for layer in ("conv", "bn")]
    units = [f"down1_seq.unit{i}" for i in (1, 2, 3)], ["skip1_seq.unit4"]
    units = [*units[0], *units[1], *(f"{part}.unit{i}" for part in ("up_seq", "down2_seq") for i in (1, 2, 3))]
    units += ["skip1_seq.unit3", "skip1_seq.unit2", "skip1_seq.unit1"]
    units += ["skip2_seq.unit3", "skip2_seq.unit2", "skip2_seq.unit1"]
    for unit, depth in zip(units, (*depths, *transfers)):
        for block in range(1, depth + 1):
            prefix = f"features.hg.{unit}.blocks.block{block}"
            layers += [f"{prefix}.body.conv{i}.{layer}" for i in (1, 2, 3) for layer in ("bn", "conv")]
            if block == 1 and (unit.startswith("down1") or unit == "skip1_seq.unit4"):
                layers += [f"{prefix}.identity_conv.{layer}" for layer in ("bn", "conv")]
    bridge = "features.hg.skip1_seq.unit4"
    layers += [f"{bridge}.conv{i}.{layer}" for i in (1, 2) for layer in ("bn", "conv")]
    layers += [f"{bridge}.se.{layer}" for layer in ("bn", "conv1", "conv2")]
    final = "features.final_block"
    return [*layers, f"{final}.conv1.bn", f"{final}.conv1.conv", f"{final}.preactiv.bn", "output.final_conv"]


def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights of any network that follow from its names."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        draw *= math.sqrt(2 * shape[0] / draw.size)
    elif name.endswith("running_var"):
        draw = np.exp(draw / 10)
    else:
        draw = draw / 10 + name.endswith("weight")
    return torch.from_numpy(draw).float()


def make_file(name: str, layers: list[str], tables: tuple) -> dict[str, torch.Tensor]:
    """A state_dict with the names of the layers and the shapes of our network's."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in create_model(name).state_dict().items()}
    content = {}
    for layer in layers:
        for kind in ("weight", "bias", "running_mean", "running_var"):
            ours = rename(f"{layer}.{kind}", tables)
            if ours in shapes:
                shape = tuple(shapes[ours]) + ((1, 1) if ours == "fc.weight" else ())
                content[f"{layer}.{kind}"] = numbers(f"{layer}.{kind}", shape)
    return content


def authors_file(name: str) -> dict[str, torch.Tensor]:
    return make_file(name, authors_layers(name), AUTHORS_NAMES)


def pytorchcv_file(name: str) -> dict[str, torch.Tensor]:
    return make_file(name, pytorchcv_layers(name), PYTORCHCV_NAMES)


def welltrained(content: dict) -> dict:
    """The names of the authors' second file: two sequences of FishNet-150 are cut elsewhere."""
    cuts = {
        "fish.fish.3.0.2.": "fish.fish.3.1.0.", "fish.fish.3.0.3.": "fish.fish.3.1.1.",
        "fish.fish.3.1.": "fish.fish.3.1.3.", "fish.fish.9.3.2.": "fish.fish.9.4.0.",
        "fish.fish.9.3.3.": "fish.fish.9.4.1.", "fish.fish.9.4.1.": "fish.fish.9.4.4.",
    }  # fmt: skip

    def cut(name):
        for old, new in cuts.items():
            if name.startswith(old):
                return name.replace(old, new)
        return name

    return {cut(name): value for name, value in content.items()}


def logits(model: nn.Module) -> np.ndarray:
    image = np.random.RandomState(0).standard_normal((1, 3, 224, 224))
    with torch.no_grad():
        return model.eval()(torch.from_numpy(image).float())[0, :10].numpy()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("fishnet99_imagenet", "authors"),
        ("fishnet150_imagenet", "welltrained"),
        ("fishnet150_imagenet", "pytorchcv"),
    ],
)
def test_files_of_others_give_the_logits_of_their_networks(tmp_path, name, form):
    if form == "pytorchcv":
        content = {f"_orig_mod.{key}": value for key, value in pytorchcv_file(name).items()}  # of a compiled model
        torch.save(content, tmp_path / "file.pth")
    else:
        state = authors_file(name)
        state = welltrained(state) if form == "welltrained" else state
        content = {
            "epoch": 100, "arch": "fishnet", "best_prec1": torch.tensor(78.0), "optimizer": {},
            "state_dict": {f"module.{key}": value for key, value in state.items()},
        }  # fmt: skip
        # as PyTorch wrote files in 2018
        torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=form == "welltrained")
    model = create_model(name)
    line = load_pretrained(model, tmp_path / "file.pth")
    names = model.state_dict().keys()
    there = [name for name in names if not name.endswith("num_batches_tracked")]  # as in files of 2018
    source = "pytorchcv" if form == "pytorchcv" else "authors"
    assert f"{len(there)} of {len(there)} tensors from " in line and source in line
    golden = GOLDEN[source][name]
    np.testing.assert_allclose(logits(model), golden, rtol=1e-3, atol=1e-3 * np.abs(golden).max())


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A file of weights of a small network of ten classes, and the network."""
    path = tmp_path_factory.mktemp("own") / "weights.pt"
    model = create_model("fishnet_tiny")
    torch.save(model.state_dict(), path)
    return path, model


def test_another_number_of_classes_drops_the_classifier_alone(own):
    path, source = own
    model = create_model("fishnet_tiny", num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    line = load_pretrained(model, path)
    total = len(before)
    assert f"{total - 1} of {total} tensors" in line and "3 classes, not 10" in line
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key == "fc.weight" else source.state_dict()[key]), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("stem.0.weight"), "1 of its weights do not fit the model: stem.0.weight is missing"),
        (lambda state: state.update(other=torch.zeros(1)), "do not fit the model: other is not the model's"),
        (lambda state: state.update({"stem.0.weight": torch.zeros(1)}), r"is \(1,\) .*, expected \(64, 3,"),
        (lambda state: state["fc.weight"].fill_(torch.nan), "fc.weight is not finite"),
        (lambda state: state.update({"fc.weight": state["fc.weight"].half()}), "torch.float16 .*, expected"),
        (lambda state: state.update({"fc.weight": state["fc.weight"].to_sparse()}), "fc.weight is "),
        (lambda state: state.update({"fc.weight": torch.zeros(10, 7)}), r"fc.weight is \(10, 7\)"),
        (lambda state: state.update({"fc.weight": torch.zeros(10, 7, 2, 2)}), r"fc.weight is \(10, 7, 2, 2\)"),
        (
            lambda state: state.update({"fc.weight": torch.zeros(7).as_strided((10, 7, 10**6, 10**6), (0, 1, 0, 0))}),
            r"fc.weight is \(10, 7, 1000000, 1000000\)",
        ),  # a small file
        (
            lambda state: state.update({5: torch.zeros(1), 12345: torch.zeros(1)}),
            "12345 is not .*; 5 is not the model's$",
        ),
        (lambda state: state.update({"a\n": torch.zeros(1), "module.a\n": torch.zeros(1)}), r"a\\n is in it twice"),
        (lambda state: state.update({"module.fc.weight": state["fc.weight"]}), "fc.weight is in it twice"),
        (lambda state: [state.pop(key) for key in list(state)[9:]], "; and [0-9]+ more$"),
        (lambda state: state.update({"module.other": torch.zeros(1)}), "module.other is not the model's"),
        (lambda state: state.update({"a\n\33[31m": torch.zeros(1)}), r"model: a\\n\\x1b\[31m is not the model's$"),
        (lambda state: state.update({"features.hg.block" + "1" * 5000 + ".": torch.zeros(1)}), "1 is not the model"),
        (lambda state: state.update(number=1), "holds no state_dict"),
        (lambda state: state.update(other=torch.zeros(1, device="meta")), "holds no state_dict"),
        (lambda state: state.update(other=torch.nested.nested_tensor([torch.zeros(1)])), "holds no state_dict"),
        (dict.clear, "holds no state_dict"),
    ],
)
def test_what_does_not_fit_is_listed_and_changes_nothing(tmp_path, own, change, message):
    state = {key: value.clone() for key, value in own[1].state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "file.pt")
    model = create_model("fishnet_tiny")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"file\.pt: .*{message}"):
        load_pretrained(model, tmp_path / "file.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_of_another_network_says_so(tmp_path):
    """Its weights may fit, as where only a stride differs."""
    path, model = tmp_path / "file.pt", create_model("fishnet_tiny")
    for field, value, fits in (("stem_stride", 1, True), ("final_norm", False, False)):
        source = create_model("fishnet_tiny", num_classes=3, **{field: value})
        torch.save({"config": vars(source.config), "model": source.state_dict()}, path)
        said = rf"file\.pt \(of a network with {field}={value}\): "
        if fits:
            assert re.search(said + "334 of 335 tensors", load_pretrained(model, path))
        else:
            with pytest.raises(ValueError, match=said + r"\d+ of its weights do not fit"):
                load_pretrained(model, path)


def test_settings_that_others_call_config_are_no_network(tmp_path, own):
    torch.save({"config": {"lr": 0.1}, "state_dict": own[1].state_dict()}, tmp_path / "file.pt")
    line = load_pretrained(create_model("fishnet_tiny"), tmp_path / "file.pt")
    assert line == f"{tmp_path}/file.pt: 335 of 335 tensors from this project's file"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory"), OSError(5, "a bad disk")])
def test_what_the_machine_lacks_is_not_the_files_fault(monkeypatch, own, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as caught:
        load_pretrained(own[1], own[0])
    assert not isinstance(error, OSError) or caught.value.filename == str(own[0])


def test_a_model_that_is_none_of_ours_is_refused(own):
    for model in FishNetFPN(create_model("fishnet_tiny")), nn.Linear(3, 2):
        with pytest.raises(ValueError, match="of its weights do not fit the model"):
            load_pretrained(model, own[0])


def test_a_file_that_is_none_or_runs_code_is_refused(tmp_path):
    class Call:
        def __reduce__(self):
            return Path.touch, (tmp_path / "canary",)

    model = create_model("fishnet_tiny")
    for legacy in (False, True):
        torch.save({"state_dict": Call()}, tmp_path / "file.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=r"file\.pt: not a file of weights"):
            load_pretrained(model, tmp_path / "file.pt")
    assert not (tmp_path / "canary").exists()
    torch.save(model.state_dict(), tmp_path / "file.pt")
    content = bytearray((tmp_path / "file.pt").read_bytes())
    content[len(content) // 2] ^= 1  # of a weight: a checksum no longer fits
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.pt: damaged \(Bad CRC-32 for file 'file/data/[0-9]+'\)"):
        load_pretrained(model, tmp_path / "file.pt")
    torch.save({"weight": torch.zeros(6)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(content.replace(b"q\6K\6N", b"q\6\x8a\7" + (2**50).to_bytes(7, "little") + b"N"))
    assert (tmp_path / "old.pt").read_bytes() != content
    with pytest.raises(ValueError, match=r"old\.pt: not a file of weights"):  # which claims to need 4 PB
        load_pretrained(model, tmp_path / "old.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pt: not a file of weights"):
        load_pretrained(model, tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt: no such file"):
        load_pretrained(model, tmp_path / "nothing.pt")


# ------------------------------------------------------------------------------------------- the README, the pyramid


SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_what_the_readme_shows_runs_and_has_its_sizes():
    names = {}
    for snippet in SNIPPETS:
        assert len(snippet.splitlines()) < 15
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 100)
    assert {name: tuple(x.shape) for name, x in names["maps"].items()} == {
        "H1": (2, 320, 56, 56), "H2": (2, 832, 28, 28), "H3": (2, 1600, 14, 14), "H4": (2, 2112, 7, 7),
    }  # fmt: skip
    assert names["pixels"].shape == (2, 21, 224, 224)


def test_the_readmes_commands_of_train_py_have_its_flags():
    text, parsed = (ROOT / "README.md").read_text().replace("\\\n", " "), 0
    for line in "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines():
        program, _, flags = line.partition("train.py ")
        if flags and "$" not in line and "examples/" not in program:
            train.parse_args(shlex.split(flags.partition('"')[0], comments=True))
            parsed += 1
    assert parsed >= 8


@pytest.mark.parametrize("program", [train, evaluate, data, flops])
def test_help(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        program.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith(f"usage: {program.__name__}.py ")
    if program is train:
        assert all(f"--{name.replace('_', '-')}" in out for name in vars(train.parse_args([])))


def test_fishnet_py_needs_no_other_file(tmp_path):
    shutil.copy(ROOT / "fishnet.py", tmp_path)
    process = start_python(1, "-c", "import fishnet; print(fishnet.__file__)", cwd=tmp_path)
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and str(tmp_path) in out, out


def test_the_tiny_network_for_photos_is_as_cheap_as_the_readme_says():
    with torch.device("meta"):
        model = create_model("fishnet_tiny", stem_stride=4)
    assert round(flops.count(model, 224).macs / 1e6) == 575


@pytest.mark.parametrize("name", ["fishnet_tiny", "fishnet99_imagenet", "resnet50"])
def test_pyramid_keeps_torchvisions_contract(name):
    model = create_model(name, **({} if name == "fishnet_tiny" else {"channels": (16, 32, 64, 128)}))
    backbone = FishNetFPN(model, out_channels=24)
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert isinstance(maps, OrderedDict) and list(maps) == ["0", "1", "2", "3", "pool"]
    stride = model.config.stem_stride
    for level in range(4):
        assert maps[str(level)].shape == (1, 24, 64 // stride >> level, 96 // stride >> level)
    assert backbone.out_channels == 24


def test_a_detector_trains_and_detects():
    """Mask R-CNN, which is Faster R-CNN with masks."""
    torch.manual_seed(0)
    backbone = FishNetFPN(create_model("fishnet_tiny"), out_channels=32)
    model = MaskRCNN(
        backbone, num_classes=11, min_size=64, max_size=64, box_batch_size_per_image=32, rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=50,
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
    assert unused == {"model.fc.weight", "model.head.3.resample.0.weight", "model.head.3.resample.0.bias"}
    assert all(p.requires_grad == (name not in unused) for name, p in backbone.named_parameters())
    with torch.no_grad():
        found = model.eval()(list(images))
    for detections in found:
        assert {"boxes", "labels", "scores"} <= detections.keys() and detections["boxes"].shape[1] == 4
        assert detections["masks"].shape[2:] == (64, 64)


def test_a_head_on_the_finest_map_segments():
    """A 1 x 1 convolution on H1 tells figure from ground after a few steps."""
    torch.manual_seed(0)
    model = create_model("fishnet_tiny")
    head = nn.Conv2d(model.feature_info["H1"].channels, 1, 1)
    images, targets = zip(*(draw_scene(seed) for seed in range(4)))
    images = torch.stack(images)
    masks = torch.stack([target["masks"].amax(0) for target in targets])[:, None].float()
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 3e-3)
    for _ in range(20):
        maps = F.interpolate(head(model.forward_features(images)["H1"]), scale_factor=2)
        loss = F.binary_cross_entropy_with_logits(maps, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inside = maps > 0
    iou = ((inside & (masks > 0)).sum() / (inside | (masks > 0)).sum()).item()
    assert iou > 0.6
