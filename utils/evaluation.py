"""Train fresh networks on a set and measure them on the test images, by the field's protocol.

SGD with momentum 0.9 and weight decay 5e-4, the learning rate multiplied by 0.1 once at half of the
epochs, cross-entropy, DSA.
"""

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks import build_network
from utils.data import Split
from utils.rng import derive_seed, stream
from utils.training import accuracy, scale_learning_rate, train_epoch

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Protocol:
    """How evaluation networks are trained, apart from the set and its learning rate."""

    num_eval: int
    epochs: int
    batch_size: int
    dsa_groups: tuple[str, ...] | None


@dataclass(frozen=True)
class Accuracies:
    """Test accuracies of equally trained networks, as fractions."""

    accs: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accs)

    @property
    def std(self) -> float:
        """The population standard deviation, as the field reports it (numpy's default)."""
        return statistics.pstdev(self.accs)

    def __str__(self) -> str:
        return f"{self.mean:6.2%} ± {self.std:5.2%} (n={len(self.accs)})"


def evaluate(
    images: Tensor,
    labels: Tensor,
    test: Split,
    *,
    num_classes: int,
    model: str,
    lr: float,
    protocol: Protocol,
    seed: int,
) -> Accuracies:
    """Accuracies of `protocol.num_eval` fresh networks `model` trained on images (N, C, H, W).

    Network k depends on `seed` and k alone.
    """
    accs = []
    for k in range(protocol.num_eval):
        network = build_network(
            model,
            channels=images.shape[1],
            num_classes=num_classes,
            image_size=images.shape[2],
            seed=derive_seed(seed, "init", k),
        ).to(images.device)
        _train(network, images, labels, lr, protocol, stream(seed, "minibatch", k))
        accs.append(accuracy(network, test.images, test.labels))
    return Accuracies(tuple(accs))


def _train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    lr: float,
    protocol: Protocol,
    generator: torch.Generator,
) -> None:
    optimizer = torch.optim.SGD(
        network.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    for epoch in range(protocol.epochs):
        if epoch > 0 and epoch == protocol.epochs // 2:
            scale_learning_rate(optimizer, 0.1)
        train_epoch(
            network,
            optimizer,
            images,
            labels,
            batch_size=protocol.batch_size,
            dsa_groups=protocol.dsa_groups,
            generator=generator,
        )
