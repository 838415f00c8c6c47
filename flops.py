"""What the networks cost: parameters, arithmetic and memory, counted without weights on the meta device.

    python flops.py                            # a line for each network of fishnet.py
    python flops.py fishnet99 --image-size 64  # one network, larger images
    python flops.py --stages fishnet99         # a line for each stage: the slides' layer table
    python flops.py --json                     # a list of objects, whole numbers, instead of a table

Prints, for one square image, of 32 pixels, or of 224 for the paper's networks:

    parameters   elements of all weights and biases.
    MACs         multiply-adds of convolutions and linear layers; nothing else, no biases. "FLOPs" in many papers.
    FLOPs        as [S] counts them: 2 x (MACs + 2 per element of a batch norm + 1 per output element of a ReLU + 1 per
                 input element of a pool + 1 per output element of an upsampling). Pools are the max-pools, the average
                 pool before the classifier and the one in the squeeze-and-excitation unit. Sums, concatenations and
                 the sigmoid are free.
    activations  bytes of all that a training step in float32 keeps from the forward for the backward pass: each tensor
                 that autograd saves, the image included, once however many operators share it (a ReLU's output is the
                 next convolution's input). Neither parameters nor the statistics of batch norm are among them, so a
                 batch of n images keeps n times as much.

and with --stages, by the rule of [S], parameters and MACs of the stem, the stages and the classifier fc, besides:

    size         side of the stage's output; a tail stage's before its pool.
    blocks       bottlenecks of the stem, residual units of the tail, regular units of body and head.
    layers       convolutions of blocks and refinement; not those of shortcuts and transfer blocks, nor the classifier.

and the I-convs: the convolutions that a gradient cannot go round, since neither an identity nor a concatenation is
beside them. [S]'s improvements leave those of the stem alone (fishnet99_direct).

Source: [S] the slides of S. H. Kim, github.com/crapine1119/fishnet. They print 0.56 GFLOP and 3.00 M parameters for
ResNet50; 2.53 GFLOP, 17.92 M and 99 layers for FishNet99.
"""

import argparse
import copy
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fishnet import FishNet, PostActBottleneck, PreActBottleneck, ResNet, create_model, model_names

STAGES = ("stem", "T1", "T2", "T3", "T4", "B4", "B3", "B2", "H1", "H2", "H3", "H4")  # in the order of the forward pass

aten = torch.ops.aten
Operator = torch._ops.OpOverloadPacket
Cost = Callable[[tuple, Tensor], int]  # of an operator's arguments and its output

MACS: dict[Operator, Cost] = {
    aten.convolution: lambda args, output: output.numel() * args[1].shape[1:].numel(),  # weight (out, in/groups, k, k)
    aten.mm: lambda args, output: output.numel() * args[0].shape[1],  # linear without bias
    aten.addmm: lambda args, output: output.numel() * args[1].shape[1],  # linear with bias, which is args[0]
}
OTHERS: dict[Operator, Cost] = {
    aten.native_batch_norm: lambda args, output: 2 * args[0].numel(),
    aten.relu: lambda args, output: output.numel(),
    aten.relu_: lambda args, output: output.numel(),
    aten.max_pool2d_with_indices: lambda args, output: args[0].numel(),
    aten.mean: lambda args, output: args[0].numel(),  # the average pools to 1 x 1
    aten.upsample_nearest2d: lambda args, output: output.numel(),
}


class Arithmetic(TorchDispatchMode):
    """Adds up the costs of the operators that run under it; one that is in neither table is free."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.others = 0

    def __torch_dispatch__(
        self, op: torch._ops.OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        output = op(*args, **(kwargs or {}))
        if op.overloadpacket in MACS:
            self.macs += MACS[op.overloadpacket](args, output)
        elif op.overloadpacket in OTHERS:
            self.others += OTHERS[op.overloadpacket](args, output)
        return output


@dataclass(frozen=True)
class Counts:
    """The columns of the table; this file's docstring defines them."""

    params: int
    macs: int
    flops: int
    activation_bytes: int


def measure(module: nn.Module, *inputs: Tensor | None) -> Counts:
    """What a forward pass of any module costs. Works on a copy without values: the module stays as it is.

    Batch norm runs in evaluation mode, which costs the same and takes a single value per channel.
    """
    module = copy.deepcopy(module).to("meta", torch.float32).eval().requires_grad_()
    inputs = [x if x is None else x.to("meta", torch.float32) for x in inputs]
    kept = set()  # storages: a tensor and its views share one

    def keep(tensor: Tensor) -> Tensor:
        if tensor.ndim > 1:  # else the statistics of a batch norm
            kept.add(tensor.untyped_storage())
        return tensor

    with torch.enable_grad(), Arithmetic() as total, saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    kept -= {p.untyped_storage() for p in module.parameters()}
    return Counts(
        params=sum(p.numel() for p in module.parameters()),
        macs=total.macs,
        flops=2 * (total.macs + total.others),
        activation_bytes=sum(storage.nbytes() for storage in kept),
    )


def make_image(model: FishNet | ResNet, size: int | None) -> Tensor:
    """One image without values, (1, in_channels, size, size); None: of the size that the network was made for.

    ValueError: no sensible size.
    """
    if size is None:
        size = 224 if model.config.structure == "paper" else 32
    if not 1 <= size <= 2**14:
        raise ValueError(f"image-size={size}: expected 1 to {2**14}")
    return torch.empty(1, model.config.in_channels, size, size, device="meta")


def count(model: FishNet | ResNet, image_size: int | None = None) -> Counts:
    """What a network costs for one image. ValueError: the size does not fit the network."""
    return measure(model, make_image(model, image_size))


@dataclass(frozen=True)
class StageCounts:
    """A row of the layer table; this file's docstring defines the columns."""

    stage: str
    size: int
    blocks: int
    layers: int
    params: int
    macs: int


def count_stages(model: FishNet | ResNet, image_size: int | None = None) -> list[StageCounts]:
    """The layer table; its parameters and MACs add up to the network's. ValueError: the size does not fit."""
    model = copy.deepcopy(model).to("meta", torch.float32).eval()
    modules = [model.stem, *model.tail, *getattr(model, "body", ()), *getattr(model, "head", ())]
    stages = dict(zip(STAGES, modules))
    stages |= {name: m for name, m in model.named_children() if name not in ("stem", "tail", "body", "head")}  # fc
    calls = {}  # stage -> its inputs and its output
    for name, stage in stages.items():
        stage.register_forward_hook(lambda _, args, output, name=name: calls.update({name: (args, output)}))
    with torch.no_grad():
        model(make_image(model, image_size))

    rows = []
    for name, stage in stages.items():
        args, output = calls[name]
        # A tail stage's size before its pool is that of its input; body and head also return their concatenation.
        last = args[0] if name.startswith("T") else output[-1] if isinstance(output, tuple) else output
        costs = measure(stage, *args)
        rows.append(
            StageCounts(
                stage=name,
                size=last.shape[-1] if last.ndim == 4 else 1,
                blocks=count_modules(stage, (PreActBottleneck, PostActBottleneck), outside=("transfer", "refine")),
                layers=count_modules(stage, nn.Conv2d, outside=("transfer", "shortcut")),
                params=costs.params,
                macs=costs.macs,
            )
        )
    return rows


def count_modules(root: nn.Module, kinds: type | tuple[type, ...], outside: tuple[str, ...]) -> int:
    """Modules of these kinds within root, without those inside modules of the given names."""
    found = (name.split(".") for name, module in root.named_modules() if isinstance(module, kinds))
    return sum(not set(outside) & set(path) for path in found)


def i_convs(model: FishNet | ResNet) -> list[str]:
    """The convolutions that a gradient cannot go round: those with neither an identity nor a concatenation beside them.

    All but those of branches, of transfer blocks (whose output is concatenated to the trunk) and of attentions. [P]
    section 3 calls them isolated convolutions, I-conv.
    """
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    beside = {"transfer", "se", "attention"}
    inside = re.compile(r"(tail|body|head)\..*\.branch\.")  # the stem's M have no shortcut
    return [name for name in convs if not beside & set(name.split(".")) and not inside.match(name)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Parameters, arithmetic and memory of the networks.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(model_names())} (default: all)")
    parser.add_argument("--stages", metavar="NAME", help="the layer table of this network instead")
    parser.add_argument("--image-size", type=int, help="side in pixels (default: 32; 224 for *_imagenet)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    args = parser.parse_args()
    try:
        if args.stages is not None and args.names:
            raise ValueError(f"--stages {args.stages} shows one network: expected no other names")
        names = [args.stages] if args.stages is not None else args.names or model_names()
        with torch.device("meta"):
            models = {name: create_model(name) for name in names}
        counts = {name: count(model, args.image_size) for name, model in models.items()}
        rows = count_stages(models[args.stages], args.image_size) if args.stages is not None else []
    except ValueError as error:
        sys.exit(f"flops.py: {error}")

    if args.json:
        networks = [{"name": name} | asdict(c) for name, c in counts.items()]
        print(json.dumps([asdict(row) for row in rows] or networks))
    elif args.stages is None:
        print(f"{'network':<20}{'parameters':>11} {'MACs, M':>12} {'FLOPs, M':>12} {'activations, MiB':>17}")
        for name, c in counts.items():
            memory = c.activation_bytes / 2**20
            print(f"{name:<20}{c.params:>11,} {c.macs / 1e6:>12,.2f} {c.flops / 1e6:>12,.2f} {memory:>17,.2f}")
    else:
        print(f"{'stage':<8}{'size':>6}{'blocks':>9}{'layers':>9}{'parameters':>15} {'MACs, M':>15}")
        for r in rows:
            print(f"{r.stage:<8}{r.size:>6}{r.blocks:>9}{r.layers:>9}{r.params:>15,} {r.macs / 1e6:>15,.2f}")
        layers, total = sum(r.layers for r in rows), counts[args.stages]
        print(f"{'sum':<8}{'':>15}{layers:>9}{total.params:>15,} {total.macs / 1e6:>15,.2f}")
        print("Layers: without shortcuts, transfer blocks and the classifier, fc.")
        names = i_convs(models[args.stages])
        print(textwrap.fill(f"{len(names)} I-convs: {', '.join(names)}.", 79, subsequent_indent="  "))


if __name__ == "__main__":
    main()
