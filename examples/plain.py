"""The networks as a first version would run, for flops.py to time beside ours: the baseline of docs/results.md.

    python flops.py examples.plain:fishnet99 fishnet99 --time --train --batch-size 64 --compile no yes

The same graph and weights, in NCHW and eager, whatever the flags say. No ReLU works in place, and glibc's allocator is
as it comes.
"""

import ctypes
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fishnet import create_model

MIB = 2**20


class Plain(nn.Module):
    """A network of fishnet.py that stays in NCHW and eager. (N, C, H, W) -> (N, num_classes)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = create_model(name)
        self.config = self.model.config
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        F.relu = lambda x, inplace=False: torch.relu(x)  # of this process, which has no other network
        if sys.platform == "linux":  # what prepare_cpu set: back to the values that glibc's own rule ends at
            mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
            if mallopt:
                m_trim_threshold, m_mmap_threshold = -1, -3
                mallopt(m_mmap_threshold, 32 * MIB)
                mallopt(m_trim_threshold, 64 * MIB)

    def to(self, *args: object, memory_format: torch.memory_format | None = None, **kwargs: object) -> "Plain":
        return super().to(*args, **kwargs)

    def compile(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.contiguous())


def fishnet99() -> Plain:
    return Plain("fishnet99")


def fishnet_tiny() -> Plain:
    return Plain("fishnet_tiny")
