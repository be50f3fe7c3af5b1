"""Features and predictions of trained experts, to choose real images by and to label them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from utils.compute.cohort import images_per_test_batch
from utils.compute.cost import fitting_network
from utils.compute.flat import FlatNetwork
from utils.data.dataset import ImageDataset, Split
from utils.data.identity import DataIdentity
from utils.data.source import Source
from utils.experts.buffer import ExpertBuffer
from utils.experts.kind import ExpertKind, open_experts


@dataclass(frozen=True)
class ExpertFeatures:
    """Experts, and the network that they are parameters of; images are not augmented.

    Buffers hold no statistics of batch norm, so it takes those of each batch.
    """

    experts: ExpertBuffer
    network: nn.Module

    @classmethod
    def open(
        cls,
        source: Source,
        images: DataIdentity,
        kind: ExpertKind,
        buffer_path: str,
        *,
        most: int,
        skip_bad: bool,
        command: str | None = None,
    ) -> "ExpertFeatures":
        """Open at most `most` experts of exactly this `kind`, trained on `images`.

        NoExperts where there are none names the `command` that makes them.
        """
        _, experts = open_experts(
            kind,
            buffer_path,
            images=images,
            channels=source.channels,
            num_classes=len(source.class_names),
            model_fixed=True,
            zca_fixed=True,
            command=command,
            max_experts=most,
            skip_bad=skip_bad,
        )
        return cls.of(experts, kind.model, source)

    @classmethod
    def of(cls, experts: ExpertBuffer, model: str, data: Source | ImageDataset) -> "ExpertFeatures":
        """Look at `data` with experts that are networks `model`."""
        network = fitting_network(
            model,
            channels=data.channels,
            num_classes=len(data.class_names),
            image_size=data.image_size,
        )
        return cls(experts, network)

    @property
    def width(self) -> int:
        """F, the number of features of an image."""
        return _last_linear(self.network).in_features

    def features(self, expert: int, split: Split) -> Tensor:
        """Compute the inputs (N, F) of the last linear layer of `expert` after its last epoch."""
        seen = split.images.new_empty(len(split.images), self.width)
        rows = iter(_batches(seen, split.images.shape[-1]))

        def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:
            next(rows).copy_(inputs[0])

        with _last_linear(self.network).register_forward_pre_hook(keep):
            self._answers(expert, self.experts.epochs, split.images)
        return seen

    def right_answers(self, expert: int, split: Split) -> Tensor:
        """Whether `expert` predicts each image's label after each of its epochs: bool (N, epochs).

        The untrained network before the first epoch is left out.
        """
        epochs = range(1, self.experts.epochs + 1)
        answers = (self._answers(expert, epoch, split.images) for epoch in epochs)
        return torch.stack([answer == split.labels for answer in answers], dim=1)

    def losses(self, expert: int, split: Split) -> Tensor:
        """Compute the cross-entropy (N, 1) of each image after the last epoch of `expert`."""
        logits = self.logits(expert, split.images)
        return F.cross_entropy(logits, split.labels, reduction="none")[:, None]

    def logits(self, expert: int, images: Tensor, *, epoch: int | None = None) -> Tensor:
        """Compute what `expert` says of images (N, C, H, W) after `epoch` epochs, by default its
        last: (N, classes).
        """
        return self._logits(expert, self.experts.epochs if epoch is None else epoch, images)

    def _answers(self, expert: int, epoch: int, images: Tensor) -> Tensor:
        """Predict the labels (N,) by `expert` after `epoch` epochs."""
        return self._logits(expert, epoch, images).argmax(1)

    @torch.no_grad()
    def _logits(self, expert: int, epoch: int, images: Tensor) -> Tensor:
        """Compute logits (N, classes) by `expert` after `epoch` epochs, batch by batch."""
        network = FlatNetwork(self.network.to(images.device))
        theta = self.experts.params(expert, epoch).to(images)
        batches = tqdm(
            _batches(images, images.shape[-1]),
            desc=f"expert {expert} after {epoch} epochs",
            unit="batch",
            leave=False,
            delay=2,
            disable=None,
        )
        return torch.cat([network(theta, batch) for batch in batches])


def _batches(rows: Tensor, image_size: int) -> tuple[Tensor, ...]:
    return rows.split(images_per_test_batch(image_size))


def _last_linear(network: nn.Module) -> nn.Linear:
    """The layer that gives the logits: in all of `networks/` the last linear one."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
