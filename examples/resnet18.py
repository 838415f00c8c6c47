"""ResNet-18 in train.py's loop: how much of an error is the images' and the recipe's, and how much the network's.

    python examples/resnet18.py runs/resnet18 --recipe strong --augment cutout --resume auto

Takes train.py's flags but those of the network and the folder, trains torchvision's ResNet-18 as is usual for images of
32 x 32 pixels, with a 3 x 3 convolution of stride 1 at first and no pool after it, and prints the errors of last.pt on
the validation and the test images, with and without `--tta`'s mirror images. evaluate.py does not know this network.
"""

import argparse
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from data import BatchTransform, load_data
from evaluate import FlipAveraged, evaluate, load_checkpoint
from fishnet import FishNetConfig


def create_model(name: str, /, *, num_classes: int, **overrides: object) -> nn.Module:
    """In the place of fishnet.create_model, whose name and overrides mean nothing here: (N, 3, H, W) -> logits."""
    network = resnet18(num_classes=num_classes)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    fc, network.fc = network.fc, nn.Identity()
    model = nn.Sequential(OrderedDict(tail=network, fc=fc))  # the parts of which train.py logs gradients
    model.config = FishNetConfig(num_classes=num_classes)  # which a checkpoint has to have
    return model


def zero_init_last(model: nn.Module) -> None:
    """In the place of fishnet.zero_init_last: every residual unit starts as its shortcut."""
    for module in model.modules():
        if isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)


def main() -> None:
    parser = argparse.ArgumentParser(usage="%(prog)s OUTPUT_DIR [flags of train.py]", allow_abbrev=False)
    parser.add_argument("output_dir")
    args, flags = parser.parse_known_args()
    for flag in ("--model", "--model-args", "--pretrained", "--output-dir"):
        if any(word.split("=")[0] == flag for word in flags):
            parser.error(f"{flag}: the network is ResNet-18, and its folder is the first argument")
    train.create_model, train.zero_init_last = create_model, zero_init_last
    sys.argv = ["train.py", "--output-dir", args.output_dir, *flags]
    train.main()

    args = train.parse_args()
    accelerator = train.make_accelerator(args)
    checkpoint = load_checkpoint(Path(args.output_dir) / "last.pt")
    model = create_model("", num_classes=len(checkpoint["classes"])).to(memory_format=torch.channels_last)
    model.load_state_dict(checkpoint["model"])
    model.to(accelerator.device)
    data = load_data(args.dataset, args.data_dir, args.val_fraction, args.seed, args.image_size)
    transform = BatchTransform(data.mean, data.std)
    for split, images in (("validation", data.val), ("test", data.test)):
        for mirror, network in (("", model), (", with mirror images", FlipAveraged(model))):
            if len(images):
                m = evaluate(accelerator, network, images, transform, len(data.classes))
                print(f"{split} top-1 error {m.top1_error:.2%}, top-5 error {m.top5_error:.2%}{mirror}")


if __name__ == "__main__":
    main()
