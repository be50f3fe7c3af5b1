"""Read the list [images, labels] of IDC and NCFM, and decode images that hold smaller ones.

In multi-formation (Kim et al., ICML 2022) a stored image is cut into factor x factor crops, and
each is enlarged to the full side before networks see it.
"""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from utils.core.errors import UserError
from utils.data.foreign.content import PAIR, Content, Stated, as_images, as_labels
from utils.data.values import shown


def read_pair(path: Path, value: Any, stated: Stated) -> Content | None:
    """Read a list of images and labels."""
    if not isinstance(value, list | tuple) or len(value) != PAIR:
        return None
    if not all(isinstance(each, Tensor) for each in value):
        return None
    images = as_images(value[0], path)
    return Content(
        "a list [images, labels], as IDC and NCFM write",
        images,
        as_labels(value[1], path, len(images)),
        is_packed=True,
    )


def decoded(images: Tensor, factor: int, path: Path) -> Tensor:
    """Images (N, C, S, S) as (N * factor^2, C, S, S): their crops, row by row, enlarged bilinearly.

    UserError where the side cannot be divided.
    """
    count, channels, side, _ = images.shape
    if side % factor:
        raise UserError(
            f"--factor {factor}: images of {side} pixels in {shown(path)} do not divide"
        )
    small = side // factor
    crops = images.view(count, channels, factor, small, factor, small)
    crops = crops.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, small, small)
    return F.interpolate(crops, size=(side, side), mode="bilinear", align_corners=False)
