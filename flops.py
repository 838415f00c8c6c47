"""Count what the networks cost: parameters, arithmetic and memory, without computing anything.

    python flops.py                            # a line for each network
    python flops.py fishnet99 --image-size 64  # one network, larger images
    python flops.py --stages fishnet99         # a line for each stage: the slides' layer table
    python flops.py torchvision.models:resnet50 --json     # any network, as a list of objects

For one square image (224 pixels for the paper's networks and others' code, else 32) it prints:

    parameters   elements of weights and biases
    MACs         multiply-adds of convolutions and linear layers, without biases; often called FLOPs
    FLOPs        as the slides [S] count them: 2 x (MACs + 2 per element of a batch norm + 1 per
                 output of a ReLU + 1 per input of a pool + 1 per output of an upsampling)
    activations  memory that a float32 training step keeps between forward and backward pass: each
                 tensor that autograd saves, once. A batch of n images keeps n times as much.

--stages prints parameters and MACs of stem, stages and classifier (fc), and by the rule of [S]:

    size         side of the stage's output; in the tail before its pool
    blocks       bottlenecks of the stem, residual units of the tail, regular units elsewhere
    layers       convolutions, without those of shortcuts and transfer blocks

It ends with the isolated convolutions (I-convs, [P] section 3): those with neither an identity nor
a concatenation beside them, so that the gradient must pass through them.

[P] is the paper, arXiv 1901.03495. [S] are the slides, github.com/crapine1119/fishnet.
"""

import argparse
import copy
import json
import math
import sys
import textwrap
from collections import namedtuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fishnet import CONFIGS, Bottleneck, ImageNetFishNet, Network, ResNet, UserError, create_model

aten = torch.ops.aten
MAC_OPERATORS = (aten.convolution, aten.mm, aten.addmm)  # PyTorch counts 2 FLOPs for a MAC
# What the slides count besides: functions of the shapes of an operator's arguments and output.
SLIDES_OPERATORS = {
    aten._native_batch_norm_legit_no_training: lambda x, *args, **kwargs: 4 * math.prod(x),
    aten.relu: lambda x, out_shape, **kwargs: 2 * math.prod(out_shape),
    aten.relu_: lambda x, out_shape, **kwargs: 2 * math.prod(out_shape),
    aten.max_pool2d_with_indices: lambda x, *args, out_shape, **kwargs: 2 * math.prod(x),
    aten.mean: lambda x, *args, out_shape, **kwargs: 2 * math.prod(x),  # average pools
    # PyTorch turns an upsampling into an index.
    aten._unsafe_index: lambda *args, out_shape, **kwargs: 2 * math.prod(out_shape),
}

# Columns of the two tables, explained at the top of this file.
Counts = namedtuple("Counts", "params macs flops activation_bytes")
StageCounts = namedtuple("StageCounts", "stage size blocks layers params macs")

def make_image(model: nn.Module, size: int | None) -> Tensor:
    """Return an image (1, C, size, size) without values, by default as large as the model needs."""
    is_ours = isinstance(model, Network)
    if size is None:
        size = 32 if is_ours and not isinstance(model, ImageNetFishNet) else 224
    if not 1 <= size <= 2**14:
        raise UserError(f"image-size={size}: expected 1 to {2**14}")
    return torch.empty(1, model.config.in_channels if is_ours else 3, size, size, device="meta")

def to_meta(model: nn.Module) -> nn.Module:
    """Return a copy without values, in evaluation mode, where batch norm takes single pixels."""
    return copy.deepcopy(model).to("meta", torch.float32).eval().requires_grad_()

def run_counted(model: nn.Module, image: Tensor) -> FlopCounterMode:
    """Return PyTorch's counter after a forward pass. Raises UserError if the image does not fit."""
    counter = FlopCounterMode(display=False, custom_mapping=SLIDES_OPERATORS)
    try:
        with torch.enable_grad(), counter:
            model(image)
    except (RuntimeError, UserError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"image-size={image.shape[-1]}: does not fit ({reason})") from None
    return counter

def sum_macs(operators: dict) -> int:
    """Return the MACs among the FLOPs that PyTorch's counter has for each operator."""
    return sum(operators.get(operator, 0) for operator in MAC_OPERATORS) // 2

def count(model: nn.Module, image_size: int | None = None) -> Counts:
    """Return what a model costs for one image. The model stays as it is."""
    model, saved = to_meta(model), []
    with saved_tensors_hooks(saved.append, lambda tensor: tensor):
        counter = run_counted(model, make_image(model, image_size))
    # A tensor and its views share a storage. Those of one dimension are statistics of batch norm.
    kept = {tensor.untyped_storage() for tensor in saved if tensor.ndim > 1}
    kept -= {p.untyped_storage() for p in model.parameters()}
    return Counts(
        params=sum(p.numel() for p in model.parameters()),
        macs=sum_macs(counter.get_flop_counts()["Global"]),
        flops=counter.get_total_flops(),
        activation_bytes=sum(storage.nbytes() for storage in kept),
    )

def count_stages(model: Network, image_size: int | None = None) -> list[StageCounts]:
    """Return the layer table. Its parameters and MACs add up to the network's."""
    if not isinstance(model, Network):
        raise UserError("--stages: expected a network of fishnet.py")
    model, image = to_meta(model), make_image(model, image_size)
    operators = run_counted(model, image).get_flop_counts()
    side = image.shape[-1] // model.config.stem_stride  # of the stem's output
    # The stride of each stage's output from the stem's, and modules that count as a stage's.
    strides = {"stem": 1, "T1": 1, "T2": 2, "T3": 4, "T4": 8, "B4": 4, "B3": 2, "B2": 1}
    strides |= {"H1": 2, "H2": 4, "H3": 8, "H4": side, "fc": side}
    more = {"T4": ["pool"]} if isinstance(model, ResNet) else {"T4": ["bridge"], "H4": ["pool"]}
    rows = []
    for stage in (stage for stage in strides if hasattr(model, stage.lower())):
        names = [stage.lower(), *more.get(stage, ())]
        modules = [getattr(model, name) for name in names]
        macs = [sum_macs(operators.get(f"{type(model).__name__}.{name}", {})) for name in names]
        rows.append(StageCounts(
            stage=stage,
            size=side // strides[stage],
            blocks=sum(len(find(m, Bottleneck, {"transfer", "refine"})) for m in modules),
            layers=sum(len(find(m, nn.Conv2d, {"transfer", "shortcut"})) for m in modules),
            params=sum(p.numel() for m in modules for p in m.parameters()),
            macs=sum(macs),
        ))  # fmt: skip
    return rows

def find(root: nn.Module, kind: type, outside: set[str]) -> list[str]:
    """Return the names of modules of a kind in root that are not inside modules named `outside`."""
    names = [name for name, module in root.named_modules() if isinstance(module, kind)]
    return [name for name in names if not outside & set(name.split("."))]

def find_i_convs(model: Network) -> list[str]:
    """Return the names of the isolated convolutions. Those of branches have an identity beside
    them, those of transfer blocks a concatenation, and attentions multiply."""
    return find(model, nn.Conv2d, {"branch", "transfer", "se", "attention"})

def print_networks(counts: dict[str, Counts]) -> None:
    width = max(20, *(len(name) + 1 for name in counts))
    head = f"{'parameters':>11} {'MACs, M':>12} {'FLOPs, M':>12} {'activations, MiB':>17}"
    print(f"{'network':<{width}}{head}")
    for name, (params, macs, flops, size) in counts.items():
        costs = f"{params:>11,} {macs / 1e6:>12,.2f} {flops / 1e6:>12,.2f} {size / 2**20:>17,.2f}"
        print(f"{name:<{width}}{costs}")

def print_stages(rows: list[StageCounts], convs: list[str]) -> None:
    print(f"{'stage':<8}{'size':>6}{'blocks':>9}{'layers':>9}{'parameters':>15} {'MACs, M':>15}")
    for stage, size, blocks, layers, params, macs in rows:
        print(f"{stage:<8}{size:>6}{blocks:>9}{layers:>9}{params:>15,} {macs / 1e6:>15,.2f}")
    _, _, _, layers, params, macs = zip(*rows)
    print(f"{'sum':<23}{sum(layers):>9}{sum(params):>15,} {sum(macs) / 1e6:>15,.2f}")
    print("Layers: without shortcuts, transfer blocks and the classifier, fc.")
    print(textwrap.fill(f"{len(convs)} I-convs: {', '.join(convs)}.", 79, subsequent_indent="  "))

def main() -> None:
    parser = argparse.ArgumentParser(description="Count parameters, arithmetic and memory.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CONFIGS)}, or MODULE:FUNCTION")
    parser.add_argument("--stages", metavar="NAME", help="print the layer table of this network")
    parser.add_argument("--image-size", type=int, help="side in pixels (default: 32 or 224)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    args = parser.parse_args()
    if args.stages and args.names:
        parser.error("--stages NAME: give no other names")
    try:
        models = {}
        for name in [args.stages] if args.stages else args.names or CONFIGS:
            # Code of others may compute while it makes a network, for which it needs values.
            with torch.device("cpu" if ":" in name else "meta"):
                models[name] = create_model(name)
        if args.stages:
            rows = count_stages(models[args.stages], args.image_size)
        else:
            counts = {name: count(model, args.image_size) for name, model in models.items()}
    except UserError as error:
        sys.exit(f"flops.py: {error}")
    if args.json:
        networks = [] if args.stages else [{"name": n} | c._asdict() for n, c in counts.items()]
        print(json.dumps([row._asdict() for row in rows] if args.stages else networks))
    elif args.stages:
        print_stages(rows, find_i_convs(models[args.stages]))
    else:
        print_networks(counts)

if __name__ == "__main__":
    main()
