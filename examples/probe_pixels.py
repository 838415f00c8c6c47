"""What does a map of features know about each pixel? Ask the networks of the study.

    python examples/study.py --data-dir data           # trains the networks
    python examples/probe_pixels.py --data-dir data --picture pixels.png
    python examples/probe_pixels.py --data-dir data --tune

A scene has three images of CIFAR-10 on a ground of one colour; a later image hides earlier ones. A
probe predicts from a map which class each pixel belongs to, or the ground: it scales each channel
to variance 1, applies a 1x1 convolution and enlarges the result. Only this convolution learns, so
the probe finds what the map holds at each place and no more. With --tune the network learns, too.
The images of the scenes are new to the networks, those of the test also to the probes.

The table has the mean over the classes of IoU: pixels that are of a class and are predicted as it,
divided by those that are either.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import ImageSet, load_data, make_transform
from evaluate import load_checkpoint, load_model
from fishnet import UserError
from train import prepare_machine

SIDE, CLASSES = 64, 11  # pixels of a scene; the ground is class 0
# Runs of the study, and the stages whose maps are probed, alone or concatenated.
NETWORKS = {
    "slides": (("H1",), ("H4",), ("H1", "H2", "H3", "H4")),
    "tail-alone-equal-arithmetic": (("T1",), ("T4",), ("T1", "T2", "T3", "T4")),
}

def draw_scenes(images: ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return scenes uint8 (count, 3, SIDE, SIDE) and the class of each pixel."""
    rng = np.random.default_rng(seed)
    scenes = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    truth = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    for i in range(count):
        scenes[i] = torch.from_numpy(rng.integers(256, size=(3, 1, 1)))
        for index in rng.integers(len(images), size=3).tolist():
            y, x = rng.integers(SIDE - 32 + 1, size=2)
            scenes[i, :, y : y + 32, x : x + 32] = images.images[index]
            truth[i, y : y + 32, x : x + 32] = images.labels[index] + 1
    return scenes, truth

class Probe(nn.Module):
    """Predict the class of each pixel from maps of a network, the first of which is the largest:
    uint8 (N, 3, SIDE, SIDE) -> logits (N, CLASSES, SIDE, SIDE)."""

    def __init__(self, model: nn.Module, stages: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.stages = model, stages
        self.transform = make_transform(model.mean, model.std)
        self.channels = sum(model.feature_info[stage].channels for stage in stages)
        self.norm = nn.BatchNorm2d(self.channels, affine=False)
        self.conv = nn.Conv2d(self.channels, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.transform(images).contiguous(memory_format=torch.channels_last)
        maps = list(self.model.forward_features(x, self.stages).values())
        size = maps[0].shape[2:]
        y = torch.cat([F.interpolate(y, size, mode="bilinear") for y in maps], 1)
        return F.interpolate(self.conv(self.norm(y)), (SIDE, SIDE), mode="bilinear")

def train_probe(probe: Probe, scenes: Tensor, truth: Tensor, epochs: int, tune: bool) -> None:
    """Train a probe with Adam on batches of 50 scenes, and with `tune` its network, too."""
    groups = [{"params": probe.conv.parameters(), "peak": 0.01}]
    probe.train()
    if tune:
        groups.append({"params": probe.model.parameters(), "peak": 0.001})
    else:
        probe.model.requires_grad_(False).eval()
    optimizer = torch.optim.Adam(groups)
    steps = epochs * len(scenes) // 50
    for step in range(steps):
        batch = torch.randperm(len(scenes))[:50]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - step / steps)
        F.cross_entropy(probe(scenes[batch]), truth[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    probe.eval()

@torch.no_grad()
def find_classes(probe: Probe, scenes: Tensor) -> Tensor:
    """Return the most probable class of each pixel, (N, SIDE, SIDE)."""
    return torch.cat([probe(batch).argmax(1) for batch in scenes.split(50)])

def compute_iou(found: Tensor, truth: Tensor) -> float:
    """Return the mean over the classes of intersection divided by union."""
    pairs = (truth * CLASSES + found).flatten().bincount(minlength=CLASSES**2)
    cells = pairs.view(CLASSES, CLASSES)
    hits = cells.diag()
    return (hits / (cells.sum(0) + cells.sum(1) - hits)).mean().item()

@functools.cache
def load_scenes(data_dir: str, seed: int, count: int) -> tuple[tuple, tuple]:
    """Return scenes and truth to learn from, and half as many to test."""
    data = load_data("cifar10", data_dir, 0.2, seed)  # as the study splits it
    return draw_scenes(data.val, count, seed=0), draw_scenes(data.test, count // 2, seed=1)

def probe_seeds(args: argparse.Namespace, run: str, stages: tuple[str, ...]) -> Tensor:
    """Probe the maps of a network of each seed. Print a row of the table, and return the classes
    found in the first six scenes by the last seed."""
    ious = []
    for seed in args.seeds:
        learn, (scenes, truth) = load_scenes(args.data_dir, seed, args.scenes)
        path = Path(args.runs) / f"{run}-{seed}" / "last.pt"
        torch.manual_seed(0)
        probe = Probe(load_model(load_checkpoint(path), path), stages)
        train_probe(probe, *learn, args.epochs, args.tune)
        found = find_classes(probe, scenes)
        ious.append(100 * compute_iou(found, truth))
    text = ", ".join(f"{iou:.1f}" for iou in ious)
    cells = run, " ".join(stages), str(probe.channels), text, f"{np.mean(ious):.1f}"
    print(f"| {' | '.join(cells)} |", flush=True)
    return found[:6]

def draw(path: str, scenes: Tensor, columns: list[Tensor]) -> None:
    """Draw a row for each scene uint8 (N, 3, SIDE, SIDE): the scene, then classes as colours."""
    hues = (np.arange(CLASSES) * 255 // CLASSES).astype(np.uint8)
    hsv = np.stack([hues, np.full(CLASSES, 200, np.uint8), np.full(CLASSES, 230, np.uint8)], 1)
    hsv[0] = 0, 0, 60  # the ground is dark grey
    colours = np.asarray(Image.fromarray(hsv[None], "HSV").convert("RGB"))[0]
    cells = [scenes.permute(0, 2, 3, 1).numpy(), *(colours[column.numpy()] for column in columns)]
    cells = [np.pad(cell, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255) for cell in cells]
    picture = Image.fromarray(np.concatenate([np.concatenate(cell) for cell in cells], 1))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)

def main() -> None:
    parser = argparse.ArgumentParser(description="Probe maps of features, pixel by pixel.")
    add = parser.add_argument
    add("--runs", default="runs/study", help="folder of the study's runs (default: runs/study)")
    add("--data-dir", default="data", help="where CIFAR-10 is (default: data)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the study (default: 0 1 2)")
    add("--scenes", type=int, default=2000, help="to learn from; half as many to test")
    add("--epochs", type=int, default=4, help="scenes drawn, by their number")
    add("--tune", action="store_true", help="train the networks, too")
    add("--picture", metavar="PNG", help="draw what each probe of the last seed finds")
    args = parser.parse_args()
    prepare_machine("no")
    print("| network | maps | channels | mean IoU of each seed, % | mean |")
    print("| --- " * 5 + "|")
    columns = []
    try:
        for run, choices in NETWORKS.items():
            for stages in choices:
                columns.append(probe_seeds(args, run, stages))
    except UserError as error:
        sys.exit(f"probe_pixels.py: {error}")
    if args.picture:
        _, (scenes, truth) = load_scenes(args.data_dir, args.seeds[-1], args.scenes)
        draw(args.picture, scenes[:6], [truth[:6], *columns])

if __name__ == "__main__":
    main()
