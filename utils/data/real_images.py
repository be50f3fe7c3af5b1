"""Choose real images of each class: by any rule, at random, as the start of a distillation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data.dataset import ImageDataset


def class_labels(num_classes: int, ipc: int, device: torch.device) -> Tensor:
    """0 ... 0, 1 ... 1, and so on: (num_classes * ipc,)."""
    return torch.arange(num_classes, device=device).repeat_interleave(ipc)


def check_ipc(
    ipc: int,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    advice: str = "choose at most that many",
) -> None:
    """UserError where a class has fewer than `ipc` of the training images with labels (N,)."""
    for name, count in zip(class_names, labels.bincount(minlength=len(class_names)), strict=True):
        if count < ipc:
            raise UserError(
                f"--ipc {ipc} is more than the {count} training images of class {name}: {advice}"
            )


# How images of one class are chosen: (described (n, ...), ipc, generator) -> which of the n, (ipc,)
# int64 on the CPU, each at most once. `described` has a row for each image.
Rule = Callable[[Tensor, int, torch.Generator], Tensor]


def at_random(described: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
    """The rule that looks at nothing."""
    return torch.randperm(len(described), generator=generator)[:ipc]


def choose_of_each_class(
    data: ImageDataset, ipc: int, rule: Rule, described: Tensor, generator: torch.Generator
) -> Tensor:
    """Choose training images by `rule`: their numbers (num_classes * ipc,), on the CPU.

    Classes in order, as in `class_labels`; `described` is (N, ...). UserError where a class has
    fewer than `ipc`.
    """
    labels = data.require_train().labels.cpu()
    check_ipc(ipc, labels, data.class_names)
    chosen = []
    for label in range(data.num_classes):
        members = (labels == label).nonzero().flatten()
        chosen.append(members[rule(described[members.to(described.device)], ipc, generator)])
    return torch.cat(chosen)


def random_real_images(data: ImageDataset, ipc: int, generator: torch.Generator) -> Tensor:
    """Choose `ipc` different random training images of each class: (num_classes * ipc, C, H, W).

    Order and errors as in `choose_of_each_class`.
    """
    train = data.require_train()
    chosen = choose_of_each_class(data, ipc, at_random, train.labels, generator)
    return train.images[chosen.to(train.images.device)]


def initial_images(data: ImageDataset, ipc: int, pix_init: str, seed: int) -> Tensor:
    """Make the first images: random real ones, or for "noise" standard normal values, which may be
    more than there are real ones.
    """
    generator, train = stream(seed, "init"), data.require_train()
    fewest = int(train.labels.bincount(minlength=data.num_classes).min())
    if pix_init == "noise" and ipc > fewest:
        shape = (data.num_classes * ipc, *train.images.shape[1:])
        return torch.randn(shape, generator=generator).to(train.images.device)
    images = random_real_images(data, ipc, generator)
    if pix_init == "noise":
        return torch.randn(images.shape, generator=generator).to(images.device)
    return images
