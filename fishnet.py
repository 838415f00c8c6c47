"""FishNet: a backbone whose tail lowers the resolution, whose body raises it, whose head lowers it.

Each stage of body and head concatenates its own features (the trunk) with earlier features of the
same resolution (the skip). It refines the result by adding to it, so the gradient of the loss
reaches every one of these stages without passing through a convolution.

FishNet-99 at 32 x 32 pixels (channels 64 128 256 512, k = 2):

    stage   size   channels         input               then
    stem    32     64               image               -> x1
    T1-T3   32-8   128, 256, 512    x1, x2, x3          max-pool -> x2, x3, x4
    T4      4      512              x4                  squeeze-and-excitation unit -> bridge
    B4      4      512 + 512        bridge and x4       M + r_k, upsample
    B3      8      512 + 256        B4 and x3           M + r_k, upsample
    B2      16     384 + 128        B3 and x2           M + r_k, upsample
    H1      32     256 + 64         B2 and x1           M + identity, max-pool
    H2      16     320 + 512        H1 and B2's cat     M + identity, max-pool
    H3      8      832 + 768        H2 and B3's cat     M + identity, max-pool
    H4      4      1600 + 512       H3 and x4           M + identity, average pool -> classifier

M is a bottleneck branch and r_k sums every k channels. "a + b" channels are a of the trunk and b of
the skip, concatenated (their cat).

Sources: [P] the paper, Sun et al., NeurIPS 2018, arXiv 1901.03495, whose equations and figures are
cited; [O] its authors' code, github.com/kevin-ssy/FishNet; [S] the slides of S. H. Kim, which
rebuild it for CIFAR-10, github.com/crapine1119/fishnet.
"""

import contextlib
import functools
import importlib
import json
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

max_pool = functools.partial(F.max_pool2d, kernel_size=2)

class UserError(ValueError):
    """An error that the user can mend. The programs print its message as one line and exit."""

    def __str__(self) -> str:  # a data worker hands an error on with its whole traceback
        return super().__str__().rstrip().rpartition("\n")[2].removeprefix("fishnet.UserError: ")

# ------------------------------------------------------------------------------- units and stages

class Bottleneck(nn.Module):
    """M: convolutions 1x1, 3x3, 1x1, with C_out / 4 channels in the middle. With `preact`, BN-ReLU
    precedes each ([P] section 3). Otherwise BN follows each, and ReLU the first two ([S])."""

    def __init__(self, in_channels: int, out_channels: int, preact: bool, dilation: int = 1):
        super().__init__()
        width = out_channels // 4
        self.preact = preact
        self.bn1 = nn.BatchNorm2d(in_channels if preact else width)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn3 = nn.BatchNorm2d(width if preact else out_channels)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.preact:
            x = self.conv1(F.relu(self.bn1(x)))  # (N, C_out/4, H, W)
            x = self.conv2(F.relu(self.bn2(x)))  # (N, C_out/4, H, W)
            return self.conv3(F.relu(self.bn3(x)))  # (N, C_out, H, W)
        x = F.relu(self.bn1(self.conv1(x)))  # (N, C_out/4, H, W)
        x = F.relu(self.bn2(self.conv2(x)))  # (N, C_out/4, H, W)
        return self.bn3(self.conv3(x))  # (N, C_out, H, W)

class RepeatChannels(nn.Module):
    """Widen by copying: output channel n is input channel floor(n C_in / C_out). [S]."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        n = torch.arange(self.out_channels, device=x.device)
        return x.index_select(1, n * x.shape[1] // self.out_channels)

def norm_relu_conv(in_channels: int, out_channels: int, bias: bool = False) -> list[nn.Module]:
    """Return BN, ReLU and a 1x1 convolution."""
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
    return [nn.BatchNorm2d(in_channels), nn.ReLU(), conv]

def squeeze_excite(channels: int, width: int, out_channels: int, bias: bool) -> list[nn.Module]:
    """Return layers that compute an attention in (0, 1), (N, C_out, 1, 1). Hu et al. 2018."""
    reduce = nn.Conv2d(channels, width, 1, bias=bias)
    expand = nn.Conv2d(width, out_channels, 1, bias=bias)
    return [nn.AdaptiveAvgPool2d(1), reduce, nn.ReLU(), expand, nn.Sigmoid()]

def make_shortcut(in_channels: int, out_channels: int, kind: str) -> nn.Module:
    """Return the identity if the width stays, else by kind: "conv", a 1x1 convolution ([S]);
    "norm_conv", the same after BN-ReLU ([O]); "repeat", the only one without a convolution."""
    if in_channels == out_channels:
        return nn.Identity()
    if kind == "repeat":
        return RepeatChannels(out_channels)
    if kind == "norm_conv":
        return nn.Sequential(*norm_relu_conv(in_channels, out_channels))
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)

class ResidualUnit(nn.Module):
    """shortcut(x) + M(x), then ReLU if post-activation. (N, C_in, H, W) -> (N, C_out, H, W)."""

    def __init__(self, widths: Sequence[int], preact: bool, dilation: int, shortcut: str) -> None:
        super().__init__()
        self.shortcut = make_shortcut(*widths, shortcut)
        self.branch = Bottleneck(*widths, preact, dilation)
        self.activation = nn.Identity() if preact else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.branch(x) + self.shortcut(x))

def make_units(widths: Sequence[int], depth: int, preact: bool, dilation: int = 1, shortcut="conv"):
    """Return `depth` residual units. The first one changes the width and has the dilation."""
    units = [ResidualUnit(widths, preact, dilation, shortcut)] if depth else []
    rest = (widths[1], widths[1]), preact, 1, shortcut
    return nn.Sequential(*units, *(ResidualUnit(*rest) for _ in range(depth - 1)))

class SEResidualUnit(ResidualUnit):
    """x + M(x) * SE(M(x)): the slides' bridge. (N, C, H, W) -> (N, C, H, W). [S]."""

    def __init__(self, channels: int, preact: bool) -> None:
        super().__init__((channels, channels), preact, dilation=1, shortcut="conv")
        self.se = nn.Sequential(*squeeze_excite(channels, channels // 16, channels, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)  # (N, C, H, W)
        return self.activation(branch * self.se(branch) + x)

@torch.fx.wrap  # torch.fx cannot trace a comparison of sizes
def channel_sum(x: Tensor, k: int) -> Tensor:
    """Return r_k(x), eq. 8: output channel n is the sum of input channels k n ... k n + k - 1.
    (N, C, H, W) -> (N, C/k, H, W). The paper's sums have one channel too many, as [S] says."""
    if k == 1:
        return x
    groups = x.unflatten(1, (x.shape[1] // k, k))  # (N, C/k, k, H, W)
    return groups.sum(2, dtype=x.dtype)  # autocast on a GPU would return float32

def upsample(x: Tensor) -> Tensor:
    """Double height and width by repeating pixels: (N, C, H, W) -> (N, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2.0).to(x.dtype)  # autocast on a GPU returns float32

class Refine(nn.Module):
    """M(x) + r_k(x): (N, C, H, W) -> (N, C/k, H, W). In the body k is the network's (UR block,
    eqs. 4-7), in the head it is 1, where r_k is the identity (DR block, eq. 9)."""

    def __init__(self, channels: int, k: int, preact: bool, dilation: int = 1) -> None:
        super().__init__()
        self.k = k
        self.branch = Bottleneck(channels, channels // k, preact, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + channel_sum(x, self.k)

class Stage(nn.Module):
    """A stage of body or head: concatenate trunk (N, C_t, H, W) and skip (N, C_s, H, W). Returns
    their C = C_t + C_s channels, (N, C, H, W), and these refined, (N, C / k, H, W). [P] Fig. 3."""

    def __init__(self, regular: nn.Module, transfer: nn.Module, refine: nn.Module) -> None:
        super().__init__()
        self.regular = regular  # residual units of the trunk
        self.transfer = transfer  # the transfer block T of the skip
        self.refine = refine

    def forward(self, trunk: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        cat = torch.cat([self.regular(trunk), self.transfer(skip)], dim=1)
        return cat, self.refine(cat)

def channel_plan(channels: Sequence[int], k: int, b4_has_skip: bool = True) -> tuple[tuple, tuple]:
    """Return (trunk, skip): the widths that B4 B3 B2 H1 H2 H3 H4 concatenate. [S].
    A body stage leaves (trunk + skip) / k channels, a head stage trunk + skip. Without a skip, as
    in the paper's networks, B4 keeps its width. Raises UserError if k does not suit a width."""
    c1, c2, c3, c4 = channels
    trunk, skips = [c4], [c4 if b4_has_skip else 0, c3, c2, c1]
    for stage, skip in zip(("B4", "B3", "B2"), skips):
        width, divisor = trunk[-1] + skip, k if skip else 1
        if width % divisor or width // divisor < 4:
            expected = f"a divisor of the width of {stage}, {trunk[-1]} + {skip} = {width}"
            raise UserError(f"k={k}: expected {expected}, that leaves at least 4 channels")
        trunk.append(width // divisor)
    skips += [trunk[2] + c2, trunk[1] + c3, c4]  # H2 and H3 take the cats of B2 and B3, H4 takes x4
    for i in (3, 4, 5):
        trunk.append(trunk[i] + skips[i])
    return tuple(trunk), tuple(skips)

@dataclass(frozen=True)
class FishNetConfig:
    """A network as numbers. Raises UserError, which names the field, if a value is wrong."""
    channels: tuple[int, ...] = (64, 128, 256, 512)  # c1 c2 c3 c4: widths of stem, T1, T2, T3
    tail_depths: tuple[int, ...] = (3, 4, 6, 2)  # residual units of T1 T2 T3 T4
    body_depths: tuple[int, ...] = (1, 1, 1)  # regular units of B4 B3 B2; () for the tail alone
    head_depths: tuple[int, ...] = (1, 1, 1, 1)  # regular units of H1 H2 H3 H4; () likewise
    k: int = 2  # how many channels r_k sums in the body
    preact: bool = True  # BN-ReLU before each convolution; False: after it
    tail_shortcut: str = "conv"  # where T1 T2 T3 widen: "conv", or "repeat" to repeat channels
    bridge: str = "se"  # between tail and body: "se" for an SEResidualUnit, or "none"
    stem_depth: int = 2  # bottlenecks of the stem, which have no shortcut
    stem_stride: int = 1  # 1, 2 or 4; with 4 the first convolution is 7x7, to see every pixel
    final_norm: bool = False  # BN-ReLU before the last average pool
    body_dilations: tuple[int, ...] = (1, 2, 4)  # of the first regular unit of B4 B3 B2
    transfer_depths: tuple[int, ...] = ()  # residual units of T in B4 ... H4; () for an M in each
    in_channels: int = 3  # channels of the image
    num_classes: int = 10  # outputs of the classifier; 0 for the pooled features

    def __post_init__(self) -> None:
        tail_alone = not self.body_depths and not self.head_depths
        for name, length, least in (
            ("channels", 4, 4), ("tail_depths", 4, 0), ("body_depths", 0 if tail_alone else 3, 0),
            ("head_depths", 0 if tail_alone else 4, 0), ("body_dilations", 3, 1),
            ("transfer_depths", 7 if self.transfer_depths else 0, 0),
        ):  # fmt: skip
            values = getattr(self, name)
            valid = isinstance(values, (list, tuple)) and len(values) == length
            if not valid or not all(type(value) is int and value >= least for value in values):
                self.refuse(name, f"{length} integers of at least {least}")
            object.__setattr__(self, name, tuple(values))
        for name, least in (("k", 1), ("stem_depth", 0), ("in_channels", 1), ("num_classes", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                self.refuse(name, f"an integer of at least {least}")
        for name, choices in (
            ("preact", (True, False)), ("tail_shortcut", ("conv", "repeat")),
            ("bridge", ("se", "none")), ("stem_stride", (1, 2, 4)), ("final_norm", (True, False)),
        ):  # fmt: skip
            value = getattr(self, name)
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                self.refuse(name, " or ".join(map(repr, choices)))
        if self.channels[3] < 16:
            self.refuse("channels", "a last width of at least 16")
        if self.tail_shortcut == "repeat" and self.channels != tuple(sorted(self.channels)):
            self.refuse("channels", "rising widths with tail_shortcut='repeat'")
        if 0 in self.tail_depths[:3]:
            self.refuse("tail_depths", "at least one unit in T1, T2 and T3")

    def refuse(self, name: str, expected: str) -> None:
        raise UserError(f"{name}={getattr(self, name)!r}: expected {expected}")

    @property
    def stride(self) -> int:  # the sides of an image must be multiples of it
        return 8 * self.stem_stride

# ---------------------------------------------------------------------------------------- networks

# A map that a network returns; a pixel of it spans `stride` pixels of the image along each side.
Feature = namedtuple("Feature", "channels stride")

@torch.fx.wrap
def check_images(x: Tensor, config: FishNetConfig) -> None:
    """Raise UserError if a batch of images does not fit a network."""
    fits = x.ndim == 4 and x.shape[1] == config.in_channels
    if not fits or x.shape[2] % config.stride or x.shape[3] % config.stride:
        expected = f"(N, {config.in_channels}, H, W) with sides that are multiples of"
        raise UserError(f"images: got {tuple(x.shape)}, expected {expected} {config.stride}")

def make_stem(config: FishNetConfig) -> nn.Sequential:
    """Return the stem: images (N, in_channels, H, W) -> x1 (N, c1, H/stem_stride, W/stem_stride).
    A convolution, then bottlenecks; in post-activation order the first bottleneck replaces it."""
    c1, depth, preact = config.channels[0], config.stem_depth, config.preact
    size = 7 if config.stem_stride == 4 else 3
    options = {"stride": config.stem_stride, "padding": size // 2, "bias": False}
    if preact or depth == 0:
        first = [nn.Conv2d(config.in_channels, c1, size, **options)]
        first += [] if preact else [nn.BatchNorm2d(c1), nn.ReLU()]
    else:
        first, depth = [Bottleneck(config.in_channels, c1, preact)], depth - 1
        first[0].conv2 = nn.Conv2d(c1 // 4, c1 // 4, size, **options)
    return nn.Sequential(*first, *(Bottleneck(c1, c1, preact) for _ in range(depth)))

def make_tail(config: FishNetConfig, shortcut: str) -> list[nn.Sequential]:
    """Return the residual units of T1, T2, T3, T4."""
    stages = zip(config.channels, (*config.channels[1:], config.channels[3]), config.tail_depths)
    return [make_units((c, out), n, config.preact, shortcut=shortcut) for c, out, n in stages]

def init_weights(model: nn.Module) -> None:
    """Initialise convolutions as Kaiming normal and the classifier as Kaiming uniform. [S]."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight)

MODEL_CARD = """---\n{{ card_data }}\n---
A [FishNet](https://arxiv.org/abs/1901.03495): load it by `FishNet.from_pretrained` of fishnet.py.
config.json has its FishNetConfig, its classes, and mean and std, which normalise its images.
"""

class Network(nn.Module, PyTorchModelHubMixin, model_card_template=MODEL_CARD):
    """Base class of the networks: images (N, in_channels, H, W) -> logits (N, num_classes). Raises
    UserError if H or W is not a multiple of config.stride."""
    # Names of the outputs, what normalises images in [0, 1], and the side and ratio of their crop.
    classes = mean = std = input_size = None
    ATTRIBUTES = ("classes", "mean", "std", "input_size")

    def add_classifier(self, width: int, bias: bool = True) -> None:
        norm = [nn.BatchNorm2d(width), nn.ReLU()] if self.config.final_norm else []
        self.pool, self.num_features = nn.Sequential(*norm, nn.AdaptiveAvgPool2d(1)), width
        self.fc = nn.Linear(width, n, bias) if (n := self.config.num_classes) else nn.Identity()

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one, or with 0 classes by the identity."""
        self.config, self.classes = replace(self.config, num_classes=num_classes), None
        self.fc = type(self)(self.config).fc.to(next(self.parameters()))

    def forward_features(self, x: Tensor, names: Sequence[str] = ()) -> OrderedDict[str, Tensor]:
        """Return the maps of the named stages in the order of the names, by default the first four
        of feature_info, which has their shapes. No stage after the last named one is computed."""
        check_images(x, self.config)
        names, maps = names or list(self.feature_info)[:4], {}
        for name, y in self.forward_stages(x):
            if name in names:
                maps[name] = y
            if len(maps) == len(names):
                break
        return OrderedDict((name, maps[name]) for name in names)

    def forward_head(self, maps: OrderedDict[str, Tensor], pre_logits: bool = False) -> Tensor:
        """Return logits of the last map, or with `pre_logits` the (N, num_features) before them."""
        x = self.pool(list(maps.values())[-1]).flatten(1)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x, list(self.feature_info)[3:4]))  # H4 or T4

    def forward_stages(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the map of each stage of the tail, before its pool."""
        y = self.stem(x)  # (N, c1, H, W)
        for i, stage in enumerate((self.t1, self.t2, self.t3, self.t4)):
            y = stage(max_pool(y) if i else y)  # (N, c2, H, W) ... (N, c4, H/8, W/8)
            yield f"T{i + 1}", y

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        content = {"imagenet": isinstance(self, ImageNetFishNet), "config": asdict(self.config)}
        content |= {name: getattr(self, name) for name in self.ATTRIBUTES}
        (save_directory / "config.json").write_text(json.dumps(content, indent=2))

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "Network":
        """Load a network of a folder or the hub. Raises UserError if it is of another kind."""
        folder, files = Path(name), ("config.json", "model.safetensors")
        if not folder.is_dir():
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
        path = folder / files[0]
        content = json.loads(path.read_text()) if path.exists() else {}
        if "imagenet" not in content:
            raise UserError(f"{name}: expected the config.json of a network of fishnet.py")
        kind = "fishnet99_imagenet" if content["imagenet"] else "fishnet99"
        model = create_model(kind, **content["config"])
        model.load_state_dict(load_file(folder / files[1]))
        vars(model).update((name, content[name]) for name in cls.ATTRIBUTES)
        return model.eval()

class ResNet(Network):
    """The tail alone: stem, T1 to T4, pool, classifier. [S]."""

    def __init__(self, config: FishNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = make_stem(config)
        self.t1, self.t2, self.t3, self.t4 = make_tail(config, config.tail_shortcut)
        self.add_classifier(config.channels[3])
        maps = enumerate((*config.channels[1:], config.channels[3]))
        self.feature_info = {f"T{i + 1}": Feature(c, config.stem_stride << i) for i, c in maps}
        init_weights(self)

class FishNet(Network):
    """Tail, body and head. [P] Fig. 2, [S]. Sizes in comments are relative to the stem's output."""

    def __init__(self, config: FishNetConfig, b4_has_skip: bool = True) -> None:
        super().__init__()
        self.config = config
        trunk, skip = channel_plan(config.channels, config.k, b4_has_skip)
        width = trunk[6] + skip[6]
        self.add_tail(config)
        stages = (self.make_stage(config, i, trunk[i], skip[i]) for i in range(7))
        self.b4, self.b3, self.b2, self.h1, self.h2, self.h3, self.h4 = stages
        self.add_classifier(width, bias=False)
        stride, head = config.stem_stride, [*trunk[4:], width]
        self.feature_info = {f"H{i + 1}": Feature(head[i], stride << i) for i in range(4)}
        self.feature_info |= {f"B{i + 1}": Feature(trunk[4 - i], stride << i) for i in (1, 2, 3)}
        init_weights(self)

    def add_tail(self, config: FishNetConfig) -> None:
        c4 = config.channels[3]
        self.stem = make_stem(config)
        self.t1, self.t2, self.t3, self.t4 = make_tail(config, config.tail_shortcut)
        self.bridge = SEResidualUnit(c4, config.preact) if config.bridge == "se" else nn.Identity()

    def make_stage(self, config: FishNetConfig, i: int, trunk: int, skip: int) -> Stage:
        """Return stage i of B4 B3 B2 H1 H2 H3 H4. The first unit of a body stage is dilated."""
        depth = (*config.body_depths, *config.head_depths)[i]
        dilation, k = (config.body_dilations[i], config.k) if i < 3 else (1, 1)
        regular = make_units((trunk, trunk), depth, config.preact, dilation)
        depths = config.transfer_depths
        transfer = (make_units((skip, skip), depths[i], config.preact) if depths
                    else Bottleneck(skip, skip, config.preact))  # fmt: skip
        return Stage(regular, transfer, Refine(trunk + skip, k, config.preact))

    def forward_tail(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return x1, x2, x3, x4 and the bridge."""
        x1 = self.stem(x)  # (N, c1, H, W)
        x2 = max_pool(self.t1(x1))  # (N, c2, H/2, W/2)
        x3 = max_pool(self.t2(x2))  # (N, c3, H/4, W/4)
        x4 = max_pool(self.t3(x3))  # (N, c4, H/8, W/8)
        return x1, x2, x3, x4, self.bridge(self.t4(x4))  # bridge: (N, c4, H/8, W/8)

    def forward_stages(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the refined map y of each stage, computed when it is asked for."""
        x1, x2, x3, x4, bridge = self.forward_tail(x)
        _, y = self.b4(bridge, x4)  # cat(bridge, x4), at H/8 x W/8
        yield "B4", y
        b3, y = self.b3(upsample(y), x3)  # b3 = cat(up(B4), x3), at H/4 x W/4
        yield "B3", y
        b2, y = self.b2(upsample(y), x2)  # b2 = cat(up(B3), x2), at H/2 x W/2
        yield "B2", y
        _, y = self.h1(upsample(y), x1)  # cat(up(B2), x1), at H x W
        yield "H1", y
        _, y = self.h2(max_pool(y), b2)  # cat(down(H1), b2), at H/2 x W/2
        yield "H2", y
        _, y = self.h3(max_pool(y), b3)  # cat(down(H2), b3), at H/4 x W/4
        yield "H3", y
        _, y = self.h4(max_pool(y), x4)  # cat(down(H3), x4), at H/8 x W/8
        yield "H4", y

# -------------------------------------------------------------- the paper's networks for ImageNet

class AttentionBridge(nn.Module):
    """The paper's bridge: u * a + a. u (N, C, H, W) are residual units of s (N, 2C, H, W), which
    widens the input, and a (N, C, 1, 1) is an attention in (0, 1), computed from s. [O]."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        half, wide = channels // 2, 2 * channels
        score = norm_relu_conv(channels, half) + norm_relu_conv(half, wide, bias=True)
        self.score = nn.Sequential(*score)
        self.units = make_units((wide, channels), depth, preact=True, shortcut="norm_conv")
        attend = squeeze_excite(wide, channels // 16, channels, bias=True)
        self.attention = nn.Sequential(nn.BatchNorm2d(wide), nn.ReLU(), *attend)

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        attention = self.attention(score)
        return self.units(score) * attention + attention

class StageWithoutSkip(Stage):
    """B4 of the paper's networks: there is nothing to concatenate."""

    def forward(self, trunk: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return trunk, self.refine(trunk)

class ImageNetFishNet(FishNet):
    """The paper's network for ImageNet: other parts, the same forward pass. Stages have no regular
    units but several that refine, which body_depths and head_depths count. [O]."""

    def __init__(self, config: FishNetConfig) -> None:
        for name, value in IMAGENET_FIELDS.items():
            if getattr(config, name) != value:
                config.refuse(name, f"{value!r} in an ImageNet network")
        for name, least in (("body_depths", 1), ("tail_depths", 1), ("transfer_depths", 0)):
            if min(getattr(config, name), default=-1) < least:
                config.refuse(name, f"at least {least} units in each of the stages")
        super().__init__(config, b4_has_skip=False)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def add_tail(self, config: FishNetConfig) -> None:
        c1, _, _, c4 = config.channels
        stem, widths = [], (config.in_channels, c1 // 2, c1 // 2, c1)
        for i, stride in enumerate((2, 1, 1)):
            stem.append(nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False))
            stem += [nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1))
        self.t1, self.t2, self.t3, _ = make_tail(config, shortcut="norm_conv")
        self.t4 = nn.Identity()
        self.bridge = AttentionBridge(c4, config.tail_depths[3])

    def make_stage(self, config: FishNetConfig, i: int, trunk: int, skip: int) -> Stage:
        depth = (*config.body_depths, *config.head_depths)[i]
        dilation = config.body_dilations[i] if i < 3 else 1
        k = config.k if i in (1, 2) else 1
        width = (trunk + skip) // k
        refine = [Refine(trunk + skip, k, True, dilation)] if depth else []
        refine += [ResidualUnit((width, width), True, dilation, "conv") for _ in range(depth - 1)]
        transfer = make_units((skip, skip), config.transfer_depths[i], True)
        kind = Stage if skip else StageWithoutSkip
        return kind(nn.Identity(), transfer, nn.Sequential(*refine))

    def add_classifier(self, width: int, bias: bool) -> None:
        reduce = norm_relu_conv(width, width // 2)  # first, so that a seed draws the same weights
        super().add_classifier(width // 2)
        self.pool = nn.Sequential(*reduce, *self.pool)

    def forward_tail(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return x1, x2, x3, and the bridge in two places: H4 takes it instead of x4."""
        x1, x2, x3, _, bridge = super().forward_tail(x)
        return x1, x2, x3, bridge, bridge

# These fields have the same value in all of the paper's networks, [O].
IMAGENET_FIELDS = {"stem_stride": 4, "stem_depth": 2, "preact": True, "final_norm": True}
IMAGENET_FIELDS |= {"tail_shortcut": "conv", "bridge": "se"}

def paper(tail: Sequence, body: Sequence, head: Sequence, transfer: Sequence) -> FishNetConfig:
    depths = {"tail_depths": tail, "body_depths": body, "head_depths": head}
    return FishNetConfig(**depths, transfer_depths=transfer, num_classes=1000, **IMAGENET_FIELDS)

CONFIGS = {
    "fishnet99": FishNetConfig(),
    "fishnet150": FishNetConfig((64, 128, 256, 512), (3, 4, 6, 3), (2, 3, 2), (3, 4, 6, 3)),
    "fishnet73": FishNetConfig(tail_depths=(1, 1, 1, 1)),  # [S]'s name; it has 66 layers
    "fishnet99_direct": FishNetConfig(tail_shortcut="repeat", bridge="none"),  # [S]
    "resnet50": FishNetConfig(tail_depths=(3, 4, 6, 3), body_depths=(), head_depths=()),  # [S]
    "fishnet_tiny": FishNetConfig(  # ours, for two CPU cores; see docs/results.md
        (32, 64, 128, 256), (1, 2, 3, 2), (0, 0, 0), (0, 0, 0, 0), transfer_depths=(0,) * 7, k=8,
        stem_depth=0, final_norm=True,
    ),
    "fishnet99_imagenet": paper((2, 2, 6, 2), (1, 1, 1), (1, 2, 2, 0), (0, 1, 1, 1, 1, 1, 4)),
    "fishnet150_imagenet": paper((2, 4, 8, 4), (2, 2, 2), (2, 2, 4, 0), (0, 2, 2, 2, 2, 2, 4)),
    "fishnet201_imagenet": paper((3, 4, 12, 4), (2,) * 3, (2, 3, 10, 0), (0, 2, 2, 2, 2, 2, 9)),
}  # fmt: skip

def create_model(name: str, /, **overrides: object) -> nn.Module:
    """Return a new network. Overrides, such as num_classes, replace fields of its FishNetConfig.
    `name` is a key of CONFIGS, or MODULE:FUNCTION for what your function(**overrides) returns."""
    module, colon, function = name.partition(":")
    if colon:
        try:
            make = getattr(importlib.import_module(module), function, None)
        except (ModuleNotFoundError, ValueError) as error:
            raise UserError(f"model={name}: {error}") from None
        if not callable(make):
            raise UserError(f"model={name}: {module} has no function {function!r}")
        return make(**overrides)
    if name not in CONFIGS:
        raise UserError(f"model={name!r}: expected one of {', '.join(CONFIGS)}, or MODULE:FUNCTION")
    if unknown := sorted(overrides.keys() - {field.name for field in fields(FishNetConfig)}):
        raise UserError(f"{unknown[0]}: not a field of FishNetConfig")
    config = replace(CONFIGS[name], **overrides)
    if name.endswith("_imagenet"):
        return ImageNetFishNet(config)
    return FishNet(config) if config.head_depths else ResNet(config)

PARTS = {"tail": "stem t1 t2 t3 t4 bridge", "body": "b4 b3 b2", "head": "h1 h2 h3 h4 pool"}

def stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)

def freeze(model: nn.Module, parts: str) -> None:
    """Freeze parts, such as "tail,body" or "t1,t2": they get no gradients, and their batch norm
    stays in evaluation mode. Raises UserError if the model has no such part."""
    for part in parts.split(","):
        names = PARTS.get(part, part).split()
        modules = [m for name, m in model.named_modules() if name.rpartition(".")[2] in names]
        if not modules:
            raise UserError(f"freeze={parts}: the network has no part {part!r}")
        for module in modules:
            module.requires_grad_(False).eval()
            module.train = functools.partial(stay_in_evaluation, module)

def zero_init_last(model: nn.Module) -> None:
    """Zero the last layer of each branch: units start as shortcuts. Goyal et al. 2017, 5.1."""
    for module in model.modules():
        if isinstance(module, (ResidualUnit, Refine)):
            last = module.branch.conv3 if module.branch.preact else module.branch.bn3
            nn.init.zeros_(last.weight)

class FishNetFPN(nn.Module):
    """A feature pyramid (Lin et al. 2017) of H1 to H4, or T1 to T4, for torchvision's detectors:
    images -> {"0": (N, out_channels, H, W), "1", "2", "3", "pool"}; "0" has the stem's stride."""

    def __init__(self, model: FishNet | ResNet, out_channels: int = 256) -> None:
        super().__init__()
        self.model = model
        self.out_channels = out_channels
        freeze(model, "pool,fc")  # unused: DistributedDataParallel would wait for their gradients
        widths = [feature.channels for feature in list(model.feature_info.values())[:4]]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, LastLevelMaxPool(), nn.BatchNorm2d)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict(zip("0123", self.model.forward_features(x).values())))

class FrozenStatistics(contextlib.AbstractContextManager):
    """Freeze batch norm's running statistics while activations are computed a second time."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def __enter__(self) -> None:
        self.saved = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()

    def __exit__(self, *error: object) -> None:
        for norm, saved in zip(self.norms, self.saved):
            norm.momentum, norm.num_batches_tracked = saved

def forward_again(part: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return forward(x) of a part whose activations are computed again in the backward pass."""
    frozen = {"context_fn": lambda: (contextlib.nullcontext(), FrozenStatistics(part))}
    options = {} if torch.compiler.is_compiling() else frozen  # compiled, statistics change once
    return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False, **options)

def checkpoint_activations(model: nn.Module) -> None:
    """Trade time for memory: keep only the inputs of stem, tail stages, bridge and parts of stages.
    The backward pass computes the rest again, to the same bits. Chen et al., arXiv 1604.06174."""
    parts = []
    for module in model.modules():
        if isinstance(module, Network):
            parts += [m for name, m in module.named_children() if name in PARTS["tail"].split()]
        elif isinstance(module, Stage):
            parts += module.children()
    if not parts:
        raise UserError("--checkpoint-activations works for the networks of fishnet.py only")
    for part in parts:
        part.forward = functools.partial(forward_again, part, part.forward)
