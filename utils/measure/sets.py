"""What eval.py trains networks on: the distilled set, and real images to compare it with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from utils.core.cache import digest
from utils.data.dataset import ImageDataset
from utils.data.distilled import SyntheticSet, batches_in_order
from utils.data.real_images import class_labels
from utils.experts.features import ExpertFeatures
from utils.measure.protocol import LearnedSteps
from utils.measure.selection import SELECTIONS, select

# Behind the names of sets that networks are trained on in another way than on images and classes.
SOFT, STEPS = ", soft labels", ", learned steps"


@dataclass(frozen=True)
class TrainingSet:
    """What networks are trained on, and how: images (N, C, H, W) for all of them, or different ones
    for each, with labels (N,), or (N, classes) of a `label_form`.
    """

    name: str
    images: Tensor | list[Tensor]
    labels: Tensor
    lr: float
    epochs: int
    label_form: str | None = None
    learned_steps: LearnedSteps | None = None

    @cached_property
    def digest(self) -> Callable[[range], str]:
        """A checksum of what a range of networks is trained on."""
        images, labels = self.images, self.labels
        if self.learned_steps is not None:
            rates = self.learned_steps.rates
            labels = torch.cat([labels.to(rates), rates])  # the steps are part of it
        if isinstance(images, Tensor):
            digest_of_all = checksum(images, labels)
            return lambda networks: digest_of_all
        draws = images
        return cache(lambda k: checksum(torch.cat(draws[k.start : k.stop]), labels))


def _by_learned_steps(hard: TrainingSet, distilled: SyntheticSet, num_classes: int) -> TrainingSet:
    """The set with the steps on it that were learned."""
    assert distilled.step_lrs is not None
    rates, ipc = distilled.step_lrs, distilled.ipc
    batches = batches_in_order(num_classes, ipc, distilled.config["distill_steps"])
    epochs = len(rates) // len(batches)
    return replace(
        hard,
        name=f"{hard.name}{STEPS}",
        lr=rates.mean().item(),
        epochs=epochs,
        learned_steps=LearnedSteps(batches * epochs, rates.to(hard.images.device)),  # type: ignore[union-attr]
    )


def checksum(images: Tensor, labels: Tensor) -> str:
    return digest({"images": images.cpu(), "labels": labels.cpu()})


def training_sets(
    distilled: SyntheticSet,
    data: ImageDataset,
    expert_features: ExpertFeatures | None,
    *,
    selections: Sequence[str],
    full: bool,
    networks: int,
    seed: int,
    lr_real: float,
    epochs: int,
    epochs_full: int,
) -> Iterator[TrainingSet]:
    """Yield the distilled set, with its soft labels where it has some and with the classes
    alone, then real images: as many by each of `selections`, and with `full`
    all of them, at the rate `lr_real`. Each set is made when its turn comes; all processes must
    take them together.
    """
    device = data.test.images.device
    dtype = data.test.images.dtype
    hard = TrainingSet(
        f"distilled {distilled.set}",
        distilled.images.to(device, dtype),
        distilled.labels.to(device),
        distilled.syn_lr,
        epochs,
    )
    if distilled.soft_labels is not None:
        soft = distilled.soft_labels.to(device, dtype)
        name = f"{hard.name}{SOFT}"
        yield replace(hard, name=name, labels=soft, label_form=distilled.label_form)
    if distilled.step_lrs is not None:
        yield _by_learned_steps(hard, distilled, data.num_classes)
    yield hard
    labels = class_labels(data.num_classes, distilled.ipc, device)
    for name in selections:
        chosen = select(
            name, data, distilled.ipc, networks=networks, seed=seed, expert_features=expert_features
        )
        yield TrainingSet(SELECTIONS[name].trained_on, chosen, labels, lr_real, epochs)
    if full:
        train = data.require_train()
        yield TrainingSet("full", train.images, train.labels, lr_real, epochs_full)
