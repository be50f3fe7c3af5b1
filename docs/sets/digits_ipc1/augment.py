"""DSA, differentiable siamese augmentation (Zhao & Bilen 2021): draw the parameters, apply them.

One group of the strategy is drawn for a batch; inside it every image has its own parameters. A draw
is plain uniform numbers, so a batch can be replayed exactly by applying the same draw again.
Magnitudes are the field's: brightness +-0.5, saturation 0-2, contrast 0.5-1.5, shift 12.5 %, cutout
of half the side, flip with probability 0.5, scale 1/1.2-1.2 per axis, rotation +-15 degrees.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

DSA_STRATEGY = "color_crop_cutout_flip_scale_rotate"

SHIFT_RATIO = 0.125
CUTOUT_RATIO = 0.5
MAX_SCALE = 1.2
MAX_ROTATION = math.radians(15)


@dataclass(frozen=True)
class Augmentation:
    """One draw: the group's name and its uniform numbers in [0, 1), (N, numbers of the group)."""

    group: str
    u: Tensor

    def to(self, device: torch.device | str) -> "Augmentation":
        return Augmentation(self.group, self.u.to(device))

    def expand(self, count: int) -> "Augmentation":
        """The draw of one image copied to `count` of them (siamese augmentation)."""
        return Augmentation(self.group, self.u.expand(count, -1))


def parse_strategy(strategy: str) -> tuple[str, ...]:
    """The groups named in `strategy`, such as "color_flip", or none for "none"; ValueError names
    unknown ones.
    """
    if strategy.lower() == "none":
        return ()
    groups = tuple(strategy.split("_"))
    unknown = [group for group in groups if group not in _GROUPS]
    if unknown:
        raise ValueError(f"unknown DSA group {unknown[0]!r}; choices: {'_'.join(_GROUPS)}, none")
    return groups


def active_groups(*, dsa: bool, strategy: str) -> tuple[str, ...] | None:
    """The groups that batches draw from; None where nothing is augmented."""
    return parse_strategy(strategy) or None if dsa else None


def draw(groups: tuple[str, ...], count: int, generator: torch.Generator) -> Augmentation:
    """Draw one group and the parameters of `count` images, on the CPU."""
    group = groups[int(torch.randint(len(groups), (1,), generator=generator))]
    numbers, _ = _GROUPS[group]
    return Augmentation(group, torch.rand(count, numbers, generator=generator))


def apply(images: Tensor, augmentation: Augmentation | None) -> Tensor:
    """Augment images (N, C, H, W), differentiably; None leaves them as they are."""
    if augmentation is None or len(images) == 0:
        return images
    _, transform = _GROUPS[augmentation.group]
    return transform(images, augmentation.u.to(images.device, images.dtype))


def _per_image(u: Tensor) -> Tensor:
    return u.view(-1, 1, 1, 1)


def _color(x: Tensor, u: Tensor) -> Tensor:
    brightness, saturation, contrast = (_per_image(column) for column in u.unbind(1))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (x - mean)


def _uniform_integer(u: Tensor, count: int) -> Tensor:
    """Map u in [0, 1) to 0 ... count - 1."""
    return (u * count).long().clamp(max=count - 1)


def _crop(x: Tensor, u: Tensor) -> Tensor:
    """Shift by whole pixels, filling with zeros."""
    n, _, height, width = x.shape
    max_y, max_x = int(height * SHIFT_RATIO + 0.5), int(width * SHIFT_RATIO + 0.5)
    padded = F.pad(x, (max_x, max_x, max_y, max_y))
    rows = _uniform_integer(u[:, 0], 2 * max_y + 1)[:, None] + torch.arange(height, device=x.device)
    columns = _uniform_integer(u[:, 1], 2 * max_x + 1)[:, None] + torch.arange(
        width, device=x.device
    )
    images = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """Zero a square of half the side around a random centre, cut off at the border."""

    def inside(u: Tensor, size: int) -> Tensor:
        side = int(size * CUTOUT_RATIO + 0.5)
        start = _uniform_integer(u, size + 1 - side % 2)[:, None] - side // 2
        position = torch.arange(size, device=u.device)
        return (position >= start) & (position < start + side)

    rows, columns = inside(u[:, 0], x.shape[2]), inside(u[:, 1], x.shape[3])
    hole = rows[:, None, :, None] & columns[:, None, None, :]
    return x.masked_fill(hole, 0.0)


def _flip(x: Tensor, u: Tensor) -> Tensor:
    return torch.where(_per_image(u) < 0.5, x.flip(3), x)


def _affine(x: Tensor, matrices: Tensor) -> Tensor:
    """Resample x under maps (N, 2, 2) from output to input coordinates in [-1, 1]."""
    theta = F.pad(matrices, (0, 1))
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _scale(x: Tensor, u: Tensor) -> Tensor:
    return _affine(x, torch.diag_embed(1 / MAX_SCALE + u * (MAX_SCALE - 1 / MAX_SCALE)))


def _rotate(x: Tensor, u: Tensor) -> Tensor:
    angle = (2 * u[:, 0] - 1) * MAX_ROTATION
    cos, sin = angle.cos(), angle.sin()
    return _affine(x, torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2))


# group -> (uniform numbers per image, transform)
_GROUPS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "color": (3, _color),
    "crop": (2, _crop),
    "cutout": (2, _cutout),
    "flip": (1, _flip),
    "scale": (2, _scale),
    "rotate": (1, _rotate),
}
