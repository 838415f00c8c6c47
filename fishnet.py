"""FishNet: a backbone whose tail goes down in resolution, whose body comes back up, whose head goes down again.

Every stage of body and head keeps the features of the others (it concatenates them) and refines them (it adds to them),
and in the slides' networks no convolution stands in the way of the gradient from the loss to any of these stages.

The stages at 32 x 32 input, FishNet-99 (channels 64 128 256 512, k = 2); "trunk + skip" are concatenated:

    stage   size   channels          comes from              then
    stem    32     64                image                   -> x1
    T1-T3   32-8   128, 256, 512     x1, x2, x3              max-pool -> x2, x3, x4
    T4      4      512               x4                      squeeze-and-excitation unit -> bridge
    B4      4      512 + 512         bridge and x4           refine by M + r_k, upsample
    B3      8      512 + 256         B4 and x3                "
    B2      16     384 + 128         B3 and x2                "
    H1      32     256 + 64          B2 and x1               refine by M + identity, max-pool
    H2      16     320 + 512         H1 and B2's 384 + 128    "
    H3      8      832 + 768         H2 and B3's 512 + 256    "
    H4      4      1600 + 512        H3 and x4               refine by M + identity, average pool -> classifier

The paper's own networks for ImageNet are built of the same stages; FishNetConfig says how they differ.

Sources: [P] Sun, Pang, Shi, Yi, Ouyang: FishNet, NeurIPS 2018, arXiv 1901.03495; [O] its authors' code,
github.com/kevin-ssy/FishNet; [S] the slides of S. H. Kim that rebuild it for CIFAR-10, github.com/crapine1119/fishnet.
Equations and figures are those of [P].

    from fishnet import FishNetFPN, create_model, load_pretrained
    logits = create_model("fishnet99")(torch.randn(2, 3, 32, 32))                  # (2, 10)
    model = create_model("fishnet150_imagenet", num_classes=5)
    print(load_pretrained(model, "fishnet150_ckpt.tar"))                           # all but the classifier
    maps = model.forward_features(torch.randn(2, 3, 224, 224))                     # {"H1": (2, 320, 56, 56), ...}
    backbone = FishNetFPN(model)                                                   # for torchvision's detectors
"""

import contextlib
import functools
import io
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------- units


class PreActBottleneck(nn.Module):
    """M: BN-ReLU before each convolution (1x1, 3x3, 1x1), a quarter of the output's width in the middle.

    (N, C_in, H, W) -> (N, C_out, H, W). [P] section 3, [S].
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__()
        width = out_channels // 4
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(F.relu(self.bn1(x), inplace=True))  # (N, C_out/4, H, W)
        x = self.conv2(F.relu(self.bn2(x), inplace=True))  # (N, C_out/4, H, W)
        return self.conv3(F.relu(self.bn3(x), inplace=True))  # (N, C_out, H, W)


class PostActBottleneck(nn.Module):
    """M with BN after each convolution and ReLU after the first two: the order of the original ResNet. [S]."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__()
        width = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, C_out/4, H, W)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)  # (N, C_out/4, H, W)
        return self.bn3(self.conv3(x))  # (N, C_out, H, W)


def bottleneck(in_channels: int, out_channels: int, preact: bool, dilation: int = 1) -> nn.Module:
    """M in the network's order of activation."""
    return (PreActBottleneck if preact else PostActBottleneck)(in_channels, out_channels, dilation)


class RepeatChannels(nn.Module):
    """Nearest-neighbour upsampling along the channels: (N, C_in, H, W) -> (N, C_out, H, W), C_out >= C_in.

    Output channel n is input channel floor(n C_in / C_out). It widens without a convolution: an improvement that [S]
    proposes for the tail.
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        channels = torch.arange(self.out_channels, device=x.device) * x.shape[1] // self.out_channels
        return x.index_select(1, channels)


def norm_conv(in_channels: int, out_channels: int, bias: bool = False) -> list[nn.Module]:
    """BN, ReLU and a 1x1 convolution."""
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
    return [nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), conv]


def make_shortcut(in_channels: int, out_channels: int, kind: str) -> nn.Module:
    """(N, C_in, H, W) -> (N, C_out, H, W): the identity where the widths agree, else what `kind` says.

    "conv": a bare 1x1 convolution, the tail's "I-conv", which stops the direct gradient ([P] section 3, [S]).
    "norm_conv": BN-ReLU before it ([O]). "repeat": no convolution ([S]'s improvement).
    """
    if in_channels == out_channels:
        return nn.Identity()
    if kind == "repeat":
        return RepeatChannels(out_channels)
    if kind == "norm_conv":
        return nn.Sequential(*norm_conv(in_channels, out_channels))
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


class ResidualUnit(nn.Module):
    """shortcut(x) + M(x), and a ReLU after the sum in the post-activation order.

    (N, C_in, H, W) -> (N, C_out, H, W); make_shortcut tells the kinds of shortcut.
    """

    def __init__(
        self, in_channels: int, out_channels: int, preact: bool, dilation: int = 1, shortcut: str = "conv"
    ) -> None:
        super().__init__()
        self.shortcut = make_shortcut(in_channels, out_channels, shortcut)
        self.branch = bottleneck(in_channels, out_channels, preact, dilation)
        self.activation = nn.Identity() if preact else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x).add_(self.shortcut(x)))  # in place: one map less at the peak


def residual_units(
    in_channels: int, out_channels: int, depth: int, preact: bool, dilation: int = 1, shortcut: str = "conv"
) -> nn.Sequential:
    """`depth` residual units; the first changes the width and has the dilation."""
    first = [ResidualUnit(in_channels, out_channels, preact, dilation, shortcut)] if depth else []
    return nn.Sequential(*first, *(ResidualUnit(out_channels, out_channels, preact) for _ in range(depth - 1)))


class SqueezeExcite(nn.Module):
    """A weight in (0, 1) for each channel from its average: (N, C, H, W) -> (N, C, 1, 1). Hu et al. 2018; [S]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.expand = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 1)  # (N, C, 1, 1)
        x = F.relu(self.reduce(x))  # (N, C/16, 1, 1)
        return torch.sigmoid(self.expand(x))  # (N, C, 1, 1)


class SEResidualUnit(nn.Module):
    """x + M(x) * SE(M(x)), the last unit of the tail: the bridge to the body. [S]."""

    def __init__(self, channels: int, preact: bool) -> None:
        super().__init__()
        self.branch = bottleneck(channels, channels, preact)
        self.se = SqueezeExcite(channels)
        self.activation = nn.Identity() if preact else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)  # (N, C, H, W)
        return self.activation((branch * self.se(branch)).add_(x))


class AttentionBridge(nn.Module):
    """The bridge from tail to body of [O]: u * a + a, both of a widened score s of the tail's last map.

    (N, C, H, W) -> (N, C, H, W). s = two BN-ReLU-conv1x1, C -> C/2 -> 2C; u = residual units of s, 2C -> C;
    a in (0, 1), (N, C, 1, 1), from the average of BN-ReLU of s.
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            *norm_conv(channels, channels // 2), *norm_conv(channels // 2, 2 * channels, bias=True)
        )
        self.units = residual_units(2 * channels, channels, depth, preact=True, shortcut="norm_conv")
        self.attention = nn.Sequential(
            nn.BatchNorm2d(2 * channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(2 * channels, channels // 16, 1), nn.ReLU(inplace=True), nn.Conv2d(channels // 16, channels, 1),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)  # (N, 2C, H, W)
        attention = self.attention(score)  # (N, C, 1, 1)
        return self.units(score) * attention + attention


# ----------------------------------------------------------------------------------------------- refinement, stage


@torch.fx.wrap  # one node in a traced graph: a tracer cannot follow a comparison of sizes
def channel_sum(x: Tensor, k: int) -> Tensor:
    """r_k, eq. 8: output channel n is the sum of the input channels k*n ... k*n + k - 1.

    (N, C, H, W) -> (N, C/k, H, W). The sums run over j = 0 ... k-1 and n = 0 ... C/k - 1; the paper prints the upper
    ends k and C/k, each one too far, as [S] points out. r_1 is the identity. ValueError: k does not divide C.
    """
    if k == 1:
        return x
    if k < 1 or x.shape[1] % k:
        raise ValueError(f"k={k}: expected a divisor of the number of channels, {x.shape[1]}")
    return x.unflatten(1, (x.shape[1] // k, k)).sum(2, dtype=x.dtype)  # autocast on a GPU would make it float32


class Refine(nn.Module):
    """M(x) + r_k(x), (N, C, H, W) -> (N, C/k, H, W): the UR block's part before its upsampling (eqs. 4-7).

    With k = 1, r_k is the identity and this is the DR block's part before its pooling (eq. 9): no convolution on the
    shortcut, so the gradient passes unchanged.
    """

    def __init__(self, channels: int, k: int, preact: bool, dilation: int = 1) -> None:
        super().__init__()
        self.k = k
        self.branch = bottleneck(channels, channels // k, preact, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x).add_(channel_sum(x, self.k))


class StageMaps(NamedTuple):
    """What a stage makes; the sizes are those of `Stage`."""

    concatenation: Tensor  # what the stage got: the head takes the body's
    refined: Tensor  # for pyramids
    resampled: Tensor  # the trunk of the next stage


class Stage(nn.Module):
    """One stage of body or head: what came along the trunk and what a skip brings, kept and refined.

    trunk (N, C_t, H, W) goes through the regular units, skip (N, C_s, H, W) through the transfer block T; both are
    concatenated, (N, C_t + C_s, H, W), refined, (N, C', H, W), and resampled, (N, C'', H', W'). Without a skip the
    trunk is the concatenation. [P] Fig. 3 and section 3; make_stage says which modules they are.
    """

    def __init__(self, regular: nn.Module, transfer: nn.Module, refine: nn.Module, resample: nn.Module) -> None:
        super().__init__()
        self.regular = regular
        self.transfer = transfer
        self.refine = refine
        self.resample = resample

    def forward(self, trunk: Tensor, skip: Tensor | None) -> StageMaps:
        x = self.regular(trunk)
        if skip is not None:
            x = torch.cat([x, self.transfer(skip)], dim=1)
        refined = self.refine(x)
        # Autocast on a GPU upsamples in float32.
        return StageMaps(x, refined, self.resample(refined).to(refined.dtype))


# --------------------------------------------------------------------------------------------------- configuration


def channel_plan(
    channels: tuple[int, int, int, int], k: int, structure: str = "slides"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The automatic channel calculation of [S]: (trunk, skip), the two widths that enter B4 B3 B2 H1 H2 H3 H4.

    A body stage leaves (trunk + skip) / k, a head stage trunk + skip; so the classifier sees trunk[6] + skip[6]. In the
    structure "paper" B4 has no skip and keeps its width, and the same rule gives the widths of [O].
    ValueError: k does not divide the width of a body stage, or leaves too few channels for a bottleneck.
    """
    if k < 1:
        raise ValueError(f"k={k}: expected an integer of at least 1")
    c1, c2, c3, c4 = channels
    first = (c4, k) if structure == "slides" else (0, 1)
    trunk = [c4]
    for stage, skip, group in (("B4", *first), ("B3", c3, k), ("B2", c2, k)):
        width = trunk[-1] + skip
        if width % group or width // group < 4:
            raise ValueError(
                f"k={k}: expected a divisor of the width of {stage}, {trunk[-1]} + {skip} = {width}, "
                "that leaves at least 4 channels"
            )
        trunk.append(width // group)
    _, b3, b2, h1 = trunk
    skips = (first[0], c3, c2, c1, b2 + c2, b3 + c3, c4)
    trunk.append(h1 + c1)
    trunk.append(trunk[-1] + skips[4])
    trunk.append(trunk[-1] + skips[5])
    return tuple(trunk), skips


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class FishNetConfig:
    """A network as numbers; checked when it is made. A wrong value is a ValueError that names its field.

    channels: widths of the stem and of T1, T2, T3 (c1 c2 c3 c4). tail_depths: residual units of T1-T4 (T4 of a FishNet
    has the SE unit besides). body_depths, head_depths: regular units of B4 B3 B2 and of H1-H4; both empty leave the
    ResNet that the tail is. k: how many channels r_k sums. preact: BN-ReLU before the convolutions or after.
    tail_shortcut: of the tail's units that widen, "conv" or "repeat" (make_shortcut). bridge: "se", the SE unit after
    T4, or "none". stem_depth: bottlenecks of the stem, which have no shortcuts. If preact, a 3x3 convolution comes
    before them, and 0 leaves it alone; if not, the first of them takes the image, and 0 leaves a 3x3 convolution with
    BN-ReLU. stem_stride: of the first 3x3 convolution, which is 7x7 for 4, so that it sees every pixel. final_norm:
    BN-ReLU before the last pool. in_channels: of the images. num_classes: of the classifier. body_dilations: of the
    first regular unit in B4 B3 B2, 1 to 32. transfer_depths: residual units of the transfer blocks of B4 B3 B2 H1 H2 H3
    H4, 0 to concatenate a skip as it is; empty for [S]'s, one M each.

    structure: "slides" for [S], "paper" for [O]'s networks for ImageNet, which have a stem of three convolutions and a
    pool with stride 4; BN-ReLU before a shortcut's convolution; an attention bridge; no skip to B4; no regular units
    but more refining ones, body_depths and head_depths (of H1 H2 H3; H4 does not refine), dilated in the body;
    transfer blocks of residual units, transfer_depths of B3 B2 H1 H2 H3 H4; and two BN-ReLU with a convolution between
    before the last pool.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512)
    tail_depths: tuple[int, ...] = (3, 4, 6, 2)
    body_depths: tuple[int, ...] = (1, 1, 1)
    head_depths: tuple[int, ...] = (1, 1, 1, 1)
    k: int = 2
    preact: bool = True
    tail_shortcut: str = "conv"
    bridge: str = "se"
    stem_depth: int = 2
    stem_stride: int = 1
    final_norm: bool = False
    in_channels: int = 3
    num_classes: int = 10
    body_dilations: tuple[int, ...] = (1, 2, 4)
    structure: str = "slides"
    transfer_depths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("channels", "tail_depths", "body_depths", "head_depths", "body_dilations", "transfer_depths"):
            if not isinstance(getattr(self, name), (list, tuple)):
                self._refuse(name, "a list of integers")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, allowed in (
            ("structure", ("slides", "paper")), ("tail_shortcut", ("conv", "repeat")), ("bridge", ("se", "none")),
            ("preact", (True, False)), ("final_norm", (True, False)), ("stem_stride", (1, 2, 4)),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not type(allowed[0]) or value not in allowed:  # True == 1
                self._refuse(name, f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}")
        for name, minimum in {"k": 1, "stem_depth": 0, "in_channels": 1, "num_classes": 1}.items():
            if not _is_int(getattr(self, name)) or getattr(self, name) < minimum:
                self._refuse(name, f"an integer of at least {minimum}")
        paper = self.structure == "paper"
        self._check_integers("channels", 4, minimum=4)
        if self.channels[3] < 16:
            self._refuse("channels", "a last width of at least 16, the reduction of squeeze-and-excitation")
        if self.tail_shortcut == "repeat" and list(self.channels) != sorted(self.channels):
            self._refuse("channels", "widths that do not shrink, for tail_shortcut='repeat'")
        self._check_integers("tail_depths", 4, minimum=0)
        if 0 in self.tail_depths[: 4 if paper else 3]:
            stages = "T1, T2, T3 and the bridge" if paper else "T1, T2 and T3"
            self._refuse("tail_depths", f"at least 1 unit in each of {stages}, where the width changes")
        self._check_integers("body_dilations", 3, minimum=1)
        if max(self.body_dilations) > 32:
            self._refuse("body_dilations", "at most 32")
        if paper:  # its structure leaves no choice in these
            for name, value in {
                "preact": True, "tail_shortcut": "conv", "bridge": "se", "stem_depth": 2, "stem_stride": 4,
                "final_norm": True,
            }.items():  # fmt: skip
                if getattr(self, name) != value:
                    self._refuse(name, f"{value!r} in the structure 'paper'")
        if not paper and self.body_depths == self.head_depths == ():  # the tail alone
            for name in ("k", "bridge", "body_dilations", "transfer_depths"):
                if getattr(self, name) != getattr(FishNetConfig, name):
                    default = repr(getattr(FishNetConfig, name))
                    self._refuse(name, f"{default} for a tail alone, which has no use for another")
            return
        self._check_integers("body_depths", 3, minimum=int(paper))
        self._check_integers("head_depths", 3 if paper else 4, minimum=int(paper))
        if paper or self.transfer_depths:
            self._check_integers("transfer_depths", 6 if paper else 7, minimum=0)
        channel_plan(self.channels, self.k, self.structure)  # raises where k does not divide

    def _check_integers(self, name: str, length: int, minimum: int) -> None:
        values = getattr(self, name)
        if len(values) != length or not all(_is_int(v) and v >= minimum for v in values):
            self._refuse(name, f"{length} integers of at least {minimum}")

    def _refuse(self, name: str, expected: str) -> NoReturn:
        raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

    @property
    def stride(self) -> int:
        """Input pixels per pixel of the lowest resolution: image sides must be multiples of it."""
        return self.stem_stride * 8


# -------------------------------------------------------------------------------------------------------- networks


@torch.fx.wrap
def check_images(x: Tensor, config: FishNetConfig) -> None:
    """ValueError where images (N, C, H, W) do not fit a network."""
    in_channels, stride = config.in_channels, config.stride
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(f"images: got shape {tuple(x.shape)}, expected (N, {in_channels}, H, W)")
    if x.shape[2] % stride or x.shape[3] % stride:
        raise ValueError(f"image side: got {x.shape[2]} x {x.shape[3]}, expected multiples of {stride}")


class Feature(NamedTuple):
    """Of a map of forward_features: its channels, and how many pixels of the input one of its pixels stands for."""

    channels: int
    stride: int


def make_stem(config: FishNetConfig) -> nn.Sequential:
    """Images (N, in_channels, H, W) -> x1 (N, c1, H/stem_stride, W/stem_stride); no shortcuts here."""
    c1, stride = config.channels[0], config.stem_stride
    if config.structure == "paper":
        layers = []
        for widths, step in (((config.in_channels, c1 // 2), 2), ((c1 // 2, c1 // 2), 1), ((c1 // 2, c1), 1)):
            conv = nn.Conv2d(*widths, 3, stride=step, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(widths[1]), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.MaxPool2d(3, stride=2, padding=1))
    size = 3 if stride < 4 else 7
    strided = functools.partial(nn.Conv2d, kernel_size=size, stride=stride, padding=size // 2, bias=False)
    if config.preact:
        units = (bottleneck(c1, c1, True) for _ in range(config.stem_depth))
        return nn.Sequential(strided(config.in_channels, c1), *units)
    if config.stem_depth == 0:
        return nn.Sequential(strided(config.in_channels, c1), nn.BatchNorm2d(c1), nn.ReLU(inplace=True))
    first = bottleneck(config.in_channels, c1, False)
    first.conv2 = strided(c1 // 4, c1 // 4)
    return nn.Sequential(first, *(bottleneck(c1, c1, False) for _ in range(config.stem_depth - 1)))


def make_tail(config: FishNetConfig) -> nn.ModuleList:
    """T1-T4: residual units; a max-pool follows T1, T2 and T3. [O]'s T4 is its bridge."""
    c1, c2, c3, c4 = config.channels
    paper = config.structure == "paper"
    shortcut = "norm_conv" if paper else config.tail_shortcut
    tail = nn.ModuleList(
        residual_units(*widths, depth, config.preact, shortcut=shortcut)
        for widths, depth in zip(((c1, c2), (c2, c3), (c3, c4), (c4, c4)), config.tail_depths)
    )
    if paper:
        tail[3] = AttentionBridge(c4, config.tail_depths[3])
    return tail


def make_pool(channels: int, config: FishNetConfig) -> nn.Module:
    """(N, C, H, W) -> (N, C', 1, 1): the average pool before the classifier. C' is C/2 in [O]'s networks, else C."""
    pool = nn.AdaptiveAvgPool2d(1)
    if config.structure == "paper":
        last = nn.BatchNorm2d(channels // 2), nn.ReLU(inplace=True)
        return nn.Sequential(*norm_conv(channels, channels // 2), *last, pool)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), pool) if config.final_norm else pool


def make_stage(config: FishNetConfig, i: int) -> Stage:
    """Stage i of B4 B3 B2 H1 H2 H3 H4 (0 ... 6).

    [S]: regular residual units, the first of them dilated; the transfer block is one M, unless transfer_depths says how
    many residual units; M refines once. [O]: no regular units; the transfer block is residual units; M and further
    residual units refine, all of them dilated.
    """
    trunk, skip = (widths[i] for widths in channel_plan(config.channels, config.k, config.structure))
    resample = nn.Upsample(scale_factor=2) if i < 3 else nn.MaxPool2d(2)
    if i == 6:
        resample = make_pool(trunk + skip, config)
    dilation = (*config.body_dilations, 1, 1, 1, 1)[i]
    k = config.k if i < 3 else 1
    depths = (*config.body_depths, *config.head_depths)
    if config.structure == "slides":
        regular = residual_units(trunk, trunk, depths[i], config.preact, dilation)
        if config.transfer_depths:
            transfer = residual_units(skip, skip, config.transfer_depths[i], config.preact)
        else:
            transfer = bottleneck(skip, skip, config.preact)
        return Stage(regular, transfer, Refine(trunk + skip, k, config.preact), resample)

    refine = nn.Sequential()
    if i < 6:
        k = 1 if i == 0 else k
        width = (trunk + skip) // k
        refine.append(Refine(trunk + skip, k, True, dilation))
        refine.extend(ResidualUnit(width, width, True, dilation) for _ in range(depths[i] - 1))
    transfer = residual_units(skip, skip, config.transfer_depths[i - 1], True) if skip else nn.Sequential()
    return Stage(nn.Sequential(), transfer, refine, resample)


def init_weights(model: nn.Module) -> None:
    """[S]: convolutions Kaiming normal, linear Kaiming uniform; [O]: all of them normal with std sqrt(2 / (k^2 out)).

    BN is made with weight 1 and bias 0.
    """
    paper = model.config.structure == "paper"
    for module in model.modules():
        if isinstance(module, nn.Conv2d) or (paper and isinstance(module, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if paper else "fan_in")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight)


class ResNet(nn.Module):
    """The tail alone: stem, four stages of residual units, average pool, classifier. [S]'s ResNet.

    images (N, in_channels, H, W), H and W multiples of config.stride -> logits (N, num_classes). ValueError: other
    images. The comments give sizes relative to the stem's output.
    """

    def __init__(self, config: FishNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = make_stem(config)
        self.tail = make_tail(config)
        self.pool = make_pool(config.channels[3], config)
        self.fc = nn.Linear(config.channels[3], config.num_classes)
        widths = (*config.channels[1:], config.channels[3])
        self.feature_info = {f"T{i + 1}": Feature(c, config.stem_stride << i) for i, c in enumerate(widths)}
        init_weights(self)

    def forward_features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The tail's maps before their pools, from high to low resolution; feature_info has channels and strides."""
        check_images(x, self.config)
        t1 = self.tail[0](self.stem(x))  # (N, c2, H, W)
        t2 = self.tail[1](F.max_pool2d(t1, 2))  # (N, c3, H/2, W/2)
        t3 = self.tail[2](F.max_pool2d(t2, 2))  # (N, c4, H/4, W/4)
        t4 = self.tail[3](F.max_pool2d(t3, 2))  # (N, c4, H/8, W/8)
        return OrderedDict(T1=t1, T2=t2, T3=t3, T4=t4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.forward_features(x)["T4"]).flatten(1))  # (N, num_classes)


class FishNet(nn.Module):
    """Tail, body and head; the picture is in this file's docstring. [P] Fig. 2, in the form of [S] or [O].

    images (N, in_channels, H, W), H and W multiples of config.stride -> logits (N, num_classes). ValueError: other
    images. The comments give sizes relative to the stem's output.
    """

    def __init__(self, config: FishNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = make_stem(config)
        self.tail = make_tail(config)
        if config.structure == "slides" and config.bridge == "se":
            self.tail[3].append(SEResidualUnit(config.channels[3], config.preact))
        self.body = nn.ModuleList(make_stage(config, i) for i in range(3))
        self.head = nn.ModuleList(make_stage(config, i) for i in range(3, 7))
        trunk, skip = channel_plan(config.channels, config.k, config.structure)
        widths = [t + s for t, s in zip(trunk, skip)]
        paper = config.structure == "paper"
        self.fc = nn.Linear(widths[6] // 2 if paper else widths[6], config.num_classes, bias=paper)
        self.feature_info = {f"H{i + 1}": Feature(widths[3 + i], config.stem_stride << i) for i in range(4)}
        self.feature_info |= {f"B{i + 1}": Feature(trunk[4 - i], config.stem_stride << i) for i in (1, 2, 3)}
        init_weights(self)

    def forward_stages(self, x: Tensor, keep: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """The pooled map (N, C, 1, 1) that the classifier sees, and the refined maps of the stages named in `keep`."""
        check_images(x, self.config)
        paper = self.config.structure == "paper"
        x1 = self.stem(x)  # (N, c1, H, W)
        x2 = F.max_pool2d(self.tail[0](x1), 2)  # (N, c2, H/2, W/2)
        x3 = F.max_pool2d(self.tail[1](x2), 2)  # (N, c3, H/4, W/4)
        x4 = F.max_pool2d(self.tail[2](x3), 2)  # (N, c4, H/8, W/8)
        bridge = self.tail[3](x4)  # (N, c4, H/8, W/8)

        x, kept, concatenations = bridge, {}, []
        for name, stage, skip in zip(("B4", "B3", "B2"), self.body, (None if paper else x4, x3, x2)):
            concatenation, refined, x = stage(x, skip)  # x: (N, B3, H/4, W/4), then (N, B2, H/2, W/2), (N, H1, H, W)
            concatenations.append(concatenation)
            if name in keep:
                kept[name] = refined
            del refined  # in evaluation a map less while the next stage runs
        b4, b3, b2 = concatenations

        for name, stage, skip in zip(("H1", "H2", "H3", "H4"), self.head, (x1, b2, b3, b4 if paper else x4)):
            # x: (N, H2, H/2, W/2), then (N, H3, H/4, W/4), (N, H4, H/8, W/8), (N, C, 1, 1)
            concatenation, refined, x = stage(x, skip)
            if name in keep:
                kept[name] = refined
            del concatenation, refined
        return x, kept

    def forward_features(self, x: Tensor, body: bool = False) -> OrderedDict[str, Tensor]:
        """The head's refined maps H1 ... H4 from high to low resolution, and the body's B2 B3 B4 after them on request.

        Their channels and strides are in feature_info, under the same names.
        """
        names = ("H1", "H2", "H3", "H4", "B2", "B3", "B4") if body else ("H1", "H2", "H3", "H4")
        _, kept = self.forward_stages(x, names)
        return OrderedDict((name, kept[name]) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.forward_stages(x)
        return self.fc(x.flatten(1))  # (N, num_classes)


def zero_init_last(model: nn.Module) -> None:
    """Every residual unit and refinement starts as its shortcut alone: the last layer of its branch is set to zero.

    Goyal et al. 2017, section 5.1. Not [S]'s: with it, high learning rates of SGD do not diverge at the start.
    """
    for module in model.modules():
        if isinstance(module, (ResidualUnit, SEResidualUnit, Refine)):
            branch = module.branch
            nn.init.zeros_(branch.conv3.weight if isinstance(branch, PreActBottleneck) else branch.bn3.weight)


PAPER = dict(structure="paper", stem_stride=4, final_norm=True, num_classes=1000)
CONFIGS = {
    "fishnet99": FishNetConfig(),
    "fishnet150": FishNetConfig(tail_depths=(3, 4, 6, 3), body_depths=(2, 3, 2), head_depths=(3, 4, 6, 3)),
    # [S]'s name; by [S]'s own count of layers it has 66.
    "fishnet73": FishNetConfig(tail_depths=(1, 1, 1, 1)),
    # [S]'s improvements: with them the tail, too, has no convolution outside a branch.
    "fishnet99_direct": FishNetConfig(tail_shortcut="repeat", bridge="none"),
    "resnet50": FishNetConfig(tail_depths=(3, 4, 6, 3), body_depths=(), head_depths=()),
    # Ours, for two CPU cores: a quarter of the pixels; no M without a shortcut round it, in stem and transfer blocks,
    # since M works in a quarter of the width. Per second of training a deeper tail gains more than regular units.
    "fishnet_tiny": FishNetConfig(
        channels=(64, 128, 256, 256), tail_depths=(2, 3, 3, 2), body_depths=(0, 0, 0), head_depths=(0, 0, 0, 0), k=8,
        transfer_depths=(0, 0, 0, 0, 0, 0, 0), stem_depth=0, stem_stride=2, final_norm=True,
    ),
    # [O]
    "fishnet99_imagenet": FishNetConfig(
        tail_depths=(2, 2, 6, 2), body_depths=(1, 1, 1), head_depths=(1, 2, 2), **PAPER,
        transfer_depths=(1, 1, 1, 1, 1, 4),
    ),
    "fishnet150_imagenet": FishNetConfig(
        tail_depths=(2, 4, 8, 4), body_depths=(2, 2, 2), head_depths=(2, 2, 4), **PAPER,
        transfer_depths=(2, 2, 2, 2, 2, 4),
    ),
    "fishnet201_imagenet": FishNetConfig(
        tail_depths=(3, 4, 12, 4), body_depths=(2, 2, 2), head_depths=(2, 3, 10), **PAPER,
        transfer_depths=(2, 2, 2, 2, 2, 9),
    ),
}  # fmt: skip


def model_names() -> list[str]:
    """The names that create_model takes."""
    return list(CONFIGS)


def create_model(name: str, /, **overrides: object) -> FishNet | ResNet:
    """A new network by its name; overrides, such as num_classes, replace fields of its FishNetConfig.

    ValueError: an unknown name or field, or a value that FishNetConfig refuses.
    """
    if name not in CONFIGS:
        raise ValueError(f"model={name!r}: expected one of {', '.join(CONFIGS)}")
    known = [field.name for field in fields(FishNetConfig)]
    for field in overrides:
        if field not in known:
            raise ValueError(f"{field}: no field of FishNetConfig, expected one of {', '.join(known)}")
    config = replace(CONFIGS[name], **overrides)
    return FishNet(config) if config.head_depths else ResNet(config)


class FishNetFPN(nn.Module):
    """A network's feature pyramid as a backbone of torchvision's detectors (Lin et al. 2017).

    images (N, in_channels, H, W) -> {"0": (N, out_channels, H', W'), "1", "2", "3" at half the sides each, "pool"};
    level "0" has the stride of the stem. A FishNet gives its head's maps, a ResNet its tail's. torchvision pads images
    to multiples of 32, which fit every network here. What only the classifier sees, of the model that is given, no
    longer takes gradients.
    """

    def __init__(self, model: FishNet | ResNet, out_channels: int = 256) -> None:
        super().__init__()
        # Here, since only detectors need it: it doubles the time and adds to the memory that "import fishnet" takes.
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        self.model = model
        self.out_channels = out_channels
        widths = [feature.channels for feature in list(model.feature_info.values())[:4]]
        for unused in (model.fc, model.head[3].resample if isinstance(model, FishNet) else model.pool):
            unused.requires_grad_(False)  # DistributedDataParallel would wait for their gradients
        # The maps are sums that nothing has normalised yet: batch norm follows each convolution of the pyramid.
        self.fpn = FeaturePyramidNetwork(widths, out_channels, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.model.forward_features(x).values()
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate(maps)))


# ------------------------------------------------------------------------------------------------------------- memory


class StatisticsHeld:
    """Within it batch norm in training mode normalises as ever, but leaves its running statistics as they are.

    It can be entered again, as it is by each backward pass through the same graph.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        self.held = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm, _, batches in self.held:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if batches is None else batches.clone()  # SyncBatchNorm wants one

    def __exit__(self, *error: object) -> None:
        for norm, momentum, batches in self.held:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def forward_again(part: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """forward(x) of a part of a network, whose maps are computed again in the backward pass instead of being kept."""
    if torch.compiler.is_compiling():  # a compiler keeps statistics apart by itself
        return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)

    def contexts() -> tuple[contextlib.AbstractContextManager, StatisticsHeld]:
        return contextlib.nullcontext(), StatisticsHeld(part)  # of the forward pass, and of its repetition

    return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def checkpoint_activations(model: nn.Module) -> None:
    """From here on the backward pass computes maps again that the forward pass no longer keeps: less memory, more time.

    Of the stem, of each stage of the tail, and of the three parts of each stage of body and head only the inputs are
    kept. Works in place, on a network or on whatever contains one, and leaves the names of its weights; outputs,
    gradients and batch norm's running statistics stay what they were. Chen et al. 2016, arXiv 1604.06174.
    ValueError: the model contains none of these networks.
    """
    parts = []
    for module in model.modules():
        if isinstance(module, (FishNet, ResNet)):
            parts += [module.stem, *module.tail]
        elif isinstance(module, Stage):
            parts += [module.regular, module.transfer, module.refine]
    if not parts:
        raise ValueError("checkpoint-activations: for the networks of fishnet.py, of which this model contains none")
    for part in parts:
        part.forward = functools.partial(forward_again, part, part.forward)


# ---------------------------------------------------------------------------------------------- weights from elsewhere

# (pattern, ours) for the names of [O]'s files, and of pytorchcv's (github.com/osmr/imgclsmob): the same graph in both.
AUTHORS_NAMES = (
    (r"conv([123])\.([01])\.", lambda m: f"stem.{3 * int(m[1]) - 3 + int(m[2])}."),
    (r"fish\.fish\.([012])\.0\.(\d+)\.", r"tail.\1.\2."),
    (r"fish\.fish\.3\.0\.([023])\.", r"tail.3.score.\1."),
    (r"fish\.fish\.3\.1\.", r"tail.3.score.5."),
    (r"fish\.fish\.3\.2\.(\d+)\.", r"tail.3.units.\1."),
    (r"fish\.fish\.3\.3\.0\.([035])\.", r"tail.3.attention.\1."),
    (r"fish\.fish\.([456])\.0\.(\d+)\.", lambda m: f"body.{int(m[1]) - 4}.refine.{m[2]}."),
    (r"fish\.fish\.([789])\.0\.(\d+)\.", lambda m: f"head.{int(m[1]) - 7}.refine.{m[2]}."),
    (r"fish\.fish\.([45])\.1\.(\d+)\.", lambda m: f"body.{int(m[1]) - 3}.transfer.{m[2]}."),
    (r"fish\.fish\.([6789])\.1\.(\d+)\.", lambda m: f"head.{int(m[1]) - 6}.transfer.{m[2]}."),
    (r"fish\.fish\.9\.3\.([023])\.", r"head.3.resample.\1."),
    (r"fish\.fish\.9\.4\.1\.", r"fc."),
    (r"(.*\.)((?:bn|conv)[123]\.)", r"\1branch.\2"),  # then the names inside a unit
)
WELLTRAINED_NAMES = (  # the authors' second file of FishNet-150 cuts two of its sequences elsewhere
    (r"fish\.fish\.3\.1\.([01])\.", lambda m: f"fish.fish.3.0.{int(m[1]) + 2}."),
    (r"fish\.fish\.3\.1\.3\.", r"fish.fish.3.1."),
    (r"fish\.fish\.9\.4\.([01])\.", lambda m: f"fish.fish.9.3.{int(m[1]) + 2}."),
    (r"fish\.fish\.9\.4\.4\.", r"fish.fish.9.4.1."),
)
PYTORCHCV_NAMES = (
    (r"features\.init_block\.conv([123])\.conv\.", lambda m: f"stem.{3 * int(m[1]) - 3}."),
    (r"features\.init_block\.conv([123])\.bn\.", lambda m: f"stem.{3 * int(m[1]) - 2}."),
    (r"features\.hg\.skip1_seq\.unit4\.conv1\.bn\.", r"tail.3.score.0."),
    (r"features\.hg\.skip1_seq\.unit4\.conv1\.conv\.", r"tail.3.score.2."),
    (r"features\.hg\.skip1_seq\.unit4\.conv2\.bn\.", r"tail.3.score.3."),
    (r"features\.hg\.skip1_seq\.unit4\.conv2\.conv\.", r"tail.3.score.5."),
    (r"features\.hg\.skip1_seq\.unit4\.se\.bn\.", r"tail.3.attention.0."),
    (r"features\.hg\.skip1_seq\.unit4\.se\.conv1\.", r"tail.3.attention.3."),
    (r"features\.hg\.skip1_seq\.unit4\.se\.conv2\.", r"tail.3.attention.5."),
    (r"features\.hg\.skip1_seq\.unit4\.blocks\.", r"tail.3.units."),
    (r"features\.hg\.down1_seq\.unit([123])\.blocks\.", lambda m: f"tail.{int(m[1]) - 1}."),
    (r"features\.hg\.up_seq\.unit([123])\.blocks\.", lambda m: f"body.{int(m[1]) - 1}.refine."),
    (r"features\.hg\.down2_seq\.unit([123])\.blocks\.", lambda m: f"head.{int(m[1]) - 1}.refine."),
    (r"features\.hg\.skip1_seq\.unit1\.blocks\.", r"head.0.transfer."),
    (r"features\.hg\.skip1_seq\.unit([23])\.blocks\.", lambda m: f"body.{4 - int(m[1])}.transfer."),
    (r"features\.hg\.skip2_seq\.unit([123])\.blocks\.", lambda m: f"head.{4 - int(m[1])}.transfer."),
    (r"features\.final_block\.conv1\.bn\.", r"head.3.resample.0."),
    (r"features\.final_block\.conv1\.conv\.", r"head.3.resample.2."),
    (r"features\.final_block\.preactiv\.bn\.", r"head.3.resample.3."),
    (r"output\.final_conv\.", r"fc."),
    # then the names inside a unit
    (r"(.*)\.block(\d{1,4})\.", lambda m: f"{m[1]}.{int(m[2]) - 1}."),
    (r"(.*)\.body\.conv([123])\.(bn|conv)\.", r"\1.branch.\3\2."),
    (r"(.*)\.identity_conv\.bn\.", r"\1.shortcut.0."),
    (r"(.*)\.identity_conv\.conv\.", r"\1.shortcut.2."),
)


def rename(name: str, table: tuple) -> str:
    """The name after each of the table's replacements that fits its beginning."""
    for pattern, ours in table:
        name = re.sub(f"^{pattern}", ours, name)
    return name


def shown(name: object) -> str:
    """What a file calls something, which can be anything, as part of one line."""
    return repr(str(name))[1:-1][:200]


def check_weights(model: nn.Module, found: dict, where: str, names: dict[str, str] | None = None) -> None:
    """ValueError, naming the weights and their faults: `found` is no state_dict of the model with finite values.

    names: what weights of `found` are called in the file that they come from.
    """
    expected = model.state_dict()
    labels = {name: shown((names or {}).get(name, name)) for name in found}
    faults = [f"{name} is missing" for name in expected.keys() - found.keys()]
    faults += [f"{labels[name]} is not the model's" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        label = labels[name]
        if not isinstance(found[name], Tensor):
            faults.append(f"{label} is no tensor")
            continue
        theirs, ours = (f"{tuple(x.shape)} {x.dtype} {x.layout}" for x in (found[name], expected[name]))
        if theirs != ours:
            faults.append(f"{label} is {theirs}, expected {ours}")
        elif not found[name].isfinite().all():
            faults.append(f"{label} is not finite")
    if faults:
        text = "; ".join(sorted(faults)[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise ValueError(f"{where}: {len(faults)} of its weights do not fit the model: {text}")


def is_archive(path: Path) -> bool:
    """Whether it begins as torch.save writes it since PyTorch 1.6. OSError: it cannot be read."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


def checked_copy(path: Path) -> io.BytesIO:
    """An archive of torch.save made anew, of what zipfile finds in it: torch.load may find something else in the file.

    Its checksums are verified. OSError: it cannot be read. ValueError, or what zipfile raises: it is damaged, or not as
    torch.save writes it.
    """
    if not is_archive(path):
        raise ValueError("no archive of torch.save")
    content, copy = path.read_bytes(), io.BytesIO()  # zipfile would say of a disk that fails that the file is damaged
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(copy, "w") as made:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("compressed, which torch.save never does: a small file could fill the memory")
        names = {record.filename.lower() for record in records}  # torch.load does not look at the case
        if len({name.partition("/")[0] for name in names}) != 1:
            raise ValueError("not in one folder, as torch.save writes it")
        if len(names) < len(records) or sum(record.file_size for record in records) > len(content):
            raise ValueError("its records overlap")
        if min(record.header_offset for record in records) > 0:
            raise ValueError("something lies before its first record")
        for record in records:
            made.writestr(record.filename, archive.read(record))
    copy.seek(0)
    return copy


def out_of_memory(error: Exception) -> bool:
    """Of a GPU, of Python or of torch's CPU allocator, which raises a plain RuntimeError."""
    text = str(error)
    of_torch = isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)
    return of_torch or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def has_numbers(value: object) -> bool:
    """Whether it is a tensor that has its numbers, in one block."""
    return isinstance(value, Tensor) and not value.is_meta and not value.is_nested


def made_otherwise(content: object, model: nn.Module) -> str:
    """The fields in which a checkpoint's config is not the model's: weights may fit a network that they are not of."""
    theirs, ours = content.get("config") if isinstance(content, dict) else None, getattr(model, "config", None)
    if not isinstance(theirs, dict) or "channels" not in theirs or not isinstance(ours, FishNetConfig):
        return ""  # no network of this file: others call their training's settings so, too
    faults = []
    for field in fields(ours):
        value = theirs.get(field.name, field.default)  # as older checkpoints mean it
        plain = isinstance(value, (int, str)) or (isinstance(value, tuple) and all(map(_is_int, value)))
        if field.name != "num_classes" and plain and value != getattr(ours, field.name):
            faults.append(f"{field.name}={value!r:.60}")
    return f" (of a network with {', '.join(faults)})" if faults else ""


def load_pretrained(model: FishNet | ResNet, path: str | Path) -> str:
    """Weights from a file of [O] (plain or "welltrained"), of pytorchcv, or of this project; returns what matched.

    Takes a state_dict or a dict that holds one as "state_dict" or "model", from any device, with a prefix "module."
    or without, and runs no code of the file. A classifier for another number of classes stays as it is made, and
    the line says so, as it does where a checkpoint is of a network with other fields. ValueError or OSError, naming
    the file: anything else that does not fit; MemoryError or torch's RuntimeError: too little memory. The model is then
    unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:  # files from before PyTorch 1.6 are no archives, and have no checksums
        file = checked_copy(path) if is_archive(path) else path
    except MemoryError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    except Exception as error:  # zipfile raises many kinds for a damaged file
        raise ValueError(f"{path}: damaged ({error})") from None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, with advice that would run a file's code
        if out_of_memory(error) and file is not path:
            raise  # while an old file may claim any size
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise ValueError(f"{path}: not a file of weights that torch.load(weights_only=True) reads") from None
    where = f"{path}{made_otherwise(content, model)}"
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(map(has_numbers, content.values())):
        raise ValueError(f"{path}: holds no state_dict")

    source, tables = "this project's", ()
    plain = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): name for name in content}  # wrappers' prefixes
    if any(name.startswith("fish.fish.") for name in plain):
        source = "the authors'"
        welltrained = "fish.fish.9.4.4.weight" in plain
        tables = (*WELLTRAINED_NAMES, *AUTHORS_NAMES) if welltrained else AUTHORS_NAMES
    elif any(name.startswith("features.hg.") for name in plain):
        source, tables = "pytorchcv's", PYTORCHCV_NAMES
    names = {rename(name, tables): theirs for name, theirs in plain.items()}
    if len(names) < len(content):
        twice, *_ = content.keys() - names.values()
        raise ValueError(f"{path}: {shown(twice)} is in it twice, under two names")
    found = {name: content[theirs] for name, theirs in names.items()}

    expected = model.state_dict()
    fc, dropped, new = "fc.weight", "", {}  # new: what stays as it is made
    if fc in found and found[fc].shape[2:] == (1, 1):
        found[fc] = found[fc][..., 0, 0]  # a classifier of [O] is a 1x1 convolution
    if fc in found and fc in expected and found[fc].ndim == 2 and found[fc].shape[1] == expected[fc].shape[1]:
        theirs, ours = len(found[fc]), len(expected[fc])
        if theirs != ours:
            dropped = f"; the classifier is new: {ours} classes, not {theirs}"
            new = {name: value for name, value in expected.items() if name.startswith("fc.")}
    uncounted = [name for name in expected if name.endswith("num_batches_tracked") and name not in found]
    found |= new | {name: expected[name] for name in uncounted}  # before PyTorch 0.4.1 files did not count batches
    check_weights(model, found, where, names)
    model.load_state_dict(found)
    total = len(expected) - len(uncounted)
    return f"{where}: {total - len(new)} of {total} tensors from {source} file{dropped}"
