"""Easy images first, the easiest no more in the end: which images an epoch of PAD's experts sees.

PAD: Li et al., "Prioritize Alignment in Dataset Distillation", 2024. EL2N: Paul et al., "Deep
Learning on a Data Diet", NeurIPS 2021.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.config.fields import option
from utils.core import ranks
from utils.core.cache import cached
from utils.core.errors import UserError
from utils.data.dataset import Split
from utils.data.identity import DataIdentity
from utils.data.source import Source
from utils.experts.features import ExpertFeatures
from utils.experts.kind import ExpertKind, NoExperts

FILE = "difficulty.pt"  # beside the experts: the EL2N of each training image
GROUP = "easy first (PAD)"
# PAD's settings are for experts of so many epochs; the others scale with --train_epochs.
PUBLISHED_EPOCHS = 100
ALL_FROM = {"CIFAR100": 40, "Tiny": 40}
ALL_FROM_ELSEWHERE = 20  # CIFAR-10's
DROP_AFTER = (40, 60)


@dataclass(frozen=True)
class EasyFirstOptions:
    easy_first: bool = option(
        False,
        "begin with the easy images of each class and end without the easiest; images are ranked "
        f"by experts trained without this flag; {PUBLISHED_EPOCHS} epochs",
        group=GROUP,
    )
    easy_share: float = option(
        0.75, "share of each class that the first epoch sees", group=GROUP, above=0, maximum=1
    )
    all_from: int | None = option(
        None,
        "first epoch, counted from 0, that sees all images; the share grows until then (default: "
        f"{ALL_FROM_ELSEWHERE} of {PUBLISHED_EPOCHS}, for CIFAR100 and Tiny 40)",
        group=GROUP,
        minimum=0,
    )
    drop_after: list[int] | None = option(
        None,
        "epochs, counted from 0, after which the easiest are left out (default: "
        f"{' '.join(map(str, DROP_AFTER))} of {PUBLISHED_EPOCHS})",
        group=GROUP,
        minimum=0,
    )
    drop_easiest: list[float] = option(
        [0.1, 0.2],
        "share of each class that is left out after each of drop_after",
        group=GROUP,
        minimum=0,
        maximum=0.99,
    )
    el2n_experts: int = option(
        10,
        "experts without this flag whose mean EL2N ranks the images; two at least, since one alone "
        "ranks by its own accidents",
        group=GROUP,
        minimum=2,
    )
    el2n_epoch: int = option(
        10, "epoch of those experts that EL2N is taken after", group=GROUP, minimum=1
    )


def easy_first_flags() -> tuple[str, ...]:
    """The names of the flags that mean something with --easy_first alone."""
    return tuple(field.name for field in fields(EasyFirstOptions) if field.name != "easy_first")


@dataclass(frozen=True)
class EasyFirst:
    """Which part of each class the epochs see, counted from 0.

    Attributes:
        share: the easiest part that epoch 0 sees; it grows linearly up to epoch `all_from`.
        all_from: the first epoch that sees all images.
        drops: (epoch, share) in order: later epochs go without that easiest share.
    """

    share: float
    all_from: int
    drops: Sequence[tuple[int, float]]

    @classmethod
    def of(
        cls,
        *,
        dataset: str,
        train_epochs: int,
        share: float,
        all_from: int | None,
        drop_after: Sequence[int] | None,
        drop_easiest: Sequence[float],
    ) -> "EasyFirst":
        """Scale what is None from PAD's 100 epochs; UserError where the rest contradicts itself."""

        def scaled(epoch: int) -> int:
            return round(epoch * train_epochs / PUBLISHED_EPOCHS)

        if all_from is None:
            all_from = scaled(ALL_FROM.get(dataset, ALL_FROM_ELSEWHERE))
        if drop_after is None:
            drop_after = [scaled(epoch) for epoch in DROP_AFTER]
        if len(drop_after) != len(drop_easiest):
            raise UserError(
                f"--drop_after and --drop_easiest are pairs: {len(drop_after)} epochs "
                f"({_listed(drop_after)}) do not go with {len(drop_easiest)} shares "
                f"({_listed(drop_easiest)})"
            )
        if list(drop_after) != sorted(drop_after):
            raise UserError(f"--drop_after {_listed(drop_after)}: give the epochs in their order")
        if drop_after and drop_after[0] < all_from:
            raise UserError(
                f"--drop_after {drop_after[0]} is before --all_from {all_from}, where all images "
                "are there for the first time: give a later one, or a lower --all_from"
            )
        return cls(share, all_from, tuple(zip(drop_after, drop_easiest, strict=True)))

    def seen(self, epoch: int, images: int) -> range:
        """Which of the `images` of a class, from easy to hard, epoch `epoch` sees: one at least."""
        if epoch < self.all_from:
            share = self.share + (1 - self.share) * epoch / self.all_from
            return range(min(images, max(1, _part(share, images))))
        dropped = [share for after, share in self.drops if epoch > after]
        return range(min(_part(dropped[-1], images), images - 1) if dropped else 0, images)

    def counts(self, epochs: int, sizes: Sequence[int]) -> list[int]:
        """How many images each of `epochs` epochs sees of classes of these `sizes`."""
        return [sum(len(self.seen(epoch, size)) for size in sizes) for epoch in range(epochs)]

    def __str__(self) -> str:
        begin = f"the easiest {self.share:.0%} at first, all from epoch {self.all_from} on"
        ends = [f"after epoch {after} without {share:.0%}" for after, share in self.drops]
        return f"of each class {', '.join([begin, *ends])} (epochs from 0)"


def _part(share: float, images: int) -> int:
    """Round down, though 0.29 * 100 is a little less than 29."""
    return math.floor(round(share * images, 6))


def _listed(values: Sequence[float]) -> str:
    return " ".join(map(str, values))


def images_by_epoch(plan: EasyFirst, difficulty: Tensor, labels: Tensor) -> Callable[[int], Tensor]:
    """Rank images of `difficulty` (N,) within their classes; returns what gives the numbers of
    those that an epoch sees, in their own order. All on the CPU; equally hard ones stay in order.
    """
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    ranked = [own[difficulty[own].argsort(stable=True)] for own in members]

    def images(epoch: int) -> Tensor:
        parts = ((own, plan.seen(epoch, len(own))) for own in ranked)
        return torch.cat([own[seen.start : seen.stop] for own, seen in parts]).sort().values

    return images


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute ||softmax(logits) - one-hot label||_2 of each image (N,), on the CPU in float64."""
    logits, labels = logits.cpu().double(), labels.cpu()
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).norm(dim=1)


@dataclass(frozen=True)
class Judges:
    """Ordinary experts that tell easy images from hard ones by their mean EL2N after an epoch."""

    experts: ExpertFeatures
    epoch: int
    images: DataIdentity

    @classmethod
    def open(
        cls,
        source: Source,
        images: DataIdentity,
        kind: ExpertKind,
        buffer_path: str,
        *,
        number: int,
        epoch: int,
        command: str,
    ) -> "Judges":
        """Open the first `number` experts of `kind`, which are trained on all images alike; after
        their last epoch where they have fewer than `epoch`.

        UserError where there are not as many names the `command` that makes them.
        """
        asks = f"--easy_first ranks images by {number} ordinary experts (--el2n_experts)"
        try:
            experts = ExpertFeatures.open(
                source, images, kind, buffer_path, most=number, skip_bad=False, command=command
            )
        except NoExperts as error:
            raise NoExperts(f"{asks}: {error}") from None
        if (there := len(experts.experts)) < number:
            folder = experts.experts.folder
            raise NoExperts(f"{asks}, {folder} has {there}; make the others with: {command}")
        return cls(experts, min(epoch, experts.experts.epochs), images)

    def __str__(self) -> str:
        experts = self.experts.experts
        last = " (their last)" if self.epoch == experts.epochs else ""
        return f"{len(experts)} experts in {experts.folder} after epoch {self.epoch}{last}"

    def difficulty(self, train: Split, folder: Path) -> Tensor:
        """Compute the mean EL2N (N,) of the training images, or read what an earlier call for the
        experts in `folder` has computed. The main process does so, and tells the others.
        """
        number = len(self.experts.experts)
        key = {"experts": number, "epoch": self.epoch, "train": self.images.parts["train"].digest}

        def build() -> dict[str, Tensor]:
            total = torch.zeros(len(train.labels), dtype=torch.float64)
            for expert in range(number):
                logits = self.experts.logits(expert, train.images, epoch=self.epoch)
                total += el2n(logits, train.labels)
            return {"el2n": total / number}

        found = cached(folder / FILE, json.dumps(key), build) if ranks.is_main() else {}
        return ranks.from_main(found)["el2n"]
