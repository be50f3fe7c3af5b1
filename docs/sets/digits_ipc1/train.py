"""Train a network on the distilled images in this folder, and say what pictures show.

    python train.py                    train, and keep the network in network.pt
    python train.py PICTURE [...]      name the classes; trains first where there is no network.pt

Needs torch and safetensors, and Pillow only where pictures are read. recipe.json says how networks
are trained and how well they do. This file lies in exported bundles; it cannot run elsewhere.
"""

import json
import sys
from pathlib import Path

import torch
from augment import apply, draw
from safetensors.torch import load_file
from torch.nn import functional as F

from networks import build_network

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECIPE = json.loads((HERE / "recipe.json").read_text(encoding="utf-8"))
DATA = {name: value.to(DEVICE) for name, value in load_file(HERE / "distilled.safetensors").items()}
CHANNELS, SIDE, _ = RECIPE["image_shape"]
CLASSES = RECIPE["class_names"]


def prepare(images01):
    """Bring images (N, C, H, W), floats in [0, 1], into the space of the distilled ones."""
    images01 = images01.to(DEVICE)
    if "zca_matrix" in DATA:
        whitened = (images01.flatten(1) - DATA["zca_mean"]) @ DATA["zca_matrix"]
        return whitened.view_as(images01)
    return (images01 - DATA["mean"].view(-1, 1, 1)) / DATA["std"].view(-1, 1, 1)


def targets():
    """What the network learns to say of the images: classes (N,), or probabilities (N, classes)."""
    if RECIPE["labels"] == "classes":
        return DATA["labels"]
    soft = DATA["soft_labels"]
    return soft.softmax(1) if RECIPE["labels"] == "logits" else soft


def steps(how, count, random):
    """Yield for each step the numbers of its images, their augmentation and the rate."""
    if how["kind"] == "learned_steps":
        for step, rate in enumerate(how["rates"]):
            yield torch.tensor(how["batches"][step % len(how["batches"])]), None, rate
    elif how["kind"] == "adam":
        for _ in range(how["steps"]):
            yield torch.randperm(count, generator=random)[: how["batch_size"]], None, how["lr"]
    else:
        groups = how["augmentation"]
        for epochs, rate in how["phases"]:
            for _ in range(epochs):
                for batch in torch.randperm(count, generator=random).split(how["batch_size"]):
                    yield batch, draw(groups, len(batch), random) if groups else None, rate


def new_network(seed=0):
    shape = {"channels": CHANNELS, "num_classes": len(CLASSES), "image_size": SIDE}
    return build_network(RECIPE["network"], **shape, seed=seed).to(DEVICE)


def train(seed=0):
    """Train a fresh network by the recipe."""
    network, how = new_network(seed).train(), RECIPE["training"]
    if how["kind"] == "adam":
        optimiser = torch.optim.Adam(network.parameters())
    else:
        decay = {"momentum": how["momentum"], "weight_decay": how["weight_decay"]}
        optimiser = torch.optim.SGD(network.parameters(), **decay)
    images, labels, random = DATA["images"], targets(), torch.Generator().manual_seed(seed)
    for batch, augmentation, rate in steps(how, len(images), random):
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        F.cross_entropy(network(apply(images[batch], augmentation)), labels[batch]).backward()
        optimiser.step()
    return network


@torch.no_grad()
def classify(network, images01):
    """The classes (N,) that the network sees in images (N, C, H, W), floats in [0, 1]."""
    network.eval()
    return torch.cat([network(prepare(part)).argmax(1) for part in images01.split(256)]).cpu()


def read_picture(path):
    """A picture file as an image (C, SIDE, SIDE) in [0, 1]; what is transparent becomes white."""
    from PIL import Image, ImageOps

    if CHANNELS not in (1, 3) or RECIPE["pixels"].keys() - {"fit", "channels"}:
        sys.exit("these images are no pictures of 8 bits: call classify() on tensors of your own")
    fit = {"crop": ImageOps.fit, "pad": ImageOps.pad, "squeeze": Image.Image.resize}
    try:
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    except OSError as error:
        sys.exit(f"{path} cannot be read as a picture: {error}")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if CHANNELS == 1 else "RGB")
    picture = fit[RECIPE["pixels"]["fit"]](picture, (SIDE, SIDE), Image.Resampling.BILINEAR)
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(SIDE, SIDE, CHANNELS).permute(2, 0, 1) / 255


def main(pictures):
    images01 = [read_picture(path) for path in pictures]
    kept = HERE / "network.pt"
    if pictures and kept.exists():
        network = new_network()
        network.load_state_dict(torch.load(kept, map_location=DEVICE, weights_only=True))
    else:
        network = train()
        torch.save(network.state_dict(), kept)
        print(f"trained on {len(DATA['images'])} images, kept in {kept}")
    for path, image in zip(pictures, images01, strict=True):
        print(f"{path}: {CLASSES[int(classify(network, image[None]))]}")


if __name__ == "__main__":
    main(sys.argv[1:])
