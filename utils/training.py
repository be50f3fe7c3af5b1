"""Train a network on images that lie on its device, and measure its accuracy."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils import augment


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    dsa_groups: tuple[str, ...] | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One pass over images (N, C, H, W), labels (N,) in random order: mean loss and train accuracy.

    Every batch gets one draw of DSA from `dsa_groups`; None trains without augmentation. Order and
    augmentation come from `generator` (CPU). The accuracy is that on the augmented batches. Both
    results are scalars on the device, so that nothing waits for them.
    """
    network.train()
    total_loss = torch.zeros((), device=images.device, dtype=images.dtype)
    correct = torch.zeros((), device=images.device, dtype=torch.int64)
    for batch in random_batches(len(images), batch_size, generator):
        x, y = _take(images, labels, batch)
        if dsa_groups is not None:
            x = augment.apply(x, augment.draw(dsa_groups, len(batch), generator))
        logits = network(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_loss += loss.detach() * len(batch)
        correct += (logits.argmax(1) == y).sum()
    return total_loss / len(images), correct / len(images)


def random_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """0 ... count - 1 in random order, `batch_size` at a time; the last may be short."""
    yield from torch.randperm(count, generator=generator).split(batch_size)


def _take(images: Tensor, labels: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    batch = batch.to(images.device)
    return images[batch], labels[batch]


def scale_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= factor


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 512) -> float:
    """The fraction of images (N, C, H, W) that `network` gives their label (N,), in eval mode."""
    network.eval()
    correct = torch.zeros((), device=images.device, dtype=torch.int64)
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        correct += (network(x).argmax(1) == y).sum()
    return correct.item() / len(images)
