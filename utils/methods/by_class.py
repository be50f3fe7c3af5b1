"""Real and synthetic images matched class by class: what a class shows, and who works on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.compute.batches import Batches, Draw, alike
from utils.config.fields import option
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data import augment
from utils.data.dataset import Split
from utils.methods.base import Setting

_GROUP = "matching class by class"


@dataclass(frozen=True)
class ByClassOptions:
    batch_real: int = option(
        256, "real images of each class in an outer step", group=_GROUP, minimum=1
    )
    lr_net: float = option(
        0.01,
        "learning rate of networks that train on the images: none is learned",
        group=_GROUP,
        above=0,
    )


class Classes:
    """The classes of the training images `train`, with `ipc` synthetic images each, in order.

    Several processes divide the classes among them. `name` tells the draws of one method from those
    of another.
    """

    def __init__(
        self,
        train: Split,
        *,
        num_classes: int,
        ipc: int,
        batch_real: int,
        dsa_groups: tuple[str, ...] | None,
        seed: int,
        name: str,
    ) -> None:
        self.train = train
        labels = train.labels.cpu()
        self._members = [(labels == label).nonzero().flatten() for label in range(num_classes)]
        self.ipc = ipc
        self.batch_real = batch_real
        self._dsa_groups = dsa_groups
        self._seed = seed
        self._name = name

    @classmethod
    def of(cls, setting: Setting, name: str) -> "Classes":
        """Those of a run whose flags are ByClassOptions."""
        options = setting.options
        assert setting.train is not None
        return cls(
            setting.train,
            num_classes=len(setting.labels) // options.ipc,
            ipc=options.ipc,
            batch_real=options.batch_real,
            dsa_groups=setting.dsa_groups,
            seed=options.seed,
            name=name,
        )

    @property
    def count(self) -> int:
        return len(self._members)

    @property
    def own(self) -> range:
        """The labels of this process's classes."""
        return range(ranks.rank(), len(self._members), ranks.world())

    def size(self, label: int) -> int:
        """How many real images a class shows in an outer step."""
        return min(self.batch_real, len(self._members[label]))

    def groups(self, most: int) -> Iterator[Sequence[int]]:
        """This process's classes, at most `most` at a time, that show as many real images each."""
        sizes = [self.size(label) for label in self.own]
        return (self.own[part.start : part.stop] for part in alike(sizes, most))

    def choose(self, label: int, most: int, generator: torch.Generator) -> Tensor:
        """Choose different real images of a class, `most` of them or all: their numbers."""
        members = self._members[label]
        return members[torch.randperm(len(members), generator=generator)[:most]]

    def draw(self, iteration: int, label: int) -> tuple[Draw, Draw]:
        """Draw what a class shows in an outer step: different real images, all its synthetic ones;
        one draw of DSA is copied to all of them.
        """
        generator = stream(self._seed, self._name, iteration, label)
        real = self.choose(label, self.batch_real, generator)
        synthetic = torch.arange(label * self.ipc, (label + 1) * self.ipc)
        if self._dsa_groups is None:
            return Draw(real, None), Draw(synthetic, None)
        shared = augment.draw(self._dsa_groups, 1, generator)
        return Draw(real, shared.expand(len(real))), Draw(synthetic, shared.expand(self.ipc))


def make_batches(draws: Sequence[Draw], images: Tensor) -> Tensor:
    """The batches (K, B, C, H, W) of K draws, differentiably from images (N, C, H, W)."""
    return Batches([draws], images.device).images(images)[0]


def targets_of(x: Tensor, labels: Sequence[int]) -> Tensor:
    """The labels (K, B) of x (K, B, ...), whose rows are classes."""
    return torch.tensor(labels, device=x.device)[:, None].expand(x.shape[:2])


def most_classes(classes: int, processes: int) -> int:
    """The classes of the process with the most; UserError where one would have none."""
    if processes > classes:
        raise UserError(f"{processes} processes are more than the {classes} classes: start fewer")
    return -(-classes // processes)
