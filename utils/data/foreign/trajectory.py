"""Read images_<tag>.pt of MTT, FTD, TESLA, ATT, DATM, PAD, EDF, MCT: tensors, a file for each.

Labels and rate lie beside the images under the same name: images_best.pt, labels_best.pt,
lr_best.pt, or ema_images_best.pt and so on. MTT's project page has sets in several files.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.core.files import torch_load
from utils.data.folders import some
from utils.data.foreign.content import (
    Content,
    Stated,
    as_images,
    as_labels,
    as_rate,
    by_number,
)
from utils.data.values import shown

FORMAT = "images_*.pt, as MTT, FTD, TESLA, ATT, DATM, PAD and EDF write"
IMAGES, PICTURES = "images", "images_zca_"


def read_tensor(path: Path, value: Any, stated: Stated) -> Content | None:
    """Read images (N, C, H, W) alone, with the labels and the rate that lie beside them."""
    if not isinstance(value, Tensor):
        return None
    if path.name.startswith(PICTURES) and stated.space is None:
        raise UserError(
            f"{shown(path)}: MTT's {PICTURES}*.pt are pictures to look at, not what is trained on: "
            f"give images_{path.name.removeprefix(PICTURES)}, or --space unit to take them all the "
            "same"
        )
    images, is_named = as_images(value, path), IMAGES in path.name
    of_labels = None if stated.label_dir else _beside(path, "labels")
    of_rate = None if stated.lr_dir else _beside(path, "lr")
    return Content(
        FORMAT if is_named else "a tensor of images",
        images,
        as_labels(torch_load(of_labels), of_labels, len(images)) if of_labels else None,
        lr=as_rate(torch_load(of_rate), of_rate) if of_rate else None,
        space="zca" if "zca" in path.name and not path.name.startswith(PICTURES) else None,
        statistics="mtt" if is_named else None,
        why="as the file's name says",
        said=tuple(f"read too: {shown(file.name)}" for file in (of_labels, of_rate) if file),
    )


def _beside(path: Path, what: str) -> Path | None:
    """The file of labels or rate that belongs to the images in `path`, where it is there."""
    file = path.with_name(path.name.replace(IMAGES, what, 1))
    return file if IMAGES in path.name and file.exists() else None


def read_folder(folder: Path, stated: Stated) -> Content:
    """Read a folder of .pt files with the tensors of one set, in one of them or in several.

    UserError where it is not said that several belong together: they may be iterations of a run.
    """
    files = sorted(folder.glob("*.pt"), key=lambda file: by_number(file.name))
    named = [file for file in files if IMAGES in file.name and PICTURES not in file.name]
    files = named or files
    if len(files) > 1 and stated.parts is None:
        raise UserError(
            f"{shown(folder)}: {some(shown(file.name) for file in files)} lie there: give one of "
            "them, or, where each is a part of one set, --parts classes (some of the classes each) "
            "or --parts images (images of every class each)"
        )
    contents = [_read_part(file, stated) for file in files]
    return contents[0] if len(contents) == 1 else _joined(contents, files, stated)


def _read_part(file: Path, stated: Stated) -> Content:
    value = torch_load(file)
    content = read_tensor(file, value, stated)
    if content is None:
        raise UserError(
            f"{shown(file)}: it is no tensor of images: give the file of the set itself"
        )
    return content


def _joined(contents: Sequence[Content], files: Sequence[Path], stated: Stated) -> Content:
    """Make one set of its parts, in their order."""
    first = contents[0]
    for content, file in zip(contents, files, strict=True):
        same = content.images.shape[1:] == first.images.shape[1:]
        same = same and (content.labels is None) == (first.labels is None)
        if not same or content.lr != first.lr or content.images.dtype != first.images.dtype:
            raise UserError(
                f"{shown(file)}: its shape, labels or rate are not those of "
                f"{shown(files[0].name)}: these are no parts of one set"
            )
    labels = [content.labels for content in contents if content.labels is not None]
    widths = {each.shape[1:] for each in labels}
    if len(widths) > 1:
        raise UserError(f"{shown(files[0].parent)}: the labels of its parts differ in shape")
    sizes = tuple(len(content.images) for content in contents)
    return replace(
        first,
        images=torch.cat([content.images for content in contents]),
        labels=torch.cat(labels) if labels else None,
        blocks=sizes if stated.parts == "images" else (sum(sizes),),
        said=(
            f"{len(files)} parts: {shown(files[0].name)} ... {shown(files[-1].name)}, by number",
        ),
    )
