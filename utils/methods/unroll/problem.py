"""What students see and where they start: batches, made block by block from draws on the CPU."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.compute.batches import Batches, Draw, draw_batches, steps_per_block


@dataclass(frozen=True)
class Problem:
    """Where K students start, what they see, and where they should arrive, if anywhere.

    `batches(images, steps)` makes x_t (K, B_t, C, H, W) for each t of a range, `labels(labels)` y_t
    (K, B_t, ...) for every t. B_t may be this process's share of a batch of `batch_sizes[t]`, even
    none of it.
    """

    theta_0: Tensor  # (K, P)
    batches: Callable[[Tensor, range], Sequence[Tensor]]
    labels: Callable[[Tensor], Sequence[Tensor]]
    batch_sizes: Sequence[int]
    theta_star: Tensor | None = None  # (K, P)
    steps_per_block: int = 1  # how many steps' batches are best made together
    first: int = 0  # steps before this one are taken, but nothing flows back through them

    @property
    def syn_steps(self) -> int:
        return len(self.batch_sizes)


def blocks(steps: range, size: int) -> Iterator[range]:
    """`steps` in ranges of `size`; the last may be shorter."""
    for start in range(steps.start, steps.stop, size):
        yield range(start, min(start + size, steps.stop))


class StudentBatches:
    """Make what K students see, drawn[t][k] at step t, block by block and differentiably."""

    def __init__(
        self,
        drawn: Sequence[Sequence[Draw]],
        steps_per_block: int,
        device: torch.device,
        *,
        first: int = 0,
    ) -> None:
        self._drawn = drawn
        self._device = device
        self._blocks: dict[range, Batches] = {}
        self._all = [*blocks(range(first), steps_per_block)]
        self._all += blocks(range(first, len(drawn)), steps_per_block)
        for steps in self._all:
            self._block(steps)

    def __call__(self, images: Tensor, steps: range) -> list[Tensor]:
        """x_t (K, B_t, C, H, W) for each t of `steps`; the same on every call."""
        return self._block(steps).images(images)

    def labels(self, labels: Tensor) -> list[Tensor]:
        """y_t (K, B_t, ...) of all steps."""
        return [y for steps in self._all for y in self._block(steps).labels(labels)]

    def _block(self, steps: range) -> Batches:
        if steps not in self._blocks:
            self._blocks[steps] = Batches(self._drawn[steps.start : steps.stop], self._device)
        return self._blocks[steps]


def draw_problem(
    theta_0: Tensor,
    theta_star: Tensor | None,
    image: Tensor,
    *,
    count: int,
    syn_steps: int,
    batch_syn: int | None,
    dsa_groups: tuple[str, ...] | None,
    generators: Sequence[torch.Generator],
    share: tuple[int, int] = (0, 1),
    first: int = 0,
) -> Problem:
    """Make every random choice of K students' steps from theta_0 (K, P) on `count` images.

    Student k draws from `generators[k]`; `image` (C, H, W) is any of the images. A step sees all of
    them or, with `batch_syn` below their number, the next chunk of a random permutation. With
    `share` (rank, world) the batches are this process's parts of what is drawn. Nothing flows back
    through the steps before `first`.
    """
    size = min(batch_syn or count, count)
    numbers = torch.arange(count)
    plans = [draw_batches(numbers, size, dsa_groups, generator) for generator in generators]
    whole = [list(step) for step in itertools.islice(zip(*plans, strict=True), syn_steps)]
    if size == count:  # all of them: in their own order
        whole = [[replace(draw, indices=numbers) for draw in step] for step in whole]
    drawn = [[draw.shard(*share) for draw in step] for step in whole]
    per_block = steps_per_block(image, len(generators) * size)
    batches = StudentBatches(drawn, per_block, theta_0.device, first=first)
    return Problem(
        theta_0=theta_0,
        batches=batches,
        labels=batches.labels,
        batch_sizes=[len(step[0]) for step in whole],
        theta_star=theta_star,
        steps_per_block=per_block,
        first=first,
    )
