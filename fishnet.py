"""FishNet: a backbone whose tail goes down in resolution, whose body comes back up, whose head goes down again.

Every stage keeps the features of the others (it concatenates them) and refines them (it adds to them), and no
convolution stands in the way of the gradient from the loss to any stage of body or head.

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

Sources: [P] Sun, Pang, Shi, Yi, Ouyang: FishNet, NeurIPS 2018, arXiv 1901.03495; [S] the slides of S. H. Kim that
rebuild it for CIFAR-10, github.com/crapine1119/fishnet. Equations and figures are those of [P].

    from fishnet import create_model
    logits = create_model("fishnet99")(torch.randn(2, 3, 32, 32))    # (2, 10)
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class ResidualUnit(nn.Module):
    """shortcut(x) + M(x), and a ReLU after the sum in the post-activation order.

    (N, C_in, H, W) -> (N, C_out, H, W). The shortcut is the identity where the widths agree, else a bare 1x1
    convolution: the tail's "I-conv", which stops the direct gradient ([P] section 3, [S]).
    """

    def __init__(self, in_channels: int, out_channels: int, preact: bool, dilation: int = 1) -> None:
        super().__init__()
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.branch = bottleneck(in_channels, out_channels, preact, dilation)
        self.activation = nn.Identity() if preact else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.shortcut(x) + self.branch(x))


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
        return self.activation(x + branch * self.se(branch))


def residual_units(in_channels: int, out_channels: int, depth: int, preact: bool, dilation: int = 1) -> nn.Sequential:
    """`depth` residual units; the first changes the width and has the dilation."""
    first = [ResidualUnit(in_channels, out_channels, preact, dilation)] if depth else []
    return nn.Sequential(*first, *(ResidualUnit(out_channels, out_channels, preact) for _ in range(depth - 1)))


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
    return x.unflatten(1, (x.shape[1] // k, k)).sum(2)


class Refine(nn.Module):
    """M(x) + r_k(x), (N, C, H, W) -> (N, C/k, H, W): the UR block's part before its upsampling (eqs. 4-7).

    With k = 1, r_k is the identity and this is the DR block's part before its pooling (eq. 9): no convolution on the
    shortcut, so the gradient passes unchanged.
    """

    def __init__(self, channels: int, k: int, preact: bool) -> None:
        super().__init__()
        self.k = k
        self.branch = bottleneck(channels, channels // k, preact)

    def forward(self, x: Tensor) -> Tensor:
        return channel_sum(x, self.k) + self.branch(x)


class Stage(nn.Module):
    """One stage of body or head: what came along the trunk and what a skip brings, kept and refined.

    trunk (N, C_t, H, W) goes through the regular units, skip (N, C_s, H, W) through the transfer block T; both are
    concatenated, refined and resampled. [P] Fig. 3 and section 3; which modules they are is FishNet's business.

    Returns (concatenation (N, C_t + C_s, H, W), resampled (N, C', H', W')): the head takes the body's concatenations.
    """

    def __init__(self, regular: nn.Module, transfer: nn.Module, refine: nn.Module, resample: nn.Module) -> None:
        super().__init__()
        self.regular = regular
        self.transfer = transfer
        self.refine = refine
        self.resample = resample

    def forward(self, trunk: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.regular(trunk), self.transfer(skip)], dim=1)
        return x, self.resample(self.refine(x))


# --------------------------------------------------------------------------------------------------- configuration


def channel_plan(channels: tuple[int, int, int, int], k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The automatic channel calculation of [S]: (trunk, skip), the two widths that enter B4 B3 B2 H1 H2 H3 H4.

    A body stage leaves (trunk + skip) / k, a head stage trunk + skip; so the classifier sees trunk[6] + skip[6].
    ValueError: k does not divide the width of a body stage, or leaves too few channels for a bottleneck.
    """
    if k < 1:
        raise ValueError(f"k={k}: expected an integer of at least 1")
    c1, c2, c3, c4 = channels
    trunk = [c4]
    for stage, skip in (("B4", c4), ("B3", c3), ("B2", c2)):
        width = trunk[-1] + skip
        if width % k or width // k < 4:
            raise ValueError(
                f"k={k}: expected a divisor of the width of {stage}, {trunk[-1]} + {skip} = {width}, "
                "that leaves at least 4 channels"
            )
        trunk.append(width // k)
    _, b3, b2, h1 = trunk
    skips = (c4, c3, c2, c1, b2 + c2, b3 + c3, c4)
    trunk.append(h1 + c1)
    trunk.append(trunk[-1] + skips[4])
    trunk.append(trunk[-1] + skips[5])
    return tuple(trunk), skips


@dataclass(frozen=True)
class FishNetConfig:
    """A network as numbers; checked when it is made. A wrong value is a ValueError that names its field.

    channels: widths of the stem and of T1, T2, T3 (c1 c2 c3 c4). tail_depths: residual units of T1-T4 (T4 of a FishNet
    has the SE unit besides). body_depths, head_depths: regular units of B4 B3 B2 and of H1-H4; both empty leave the
    ResNet that the tail is. k: how many channels r_k sums. preact: BN-ReLU before the convolutions or after.
    stem_stride: of the first convolution. final_norm: BN-ReLU before the last pool, as in [P]'s networks for ImageNet;
    [S] has none. in_channels: of the images. num_classes: of the classifier.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512)
    tail_depths: tuple[int, ...] = (3, 4, 6, 2)
    body_depths: tuple[int, ...] = (1, 1, 1)
    head_depths: tuple[int, ...] = (1, 1, 1, 1)
    k: int = 2
    preact: bool = True
    stem_stride: int = 1
    final_norm: bool = False
    in_channels: int = 3
    num_classes: int = 10

    def __post_init__(self) -> None:
        for name in ("channels", "tail_depths", "body_depths", "head_depths"):
            if not isinstance(getattr(self, name), (list, tuple)):
                self._refuse(name, "a list of integers")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        tail_only = self.body_depths == self.head_depths == ()
        self._check_integers("channels", 4, minimum=4)
        if self.channels[3] < 16:
            self._refuse("channels", "a last width of at least 16, the reduction of squeeze-and-excitation")
        self._check_integers("tail_depths", 4, minimum=0)
        if 0 in self.tail_depths[:3]:
            self._refuse("tail_depths", "at least 1 unit in each of T1, T2 and T3, where the width changes")
        if not tail_only:
            self._check_integers("body_depths", 3, minimum=0)
            self._check_integers("head_depths", 4, minimum=0)
        for name in ("k", "in_channels", "num_classes"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                self._refuse(name, "an integer of at least 1")
        for name in ("preact", "final_norm"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")
        if not _is_int(self.stem_stride) or self.stem_stride not in (1, 2, 4):
            self._refuse("stem_stride", "1, 2 or 4")
        if not tail_only:
            channel_plan(self.channels, self.k)  # raises where k does not divide

    def _check_integers(self, name: str, length: int, minimum: int) -> None:
        values = getattr(self, name)
        if len(values) != length or not all(_is_int(v) and v >= minimum for v in values):
            self._refuse(name, f"{length} integers of at least {minimum}")

    def _refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

    @property
    def stride(self) -> int:
        """Input pixels per pixel of the lowest resolution: image sides must be multiples of it."""
        return self.stem_stride * 8


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# -------------------------------------------------------------------------------------------------------- networks


@torch.fx.wrap
def check_images(x: Tensor, in_channels: int, stride: int) -> None:
    """ValueError where images (N, C, H, W) do not fit a network."""
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(f"images: got shape {tuple(x.shape)}, expected (N, {in_channels}, H, W)")
    if x.shape[2] % stride or x.shape[3] % stride:
        raise ValueError(f"image side: got {x.shape[2]} x {x.shape[3]}, expected multiples of {stride}")


class ResNet(nn.Module):
    """The tail alone: stem, four stages of residual units, average pool, classifier. [S]'s ResNet.

    images (N, in_channels, H, W), H and W multiples of config.stride -> logits (N, num_classes).
    """

    def __init__(self, config: FishNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = make_stem(config)
        self.tail = make_tail(config)
        self.pool = make_pool(config.channels[3], config)
        self.fc = nn.Linear(config.channels[3], config.num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.config.in_channels, self.config.stride)
        x = self.stem(x)  # (N, c1, H, W)
        for stage in self.tail:
            x = stage(x)  # (N, c4, H/8, W/8) at last
        return self.fc(self.pool(x).flatten(1))  # (N, num_classes)


class FishNet(nn.Module):
    """Tail, body and head; the picture is in this file's docstring. [P] Fig. 2, in [S]'s form for small images.

    images (N, in_channels, H, W), H and W multiples of config.stride -> logits (N, num_classes). ValueError: other
    images. The comments give sizes relative to the stem's output.
    """

    def __init__(self, config: FishNetConfig) -> None:
        super().__init__()
        self.config = config
        trunk, skip = channel_plan(config.channels, config.k)

        def stage(i: int, depth: int, k: int, resample: nn.Module, dilation: int = 1) -> Stage:
            regular = residual_units(trunk[i], trunk[i], depth, config.preact, dilation)
            transfer = bottleneck(skip[i], skip[i], config.preact)
            return Stage(regular, transfer, Refine(trunk[i] + skip[i], k, config.preact), resample)

        self.stem = make_stem(config)
        self.tail = make_tail(config)
        self.tail[3].append(SEResidualUnit(config.channels[3], config.preact))
        self.body = nn.ModuleList(
            stage(i, depth, config.k, nn.Upsample(scale_factor=2), dilation)
            for i, (depth, dilation) in enumerate(zip(config.body_depths, (1, 2, 4)))
        )
        pool = make_pool(trunk[6] + skip[6], config)
        self.head = nn.ModuleList(
            stage(i, depth, 1, pool if i == 6 else nn.MaxPool2d(2))
            for i, depth in enumerate(config.head_depths, start=3)
        )
        self.fc = nn.Linear(trunk[6] + skip[6], config.num_classes, bias=False)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.config.in_channels, self.config.stride)
        x = self.stem(x)  # (N, c1, H, W)

        tail = []
        for stage in self.tail:  # T1 T2 T3 T4
            tail.append(x)  # x1 x2 x3 x4: (N, c1, H, W) ... (N, c4, H/8, W/8)
            x = stage(x)  # the bridge at last: (N, c4, H/8, W/8)

        body = []
        for stage, skip in zip(self.body, (tail[3], tail[2], tail[1])):  # B4 B3 B2
            concatenated, x = stage(x, skip)  # B2's: (N, B2 + c2, H/2, W/2), (N, H1, H, W)
            body.append(concatenated)

        for stage, skip in zip(self.head, (tail[0], body[2], body[1], tail[3])):  # H1 H2 H3 H4
            _, x = stage(x, skip)  # (N, H4 + c4, 1, 1) at last

        return self.fc(x.flatten(1))  # (N, num_classes)


def make_stem(config: FishNetConfig) -> nn.Sequential:
    """Images (N, in_channels, H, W) -> x1 (N, c1, H/stem_stride, W/stem_stride); no shortcuts here."""
    c1, stride = config.channels[0], config.stem_stride
    if config.preact:
        first = nn.Conv2d(config.in_channels, c1, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(first, bottleneck(c1, c1, True), bottleneck(c1, c1, True))
    first = bottleneck(config.in_channels, c1, False)
    first.conv2.stride = (stride, stride)
    return nn.Sequential(first, bottleneck(c1, c1, False))


def make_tail(config: FishNetConfig) -> nn.ModuleList:
    """T1-T4: residual units, and a max-pool after T1, T2 and T3."""
    c1, c2, c3, c4 = config.channels
    widths = ((c1, c2), (c2, c3), (c3, c4), (c4, c4))
    tail = nn.ModuleList(residual_units(*w, depth, config.preact) for w, depth in zip(widths, config.tail_depths))
    for stage in tail[:3]:
        stage.append(nn.MaxPool2d(2))
    return tail


def make_pool(channels: int, config: FishNetConfig) -> nn.Module:
    """(N, C, H, W) -> (N, C, 1, 1): the average pool before the classifier."""
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), pool) if config.final_norm else pool


def init_weights(model: nn.Module) -> None:
    """[S]: convolutions Kaiming normal, linear Kaiming uniform; BN is made with weight 1 and bias 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight)


def zero_init_last(model: nn.Module) -> None:
    """Every residual unit and refinement starts as its shortcut alone: the last layer of its branch is set to zero.

    Goyal et al. 2017, section 5.1. Not [S]'s: with it, high learning rates of SGD do not diverge at the start.
    """
    for module in model.modules():
        if isinstance(module, (ResidualUnit, SEResidualUnit, Refine)):
            branch = module.branch
            nn.init.zeros_(branch.conv3.weight if isinstance(branch, PreActBottleneck) else branch.bn3.weight)


CONFIGS = {
    "fishnet99": FishNetConfig(),
    "fishnet150": FishNetConfig(tail_depths=(3, 4, 6, 3), body_depths=(2, 3, 2), head_depths=(3, 4, 6, 3)),
    # [S]'s name; by [S]'s own count of layers it has 66.
    "fishnet73": FishNetConfig(tail_depths=(1, 1, 1, 1)),
    "resnet50": FishNetConfig(tail_depths=(3, 4, 6, 3), body_depths=(), head_depths=()),
    # Ours, for two CPU cores: a quarter of the pixels. The widths hardly grow: M works in a quarter of its output's
    # width, so a stem of 16 would pass all it knows of an image through 4 channels.
    "fishnet_tiny": FishNetConfig(channels=(48, 48, 64, 96), tail_depths=(1, 2, 2, 1), stem_stride=2, final_norm=True),
}


def model_names() -> list[str]:
    """The names that create_model takes."""
    return list(CONFIGS)


def create_model(name: str, num_classes: int = 10, **overrides: object) -> FishNet | ResNet:
    """A new network by its name; overrides replace fields of its FishNetConfig.

    ValueError: an unknown name or field, or a value that FishNetConfig refuses.
    """
    if name not in CONFIGS:
        raise ValueError(f"model={name!r}: expected one of {', '.join(CONFIGS)}")
    known = [field.name for field in fields(FishNetConfig)]
    for field in overrides:
        if field not in known:
            raise ValueError(f"{field}: no field of FishNetConfig, expected one of {', '.join(known)}")
    config = replace(CONFIGS[name], num_classes=num_classes, **overrides)
    return FishNet(config) if config.head_depths else ResNet(config)
