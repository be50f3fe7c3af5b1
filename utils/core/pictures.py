"""Sheets of images for people to look at."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.core.files import atomic_write

MIN_SIDE = 64  # of an image on the sheet, in pixels
MAX_COLUMNS = 20


def save_grid(images01: Tensor, path: Path, *, ipc: int) -> None:
    """Write images (classes * ipc, C, H, W) as one PNG sheet; values are clipped to [0, 1].

    Each class begins a new row; with one image a class, a row holds ten classes. Small images are
    enlarged without smoothing. Of other than 1 or 3 channels those that `shown_as` says are shown.
    """
    # Slow to import, and needed by one script only.
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    images01 = visible(images01.detach().float().cpu().clamp(0, 1))
    if ipc == 1:
        columns = 10
    else:
        columns = min(ipc, MAX_COLUMNS)
        by_class = images01.unflatten(0, (-1, ipc))
        # White images fill up the last row of a class.
        blank = by_class.new_ones(1).expand(len(by_class), -ipc % columns, *images01.shape[1:])
        images01 = torch.cat([by_class, blank], 1).flatten(0, 1)
    factor = max(1, MIN_SIDE // images01.shape[-1])
    enlarged = F.interpolate(images01, scale_factor=factor, mode="nearest")
    sheet = make_grid(enlarged, nrow=columns, padding=2 * max(1, factor // 4), pad_value=1.0)
    with atomic_write(path) as file:
        to_pil_image(sheet).save(file, format="PNG")


def visible(images: Tensor) -> Tensor:
    """What can be shown of images (N, C, H, W): grey or colours, so 1 or 3 channels."""
    channels = images.shape[1]
    if channels == 2:
        return images.mean(1, keepdim=True)
    return images[:, :3] if channels > 3 else images


def shown_as(channels: int) -> str | None:
    """Say what `visible` shows of so many channels; None where it shows all."""
    if channels == 2:
        return "the mean of the 2 channels"
    return f"the first 3 of {channels} channels as red, green, blue" if channels > 3 else None
