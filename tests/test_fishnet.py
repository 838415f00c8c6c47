"""Compare the networks with a second implementation in this file, the logits of other people's
implementations and published counts."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fishnet import CONFIGS, FrozenStatistics, Refine, ResidualUnit, SEResidualUnit
from fishnet import Stage, UserError, channel_plan, channel_sum, checkpoint_activations
from fishnet import create_model, freeze, zero_init_last

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
NARROW = {"channels": (16, 32, 64, 128), "k": 2}

@pytest.fixture(autouse=True)
def seed(one_thread):
    torch.manual_seed(0)

# ------------------------------------------------------------------------ weights from their shapes

def normal(*shape):
    """Return numbers that depend on the shape alone, so that two implementations of a network get
    the same weights in whatever order they make them."""
    return np.random.RandomState(math.prod(shape)).standard_normal(shape)

def weight(*shape):
    """Return a weight (out, in, ...) in float64, rounded to float32."""
    values = normal(*shape) * math.sqrt(2 * shape[0] / math.prod(shape))
    return torch.from_numpy(values).float().double()

def bias(size):
    return torch.from_numpy(normal(size) * 0.01).float().double()

def fill(model):
    """Return the model in float64 with such weights and biases."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data = weight(*module.weight.shape)
            if module.bias is not None:
                module.bias.data = bias(len(module.bias))
    return model.double()

# ------------------------------------------------------------------------- a second implementation

def reference(
    x, channels, tail, body, head, k=2, preact=True, stem_stride=1, final_norm=False,
    num_classes=10, tail_shortcut="conv", bridge="se", stem_depth=2, body_dilations=(1, 2, 4),
    transfer=(),
):  # fmt: skip
    """Return the logits of the slides' networks in training mode. Weights are made where their
    shapes become known."""
    c1, c2, c3, c4 = channels
    activate_sum = (lambda x: x) if preact else torch.relu
    first = 7 if stem_stride == 4 else 3  # side of the first kernel

    def norm(x):
        x = x - x.mean((0, 2, 3), keepdim=True)
        return x / torch.sqrt((x * x).mean((0, 2, 3), keepdim=True) + 1e-5)

    def conv(x, out, kernel=1, dilation=1, stride=1):
        padding = (kernel - 1) // 2 * dilation
        return F.conv2d(x, weight(out, x.shape[1], kernel, kernel), None, stride, padding, dilation)

    def m(x, out, dilation=1, stride=1, kernel=3):
        if preact:
            x = conv(norm(x).relu(), out // 4)
            x = conv(norm(x).relu(), out // 4, 3, dilation)
            return conv(norm(x).relu(), out)
        x = norm(conv(x, out // 4)).relu()
        x = norm(conv(x, out // 4, kernel, dilation, stride)).relu()
        return norm(conv(x, out))

    def units(x, out, depth, dilation=1):
        for i in range(depth):
            if x.shape[1] == out:
                shortcut = x
            elif tail_shortcut == "repeat":
                copies = [x[:, math.floor(n * x.shape[1] / out)] for n in range(out)]
                shortcut = torch.stack(copies, 1)
            else:
                shortcut = conv(x, out)
            x = activate_sum(shortcut + m(x, out, dilation if i == 0 else 1))
        return x

    def cat(trunk, skip, stage):
        dilation = (*body_dilations, 1, 1, 1, 1)[stage]
        trunk = units(trunk, trunk.shape[1], (*body, *head)[stage], dilation)
        width = skip.shape[1]
        skip = units(skip, width, transfer[stage]) if transfer else m(skip, width)
        return torch.cat([trunk, skip], 1)

    def up(x):
        x = m(x, x.shape[1] // k) + sum(x[:, j::k] for j in range(k))
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def pool(x):
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))

    def down(x):
        return pool(m(x, x.shape[1]) + x)

    def average(x):
        return (norm(x).relu() if final_norm else x).mean((2, 3))

    if preact:
        x1 = conv(x, c1, first, stride=stem_stride)
    elif stem_depth:
        x1 = m(x, c1, stride=stem_stride, kernel=first)
    else:
        x1 = norm(conv(x, c1, first, stride=stem_stride)).relu()
    for _ in range(stem_depth if preact else stem_depth - 1):
        x1 = m(x1, c1)
    x2 = pool(units(x1, c2, tail[0]))
    x3 = pool(units(x2, c3, tail[1]))
    x4 = pool(units(x3, c4, tail[2]))
    x = units(x4, c4, tail[3])
    if not head:
        return average(x) @ weight(num_classes, c4).T + bias(num_classes)
    if bridge == "se":
        y = m(x, c4)
        squeezed = conv(y.mean((2, 3), keepdim=True), c4 // 16).relu()
        x = activate_sum(x + y * conv(squeezed, c4).sigmoid())
    b4 = cat(x, x4, 0)
    b3 = cat(up(b4), x3, 1)
    b2 = cat(up(b3), x2, 2)
    h1 = cat(up(b2), x1, 3)
    h2 = cat(down(h1), b2, 4)
    h3 = cat(down(h2), b3, 5)
    h4 = cat(down(h3), x4, 6)
    x = average(m(h4, h4.shape[1]) + h4)
    return x @ weight(num_classes, x.shape[1]).T

SMALL = {"channels": (8, 18, 24, 32), "tail": (1, 2, 1, 1), "body": (1, 1, 1), "head": (1, 1, 1, 1)}
TAIL = {"body": (), "head": ()}
TINY = {
    "channels": (32, 64, 128, 256), "tail": (1, 2, 3, 2), "body": (0, 0, 0), "head": (0, 0, 0, 0),
    "k": 8, "transfer": (0,) * 7, "stem_depth": 0, "final_norm": True,
}  # fmt: skip
CASES = {
    "k=1": {"k": 1},
    "k=4": {"k": 4},
    "k=3": {"k": 3, "channels": (8, 16, 20, 33)},
    "deep": {"tail": (2, 1, 3, 2), "body": (2, 3, 2), "head": (2, 1, 3, 2)},
    "no regular units": {"tail": (1, 1, 1, 0), "body": (0, 2, 0), "head": (1, 0, 2, 0)},
    "post-activation": {"preact": False, "k": 4, "tail": (2, 1, 2, 2), "head": (0, 2, 1, 2)},
    "stem of one convolution": {"stem_depth": 0},
    "one convolution, post-activation": {"stem_depth": 0, "stem_stride": 2, "preact": False},
    "stem of three bottlenecks": {"stem_depth": 3, "preact": False},
    "stem 2, 7 classes": {"stem_stride": 2, "num_classes": 7},
    "stem 4": {"stem_stride": 4},
    "stem 4, post-activation": {"stem_stride": 4, "preact": False},
    "stem 4 of one convolution": {"stem_depth": 0, "stem_stride": 4, "preact": False},
    "final norm": {"final_norm": True},
    "repeat": {"tail_shortcut": "repeat"},  # 8 -> 18 -> 24 -> 32 are not multiples
    "no bridge": {"bridge": "none"},
    "other dilations": {"body_dilations": (3, 1, 2)},
    "transfer blocks of units": {"transfer": (1, 0, 2, 1, 0, 1, 3)},
    "empty transfer blocks, post-activation": {"transfer": (0,) * 7, "preact": False},
    "direct, post-activation": {"tail_shortcut": "repeat", "bridge": "none", "preact": False},
    "grey": {"in_channels": 1},
    "resnet": TAIL | {"tail": (2, 1, 2, 3)},
    "resnet, final norm": TAIL | {"tail": (1, 1, 1, 1), "final_norm": True},
    "resnet, post-activation": TAIL | {"tail": (1, 1, 1, 0), "preact": False, "num_classes": 12},
    "fishnet_tiny": TINY,
}

@pytest.mark.parametrize("case", CASES)
def test_any_configuration_equals_the_reference(case):
    config = SMALL | CASES[case]
    depths = ("tail", "body", "head", "transfer")
    overrides = {f"{n}_depths" if n in depths else n: value for n, value in config.items()}
    model = fill(create_model("fishnet99", **overrides)).train()
    assert case not in CONFIGS or model.config == CONFIGS[case]
    side = 16 * config.get("stem_stride", 1)
    images = torch.from_numpy(normal(3, config.pop("in_channels", 3), side, side * 3 // 2))
    expected = reference(images, **config)
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)

@pytest.mark.parametrize("name", GOLDEN)
def test_logits_equal_those_of_the_original_implementation(name):
    size = 64 if name.endswith("_imagenet") else 32
    images = torch.from_numpy(normal(4, 3, size, size))
    with torch.no_grad():
        logits = fill(create_model(name)).train()(images)[:, :10]
    expected = [GOLDEN[name]["first"], GOLDEN[name]["last"]]  # printed to 1e-9
    np.testing.assert_allclose(logits[[0, -1]], expected, rtol=1e-8, atol=1e-9)

# -------------------------------------------------------------------------------- counts and widths

@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("fishnet99", {}, 17_918_784), ("fishnet150", {}, 28_806_464),
        ("fishnet73", {}, 15_991_616), ("resnet50", {}, 2_999_626),
        ("fishnet99", NARROW, 1_135_344), ("fishnet99", {"preact": False}, 17_914_672),
        ("fishnet99_imagenet", {}, 16_628_904), ("fishnet150_imagenet", {}, 24_959_400),
        ("fishnet201_imagenet", {}, 44_584_552),
    ],
)  # fmt: skip
def test_number_of_parameters_is_the_published_one(name, overrides, expected):
    with torch.device("meta"):
        model = create_model(name, **overrides)
    assert sum(p.numel() for p in model.parameters()) == expected

def test_channel_plan_of_fishnet99_is_that_of_the_slides():
    trunk, skip = channel_plan((64, 128, 256, 512), k=2)
    assert trunk == (512, 512, 384, 256, 320, 832, 1600)
    assert skip == (512, 256, 128, 64, 512, 768, 512)
    assert channel_plan((64, 128, 256, 512), 2, b4_has_skip=False) == (trunk, (0, *skip[1:]))

@pytest.mark.parametrize(
    ("channels", "k", "fragments"),
    [
        ((64, 128, 256, 512), 3, ("k=3", "B4", "1024")),
        ((64, 128, 255, 512), 2, ("k=2", "B3", "767")),
        ((64, 127, 256, 512), 2, ("k=2", "B2", "511")),
        ((4, 31, 31, 16), 32, ("k=32", "B4", "at least 4")),
    ],
)
def test_k_must_divide_the_widths_of_the_body(channels, k, fragments):
    with pytest.raises(UserError) as error:
        create_model("fishnet99", channels=channels, k=k)
    assert all(fragment in str(error.value) for fragment in fragments), error.value

@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_channel_sum_is_equation_8(k, memory_format):
    x = torch.from_numpy(normal(2, 12, 3, 5))
    expected = np.zeros((2, 12 // k, 3, 5))
    for n in range(12 // k):
        for j in range(k):
            expected[:, n] += x.numpy()[:, k * n + j]
    found = channel_sum(x.to(memory_format=memory_format), k)
    np.testing.assert_allclose(found, expected, rtol=1e-12)

@pytest.mark.parametrize("name", ["fishnet99", "fishnet99_imagenet"])
def test_weights_start_as_their_sources_say(name):
    is_papers = name.endswith("_imagenet")
    for module in create_model(name, num_classes=1000).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, nn.Linear) and not is_papers:
            bound = math.sqrt(6 / 2112)
            assert 0.99 * bound < module.weight.abs().max() <= bound and module.bias is None
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel() > 10_000:
            fan = module.weight[:, 0].numel() if is_papers else module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.05)

# ----------------------------------------------------------------------------- mistakes of the user

WRONG_FIELDS = {  # (field, value, what the message says was expected)
    "fishnet99": [
        ("channels", (64, 128, 256), "4 integers"), ("channels", (4, 4, 4, 16.0), "4 integers"),
        ("channels", (3, 128, 256, 512), "at least 4"), ("channels", (4, 4, 4, 8), "at least 16"),
        ("channels", 64, "4 integers"), ("body_depths", "111", "3 integers"),
        ("tail_depths", (1, 1, 1, -1), "at least 0"), ("tail_depths", (1, 0, 1, 1), "at least one"),
        ("body_depths", (1, 1), "3 integers"), ("body_depths", (), "3 integers"),
        ("head_depths", (1, 1, 1, True), "4 integers"), ("head_depths", None, "4 integers"),
        ("k", 0, "at least 1"), ("k", 2.0, "an integer"), ("k", True, "an integer"),
        ("preact", 1, "True or False"), ("final_norm", "no", "True or False"),
        ("stem_depth", -1, "at least 0"), ("stem_stride", 3, "1 or 2 or 4"),
        ("stem_stride", True, "1 or 2 or 4"), ("in_channels", 0, "at least 1"),
        ("num_classes", "10", "an integer"), ("tail_shortcut", "none", "'conv' or 'repeat'"),
        ("bridge", True, "'se' or 'none'"), ("body_dilations", (1, 2, 0), "at least 1"),
        ("transfer_depths", (1, 1, 1, 1, 1, 1), "7 integers"),
    ],
    "fishnet99_direct": [("channels", (64, 128, 64, 128), "tail_shortcut='repeat'")],
    "fishnet99_imagenet": [
        ("preact", False, "True in"), ("tail_shortcut", "repeat", "'conv' in"),
        ("stem_stride", 2, "4 in an ImageNet network"), ("head_depths", (1, 1, 1), "4 integers"),
        ("body_depths", (1, 0, 1), "at least"), ("tail_depths", (2, 2, 6, 0), "at least"),
        ("transfer_depths", (), "at least"),
    ],
}  # fmt: skip

@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [(name, *row) for name, rows in WRONG_FIELDS.items() for row in rows],
)
def test_a_wrong_field_is_named(name, field, value, expected):
    with pytest.raises(UserError, match=f"^{field}={re.escape(repr(value))}: expected ") as error:
        create_model(name, **{field: value})
    assert expected in str(error.value) and "\n" not in str(error.value)

def test_unknown_names_and_networks_are_refused():
    with pytest.raises(UserError, match=r"model='fishnet42'.*fishnet99.*resnet50"):
        create_model("fishnet42")
    with pytest.raises(UserError, match="depth: not a field"):
        create_model("fishnet99", depth=3)
    with pytest.raises(UserError, match=r"networks of fishnet\.py only"):
        checkpoint_activations(nn.Linear(3, 3))

@pytest.mark.parametrize("name", ["fishnet_tiny", "resnet50"])
@pytest.mark.parametrize("shape", [(1, 3, 32, 36), (1, 3, 40, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_images_that_do_not_fit_are_refused(name, shape):
    model = create_model(name, stem_stride=2, **NARROW)
    expected = r"expected \(N, 3, H, W\) with sides that are multiples of 16"
    with pytest.raises(UserError, match=re.escape(f"got {shape}, ") + expected):
        model(torch.zeros(shape))

# ---------------------------------------------------------------------------------------- behaviour

@pytest.mark.parametrize("name", ["fishnet99", "fishnet_tiny", "fishnet99_imagenet"])
def test_every_map_is_half_precision_under_autocast_on_a_gpu(name):
    """Use a fake GPU, which knows shapes, types and devices. Autocast on a GPU turns sums and
    upsampled maps into float32."""
    found = []
    with FakeTensorMode(), torch.device("cuda"):
        model = create_model(name)
        for module in model.modules():
            if isinstance(module, Stage):
                module.register_forward_hook(lambda m, inputs, maps: found.extend((*inputs, *maps)))
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would refuse without a GPU
        try:
            model(torch.empty(2, 3, 64, 64))
            found.append(channel_sum(found[0], k=2))
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert len(found) == 7 * 4 + 1
    assert {(x.device.type, x.dtype) for x in found} == {("cuda", torch.bfloat16)}

def silence(*modules):
    """Let every bottleneck branch return zeros."""
    for module in (m for root in modules for m in root.modules()):
        if hasattr(module, "conv3"):
            nn.init.zeros_(module.conv3.weight)

def fold(x, skips, k):
    """Follow (N, C) through the body: each stage appends a silent skip and sums k channels."""
    for skip in skips:
        x = np.pad(x, ((0, 0), (0, skip))).reshape(len(x), -1, k).sum(2)
    return x

@pytest.mark.parametrize("preact", [True, False])
def test_body_and_head_have_no_convolution_in_the_way(preact):
    model = create_model("fishnet_tiny", preact=preact, final_norm=False, transfer_depths=())
    silence(model.b4, model.b3, model.b2, model.h1, model.h2, model.h3, model.h4)
    bridges = []
    model.bridge.register_forward_hook(lambda module, inputs, output: bridges.append(output))
    logits = model(torch.randn(2, 3, 32, 32))

    arrives = bridges[0].mean((2, 3)).detach().numpy()  # pooling undoes each upsampling
    arrives = fold(arrives, (256, 256, 128), k=8)
    weights = model.fc.weight.detach().numpy()[:, : arrives.shape[1]]
    assert np.abs(arrives).max() > 0.1
    np.testing.assert_allclose(logits.detach(), arrives @ weights.T, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("name", ["fishnet99_direct", "fishnet99"])
def test_the_direct_network_is_linear_from_the_stem_on(name):
    channels = 8, 16, 24, 48
    model = create_model(name, channels=channels).double()
    silence(model)
    model.stem = nn.Identity()
    model.config = dataclasses.replace(model.config, in_channels=8)
    # Maps of one value each keep a max-pool linear.
    stem = torch.rand(2, 8, 1, 1, dtype=torch.float64).expand(2, 8, 16, 16).clone().requires_grad_()
    logits = model(stem)
    weights = model.fc.weight.detach().numpy()

    path = np.eye(8)  # from the stem's channels to those of the body's last stage
    for c in channels[1:]:
        path = path[:, np.arange(c) * path.shape[1] // c]
    path = fold(path, (48, 24, 16), k=2)
    path = path @ weights[:, : path.shape[1]].T
    expected = stem.detach().numpy()[:, :, 0, 0] @ path
    if name == "fishnet99":  # its isolated convolutions are in the way
        assert np.abs(logits.detach().numpy() - expected).max() > 0.1
        return
    np.testing.assert_allclose(logits.detach(), expected, rtol=1e-10)
    logits[:, 3].sum().backward()
    np.testing.assert_allclose(stem.grad.sum((2, 3)), [path[:, 3]] * 2, rtol=1e-10)

def test_one_image_trains_every_weight():
    model = create_model("fishnet_tiny").train()
    model(torch.randn(1, 3, 32, 32)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "conv" in name)

@pytest.mark.parametrize("name", ["fishnet99", "fishnet_tiny", "fishnet99_imagenet", "resnet50"])
def test_features_are_the_refined_maps_of_the_stages(name):
    model = create_model(name).eval()
    names = list(model.feature_info)
    seen = {}
    for key in names:
        stage = getattr(model, key.lower())
        refine = stage if key[0] == "T" else stage.refine
        refine.register_forward_hook(lambda m, inputs, output, key=key: seen.update({key: output}))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = model.forward_features(images, names)
        assert list(maps) == names
        for key, x in maps.items():
            channels, stride = model.feature_info[key]
            assert x is seen[key] and x.shape == (1, channels, 64 // stride, 96 // stride)
        assert list(model.forward_features(images)) == names[:4]
        for i, key in enumerate(order := list(seen)):  # later stages are not computed
            seen.clear()
            assert list(model.forward_features(images, (key,))) == [key]
            assert list(seen) == order[: i + 1]

@pytest.mark.parametrize("name", ["fishnet99", "fishnet99_imagenet", "resnet50"])
def test_without_classes_the_network_returns_what_the_classifier_gets(name):
    model, images = create_model(name, **NARROW).eval(), torch.randn(2, 3, 32, 32)
    bare = copy.deepcopy(model)
    bare.reset_classifier(0)
    with torch.no_grad():
        pooled, logits, maps = bare(images), model(images), model.forward_features(images)
        torch.testing.assert_close(F.linear(pooled, model.fc.weight, model.fc.bias), logits)
        assert torch.equal(model.forward_head(maps), logits)
        assert torch.equal(model.forward_head(maps, pre_logits=True), pooled)
    model.double().reset_classifier(5)
    assert model(images.double()).shape == (2, 5) and pooled.shape == (2, model.num_features)

@pytest.mark.parametrize(("name", "preact"), [("fishnet99", False), ("fishnet99_imagenet", True)])
def test_every_module_takes_a_full_backward_hook(name, preact):  # as Grad-CAM tools do
    model, called = create_model(name, **NARROW, preact=preact), set()
    for module in model.modules():
        module.register_full_backward_hook(lambda module, *_: called.add(module))
    model(torch.randn(2, 3, 32, 32, requires_grad=True)).logsumexp(1).sum().backward()
    assert called >= {module for module in model.modules() if list(module.parameters())}

def test_frozen_parts_stay_as_they_are():
    model = create_model("fishnet99_imagenet", **NARROW).double()
    freeze(model, "tail,b4,b2")
    trained = copy.deepcopy(model).train()
    train_three_steps(trained)
    pairs = zip(trained.state_dict().items(), model.state_dict().values())
    changed = {key.partition(".")[0] for (key, value), before in pairs if not value.equal(before)}
    assert changed == {"b3", "h1", "h2", "h3", "h4", "pool", "fc"}
    with pytest.raises(UserError, match="freeze=stem,neck: the network has no part 'neck'"):
        freeze(model, "stem,neck")

@pytest.mark.parametrize("name", ["fishnet99_direct", "resnet50", "fishnet99_imagenet"])
@pytest.mark.parametrize("method", ["fx", "export", "compile"])
def test_networks_can_be_traced(name, method):
    model = create_model(name, **NARROW).eval()
    images = torch.randn(2, 3, 32, 32)
    if method == "fx":
        traced = torch.fx.symbolic_trace(model)
    elif method == "export":
        traced = torch.export.export(model, (images,)).module()
    else:
        torch.compiler.reset()
        traced = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        tolerance = 0 if method == "export" else 1e-5
        torch.testing.assert_close(traced(images), model(images), rtol=tolerance, atol=tolerance)

@pytest.mark.parametrize("preact", [True, False])
def test_units_start_as_their_shortcuts(preact):
    model = create_model("fishnet99", **NARROW, preact=preact)
    zero_init_last(model)
    kinds = set()
    for unit in model.modules():
        if not isinstance(unit, (ResidualUnit, SEResidualUnit, Refine)):
            continue
        kinds.add(type(unit))
        x = torch.randn(2, unit.branch.conv1.in_channels, 4, 4)
        if isinstance(unit, Refine):
            expected = channel_sum(x, unit.k)
        else:
            shortcut = getattr(unit, "shortcut", nn.Identity())(x)
            expected = shortcut if preact else shortcut.relu()
        torch.testing.assert_close(unit(x), expected)
    assert len(kinds) == 3

# ------------------------------------------------------------------------- activation checkpointing

def train_three_steps(model, call=None):
    """Train in float64 on random images, and return the logits of the last step."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9)
    for _ in range(3):
        optimizer.zero_grad()
        logits = (call or model)(torch.randn(4, 3, 32, 32, dtype=torch.double))
        F.cross_entropy(logits, torch.arange(4)).backward()
        optimizer.step()
    return logits

def assert_same_training(a, logits_a, b, logits_b):
    """Compare every bit of logits, gradients, weights, running statistics and batch counts."""
    assert torch.equal(logits_a, logits_b)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters()))
    assert a.state_dict().keys() == b.state_dict().keys()
    for (key, value), other in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(value, other), key

def make_twins(name, **overrides):
    """Return a network in float64, and a copy with activation checkpointing."""
    model = create_model(name, **NARROW, **overrides).double()
    twin = copy.deepcopy(model)
    checkpoint_activations(twin)
    return model, twin

@pytest.mark.parametrize(
    ("name", "preact"),
    [("fishnet_tiny", False), ("fishnet99_imagenet", True), ("resnet50", True)],
)
def test_checkpointing_changes_no_bit_of_training(name, preact):
    model, twin = make_twins(name, preact=preact)
    for module in (model.t1, twin.t1):  # one part is in evaluation mode, as in fine-tuning
        module.eval()
    copied = copy.deepcopy(twin)
    logits = train_three_steps(model)
    assert_same_training(model, logits, twin, train_three_steps(twin))
    assert_same_training(model, logits, copied, train_three_steps(copied))
    batches = {int(x) for key, x in twin.state_dict().items() if key.endswith("batches_tracked")}
    assert batches == {0, 3}

def test_checkpointing_allows_several_backward_passes():
    images = torch.rand(4, 3, 32, 32, dtype=torch.double)
    results = []
    for model in make_twins("fishnet_tiny"):
        logits = model(images)
        logits[:, 0].sum().backward(retain_graph=True)
        logits[:, 1].sum().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(map(torch.equal, *results))

def test_frozen_statistics_leave_sync_batch_norm_a_count():
    """SyncBatchNorm raises without a count in training, but needs a GPU to run."""
    norm = nn.SyncBatchNorm(4)
    with FrozenStatistics(norm):
        norm.num_batches_tracked.add_(1)
    assert norm.num_batches_tracked == 0 and norm.momentum == 0.1

@pytest.mark.parametrize("wrapper", ["compile", "distributed"])
def test_checkpointing_changes_no_bit_under(wrapper, tmp_path):
    model, twin = make_twins("resnet50", tail_depths=(1, 1, 1, 0))
    logits = train_three_steps(model)
    if wrapper == "compile":
        torch.compiler.reset()
        twin.compile(backend="aot_eager")
        assert_same_training(model, logits, twin, train_three_steps(twin))
        return
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(twin)
        assert_same_training(model, logits, twin, train_three_steps(twin, wrapped))
    finally:
        torch.distributed.destroy_process_group()

class LiveBytes(TorchDispatchMode):
    """Measure the most bytes that operators have made and nothing has released, at any time."""

    def __init__(self):
        super().__init__()
        self.alive, self.total, self.peak = {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        output = op(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.alive:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.total += storage.nbytes()
        if self.total > self.peak:  # only then it is worth looking at what is gone
            self.alive = {key: x for key, x in self.alive.items() if not x[0].expired()}
            self.total = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.total)
        return output

def test_checkpointing_needs_two_fifths_of_the_memory():
    """Compare the peaks of a step with 64 images on the meta device, which computes nothing."""
    peaks = []
    with torch.device("meta"):
        for is_checkpointed in (False, True):
            model = create_model("fishnet99")
            if is_checkpointed:
                checkpoint_activations(model)
            images = torch.empty(64, 3, 32, 32)
            with LiveBytes() as live:
                model(images).sum().backward()
            peaks.append(live.peak)
    assert peaks[1] < 0.39 * peaks[0], peaks
