"""Train Mask R-CNN on drawn figures, with FishNet as the backbone and with a ResNet like its tail.

    python examples/detect_figures.py                                     # both backbones, on a CPU
    python examples/detect_figures.py --scenes 800 --picture figures.png  # a short training

A scene has one to three of the ten figures of data.py, which may overlap, on noisy ground. All
scenes follow from seeds, so both backbones see the same ones. The program prints the average
precision of boxes and masks at IoU 0.5 on scenes that training does not use. --picture draws what
the first backbone finds in them. The default number of scenes takes about 20 minutes on one core.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import box_iou
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import SHAPES, draw_mask
from fishnet import FishNetFPN, create_model, zero_init_last
from flops import count
from train import prepare_machine

SIDE = 64  # of a scene, in pixels
# Both backbones cost the same arithmetic.
NETWORK = {"stem_stride": 2, "final_norm": True}
BACKBONES = {
    "FishNet": NETWORK | {"channels": (48, 48, 64, 96), "tail_depths": (1, 2, 2, 1)},
    "its tail": NETWORK | {
        "channels": (112, 112, 128, 192), "tail_depths": (2, 3, 3, 2), "body_depths": (),
        "head_depths": (),
    },
}  # fmt: skip

def draw_scene(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an image (3, SIDE, SIDE) in [0, 1] and its target, as torchvision's detectors take it:
    boxes (n, 4), labels (n,), masks (n, SIDE, SIDE)."""
    rng = np.random.default_rng(seed)
    image = np.broadcast_to(rng.uniform(0, 1, (3, 1, 1)), (3, SIDE, SIDE)).copy()
    labels, masks = [], []
    for label in rng.choice(len(SHAPES), rng.integers(1, 4), replace=False):
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(9, 15)
        cx, cy = rng.uniform(14, SIDE - 14, 2)
        inside = draw_mask(SHAPES[label], SIDE, complex(cx, cy), radius, angle) > 0.5
        masks = [mask & ~inside for mask in masks]  # a later figure hides earlier ones
        masks.append(inside)
        labels.append(label + 1)  # label 0 is the ground
        image[:, inside] = rng.uniform(0, 1, (3, 1))
    image = np.clip(image + rng.normal(0, 0.06, image.shape), 0, 1)
    seen = [i for i, mask in enumerate(masks) if mask.sum() >= 20]
    points = [np.nonzero(masks[i]) for i in seen]
    boxes = [(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) for ys, xs in points]
    masks = np.array([masks[i] for i in seen]).reshape(-1, SIDE, SIDE)
    target = {
        "boxes": torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
        "labels": torch.tensor([labels[i] for i in seen], dtype=torch.int64),
        "masks": torch.from_numpy(masks).byte(),
    }
    return torch.from_numpy(image).float(), target

def make_detector(overrides: dict) -> MaskRCNN:
    """Return torchvision's Mask R-CNN on a feature pyramid, with anchors for figures of this size
    and heads that are small enough for a CPU."""
    model = create_model("fishnet99", **overrides)
    zero_init_last(model)
    width, classes = 64, len(SHAPES) + 1
    anchors = AnchorGenerator(((14,), (18,), (22,), (26,), (32,)), ((0.5, 1.0, 2.0),) * 5)
    return MaskRCNN(
        FishNetFPN(model, out_channels=width), min_size=SIDE, max_size=SIDE,
        image_mean=[0.5] * 3, image_std=[0.25] * 3, rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=300, rpn_post_nms_top_n_train=150, rpn_pre_nms_top_n_test=150,
        rpn_post_nms_top_n_test=60, box_batch_size_per_image=32, box_positive_fraction=0.5,
        box_detections_per_img=20,
        box_head=FastRCNNConvFCHead((width, 7, 7), (width, width), (256,), nn.BatchNorm2d),
        box_predictor=FastRCNNPredictor(256, classes),
        mask_head=MaskRCNNHeads(width, (width, width), 1),
        mask_predictor=MaskRCNNPredictor(width, width, classes),
    )  # fmt: skip

def train(model: nn.Module, scenes: int, batch_size: int = 4, lr: float = 1e-3) -> None:
    """Train with AdamW, 100 steps of warm-up and a linear decay to 0. Each scene is seen once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.02)
    model.train()
    for step in range(scenes // batch_size):
        seeds = range(step * batch_size, (step + 1) * batch_size)
        images, targets = zip(*(draw_scene(1_000_000 + seed) for seed in seeds))
        losses = model(list(images), list(targets))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        done = step * batch_size / scenes
        optimizer.param_groups[0]["lr"] = lr * min(1 - done, (step + 1) / 100)
        optimizer.step()
        if step % 100 == 0:
            parts = (f"{name.removeprefix('loss_')} {loss:.2f}" for name, loss in losses.items())
            print(f"{done:4.0%}", *parts, sep="  ", flush=True)

def average_precision(scores: Tensor, hits: Tensor, objects: int) -> float:
    """Return the area under the precision-recall curve of detections (n,). The precision at a
    recall is the highest one at this recall or more."""
    order = scores.argsort(descending=True, stable=True)
    hits = hits[order].double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    precision = precision.flip(0).cummax(0).values.flip(0)
    return float((precision * torch.diff(hits, prepend=hits.new_zeros(1))).sum() / objects)

def mask_iou(found: Tensor, truth: Tensor) -> Tensor:
    """Return the IoU of all pairs of boolean masks: (n, H, W) and (m, H, W) -> (n, m)."""
    found, truth = found.flatten(1).float(), truth.flatten(1).float()
    both = found @ truth.T
    return both / (found.sum(1)[:, None] + truth.sum(1) - both)

def match(found_labels: Tensor, labels: Tensor, iou: Tensor) -> list[bool]:
    """Return for each detection, the most certain first, if it hits a figure that none before it
    hit: one of its class with an IoU of at least 0.5. iou (detections, figures)."""
    left, hits = set(range(len(labels))), []
    for i, label in enumerate(found_labels):
        near = [j for j in left if labels[j] == label and iou[i, j] >= 0.5]
        best = max(near, key=iou[i].__getitem__, default=None)
        left.discard(best)
        hits.append(best is not None)
    return hits

@torch.no_grad()
def evaluate(model: nn.Module, scenes: int = 400) -> tuple[float, float]:
    """Return the average precision of boxes and of masks at IoU 0.5, as means over the classes, on
    scenes that training does not use."""
    model.eval()
    rows = [torch.empty(0, 4, dtype=torch.float64)]  # label, score, box hits, mask hits
    counts = torch.zeros(len(SHAPES) + 1)
    for seed in range(scenes):
        image, target = draw_scene(seed)
        (found,) = model([image])
        counts += torch.bincount(target["labels"], minlength=len(counts))
        labels, truth = found["labels"], target["labels"]
        boxes = box_iou(found["boxes"], target["boxes"])
        masks = mask_iou(found["masks"][:, 0] > 0.5, target["masks"] > 0)
        hits = [torch.tensor(match(labels, truth, iou)).double() for iou in (boxes, masks)]
        rows.append(torch.stack([labels.double(), found["scores"].double(), *hits], dim=1))
    rows, precisions = torch.cat(rows), []
    for label in counts.nonzero().flatten().tolist():
        _, scores, *hits = rows[rows[:, 0] == label].T
        precisions.append([average_precision(scores, hit, counts[label].item()) for hit in hits])
    return tuple(np.mean(precisions, axis=0).tolist())

@torch.no_grad()
def draw_detections(model: nn.Module, scenes: int = 12) -> Image.Image:
    """Draw scenes that training does not use with the masks, boxes and names that the model finds,
    at four times their size."""
    model.eval()
    tiles = []
    for seed in range(scenes):
        image, _ = draw_scene(seed)
        (found,) = model([image])
        keep = found["scores"] > 0.5
        tile = (image * 255).byte()
        if keep.any():
            tile = draw_segmentation_masks(tile, found["masks"][keep, 0] > 0.5, alpha=0.5)
        tile = tile.repeat_interleave(4, 1).repeat_interleave(4, 2)
        names = [SHAPES[label - 1] for label in found["labels"][keep].tolist()]
        if keep.any():
            tile = draw_bounding_boxes(tile, found["boxes"][keep] * 4, names, colors="white")
        tiles.append(tile)
    grid = make_grid(tiles, nrow=4, padding=4, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())

def main() -> None:
    parser = argparse.ArgumentParser(description="Train Mask R-CNN on drawn figures.")
    parser.add_argument("--scenes", type=int, default=12000, help="to train on (default: 12000)")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    about = "draw what the first backbone finds in unseen scenes"
    parser.add_argument("--picture", metavar="PNG", help=about)
    args = parser.parse_args()
    if args.scenes < 4:
        parser.error(f"--scenes {args.scenes}: expected at least 4, which are a batch")
    if args.picture and not args.picture.endswith(".png"):
        parser.error(f"--picture {args.picture}: expected a name that ends in .png")
    if args.picture:
        try:
            open(args.picture, "a").close()  # now, rather than after the training
        except OSError as error:
            parser.error(f"--picture {args.picture}: {error.strerror}")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    prepare_machine("no")
    for name in args.backbones:
        torch.manual_seed(0)
        model = make_detector(BACKBONES[name])
        costs = count(model.backbone.model, SIDE)
        started = time.perf_counter()
        train(model, args.scenes)
        minutes = (time.perf_counter() - started) / 60
        boxes, masks = evaluate(model)
        print(f"{name}: {costs.params:,} parameters, {costs.macs / 1e6:.0f} M MACs, {args.scenes} "
              f"scenes in {minutes:.1f} minutes: box AP50 {boxes:.1%}, mask AP50 {masks:.1%}",
              flush=True)  # fmt: skip
        if args.picture and name == args.backbones[0]:
            draw_detections(model).save(args.picture)

if __name__ == "__main__":
    main()
