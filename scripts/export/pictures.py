"""A folder of PNGs for each class, in an order that torchvision's ImageFolder keeps."""

import re
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

from scripts.export.contents import Contents
from utils.core.pictures import visible


def check(contents: Contents) -> None:
    """Every set can be shown."""


def write(contents: Contents, folder: Path) -> None:
    """Write <label>_<class>/<number>.png; values are rounded to 8 bits and clipped."""
    names = class_folders(contents.distilled.class_names)
    counts = [0] * len(names)
    labels = contents.tensors["labels"].tolist()
    for name in names:
        (folder / name).mkdir(parents=True)
    for image, label in zip(visible(contents.images01), labels, strict=True):
        to_pil_image(image.mul(255).round().byte()).save(
            folder / names[label] / f"{counts[label]:04d}.png"
        )
        counts[label] += 1


def class_folders(names: tuple[str, ...]) -> list[str]:
    """Folder names whose alphabetical order is that of the labels."""
    digits = len(str(len(names) - 1))
    return [
        f"{label:0{digits}d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}"
        for label, name in enumerate(names)
    ]
