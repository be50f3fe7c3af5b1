"""Batches of many steps at once: which images each sees, how they are augmented.

Drawing (on the CPU, from a generator) and making (on the device) are apart. A batch does not depend
on the network that sees it, so the batches of many steps, or of many networks, are made together:
one gather and one call per DSA group, where one after another would launch a dozen small kernels
each.
"""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.data import augment
from utils.data.augment import Augmentation

# The images of the batches that are made together take so many bytes, or are those of one step: few
# on a CPU, which has them in its caches then, many on a GPU, where every call is a launch.
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20, "mps": 64 * 2**20}


@dataclass(frozen=True)
class Draw:
    """One batch: the images it sees, indices (b,) on the CPU, and their augmentation."""

    indices: Tensor
    augmentation: Augmentation | None

    def shard(self, rank: int, world: int) -> "Draw":
        """The part of `rank` when the batch is divided over `world` processes; may be empty."""
        part = slice(rank * len(self) // world, (rank + 1) * len(self) // world)
        augmentation = self.augmentation
        if augmentation is not None:
            augmentation = replace(augmentation, u=augmentation.u[part])
        return Draw(self.indices[part], augmentation)

    def __len__(self) -> int:
        return len(self.indices)


def draw_batches(
    numbers: Tensor,
    size: int,
    dsa_groups: tuple[str, ...] | None,
    generator: torch.Generator,
) -> Iterator[Draw]:
    """Endless passes over the images `numbers` (N,) in random order, `size` at a time; the last of
    a pass may be short. Every batch gets one draw of DSA from `dsa_groups`; None leaves them as
    they are.
    """
    while True:
        order = torch.randperm(len(numbers), generator=generator)
        for indices in numbers[order].split(size):
            augmentation = None
            if dsa_groups is not None:
                augmentation = augment.draw(dsa_groups, len(indices), generator)
            yield Draw(indices, augmentation)


def steps_per_block(image: Tensor, images_per_step: int) -> int:
    """How many steps' batches are made together; `image` (C, H, W) is one of them."""
    step_bytes = images_per_step * image.numel() * image.element_size()
    return max(1, BLOCK_BYTES[image.device.type] // max(1, step_bytes))


def alike(sizes: Sequence[Hashable], most: int) -> Iterator[range]:
    """Ranges that cover `sizes` in order, each of equal ones: a power of two of them, at most
    `most`, so that calls which take a range together have few shapes.
    """
    first = 0
    for _, equal in itertools.groupby(sizes):
        left = len(list(equal))
        while left:
            count = 1 << (min(left, most).bit_length() - 1)
            yield range(first, first + count)
            first, left = first + count, left - count


class Batches:
    """The batches of some steps for k networks, ready on a device: drawn[step][j] is network j's.

    Within one step all k are of one size b.
    """

    def __init__(self, drawn: Sequence[Sequence[Draw]], device: torch.device) -> None:
        self._shapes = [(len(step), len(step[0])) for step in drawn]
        draws = [draw for step in drawn for draw in step]
        groups = [draw.augmentation.group if draw.augmentation else "" for draw in draws]
        order = sorted(range(len(draws)), key=lambda i: groups[i])
        self._parts: list[tuple[int, Augmentation | None]] = []
        for group in dict.fromkeys(groups[i] for i in order):
            members = [draws[i] for i in order if groups[i] == group]
            u = [draw.augmentation.u for draw in members if draw.augmentation]
            augmentation = Augmentation(group, to_device(torch.cat(u), device)) if u else None
            self._parts.append((sum(map(len, members)), augmentation))
        self._sources = to_device(torch.cat([draws[i].indices for i in order]), device)
        rows = torch.arange(len(self._sources)).split([len(draws[i]) for i in order])
        of_draw = dict(zip(order, rows, strict=True))
        self._order = to_device(torch.cat([of_draw[i] for i in range(len(draws))]), device)

    def images(self, images: Tensor) -> list[Tensor]:
        """From images (N, C, H, W), differentiably: for each step x (k, b, C, H, W)."""
        sorted_rows = images[self._sources].split([count for count, _ in self._parts])
        made = [
            augment.apply(rows, augmentation)
            for rows, (_, augmentation) in zip(sorted_rows, self._parts, strict=True)
        ]
        return self._by_step(torch.cat(made)[self._order] if len(made) > 1 else made[0])

    def labels(self, labels: Tensor) -> list[Tensor]:
        """From labels (N,), for each step y (k, b)."""
        return self._by_step(labels[self._sources][self._order])

    def _by_step(self, rows: Tensor) -> list[Tensor]:
        steps = rows.split([k * b for k, b in self._shapes])
        return [step.unflatten(0, shape) for step, shape in zip(steps, self._shapes, strict=True)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without making the host wait for the device."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
