"""What a run with soft labels begins with: images that experts get right, and their logits.

DATM (Guo et al., ICLR 2024).
"""

import torch
from torch import Tensor

from utils.core.rng import stream
from utils.data.dataset import ImageDataset
from utils.data.real_images import check_ipc
from utils.experts.features import ExpertFeatures


def images_that_experts_get_right(
    data: ImageDataset, ipc: int, features: ExpertFeatures, seed: int
) -> Tensor:
    """Choose training images: their numbers (num_classes * ipc,), classes in order, on the CPU.

    Of each class, in a random order, the first that expert 0 gets right after its last epoch; where
    these are too few the next expert's follow, and at last the others.
    """
    train = data.require_train()
    labels = train.labels.cpu()
    check_ipc(ipc, labels, data.class_names)
    order = torch.randperm(len(labels), generator=stream(seed, "init"))
    chosen: dict[int, list[int]] = {label: [] for label in range(data.num_classes)}
    for expert in range(len(features.experts)):
        right = (features.logits(expert, train.images).argmax(1) == train.labels).cpu()
        _fill(chosen, order[right[order]], labels, ipc)
        if all(len(numbers) == ipc for numbers in chosen.values()):
            break
    _fill(chosen, order, labels, ipc)
    return torch.tensor([number for numbers in chosen.values() for number in numbers])


def _fill(chosen: dict[int, list[int]], order: Tensor, labels: Tensor, ipc: int) -> None:
    """Add to each class the next images of `order` that it lacks, up to `ipc`."""
    for label, numbers in chosen.items():
        members = order[labels[order] == label].tolist()
        new = [number for number in members if number not in numbers]
        numbers += new[: ipc - len(numbers)]


def logits_of_right_experts(features: ExpertFeatures, images: Tensor, labels: Tensor) -> Tensor:
    """The mean logits (N, classes) of those experts that give an image (C, H, W) its label; of all
    where none does.
    """
    said = torch.stack([features.logits(expert, images) for expert in range(len(features.experts))])
    right = said.argmax(2) == labels  # (experts, N)
    counted = torch.where(right.any(0), right, True).to(said.dtype)
    return torch.einsum("en,enc->nc", counted, said) / counted.sum(0)[:, None]
