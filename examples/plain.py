"""The networks as a first version would run, for flops.py to time beside ours: the baseline of docs/results.md.

    python flops.py examples.plain:fishnet99 fishnet99 --time --train --batch-size 64 --compile no yes

The same graph and weights in NCHW and eager, whatever --channels-last and --compile say. No ReLU works in place, and
glibc's allocator does what it does by itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluate import set_malloc_thresholds
from fishnet import create_model

MIB = 2**20


def work_as_a_first_version() -> None:
    """Of the whole process: no ReLU works in place, and freed tensors go back to the system.

    From 32 MiB on at once, and from the heap's end once it has 64 MiB: where glibc's own rule ends with large tensors.
    """
    F.relu = lambda x, inplace=False: torch.relu(x)
    set_malloc_thresholds(mmap=32 * MIB, trim=64 * MIB)


class Plain(nn.Module):
    """A network of fishnet.py that stays in NCHW and eager. (N, C, H, W) -> (N, num_classes)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = create_model(name)
        self.config = self.model.config
        work_as_a_first_version()  # flops.py times each network in a process of its own

    def to(self, *args: object, memory_format: torch.memory_format | None = None, **kwargs: object) -> "Plain":
        return super().to(*args, **kwargs)

    def compile(self, **kwargs: object) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.contiguous())


def fishnet99() -> Plain:
    return Plain("fishnet99")


def fishnet_tiny() -> Plain:
    return Plain("fishnet_tiny")
