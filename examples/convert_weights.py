"""Convert weights of other FishNet implementations into a file that this project loads.

    python examples/convert_weights.py fishnet150_ckpt.tar fishnet150.pt

It reads the files of the paper's authors (github.com/kevin-ssy/FishNet), the "welltrained"
FishNet-150 among them, and pytorchcv's FishNet-150 (github.com/osmr/imgclsmob). It never runs code
from a file. It prints which network the weights belong to, and a command that trains it further.
In Python, use the new file like this:

    model = create_model("fishnet150_imagenet")
    print(load_pretrained(model, "fishnet150.pt"))
"""

import argparse
import os
import re
import shlex
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import check_weights, load_file
from fishnet import CONFIGS, UserError, create_model

STAGES = ("b4", "b3", "b2", "h1", "h2", "h3", "h4")
# Each table maps the beginnings of another implementation's names to the beginnings of ours.
AUTHORS = {
    **{f"conv{i}.{j}.": f"stem.{3 * i - 3 + j}." for i in (1, 2, 3) for j in (0, 1)},
    **{f"fish.fish.{i}.0.": f"t{i + 1}." for i in (0, 1, 2)},
    "fish.fish.3.0.": "bridge.score.", "fish.fish.3.1.": "bridge.score.5.",
    "fish.fish.3.2.": "bridge.units.", "fish.fish.3.3.0.": "bridge.attention.",
    **{f"fish.fish.{i + 4}.0.": f"{STAGES[i]}.refine." for i in range(6)},
    **{f"fish.fish.{i + 4}.1.": f"{STAGES[i + 1]}.transfer." for i in range(6)},
    "fish.fish.9.3.": "pool.", "fish.fish.9.4.1.": "fc.",
}  # fmt: skip
WELLTRAINED = AUTHORS | {  # it groups the layers of bridge and pool differently
    "fish.fish.3.1.0.": "bridge.score.2.", "fish.fish.9.4.0.": "pool.2.",
    "fish.fish.3.1.1.": "bridge.score.3.", "fish.fish.9.4.1.": "pool.3.",
    "fish.fish.3.1.3.": "bridge.score.5.", "fish.fish.9.4.4.": "fc.",
}  # fmt: skip
BRIDGE = "features.hg.skip1_seq.unit4."
PYTORCHCV = {
    **{f"features.init_block.conv{i}.conv.": f"stem.{3 * i - 3}." for i in (1, 2, 3)},
    **{f"features.init_block.conv{i}.bn.": f"stem.{3 * i - 2}." for i in (1, 2, 3)},
    **{f"features.hg.down1_seq.unit{i}.": f"t{i}." for i in (1, 2, 3)},
    f"{BRIDGE}conv1.bn.": "bridge.score.0.", f"{BRIDGE}conv1.conv.": "bridge.score.2.",
    f"{BRIDGE}conv2.bn.": "bridge.score.3.", f"{BRIDGE}conv2.conv.": "bridge.score.5.",
    f"{BRIDGE}se.bn.": "bridge.attention.0.", f"{BRIDGE}se.conv1.": "bridge.attention.3.",
    f"{BRIDGE}se.conv2.": "bridge.attention.5.", f"{BRIDGE}blocks.": "bridge.units.blocks.",
    **{f"features.hg.up_seq.unit{i}.": f"{STAGES[i - 1]}.refine." for i in (1, 2, 3)},
    **{f"features.hg.down2_seq.unit{i}.": f"{STAGES[i + 2]}.refine." for i in (1, 2, 3)},
    **{f"features.hg.skip1_seq.unit{i}.": f"{STAGES[4 - i]}.transfer." for i in (1, 2, 3)},
    **{f"features.hg.skip2_seq.unit{i}.": f"{STAGES[7 - i]}.transfer." for i in (1, 2, 3)},
    "features.final_block.conv1.bn.": "pool.0.", "features.final_block.conv1.conv.": "pool.2.",
    "features.final_block.preactiv.bn.": "pool.3.", "output.final_conv.": "fc.",
}  # fmt: skip
INSIDE_UNITS = (  # applied after the beginning of a name is ours; all but the last are pytorchcv's
    (r"\.blocks\.block(\d{1,3})\.", lambda match: f".{int(match[1]) - 1}."),
    (r"\.body\.conv([123])\.(bn|conv)\.", r".branch.\2\1."),
    (r"\.identity_conv\.bn\.", ".shortcut.0."),
    (r"\.identity_conv\.conv\.", ".shortcut.2."),
    (r"\.(\d+)\.(bn|conv)([123])\.", r".\1.branch.\2\3."),
)

def rename(name: str, table: dict[str, str]) -> str:
    """Return our name for a weight, or the same name if the table does not have it. Of several
    beginnings that fit, the longest counts."""
    start = max(filter(name.startswith, table), key=len, default="")
    if not start:
        return name
    name = table[start] + name.removeprefix(start)
    for pattern, ours in INSIDE_UNITS:
        name = re.sub(pattern, ours, name)
    return name

def read_weights(path: str) -> dict[str, Tensor]:
    """Return the state_dict in a file, with the file's names but without prefixes such as
    "module.". Raises UserError if there is none."""
    if zipfile.is_zipfile(path):
        content = load_file(path)
    else:
        try:  # PyTorch has written zip archives only since version 1.6
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except Exception:  # PyTorch raises many kinds for damaged files
            raise UserError(f"{path}: damaged, or holds more than tensors and values") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise UserError(f"{path}: holds no state_dict")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): x for name, x in content.items()}

def find_network(weights: dict[str, Tensor]) -> tuple[str, nn.Module]:
    """Return the paper's network that has the most names in common with the weights."""
    classes = len(weights["fc.weight"]) if "fc.weight" in weights else 1000
    names = [name for name in CONFIGS if name.endswith("_imagenet")]
    with torch.device("meta"):
        models = {name: create_model(name, num_classes=classes) for name in names}
    return min(models.items(), key=lambda item: len(item[1].state_dict().keys() ^ weights.keys()))

def convert(path: str) -> tuple[str, dict[str, Tensor]]:
    """Return the name of the network that a file's weights fit, and its state_dict. Raises
    UserError if the file cannot be read, or fits no network."""
    found = read_weights(path)
    if any(name.startswith("fish.fish.") for name in found):
        table = WELLTRAINED if "fish.fish.9.4.4.weight" in found else AUTHORS
    elif any(name.startswith("features.hg.") for name in found):
        table = PYTORCHCV
    else:
        raise UserError(f"{path}: holds no weights of the paper's authors or of pytorchcv")
    weights = {rename(name, table): x for name, x in found.items()}
    if "fc.weight" in weights and weights["fc.weight"].shape[2:] == (1, 1):
        weights["fc.weight"] = weights["fc.weight"].flatten(1)  # a 1x1 convolution in these files
    name, model = find_network(weights)
    # Batch norm counts batches only since PyTorch 0.4.1, so older files lack these counts.
    counts = [key for key in model.state_dict() if key.endswith("num_batches_tracked")]
    weights = dict.fromkeys(counts, torch.tensor(0)) | weights
    check_weights(model, weights, f"{path}: does not fit {name}, the nearest network")
    return name, weights

def main() -> None:
    parser = argparse.ArgumentParser(description="Convert weights of other FishNets.")
    parser.add_argument("source", type=os.path.expanduser, metavar="IN", help="file to read")
    parser.add_argument("target", type=os.path.expanduser, metavar="OUT", help="file to write")
    args = parser.parse_args()
    try:
        name, weights = convert(args.source)
        with open(args.target, "wb") as file:
            torch.save(weights, file)
    except UserError as error:
        sys.exit(f"convert_weights.py: {error}")
    except OSError as error:
        sys.exit(f"convert_weights.py: {args.target}: {error.strerror}")
    out = shlex.quote(args.target)
    print(f"wrote {out}: {len(weights)} tensors of {name}, {len(weights['fc.weight'])} classes")
    print("To train it further on a folder of images:")
    print(f"python train.py --recipe strong --model {name} --pretrained {out} --dataset folder")

if __name__ == "__main__":
    main()
