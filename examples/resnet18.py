"""ResNet-18 in the place of FishNet: is an error due to the network, or to images and recipe?

    python train.py --recipe strong --model examples.resnet18:resnet18 --augment cutout
    python evaluate.py RUN/last.pt --model examples.resnet18:resnet18 --tta
    python flops.py examples.resnet18:resnet18 --image-size 32
"""

import torchvision
from torch import nn

def resnet18(num_classes: int = 10, zero_init_residual: bool = True) -> nn.Module:
    """Return torchvision's network, changed as is usual for 32 x 32 pixels: the first convolution
    is 3 x 3 with stride 1, and no pool follows it. (N, 3, H, W) -> logits (N, num_classes)."""
    options = {"num_classes": num_classes, "zero_init_residual": zero_init_residual}
    model = torchvision.models.resnet18(**options)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model
