"""Where the time of an eager training step on the CPU goes, and what bounds it: a roofline, operator by operator.

    python examples/roofline.py fishnet99 --batch-size 64

Prints a Markdown table of PyTorch's operators, those that take most of the time first, with the means of a step:

    calls, ms, share   how often, how long, and what part of all operators' time.
    GFLOP/s            of convolutions and matrix products; 2 for a multiply-add.
    GB/s               of the tensors that go in and come out, each once: the least that has to move.
    roof               the least time that the operator can take, which is the larger of FLOPs / (FLOP/s of a matrix
                       product) and bytes / (bytes/s of a copy), by the time that it takes. What fits a cache can be
                       faster than a copy of what does not.
    bound              which of the two is the larger: "arithmetic" or "memory".

Williams, Waterman, Patterson: Roofline, 2009. A compiler fuses operators, so that fewer bytes move; flops.py times it.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import available_cores, prepare_cpu
from fishnet import create_model, model_names
from flops import Setting, make_image, make_step

SHOWN = 14  # operators; the others are one row


class OperatorCosts(TorchDispatchMode):
    """Within it, adds up [calls, seconds, FLOPs, bytes] of each operator; views, which move nothing, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0, 0])

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        started = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - started
        returns = func._schema.returns
        if returns and returns[0].alias_info and not returns[0].alias_info.is_write:
            return out
        flops = flop_registry.get(func.overloadpacket, lambda *_, **__: 0)(*args, **kwargs, out_val=out)
        inputs = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        if name.startswith("convolution"):
            weight = args[2 if name == "convolution_backward" else 1]
            name += f" {weight.shape[2]} x {weight.shape[3]}"
        total = self.costs[name]
        for i, value in enumerate((1, seconds, flops, sum(x.nbytes for x in (*inputs.values(), *outputs)))):
            total[i] += value
        return out


def measure_roofs(rounds: int = 7) -> tuple[float, float]:
    """FLOP/s of a product of square float32 matrices of 2,048 rows, and bytes/s, read and written, of a copy."""
    a, b = torch.randn(2, 2048, 2048)
    source, target = torch.zeros(2, 1 << 26)  # 256 MiB each: no cache holds them
    products, copies = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        middle = time.perf_counter()
        target.copy_(source)
        products.append(middle - start)
        copies.append(time.perf_counter() - middle)
    return 2 * 2048**3 / median(products), 2 * source.nbytes / median(copies)


def table(costs: dict[str, list[float]], steps: int, peak: float, bandwidth: float) -> list[str]:
    """Lines of Markdown, the module's columns; peak in FLOP/s, bandwidth in bytes/s."""
    rows = sorted(costs.items(), key=lambda item: -item[1][1])
    rest = [sum(column) for column in zip(*(values for _, values in rows[SHOWN:]))]
    rows = rows[:SHOWN] + ([("all others", rest)] if rest else [])
    everything = sum(seconds for _, (_, seconds, _, _) in rows)
    lines = ["| operator | calls | ms | share | GFLOP/s | GB/s | roof | bound |", "| --- " * 8 + "|"]
    for name, (calls, seconds, flops, size) in rows:
        arithmetic, memory = flops / peak, size / bandwidth
        lines.append(
            f"| `{name}` | {calls / steps:,.0f} | {1e3 * seconds / steps:,.1f} | {seconds / everything:.1%} | "
            f"{f'{flops / seconds / 1e9:.1f}' if flops else ''} | {size / seconds / 1e9:.1f} | "
            f"{max(arithmetic, memory) / seconds:.0%} | {'arithmetic' if arithmetic > memory else 'memory'} |"
        )
    return lines


def setting(name: str, batch_size: int, image_size: int) -> Setting:
    """A training step as train.py does it on a CPU."""
    return Setting(
        name, compile="no", channels_last="yes", mixed_precision="no", checkpoint_activations="no", train=True,
        batch_size=batch_size, image_size=image_size, device="cpu",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=model_names())
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="that are counted, after one that is not")
    args = parser.parse_args()
    if args.batch_size < 2 or args.steps < 1:
        parser.error("expected --batch-size of at least 2 and --steps of at least 1")

    device = torch.device("cpu")
    prepare_cpu(device)
    torch.set_num_threads(available_cores())
    peak, bandwidth = measure_roofs()
    with torch.device("meta"):
        side = make_image(create_model(args.name), None).shape[-1]
    step = make_step(setting(args.name, args.batch_size, side), device)
    step()
    moments = []
    with OperatorCosts() as mode:
        for _ in range(args.steps):
            moments.append(step())
    seconds = sum(last - first for first, *_, last in moments) / args.steps
    flops = sum(flops for _, _, flops, _ in mode.costs.values()) / args.steps
    print(f"{args.name}, batch {args.batch_size}, float32, channels_last, {torch.get_num_threads()} threads: "
          f"{seconds:.2f} s a step, {flops / seconds / 1e9:.0f} GFLOP/s; a matrix product does {peak / 1e9:.0f}, "
          f"a copy moves {bandwidth / 1e9:.1f} GB/s.\n")
    print("\n".join(table(mode.costs, args.steps, peak, bandwidth)))


if __name__ == "__main__":
    main()
