"""ResNet-18 in the place of FishNet: how much of an error is the images' and the recipe's, and how much the network's.

    python examples/resnet18.py train --recipe strong --augment cutout --output-dir runs/resnet18
    python examples/resnet18.py evaluate runs/resnet18/last.pt --tta

These are train.py and evaluate.py with their flags; evaluate.py by itself does not know the network. That is
torchvision's, as is usual for images of 32 x 32 pixels: its first convolution is 3 x 3 with stride 1, and no pool comes
after it.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C in them is no traceback

import os
import sys
import threading
from collections import OrderedDict
from pathlib import Path

from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate
import train
from data import reader_may_leave
from fishnet import FishNetConfig

PROGRAMS = {"train": train.main, "evaluate": evaluate.main}


def create_model(name: str, /, *, num_classes: int, **overrides: object) -> nn.Module:
    """(N, 3, H, W) -> logits (N, num_classes). The overrides, a checkpoint's config, mean nothing here."""
    network = resnet18(num_classes=num_classes)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    fc, network.fc = network.fc, nn.Identity()
    model = nn.Sequential(OrderedDict(tail=network, fc=fc))  # the parts of which train.py logs the gradients
    model.config = FishNetConfig(num_classes=num_classes)  # a checkpoint has to have one
    return model


def zero_init_last(model: nn.Module) -> None:
    """Every residual unit starts as its shortcut."""
    for module in model.modules():
        if isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"{__doc__}\nexpected train or evaluate as the first word")
    for word in sys.argv:
        if word.split("=")[0] in ("--checkpoint-activations", "--model-args", "--pretrained"):
            sys.exit(f"resnet18.py: {word}: is for FishNets")
    train.create_model = evaluate.create_model = create_model
    train.zero_init_last = zero_init_last
    train.model_names = lambda: ["resnet18"]
    for recipe in train.RECIPES.values():
        recipe |= {"model": "resnet18", "model_args": {}}
    program = sys.argv.pop(1)
    PROGRAMS[program]()
    if program == "train" and os.environ.get("LOCAL_RANK", "0") == "0":
        print("of ResNet-18: python examples/resnet18.py evaluate")  # after the line that names evaluate.py


if __name__ == "__main__":
    threading.excepthook = train.raised_in_thread
    with reader_may_leave():
        main()
