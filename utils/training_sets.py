"""What eval.py trains networks on: the distilled set, and real images to compare it with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from utils.cache import digest
from utils.data import ImageDataset
from utils.observer import Observer
from utils.options import EvalOptions
from utils.selection import SELECTIONS, asked_for, select
from utils.synthetic_set import SyntheticSet, class_labels


@dataclass(frozen=True)
class TrainingSet:
    """What networks are trained on, and how: images (N, C, H, W) for all of them, or different ones
    for each, with labels (N,).
    """

    name: str
    images: Tensor | list[Tensor]
    labels: Tensor
    lr: float
    epochs: int

    @cached_property
    def digest(self) -> Callable[[range], str]:
        """A checksum of what a range of networks is trained on."""
        images, labels = self.images, self.labels
        if isinstance(images, Tensor):
            digest_of_all = checksum(images, labels)
            return lambda networks: digest_of_all
        draws = images
        return cache(lambda k: checksum(torch.cat(draws[k.start : k.stop]), labels))


def checksum(images: Tensor, labels: Tensor) -> str:
    return digest({"images": images.cpu(), "labels": labels.cpu()})


def training_sets(
    options: EvalOptions, distilled: SyntheticSet, data: ImageDataset, observer: Observer | None
) -> Iterator[TrainingSet]:
    """The distilled set and, as asked for, real images under the same protocol; each is made when
    its turn comes. All processes must take them together.
    """
    device, epochs = data.test.images.device, options.epoch_eval_train
    yield TrainingSet(
        f"distilled {distilled.set}",
        distilled.images.to(device, data.test.images.dtype),
        distilled.labels.to(device),
        distilled.syn_lr,
        epochs,
    )
    labels = class_labels(data.num_classes, distilled.ipc, device)
    for name in asked_for(options):
        chosen = select(
            name,
            data,
            distilled.ipc,
            networks=options.num_eval,
            seed=options.seed,
            observer=observer,
        )
        yield TrainingSet(SELECTIONS[name].trained_on, chosen, labels, options.lr_real, epochs)
    if options.full:
        train = data.require_train()
        epochs = options.epoch_full_train or epochs
        yield TrainingSet("full", train.images, train.labels, options.lr_real, epochs)
