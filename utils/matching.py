"""One outer step of trajectory matching: draw an expert segment and student batches, match them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from utils import augment
from utils.augment import Augmentation
from utils.expert_buffer import ExpertBuffer
from utils.flat_params import FlatNetwork
from utils.rng import stream
from utils.training import random_batches
from utils.trajectory_length import LengthPolicy
from utils.unroll import Distance, Engine, Matching, Problem


@dataclass(frozen=True)
class Matcher:
    """Everything of an outer step but the images: `match(iteration, ...)` is a pure function.

    labels (N,) are those of the synthetic images; a student step sees all N images, or, with
    `batch_syn` below N, the next chunk of a random permutation.
    """

    network: FlatNetwork
    experts: ExpertBuffer
    labels: Tensor
    syn_steps: int
    expert_epochs: int
    max_start_epoch: int
    batch_syn: int | None
    dsa_groups: tuple[str, ...] | None
    engine: Engine
    distance: Distance
    policy: LengthPolicy
    seed: int

    def match(self, iteration: int, images: Tensor, syn_lr: Tensor) -> tuple[Matching, int]:
        """Match one expert segment from images (N, C, H, W) and syn_lr; also its start epoch.

        Every draw depends on the seed and `iteration` alone, so any iteration can be repeated.
        """
        expert, start = self._draw_segment(iteration)
        theta_0, theta_star = self.experts.segment(expert, start, self.expert_epochs)
        problem = draw_problem(
            self.network,
            theta_0.to(images),
            theta_star.to(images),
            self.labels,
            syn_steps=self.syn_steps,
            batch_syn=self.batch_syn,
            dsa_groups=self.dsa_groups,
            generator=stream(self.seed, "student", iteration),
        )
        return self.engine(problem, images, syn_lr, self.distance, self.policy), start

    def _draw_segment(self, iteration: int) -> tuple[int, int]:
        """The experts in a new random order on every pass; the start epoch uniformly."""
        which_pass, position = divmod(iteration, len(self.experts))
        order = torch.randperm(
            len(self.experts), generator=stream(self.seed, "expert_order", which_pass)
        )
        start = torch.randint(
            self.max_start_epoch, (1,), generator=stream(self.seed, "start_epoch", iteration)
        )
        return int(order[position]), int(start)


@dataclass(frozen=True)
class StudentBatch:
    """What one student step sees: some of the images, augmented. Replays the same on every call."""

    indices: Tensor | None  # (B,), None for all
    augmentation: Augmentation | None

    def __call__(self, images: Tensor) -> Tensor:
        chosen = images if self.indices is None else images[self.indices]
        return augment.apply(chosen, self.augmentation)


def draw_problem(
    network: FlatNetwork,
    theta_0: Tensor,
    theta_star: Tensor,
    labels: Tensor,
    *,
    syn_steps: int,
    batch_syn: int | None,
    dsa_groups: tuple[str, ...] | None,
    generator: torch.Generator,
) -> Problem:
    """The matching problem from theta_0 to theta_star (P,), with every random choice made."""
    count, device = len(labels), labels.device
    chunks = _endless_chunks(count, min(batch_syn or count, count), generator)
    batches, batch_labels = [], []
    for _ in range(syn_steps):
        chunk = next(chunks)
        indices = None if len(chunk) == count else chunk.to(device)
        augmentation = None
        if dsa_groups is not None:
            augmentation = augment.draw(dsa_groups, len(chunk), generator).to(device)
        batches.append(StudentBatch(indices, augmentation))
        batch_labels.append(labels if indices is None else labels[indices])

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(theta, x), y)

    return Problem(loss, theta_0, theta_star, batches, batch_labels)


def _endless_chunks(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from random_batches(count, size, generator)
