"""What eval.py trains networks on: the distilled set, and real images to compare it with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from utils.compute.cost import FLOAT_BYTES
from utils.core.cache import digest
from utils.data.dataset import ImageDataset
from utils.data.distilled import SyntheticSet, batches_in_order
from utils.data.label_forms import CENTRED, LABEL_FORMS
from utils.data.real_images import class_labels
from utils.experts.features import ExpertFeatures
from utils.measure.protocol import AdamSteps, LearnedSteps, OwnTraining
from utils.measure.regression import KernelRegression, regression_labels
from utils.measure.selection import SELECTIONS, select
from utils.measure.squared_error import SquaredErrorSteps

# Behind the names of sets that networks are trained on in another way than on images and classes,
# or that a kernel predicts from in place of networks.
SOFT, STEPS, ADAM = ", soft labels", ", learned steps", ", Adam steps"
KERNEL, SQUARED = ", kernel regression", ", squared error"
EQUAL_BYTES = ", equal bytes"  # behind real images: as many as fit into the bytes of the set


@dataclass(frozen=True)
class TrainingSet:
    """What networks are trained on, and how: images (N, C, H, W) for all of them, or different ones
    for each, with labels (N,), or (N, classes) of a `label_form`; in batches of `batch_size` (None:
    those of the call), on the networks `models` (None: all of the call). For a `regression` nothing
    is trained: no rate, no epochs.
    """

    name: str
    images: Tensor | list[Tensor]
    labels: Tensor
    lr: float
    epochs: int
    label_form: str | None = None
    own_training: OwnTraining | None = None
    regression: KernelRegression | None = None
    batch_size: int | None = None
    models: Sequence[str] | None = None

    @cached_property
    def digest(self) -> Callable[[range], str]:
        """A checksum of what a range of networks is trained on."""
        images, labels = self.images, self.labels
        if way := self.own_training or self.regression:
            labels = torch.cat([labels.flatten().to(way.numbers), way.numbers])  # a part of it
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
        own_training=LearnedSteps(batches * epochs, rates.to(hard.images.device)),  # type: ignore[union-attr]
    )


def _by_adam(soft: TrainingSet, name: str, distilled: SyntheticSet) -> TrainingSet:
    """The set with soft labels and as many steps as the distillation has noted."""
    assert distilled.train_steps is not None
    count, config = len(soft.labels), distilled.config
    training = AdamSteps(
        distilled.train_steps, min(config["batch_syn"] or count, count), config["lr_adam"]
    )
    epochs = -(-training.steps * training.batch_size // count)
    return replace(soft, name=name, lr=training.lr, epochs=epochs, own_training=training)


def _by_regression(
    hard: TrainingSet, regression: KernelRegression, distilled: SyntheticSet
) -> TrainingSet:
    """The set as a kernel predicts from it."""
    labels = regression_labels(distilled, device=hard.images.device)  # type: ignore[union-attr]
    name = f"{hard.name}{KERNEL}"
    return replace(hard, name=name, labels=labels, lr=0.0, epochs=0, regression=regression)


def _by_squared_error(
    hard: TrainingSet, distilled: SyntheticSet, models: Sequence[str]
) -> TrainingSet:
    """The set as networks `models` regress on the labels that a kernel predicts from."""
    assert isinstance(hard.images, Tensor)
    images, count = hard.images, len(hard.labels)
    training = SquaredErrorSteps.on(count)
    return replace(
        hard,
        name=f"{hard.name}{SQUARED}",
        labels=regression_labels(distilled, device=images.device, dtype=images.dtype),
        lr=training.factor,  # of the largest stable rate
        epochs=training.epochs(count),
        label_form=CENTRED,
        own_training=training,
        batch_size=training.batch_size,
        models=models,
    )


def checksum(images: Tensor, labels: Tensor) -> str:
    return digest({"images": images.cpu(), "labels": labels.cpu()})


def real_images_in_bytes(distilled: SyntheticSet) -> int:
    """How many real images of a class, a byte a value, take the bytes of a set: float32 images and
    what else was learned. A class may have fewer.
    """
    learned = (distilled.images, distilled.soft_labels, distilled.step_lrs)
    values = sum(each.numel() for each in learned if each is not None)
    image = distilled.images[0].numel()
    return FLOAT_BYTES * values // (image * len(distilled.class_names))


def training_sets(
    distilled: SyntheticSet,
    data: ImageDataset,
    expert_features: ExpertFeatures | None,
    *,
    regressing: Sequence[str],
    hard_labels: bool,
    selections: Sequence[str],
    equal_bytes: bool,
    full: bool,
    networks: int,
    seed: int,
    lr_real: float,
    epochs: int,
    epochs_full: int,
) -> Iterator[TrainingSet]:
    """Yield the distilled set, see `own_sets`. Then real images: as many by each of `selections`,
    with `equal_bytes` as many at random as fit into the bytes of the set, and with `full` all of
    them, at the rate `lr_real`. Each set is made when its turn comes; all processes must take them
    together.
    """
    test = data.test.images
    yield from own_sets(
        distilled,
        device=test.device,
        dtype=test.dtype,
        regressing=regressing,
        hard_labels=hard_labels,
        epochs=epochs,
    )
    chosen = [(name, distilled.ipc, "") for name in selections]
    if equal_bytes:
        fewest = int(data.require_train().labels.bincount().min())
        chosen.append(("random", min(real_images_in_bytes(distilled), fewest), EQUAL_BYTES))
    for name, ipc, why in chosen:
        images = select(
            name, data, ipc, networks=networks, seed=seed, expert_features=expert_features
        )
        labels = class_labels(data.num_classes, ipc, test.device)
        name = f"{SELECTIONS[name].trained_on}{why}"
        yield TrainingSet(name, images, labels, lr_real, epochs)
    if full:
        train = data.require_train()
        yield TrainingSet("full", train.images, train.labels, lr_real, epochs_full)


def own_sets(
    distilled: SyntheticSet,
    *,
    device: torch.device,
    dtype: torch.dtype,
    regressing: Sequence[str] = (),
    hard_labels: bool,
    epochs: int,
) -> Iterator[TrainingSet]:
    """Yield the distilled set as its own method uses it and with soft labels that networks train
    on, as far as it has these; with labels of a kernel for networks that are `regressing` on them;
    with the classes alone unless there is another way and `hard_labels` are not wanted.
    """
    hard = TrainingSet(
        f"distilled {distilled.set}",
        distilled.images.to(device, dtype),
        distilled.labels.to(device),
        distilled.syn_lr,
        epochs,
    )
    if regression := KernelRegression.of(distilled):
        yield _by_regression(hard, regression, distilled)
        if regressing:
            yield _by_squared_error(hard, distilled, regressing)
    has_soft = distilled.label_form in LABEL_FORMS
    if has_soft:
        assert distilled.soft_labels is not None
        soft = distilled.soft_labels.to(device, dtype)
        name = f"{hard.name}{SOFT}"
        by_soft = replace(hard, name=name, labels=soft, label_form=distilled.label_form)
        if distilled.train_steps is not None:
            yield _by_adam(by_soft, f"{hard.name}{ADAM}", distilled)
        yield by_soft
    if distilled.step_lrs is not None:
        yield _by_learned_steps(hard, distilled, len(distilled.class_names))
    has_more = has_soft or regression is not None or distilled.step_lrs is not None
    if hard_labels or not has_more:
        yield hard
