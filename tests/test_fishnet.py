"""The networks against published counts, another implementation's logits, and a second implementation in this file."""

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

from fishnet import (
    FishNetConfig,
    Refine,
    ResidualUnit,
    SEResidualUnit,
    Stage,
    StatisticsHeld,
    channel_plan,
    channel_sum,
    checkpoint_activations,
    create_model,
    model_names,
    zero_init_last,
)

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
NARROW = {"channels": (16, 32, 64, 128)}


def narrow(name: str) -> dict:
    """For create_model; the k of fishnet_tiny does not divide so small widths."""
    return NARROW | ({"k": 2} if name == "fishnet_tiny" else {})


@pytest.fixture(autouse=True)
def seed(one_thread):
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------- weights from shapes alone


def normal(*shape):
    """Numbers that depend on the shape alone: any implementation of a network gets the same weights, in any order."""
    return np.random.RandomState(math.prod(shape)).standard_normal(shape)


def weight(*shape):
    """A weight (out, in, ...), rounded to float32 and given as float64."""
    return torch.from_numpy(normal(*shape) * math.sqrt(2 * shape[0] / math.prod(shape))).float().double()


def fill(model):
    """The model with such weights, 0.01 of the same as biases, float64."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data = weight(*module.weight.shape)
            if module.bias is not None:
                module.bias.data = torch.from_numpy(normal(len(module.bias)) * 0.01).float().double()
    return model.double()


# ---------------------------------------------------------------------------------------------- a second implementation


def reference(
    x, channels, tail, body, head, k=2, preact=True, stem_stride=1, final_norm=False, num_classes=10,
    tail_shortcut="conv", bridge="se", stem_depth=2, body_dilations=(1, 2, 4), transfer=(),
):  # fmt: skip
    """Train-mode logits of the slides' networks, written straight down; it makes its weights when it meets a shape."""
    c1, c2, c3, c4 = channels
    activate_sum = (lambda x: x) if preact else torch.relu
    first = 7 if stem_stride == 4 else 3  # the side of the first kernel

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
            elif tail_shortcut == "repeat":  # nearest-neighbour upsampling along the channels
                shortcut = torch.stack([x[:, math.floor(n * x.shape[1] / out)] for n in range(out)], 1)
            else:
                shortcut = conv(x, out)
            x = activate_sum(shortcut + m(x, out, dilation if i == 0 else 1))
        return x

    def cat(trunk, skip, stage):
        trunk = units(trunk, trunk.shape[1], (*body, *head)[stage], (*body_dilations, 1, 1, 1, 1)[stage])
        width = skip.shape[1]
        return torch.cat([trunk, units(skip, width, transfer[stage]) if transfer else m(skip, width)], 1)

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
        bias = torch.from_numpy(normal(num_classes) * 0.01).float().double()
        return average(x) @ weight(num_classes, c4).T + bias
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


DEPTHS = {"tail": (1, 2, 1, 1), "body": (1, 1, 1), "head": (1, 1, 1, 1)}
CASES = {
    "k=1": {"k": 1},
    "k=2": {"k": 2},
    "k=4": {"k": 4},
    "k=3": {"k": 3, "channels": (8, 16, 20, 33)},
    "deep": {"tail": (2, 1, 3, 2), "body": (2, 3, 2), "head": (2, 1, 3, 2)},
    "no regular units": {"tail": (1, 1, 1, 0), "body": (0, 2, 0), "head": (1, 0, 2, 0)},
    "post-activation": {"preact": False},
    "post-activation, k=4": {"preact": False, "k": 4, "tail": (2, 1, 2, 2), "body": (2, 2, 2), "head": (0, 2, 1, 2)},
    "stem of one convolution": {"stem_depth": 0},
    "stem of one convolution, post-activation": {"stem_depth": 0, "stem_stride": 2, "preact": False},
    "stem of three bottlenecks": {"stem_depth": 3, "preact": False},
    "stem 2, 7 classes": {"stem_stride": 2, "num_classes": 7},
    "stem 4": {"stem_stride": 4},
    "stem 4, post-activation": {"stem_stride": 4, "preact": False},
    "stem 4 of one convolution, post-activation": {"stem_depth": 0, "stem_stride": 4, "preact": False},
    "final norm": {"final_norm": True},
    "repeat": {"tail_shortcut": "repeat"},  # 8 -> 18 -> 24 -> 32: not multiples
    "repeat, doubled": {"tail_shortcut": "repeat", "channels": (8, 16, 32, 64)},
    "no bridge": {"bridge": "none"},
    "other dilations": {"body_dilations": (3, 1, 2)},
    "transfer blocks of units": {"transfer": (1, 0, 2, 1, 0, 1, 3)},
    "nothing in transfer blocks, post-activation": {"transfer": (0,) * 7, "preact": False},
    "direct, post-activation": {"tail_shortcut": "repeat", "bridge": "none", "preact": False},
    "resnet, final norm": {"tail": (1, 1, 1, 1), "body": (), "head": (), "final_norm": True},
    "grey": {"in_channels": 1},
    "resnet": {"tail": (2, 1, 2, 3), "body": (), "head": ()},
    "resnet, post-activation": {"tail": (1, 1, 1, 0), "body": (), "head": (), "preact": False, "num_classes": 12},
}


@pytest.mark.parametrize("case", CASES)
def test_any_configuration_is_the_reference(case):
    config = {"channels": (8, 18, 24, 32), **DEPTHS, **CASES[case]}
    depths = (*DEPTHS, "transfer")
    overrides = {f"{name}_depths" if name in depths else name: value for name, value in config.items()}
    images = torch.from_numpy(normal(3, config.pop("in_channels", 3), *[16 * config.get("stem_stride", 1)] * 2))
    expected = reference(images, **config)
    logits = fill(create_model("fishnet99", **overrides)).train()(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_fishnet_tiny_is_the_reference():
    images = torch.from_numpy(normal(2, 3, 32, 48))  # not square
    expected = reference(
        images, (64, 128, 256, 256), (2, 3, 3, 2), (0, 0, 0), (0, 0, 0, 0), k=8, transfer=(0,) * 7, stem_depth=0,
        stem_stride=2, final_norm=True,
    )  # fmt: skip
    torch.testing.assert_close(fill(create_model("fishnet_tiny")).train()(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_of_the_original_implementation(name):
    size = 64 if name.endswith("_imagenet") else 32
    images = torch.from_numpy(normal(4, 3, size, size))
    with torch.no_grad():
        logits = fill(create_model(name)).train()(images)[:, :10]
    for image, expected in (0, GOLDEN[name]["first"]), (-1, GOLDEN[name]["last"]):
        np.testing.assert_allclose(logits[image], expected, rtol=1e-8, atol=1e-9)  # they are printed to 1e-9


# ------------------------------------------------------------------------------------------------------ counts, widths


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("fishnet99", {}, 17_918_784),
        ("fishnet150", {}, 28_806_464),
        ("fishnet73", {}, 15_991_616),
        ("resnet50", {}, 2_999_626),
        ("fishnet99", NARROW, 1_135_344),
        ("fishnet99", {"preact": False}, 17_914_672),
        ("fishnet99_imagenet", {}, 16_628_904),
        ("fishnet150_imagenet", {}, 24_959_400),
        ("fishnet201_imagenet", {}, 44_584_552),
    ],
)
def test_number_of_parameters(name, overrides, expected):
    with torch.device("meta"):
        model = create_model(name, **overrides)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_channel_plan_of_fishnet99():
    trunk, skip = channel_plan((64, 128, 256, 512), k=2)
    assert trunk == (512, 512, 384, 256, 320, 832, 1600)
    assert skip == (512, 256, 128, 64, 512, 768, 512)
    assert create_model("fishnet99").fc.in_features == 2112
    # the paper's: the same rule without a skip to B4
    assert channel_plan((64, 128, 256, 512), 2, "paper") == (trunk, (0, *skip[1:]))


@pytest.mark.parametrize(
    ("channels", "k", "fragments"),
    [
        ((64, 128, 256, 512), 3, ("k=3", "B4", "1024")),
        ((64, 128, 256, 512), 5, ("k=5", "B4", "1024")),
        ((64, 128, 255, 512), 2, ("k=2", "B3", "767")),
        ((64, 127, 256, 512), 2, ("k=2", "B2", "511")),
        ((4, 31, 31, 16), 32, ("k=32", "B4", "at least 4")),
    ],
)
def test_k_must_divide_the_widths_of_the_body(channels, k, fragments):
    for refused in (lambda: channel_plan(channels, k), lambda: FishNetConfig(channels=channels, k=k)):
        with pytest.raises(ValueError) as error:
            refused()
        assert all(fragment in str(error.value) for fragment in fragments), error.value


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_channel_sum_is_equation_8(k, memory_format):
    x = torch.from_numpy(normal(2, 12, 3, 5))
    expected = np.zeros((2, 12 // k, 3, 5))
    for n in range(12 // k):
        for j in range(k):
            expected[:, n] += x.numpy()[:, k * n + j]
    np.testing.assert_allclose(channel_sum(x.to(memory_format=memory_format), k), expected, rtol=1e-12)


@pytest.mark.parametrize("k", [0, -2, 5, 24])
def test_channel_sum_refuses_k(k):
    with pytest.raises(ValueError, match=f"k={k}: .*12"):
        channel_sum(torch.zeros(1, 12, 2, 2), k)


def test_dilation_is_in_the_first_regular_unit_of_b3_and_b2():
    convs = [m for m in create_model("fishnet150").modules() if isinstance(m, nn.Conv2d)]
    dilated = [(m.dilation, m.padding, m.in_channels) for m in convs if m.dilation != (1, 1)]
    assert dilated == [((2, 2), (2, 2), 512 // 4), ((4, 4), (4, 4), 384 // 4)]


def test_weights_at_the_start():
    model = create_model("fishnet99", num_classes=1000)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / module.weight[0].numel()), rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    bound = math.sqrt(6 / 2112)
    assert 0.99 * bound < model.fc.weight.abs().max() <= bound
    assert model.fc.bias is None and create_model("resnet50").fc.bias is not None


def test_weights_of_the_papers_networks_at_the_start():
    for module in create_model("fishnet99_imagenet").modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.numel() > 10_000:
            outputs = module.weight[:, 0].numel()  # k^2 times the output channels
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / outputs), rel=0.05)


# -------------------------------------------------------------------------------------------------- errors of the user


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("channels", (64, 128, 256), "4 integers"),
        ("channels", (64, 128, 256, 512.0), "4 integers"),
        ("channels", (3, 128, 256, 512), "at least 4"),
        ("channels", (4, 4, 4, 8), "at least 16"),
        ("channels", 64, "a list of integers"),
        ("tail_depths", (1, 1, 1), "4 integers"),
        ("tail_depths", (1, 1, 1, -1), "at least 0"),
        ("tail_depths", (1, 0, 1, 1), "at least 1"),
        ("body_depths", (1, 1), "3 integers"),
        ("body_depths", (), "3 integers"),
        ("body_depths", (1, -1, 1), "at least 0"),
        ("body_depths", "111", "a list of integers"),
        ("head_depths", (1, 1, 1), "4 integers"),
        ("head_depths", (1, 1, 1, True), "4 integers"),
        ("head_depths", None, "a list of integers"),
        ("k", 0, "at least 1"),
        ("k", 2.0, "an integer"),
        ("k", True, "an integer"),
        ("preact", 1, "True or False"),
        ("preact", "no", "True or False"),
        ("final_norm", 0, "True or False"),
        ("stem_depth", -1, "an integer of at least 0"),
        ("stem_depth", 1.0, "an integer of at least 0"),
        ("stem_stride", 3, "1, 2 or 4"),
        ("stem_stride", True, "1, 2 or 4"),
        ("in_channels", 0, "at least 1"),
        ("num_classes", -1, "at least 1"),
        ("num_classes", "10", "an integer"),
        ("tail_shortcut", "none", "'conv' or 'repeat'"),
        ("bridge", True, "'se' or 'none'"),
        ("structure", "imagenet", "'slides' or 'paper'"),
        ("body_dilations", (1, 2), "3 integers"),
        ("body_dilations", (1, 2, 0), "at least 1"),
        ("body_dilations", (1, 2, 33), "at most 32"),
        ("transfer_depths", (1, 1, 1, 1, 1, 1), "7 integers"),
    ],
)
def test_a_wrong_field_is_named(field, value, expected):
    with pytest.raises(ValueError) as error:
        create_model("fishnet99", **{field: value})
    message = str(error.value)
    assert message.startswith(f"{field}={value!r}: expected ") and expected in message and "\n" not in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("k", 4), ("bridge", "none"), ("body_dilations", (1, 1, 1)), ("transfer_depths", (0,) * 7)],
)
def test_a_tail_alone_refuses_fields_of_the_body(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}: expected ") + ".* for a tail alone"):
        create_model("resnet50", **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("preact", False, "True in the structure 'paper'"),
        ("tail_shortcut", "repeat", "'conv' in the structure 'paper'"),
        ("stem_depth", 0, "2 in the structure 'paper'"),
        ("stem_stride", 2, "4 in the structure 'paper'"),
        ("body_depths", (1, 0, 1), "3 integers of at least 1"),
        ("head_depths", (1, 1, 1, 1), "3 integers"),
        ("tail_depths", (2, 2, 6, 0), "at least 1 unit in each of T1, T2, T3 and the bridge"),
        ("transfer_depths", (1, 1), "6 integers"),
    ],
)
def test_a_wrong_field_of_the_papers_networks_is_named(field, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}: expected {expected}")):
        create_model("fishnet99_imagenet", **{field: value})


def test_channels_that_shrink_cannot_be_repeated():
    with pytest.raises(ValueError, match=r"channels=.*tail_shortcut='repeat'"):
        create_model("fishnet99", channels=(64, 128, 64, 128), tail_shortcut="repeat")


def test_unknown_names():
    assert set(model_names()) == {
        "fishnet99", "fishnet150", "fishnet73", "fishnet99_direct", "resnet50", "fishnet_tiny", "fishnet99_imagenet",
        "fishnet150_imagenet", "fishnet201_imagenet",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"model='fishnet42'.*fishnet99.*resnet50"):
        create_model("fishnet42")
    with pytest.raises(ValueError, match=r"depth: .*tail_depths"):
        create_model("fishnet99", depth=3)


def test_a_configuration_stays_as_it_was_made():
    config = FishNetConfig(channels=[16, 32, 64, 128])
    assert config.channels == (16, 32, 64, 128)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 4


@pytest.mark.parametrize("name", ["fishnet_tiny", "resnet50"])
@pytest.mark.parametrize(
    ("shape", "fragments"),
    [
        ((1, 3, 32, 36), ("image side", "32 x 36", "multiples of")),
        ((1, 3, 40, 32), ("image side", "40 x 32", "multiples of 16")),
        ((1, 1, 32, 32), ("(1, 1, 32, 32)", "(N, 3, H, W)")),
        ((3, 32, 32), ("(3, 32, 32)", "(N, 3, H, W)")),
    ],
)
def test_images_that_do_not_fit(name, shape, fragments):
    model = create_model(name, stem_stride=2, **narrow(name))
    with pytest.raises(ValueError) as error:
        model(torch.zeros(shape))
    assert all(fragment in str(error.value) for fragment in fragments), error.value


# ------------------------------------------------------------------------------------------------------------ behaviour


@pytest.mark.parametrize("overrides", [{}, {"preact": False}, {"preact": False, "stem_depth": 2}])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_stem_sees_every_pixel(stride, overrides):
    stem = create_model("fishnet_tiny", stem_stride=stride, **overrides).stem.double()
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    stem(images).square().sum().backward()
    assert images.grad.abs().amin() > 0


@pytest.mark.parametrize("name", ["fishnet99", "fishnet_tiny", "fishnet99_imagenet"])
def test_half_precision_on_a_gpu_is_half_precision_everywhere(name):
    """There autocast makes sums and upsampled maps float32. A fake GPU knows shapes, types and devices."""
    found = []
    with FakeTensorMode(), torch.device("cuda"):
        model = create_model(name)
        for module in model.modules():
            if isinstance(module, Stage):
                module.register_forward_hook(lambda stage, inputs, maps: found.extend(maps))
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would not without a GPU
        try:
            model(torch.empty(2, 3, 64, 64))
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert len(found) == 21 and {(x.device.type, x.dtype) for x in found} == {("cuda", torch.bfloat16)}


def test_a_network_made_without_memory_has_all_it_needs_in_its_state_dict():
    source = create_model("fishnet99_direct", **narrow("fishnet99_direct")).eval()
    with torch.device("meta"):
        model = create_model("fishnet99_direct", **narrow("fishnet99_direct")).eval()
    model.load_state_dict(source.state_dict(), assign=True)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), source(images))


@pytest.mark.parametrize("preact", [True, False])
def test_body_and_head_have_no_convolution_in_the_way(preact):
    """With every M of body and head silent, what the tail found still arrives: summed, copied, pooled, concatenated."""
    model = create_model("fishnet_tiny", preact=preact, final_norm=False, transfer_depths=())
    for module in (*model.body.modules(), *model.head.modules()):
        if hasattr(module, "conv3"):
            nn.init.zeros_(module.conv3.weight)
    bridges = []
    model.tail[3].register_forward_hook(lambda module, inputs, output: bridges.append(output))
    logits = model(torch.randn(2, 3, 32, 32))

    arrives = bridges[0].mean((2, 3)).detach().numpy()  # an upsampled pixel's maximum is the pixel
    for skip in (256, 256, 128):  # c4, c3, c2: nothing comes from the skips, and r_8 sums eight channels
        arrives = np.pad(arrives, ((0, 0), (0, skip))).reshape(2, -1, 8).sum(2)
    weights = model.fc.weight.detach().numpy()[:, : arrives.shape[1]]
    assert np.abs(arrives).max() > 0.1
    np.testing.assert_allclose(logits.detach(), arrives @ weights.T, rtol=1e-4, atol=1e-5)


def test_one_image_trains():
    model = create_model("fishnet_tiny").train()
    image = torch.randn(1, 3, 32, 32)
    first, second = model(image), model(image)
    assert first.shape == (1, 10) and torch.equal(first, second)
    first.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "conv" in name)


def test_in_evaluation_an_image_is_judged_by_itself():
    model = create_model("fishnet_tiny")
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        model(images)  # gives the running statistics other values than those of the start
        model.eval()
        together, single = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)


def silence(model):
    """Every M gives zeros."""
    for module in model.modules():
        if hasattr(module, "conv3"):
            nn.init.zeros_(module.conv3.weight)
    return model


@pytest.mark.parametrize("name", ["fishnet99_direct", "fishnet99"])
def test_the_direct_network_is_linear_from_the_stem_on(name):
    """With every M silent, logits are sums, copies and pools of the stem's features: numpy computes them."""
    channels = 8, 16, 24, 48
    model = silence(create_model(name, channels=channels)).double()
    stem = torch.rand(2, 8, 1, 1, dtype=torch.float64).expand(2, 8, 16, 16).clone()  # even maps: a maximum is linear
    model.stem = nn.Identity()
    model.config = dataclasses.replace(model.config, in_channels=8)
    stem.requires_grad_()
    logits = model(stem)
    weights = model.fc.weight.detach().numpy()

    x = stem.detach().numpy()[:, :, 0, 0]
    for c in channels[1:]:
        x = x[:, np.arange(c) * x.shape[1] // c]
    for skip in (48, 24, 16):  # the body: nothing comes from the skips' M, and r_2 sums pairs
        x = np.pad(x, ((0, 0), (0, skip))).reshape(2, -1, 2).sum(2)
    expected = x @ weights[:, : x.shape[1]].T
    if name == "fishnet99":
        assert np.abs(logits.detach().numpy() - expected).max() > 0.1  # its I-convs change them
        return
    np.testing.assert_allclose(logits.detach(), expected, rtol=1e-10)

    # The gradient at the stem is that of this identity path: each of its channels' copies, spread over the pixels.
    logits[:, 3].sum().backward()
    path = np.eye(8)
    for c in channels[1:]:
        path = path[:, np.arange(c) * path.shape[1] // c]
    for skip in (48, 24, 16):
        path = np.pad(path, ((0, 0), (0, skip))).reshape(8, -1, 2).sum(2)
    expected = path @ weights[3, : path.shape[1]]
    np.testing.assert_allclose(stem.grad.sum((2, 3)), [expected] * 2, rtol=1e-10)


@pytest.mark.parametrize("name", ["fishnet99", "fishnet_tiny", "fishnet99_imagenet", "resnet50"])
def test_features_are_the_maps_of_the_stages(name):
    model = create_model(name).eval()
    if name == "resnet50":
        stages = dict(zip(("T1", "T2", "T3", "T4"), model.tail))
    else:
        stages = dict(zip(("H1", "H2", "H3", "H4"), (stage.refine for stage in model.head)))
        stages |= dict(zip(("B4", "B3", "B2"), (stage.refine for stage in model.body)))
    seen = {}
    for key, stage in stages.items():
        stage.register_forward_hook(lambda module, args, output, key=key: seen.update({key: output}))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = model.forward_features(images) if name == "resnet50" else model.forward_features(images, body=True)
        assert list(maps) == list(model.feature_info)
        for key, x in maps.items():
            channels, stride = model.feature_info[key]
            assert x is seen[key] and x.shape == (1, channels, 64 // stride, 96 // stride)
        if name != "resnet50":
            assert list(model.forward_features(images)) == ["H1", "H2", "H3", "H4"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("fishnet_tiny", {"tail_shortcut": "repeat"}), ("resnet50", {}), ("fishnet99_imagenet", {})],
)
@pytest.mark.parametrize("way", ["fx", "export", "compile"])
def test_can_be_traced(name, overrides, way):
    model = create_model(name, **narrow(name), **overrides).eval()
    images = torch.randn(2, 3, 32, 32)
    if way == "fx":
        traced = torch.fx.symbolic_trace(model)
    elif way == "export":
        traced = torch.export.export(model, (images,)).module()
    else:
        torch.compiler.reset()
        traced = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        tolerance = 0 if way == "export" else 1e-5
        torch.testing.assert_close(traced(images), model(images), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------- memory


def train_three_steps(model, call=None):
    """In float64 on random images; returns the logits of the last step."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9)
    for _ in range(3):
        optimizer.zero_grad()
        logits = (call or model.__call__)(torch.randn(4, 3, 32, 32, dtype=torch.double))
        F.cross_entropy(logits, torch.arange(4)).backward()
        optimizer.step()
    return logits


def assert_same_training(a, logits_a, b, logits_b):
    """To the bit: logits, gradients, weights, running statistics and the batches that these have seen."""
    assert torch.equal(logits_a, logits_b)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters()))
    assert a.state_dict().keys() == b.state_dict().keys()
    for (key, value), other in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(value, other), key


def twins(name, **overrides):
    """A network in float64 and the same with checkpointing."""
    model = create_model(name, **narrow(name), **overrides).double()
    twin = copy.deepcopy(model)
    checkpoint_activations(twin)
    return model, twin


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
        shortcut = channel_sum(x, unit.k) if isinstance(unit, Refine) else getattr(unit, "shortcut", nn.Identity())(x)
        expected = shortcut if preact or isinstance(unit, Refine) else shortcut.relu()
        torch.testing.assert_close(unit(x), expected)
    assert len(kinds) == 3


def test_checkpointing_of_another_network_is_refused():
    with pytest.raises(ValueError, match="this model contains none"):
        checkpoint_activations(torch.nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("fishnet_tiny", {}), ("fishnet_tiny", {"preact": False}), ("fishnet99_imagenet", {}), ("resnet50", {})],
)
def test_checkpointing_changes_no_bit_of_training(name, overrides):
    model, twin = twins(name, **overrides)
    for module in (model.tail[0], twin.tail[0]):  # a part in evaluation mode, as for fine-tuning
        module.eval()
    copied = copy.deepcopy(twin)
    logits = train_three_steps(model)
    assert_same_training(model, logits, twin, train_three_steps(twin))
    assert_same_training(model, logits, copied, train_three_steps(copied))
    batches = [value for key, value in twin.state_dict().items() if key.endswith("num_batches_tracked")]
    assert {int(value) for value in batches} == {0, 3}


def test_checkpointing_allows_several_backward_passes():
    results = []
    for model in twins("fishnet_tiny"):
        logits = model(torch.rand(4, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0)))
        logits[:, 0].sum().backward(retain_graph=True)
        logits[:, 1].sum().backward()
        results += [[p.grad for p in model.parameters()] + list(model.buffers())]
    assert all(map(torch.equal, *results))


def test_held_statistics_leave_sync_batch_norm_a_count():
    """It raises without one in training. It needs a GPU to run, so this looks at the count alone."""
    norm = nn.SyncBatchNorm(4)
    with StatisticsHeld(norm):
        norm.num_batches_tracked.add_(1)
    assert norm.num_batches_tracked == 0 and norm.momentum == 0.1


@pytest.mark.parametrize("way", ["compile", "distributed"])
def test_checkpointing_agrees_with(way, tmp_path):
    model, twin = twins("resnet50", tail_depths=(1, 1, 1, 0))
    logits = train_three_steps(model)
    if way == "compile":
        torch.compiler.reset()
        twin.compile(backend="aot_eager")
        assert_same_training(model, logits, twin, train_three_steps(twin))
        return
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(twin)
        assert_same_training(model, logits, twin, train_three_steps(twin, wrapped.__call__))
    finally:
        torch.distributed.destroy_process_group()


class LiveBytes(TorchDispatchMode):
    """The most bytes at a time that operators have made and nothing has let go of yet."""

    def __init__(self):
        super().__init__()
        self.alive, self.total, self.peak = {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        output = op(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.total += storage.nbytes()
        if self.total > self.peak:  # perhaps: some are gone
            self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
            self.total = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.total)
        return output


def test_checkpointing_takes_two_fifths_of_the_memory():
    """All maps and gradients at the fullest moment of a step with 64 images; on the meta device nothing is computed."""
    peaks = []
    with torch.device("meta"):
        for checkpointed in (False, True):
            model = create_model("fishnet99")
            if checkpointed:
                checkpoint_activations(model)
            images = torch.empty(64, 3, 32, 32)
            with LiveBytes() as live:
                model(images).sum().backward()
            peaks.append(live.peak)
    assert peaks[1] < 0.39 * peaks[0], peaks
