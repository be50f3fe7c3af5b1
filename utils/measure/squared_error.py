"""Networks that regress on the labels of KIP and Label Solve, as their paper measures such sets
(Nguyen et al., NeurIPS 2021).

Squared error on centred labels, SGD with momentum 0.9, a cosine rate, 5000 steps of 100 images,
L2 0.001, no augmentation. The paper searched L2 and the rate's factor by grid on training images
held out; here nothing is searched.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.compute.cohort import Cohort
from utils.compute.stability import largest_stable_rate
from utils.measure.protocol import MOMENTUM, random_batches

BATCH = 100  # images, where there are as many


@dataclass(frozen=True)
class SquaredErrorSteps:
    """`steps` steps of SGD, each on `batch_size` random images. The rate begins at `factor` times
    the largest stable one of each fresh network on these images, and falls to 0 along a cosine.
    """

    batch_size: int
    steps: int = 5_000
    factor: float = 1.0
    weight_decay: float = 1e-3

    @classmethod
    def on(cls, count: int) -> "SquaredErrorSteps":
        """The training on `count` images."""
        return cls(min(BATCH, count))

    def epochs(self, count: int) -> int:
        """How often it sees each of `count` images."""
        return math.ceil(self.steps * self.batch_size / count)

    def __str__(self) -> str:
        return (
            f"{self.steps:,} steps of {self.batch_size} images, from {self.factor:g} times the "
            f"largest stable rate of each network, L2 {self.weight_decay:g}; nothing is searched"
        )

    @property
    def optimiser(self) -> Mapping[str, Any]:
        return {"momentum": MOMENTUM, "weight_decay": self.weight_decay}

    @property
    def numbers(self) -> Tensor:
        numbers = [self.batch_size, self.steps, self.factor, self.weight_decay]
        return torch.tensor(numbers, dtype=torch.float64)

    def train(
        self, cohort: Cohort, images: Tensor, labels: Tensor, generators: Sequence[torch.Generator]
    ) -> None:
        piece = math.ceil(self.batch_size / 2)  # with its tangents it takes what a step takes
        stable = [
            largest_stable_rate(network, images, piece=piece, generator=generator)
            for network, generator in zip(cohort.networks, generators, strict=True)
        ]
        part = torch.arange(self.steps, dtype=torch.float64) / self.steps
        first = self.factor * torch.tensor(stable, dtype=torch.float64)
        rates = torch.outer((1 + torch.cos(math.pi * part)) / 2, first)
        plans = [random_batches(len(images), self.batch_size, each) for each in generators]
        cohort.train_on(images, labels, plans, rates=rates.to(images))
