"""DSA against a slow reference, one image and one pixel at a time; its ranges; its replay."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from utils.data import augment
from utils.data.augment import DSA_STRATEGY, Augmentation, parse_strategy

GROUPS = parse_strategy(DSA_STRATEGY)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=generator(1), dtype=torch.float64)


def draw(group: str, count: int, seed: int = 0) -> Augmentation:
    return augment.draw((group,), count, generator(seed))


def reference(group: str, x: Tensor, u: list[float]) -> Tensor:
    """The augmentation of one image (C, H, W), by the field's formulas."""
    return {
        "color": reference_color,
        "crop": reference_crop,
        "cutout": reference_cutout,
        "flip": lambda x, u: torch.stack(x.unbind(2)[::-1], 2) if u[0] < 0.5 else x,
        "scale": lambda x, u: warp(x, [[scale(u[0]), 0], [0, scale(u[1])]]),
        "rotate": reference_rotate,
    }[group](x, u)


def reference_color(x: Tensor, u: list[float]) -> Tensor:
    x = x + (u[0] - 0.5)
    grey = sum(x) / len(x)
    x = torch.stack([grey + (channel - grey) * u[1] * 2 for channel in x])
    return x.mean() + (x - x.mean()) * (u[2] + 0.5)


def reference_crop(x: Tensor, u: list[float]) -> Tensor:
    _, height, width = x.shape
    shifts = [int(size * 0.125 + 0.5) for size in (height, width)]
    dy, dx = (int(v * (2 * shift + 1)) - shift for v, shift in zip(u, shifts, strict=True))
    moved = torch.zeros_like(x)
    for row, column in product(range(height), range(width)):
        if 0 <= row + dy < height and 0 <= column + dx < width:
            moved[:, row, column] = x[:, row + dy, column + dx]
    return moved


def reference_cutout(x: Tensor, u: list[float]) -> Tensor:
    _, height, width = x.shape
    sides = [int(size * 0.5 + 0.5) for size in (height, width)]
    centres = [
        int(v * (size + 1 - side % 2))
        for v, size, side in zip(u, (height, width), sides, strict=True)
    ]
    cut = x.clone()
    for row, column in product(range(height), range(width)):
        offsets = (row - centres[0] + sides[0] // 2, column - centres[1] + sides[1] // 2)
        if 0 <= offsets[0] < sides[0] and 0 <= offsets[1] < sides[1]:
            cut[:, row, column] = 0
    return cut


def reference_rotate(x: Tensor, u: list[float]) -> Tensor:
    angle = (u[0] - 0.5) * 2 * 15 * math.pi / 180
    return warp(x, [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def scale(u: float) -> float:
    return u * (1.2 - 1 / 1.2) + 1 / 1.2


def warp(x: Tensor, matrix: list[list[float]]) -> Tensor:
    theta = torch.tensor([[[*row, 0] for row in matrix]], dtype=x.dtype)
    grid = F.affine_grid(theta, [1, *x.shape], align_corners=False)
    return F.grid_sample(x[None], grid, align_corners=False)[0]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 13, 10), (3, 32, 32)])
@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_the_reference_image_by_image(group, shape):
    images = random_images(6, *shape)
    augmentation = draw(group, len(images))
    augmented = augment.apply(images, augmentation)
    expected = [
        reference(group, x, u) for x, u in zip(images, augmentation.u.tolist(), strict=True)
    ]
    torch.testing.assert_close(augmented, torch.stack(expected))
    assert not torch.equal(augmented, images)


def assert_fills(values: Tensor, low: float, high: float) -> None:
    """All values lie between low and high and come within 1 % of the range of either."""
    margin = 0.01 * (high - low)
    assert low - 1e-9 <= values.min() <= low + margin
    assert high - margin <= values.max() <= high + 1e-9


def test_the_ranges_of_color():
    flat = torch.zeros(3000, 3, 4, 4, dtype=torch.float64)
    brightness = augment.apply(flat, draw("color", 3000)).mean((1, 2, 3))
    assert_fills(brightness, -0.5, 0.5)

    grey = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 1, 4, 4)
    chroma = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    x = augment.apply((grey + chroma).repeat(3000, 1, 1, 1), draw("color", 3000))
    contrast = (x[:, 0, 3, 3] - x[:, 0, 0, 0]) / 2
    saturation = (x[:, 2, 0, 0] - x[:, 0, 0, 0]) / 2 / contrast
    assert_fills(contrast, 0.5, 1.5)
    assert_fills(saturation, 0.0, 2.0)


@pytest.mark.parametrize(("size", "reach"), [(8, 1), (12, 2), (32, 4)])
def test_crop_shifts_by_every_amount_both_ways(size, reach):
    position = torch.arange(size * size).view(1, 1, size, size).repeat(3000, 1, 1, 1)
    centre = augment.apply(position.double(), draw("crop", 3000))[:, 0, size // 2, size // 2].long()
    shifts = {(v // size - size // 2, v % size - size // 2) for v in centre.tolist()}
    assert shifts == set(product(range(-reach, reach + 1), repeat=2))


def test_cutout_is_half_the_side_and_reaches_every_border():
    holes = augment.apply(torch.ones(3000, 1, 8, 8), draw("cutout", 3000))[:, 0] == 0
    rows = {tuple(hole.any(1).nonzero().flatten().tolist()) for hole in holes}
    columns = {tuple(hole.any(0).nonzero().flatten().tolist()) for hole in holes}
    spans = {tuple(range(max(c - 2, 0), min(c + 2, 8))) for c in range(9)}
    assert rows == columns == spans


def test_flip_takes_every_second_image():
    images = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(3000, 1, 1, 1)
    flipped = augment.apply(images, draw("flip", 3000))[:, 0, 0, 0]
    assert 0.47 < flipped.mean() < 0.53


def where_pixels_come_from(group: str, count: int) -> tuple[Tensor, Tensor]:
    """Input coordinates x and y, times 9, of the output pixel at (4, 2), measured on ramps."""
    ramp = torch.arange(-8, 9, 2, dtype=torch.float64)
    x, y = ramp.expand(9, 9), ramp[:, None].expand(9, 9)
    images = torch.stack([x, y]).repeat(count, 1, 1, 1)
    moved = augment.apply(images, draw(group, count))
    return moved[:, 0, 5, 6], moved[:, 1, 5, 6]  # x = 4, y = 2 of the output


def test_the_ranges_of_scale_per_axis():
    x, y = where_pixels_come_from("scale", 3000)
    assert_fills(x / 4, 1 / 1.2, 1.2)
    assert_fills(y / 2, 1 / 1.2, 1.2)
    assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 0.1


def test_the_range_of_rotate_both_ways():
    x, y = where_pixels_come_from("rotate", 3000)
    angle = torch.atan2(y, x) - math.atan2(2, 4)
    assert_fills(angle.rad2deg(), -15, 15)
    torch.testing.assert_close(x**2 + y**2, torch.full_like(x, 20.0))


def test_a_batch_gets_one_group_and_in_time_every_group():
    rng = generator()
    drawn = [augment.draw(GROUPS, 5, rng) for _ in range(600)]
    counts = {group: sum(one.group == group for one in drawn) for group in GROUPS}
    assert sum(counts.values()) == 600
    assert all(60 < n < 140 for n in counts.values()), counts
    assert all(len(one.u) == 5 and one.u.min() >= 0 and one.u.max() < 1 for one in drawn)


def test_only_groups_of_the_strategy_are_drawn():
    rng = generator()
    groups = parse_strategy("flip_crop")
    assert {augment.draw(groups, 2, rng).group for _ in range(50)} == {"flip", "crop"}


def test_the_same_generator_draws_the_same():
    first, again, other = (augment.draw(GROUPS, 4, generator(seed)) for seed in (7, 7, 8))
    assert first.group == again.group and torch.equal(first.u, again.u)
    assert first.u.shape != other.u.shape or not torch.equal(first.u, other.u)


@pytest.mark.parametrize("group", GROUPS)
def test_a_draw_is_replayed_exactly_and_the_images_stay(group):
    images = random_images(4, 3, 8, 8).float()
    before = images.clone()
    augmentation = draw(group, 4)
    once = augment.apply(images, augmentation)
    assert torch.equal(once, augment.apply(images, augmentation))
    assert torch.equal(images, before)
    assert once.dtype == images.dtype


@pytest.mark.parametrize("group", GROUPS)
def test_the_gradient_passes_to_the_images(group):
    images = random_images(3, 2, 6, 5).requires_grad_()
    augmentation = draw(group, 3)
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, augmentation), images)


def test_no_augmentation_leaves_the_images_as_they_are():
    images = random_images(2, 3, 4, 4)
    assert augment.apply(images, None) is images


def test_an_unknown_group_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=f"'blur'; choices: {DSA_STRATEGY}"):
        parse_strategy("color_blur")
