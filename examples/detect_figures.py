"""Mask R-CNN on drawn figures: FishNet as a backbone of torchvision's detectors, beside the ResNet that its tail is.

    python examples/detect_figures.py                                     # both backbones, on a CPU
    python examples/detect_figures.py --scenes 800 --picture figures.png  # a look at it

Scenes are drawn from a seed: one to three of the ten figures of data.py on a noisy ground; they may overlap. Prints the
box and mask average precision at IoU 0.5 on held-out scenes; --picture draws what the first backbone finds in them.
Both see the same scenes; the default number took about 20 minutes for each on a core of its own.
"""

import argparse
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

from study import NETWORK, VARIANTS

from data import SHAPES, inside_figure
from evaluate import prepare_cpu
from fishnet import FishNetFPN, create_model, zero_init_last
from flops import count

SIDE = 64
SCENES = 12000
# Both cost the same arithmetic.
BACKBONES = {"FishNet": NETWORK, "its tail": NETWORK | VARIANTS["tail alone, wider and deeper"]}


def draw_scene(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An image (3, SIDE, SIDE) in [0, 1] and torchvision's target: boxes (n, 4), labels (n,), masks (n, SIDE, SIDE)."""
    rng = np.random.default_rng(seed)
    grid = np.arange(SIDE) + 0.5
    image = np.broadcast_to(rng.uniform(0, 1, (3, 1, 1)), (3, SIDE, SIDE)).copy()
    labels, masks = [], []
    for label in rng.choice(len(SHAPES), rng.integers(1, 4), replace=False):
        angle, radius, (cx, cy) = rng.uniform(0, 2 * np.pi), rng.uniform(9, 15), rng.uniform(14, SIDE - 14, 2)
        x, y = (grid[None] - cx) / radius, (grid[:, None] - cy) / radius
        inside = inside_figure(
            SHAPES[label], np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        )
        masks = [mask & ~inside for mask in masks]  # what is drawn later lies on top
        masks.append(inside)
        labels.append(label + 1)  # 0 is the ground
        image[:, inside] = rng.uniform(0, 1, (3, 1))
    image = np.clip(image + rng.normal(0, 0.06, image.shape), 0, 1)
    seen = [i for i, mask in enumerate(masks) if mask.sum() >= 20]
    boxes = [(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) for ys, xs in (np.nonzero(masks[i]) for i in seen)]
    target = {
        "boxes": torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32),
        "labels": torch.tensor([labels[i] for i in seen], dtype=torch.int64),
        "masks": torch.from_numpy(np.array([masks[i] for i in seen]).reshape(-1, SIDE, SIDE)).byte(),
    }
    return torch.from_numpy(image).float(), target


def make_detector(overrides: dict) -> MaskRCNN:
    """Mask R-CNN of torchvision on the pyramid, with anchors for figures of this size and heads for a CPU."""
    model = create_model("fishnet99", **overrides)
    zero_init_last(model)
    width, classes = 64, len(SHAPES) + 1
    return MaskRCNN(
        FishNetFPN(model, out_channels=width), min_size=SIDE, max_size=SIDE, image_mean=[0.5] * 3, image_std=[0.25] * 3,
        rpn_anchor_generator=AnchorGenerator(((14,), (18,), (22,), (26,), (32,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=300, rpn_post_nms_top_n_train=150, rpn_pre_nms_top_n_test=150,
        rpn_post_nms_top_n_test=60, box_batch_size_per_image=32, box_positive_fraction=0.5, box_detections_per_img=20,
        box_head=FastRCNNConvFCHead((width, 7, 7), (width, width), (256,), nn.BatchNorm2d),
        box_predictor=FastRCNNPredictor(256, classes),
        mask_head=MaskRCNNHeads(width, (width, width), 1), mask_predictor=MaskRCNNPredictor(width, width, classes),
    )  # fmt: skip


def train(model: nn.Module, scenes: int, batch_size: int = 4, lr: float = 1e-3) -> None:
    """AdamW with a linear decay to 0; each scene is seen once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.02)
    model.train()
    for step in range(scenes // batch_size):
        images, targets = zip(*(draw_scene(1_000_000 + step * batch_size + i) for i in range(batch_size)))
        losses = model(list(images), list(targets))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        done = step * batch_size / scenes
        optimizer.param_groups[0]["lr"] = lr * min(1 - done, (step + 1) / 100)  # after 100 warm-up steps
        optimizer.step()
        if step % 100 == 0:
            parts = "  ".join(f"{name.removeprefix('loss_')} {loss.item():.2f}" for name, loss in losses.items())
            print(f"{done:4.0%}  {parts}", flush=True)


def average_precision(scores: Tensor, hits: Tensor, objects: int) -> float:
    """Area under the precision-recall curve of detections (n,), precision made monotone from the right."""
    order = scores.argsort(descending=True, stable=True)
    hits = hits[order].double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    precision = precision.flip(0).cummax(0).values.flip(0)
    return float((precision * torch.diff(hits, prepend=hits.new_zeros(1))).sum() / objects)


def mask_iou(found: Tensor, truth: Tensor) -> Tensor:
    """(n, H, W) and (m, H, W) booleans -> (n, m)."""
    found, truth = found.flatten(1).float(), truth.flatten(1).float()
    both = found @ truth.T
    return both / (found.sum(1)[:, None] + truth.sum(1) - both)


@torch.no_grad()
def evaluate(model: nn.Module, scenes: int = 400) -> tuple[float, float]:
    """Box and mask AP at IoU 0.5, the mean over the classes, on scenes that training never draws."""
    model.eval()
    table = []  # of each detection: label, score, whether its box and its mask hit a figure that none before it hit
    counts = torch.zeros(len(SHAPES) + 1)
    for seed in range(scenes):
        image, target = draw_scene(seed)
        (found,) = model([image])
        counts += torch.bincount(target["labels"], minlength=len(counts))
        ious = box_iou(found["boxes"], target["boxes"]), mask_iou(found["masks"][:, 0] > 0.5, target["masks"] > 0)
        free = [set(range(len(target["labels"]))) for _ in ious]
        for i in range(len(found["scores"])):  # they come by falling score
            row = [found["labels"][i].item(), found["scores"][i].item()]
            for iou, left in zip(ious, free):
                near = [j for j in left if target["labels"][j] == row[0] and iou[i, j] >= 0.5]
                best = max(near, key=lambda j, i=i, iou=iou: iou[i, j], default=None)
                left.discard(best)
                row.append(best is not None)
            table.append(row)
    table = torch.tensor(table, dtype=torch.float64).view(-1, 4)
    precisions = []  # (box, mask) of each class
    for label in counts.nonzero().flatten().tolist():
        _, scores, *hits = table[table[:, 0] == label].T
        precisions.append([average_precision(scores, hit, counts[label].item()) for hit in hits])
    boxes, masks = np.mean(precisions, axis=0).tolist()
    return boxes, masks


@torch.no_grad()
def draw_detections(model: nn.Module, scenes: int = 12) -> Image.Image:
    """The first held-out scenes with the masks, boxes and names that the model finds, four times as large."""
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
    return Image.fromarray(make_grid(tiles, nrow=4, padding=4, pad_value=255).permute(1, 2, 0).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description="Mask R-CNN on drawn figures.")
    parser.add_argument("--scenes", type=int, default=SCENES, help="to train on (default: %(default)s)")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--picture", metavar="PNG", help="write detections of the first backbone on held-out scenes")
    args = parser.parse_args()
    if args.scenes < 4:
        sys.exit(f"detect_figures.py: scenes={args.scenes}: expected at least 4, a batch")
    if args.picture and not args.picture.endswith(".png"):
        sys.exit(f"detect_figures.py: picture={args.picture}: expected a name that ends in .png")
    try:
        if args.picture:
            open(args.picture, "a").close()  # a quarter of an hour before it is needed
    except OSError as error:
        sys.exit(f"detect_figures.py: {error}")
    prepare_cpu(torch.device("cpu"))
    for name in args.backbones:
        torch.manual_seed(0)
        model = make_detector(BACKBONES[name])
        costs = count(model.backbone.model, SIDE)
        started = time.perf_counter()
        train(model, args.scenes)
        minutes = (time.perf_counter() - started) / 60
        boxes, masks = evaluate(model)
        print(
            f"{name}: {costs.params:,} parameters, {costs.macs / 1e6:.0f} M MACs, {args.scenes} scenes in "
            f"{minutes:.1f} minutes: box AP50 {boxes:.1%}, mask AP50 {masks:.1%}",
            flush=True,
        )
        if args.picture and name == args.backbones[0]:
            draw_detections(model).save(args.picture)


if __name__ == "__main__":
    main()
