"""The files of MTT and of DATM: images in the space that networks see, class by class."""

from pathlib import Path

import torch

from scripts.export.contents import Contents
from utils.core.errors import UserError
from utils.core.files import torch_save

IMAGES, LABELS, RATE = "images_best.pt", "labels_best.pt", "lr_best.pt"


def check_mtt(contents: Contents) -> None:
    """UserError for what MTT's files cannot say."""
    contents.check_protocol("MTT's format")
    if contents.recipe["labels"] != "classes":
        raise UserError(
            "MTT's format knows classes only, and networks train on the soft labels of this set: "
            "choose datm"
        )


def write_mtt(contents: Contents, folder: Path) -> None:
    """Write float32 images (N, C, H, W) and int64 labels (N,); the rate has no file there."""
    torch_save(contents.tensors["images"], folder / IMAGES)
    torch_save(contents.tensors["labels"], folder / LABELS)


def check_datm(contents: Contents) -> None:
    """UserError for what DATM's files cannot say."""
    contents.check_protocol("DATM's format")


def write_datm(contents: Contents, folder: Path) -> None:
    """Write float32 images, float32 logits (N, classes) whose softmax DATM takes, and the rate."""
    torch_save(contents.tensors["images"], folder / IMAGES)
    torch_save(contents.logits, folder / LABELS)
    torch_save(torch.tensor(contents.distilled.syn_lr), folder / RATE)
