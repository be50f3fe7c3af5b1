"""Read a folder of pictures in class folders, as SRe2L and RDED write, or anybody."""

from pathlib import Path

import torch

from utils.core.errors import UserError
from utils.data.decode import Decoding, decode
from utils.data.folders import class_names, list_images
from utils.data.foreign.content import Content, by_number
from utils.data.values import look, shown


def read_pictures(folder: Path) -> Content:
    """Read pictures of one size and 8 bits; labels number the class folders in their order.

    UserError where pictures differ in size or cannot be read.
    """
    names = tuple(sorted(class_names(folder), key=by_number))
    if not names:
        raise UserError(
            f"{shown(folder)}: neither class folders of pictures nor .pt files lie there: give the "
            "file or the folder that holds the set"
        )
    items = list_images(folder / name for name in names)
    files = [file for file, _ in items]
    first, *others = looks = [look(file) for file in files]
    for file, other in zip(files[1:], others, strict=True):
        if (other.width, other.height) != (first.width, first.height):
            raise UserError(
                f"{shown(file)} is {other.width}x{other.height}, {shown(files[0])} "
                f"{first.width}x{first.height}: the images of a set have one size"
            )
    if first.width != first.height:
        raise UserError(f"{shown(files[0])} is {first.width}x{first.height}: images are square")
    channels = max(each.channels for each in looks)
    return Content(
        "pictures in class folders",
        decode(files, Decoding(first.width, channels)),
        torch.tensor([label for _, label in items]),
        class_names=names,
    )
