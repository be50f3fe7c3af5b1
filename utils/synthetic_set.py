"""The distilled images with their labels and learned syn_lr: initialise, save, load.

A set is one file `distilled_<tag>.pt` that explains itself: a dict of tensors and plain values,
loadable with `torch.load(path, weights_only=True)`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.data import ImageDataset
from utils.errors import UserError
from utils.files import torch_load, torch_save
from utils.normalisation import Normalisation
from utils.rng import stream


@dataclass(frozen=True)
class SyntheticSet:
    """images (classes * ipc, C, H, W) in the space the network sees, classes in order."""

    images: Tensor
    labels: Tensor
    syn_lr: float
    dataset: str
    subset: str | None
    model: str
    ipc: int
    class_names: tuple[str, ...]
    normalisation: Normalisation
    iteration: int
    set: str  # raw or ema
    config: Mapping[str, Any]

    def save(self, path: Path, *, include_whitening: bool) -> None:
        """Write the set, atomically. Without its ZCA matrix (37 MB for CIFAR) the reader has to fit
        the whitening again, which needs the training images.
        """
        values = {name: getattr(self, name) for name in _PLAIN}
        values |= {
            "images": self.images.detach().cpu().float(),
            "labels": self.labels.cpu(),
            "class_names": list(self.class_names),
            "config": dict(self.config),
        }
        torch_save(values | self.normalisation.to_dict(include_whitening), path)

    @classmethod
    def load(cls, path: Path) -> "SyntheticSet":
        """Read a set. UserError for a missing file and for one that holds no distilled set."""
        if not path.is_file():
            raise UserError(f"no distilled set at {path}; distill_att.py writes distilled_<tag>.pt")
        values = torch_load(path)
        needed = [*_PLAIN, "images", "labels", "class_names", "config", "mean", "std", "zca"]
        missing = [key for key in needed if not isinstance(values, dict) or key not in values]
        if not missing:
            missing = [f"config.{key}" for key in _CONFIG if key not in values["config"]]
        if missing:
            raise UserError(f"{path} is not a distilled set: it lacks {', '.join(missing)}")
        return cls(
            **{name: values[name] for name in _PLAIN},
            images=values["images"],
            labels=values["labels"],
            class_names=tuple(values["class_names"]),
            config=values["config"],
            normalisation=Normalisation.from_dict(values),
        )


_CONFIG = ("data_path", "res", "dsa", "dsa_strategy", "batch_train")  # what eval.py needs of it
_PLAIN = ("syn_lr", "dataset", "subset", "model", "ipc", "iteration", "set")


def class_labels(num_classes: int, ipc: int, device: torch.device) -> Tensor:
    """0 ... 0, 1 ... 1, and so on: (num_classes * ipc,)."""
    return torch.arange(num_classes, device=device).repeat_interleave(ipc)


def check_ipc(ipc: int, labels: Tensor, class_names: Sequence[str]) -> None:
    """UserError where a class has fewer than `ipc` of the training images with labels (N,)."""
    for name, count in zip(class_names, labels.bincount(minlength=len(class_names)), strict=True):
        if count < ipc:
            raise UserError(
                f"--ipc {ipc} is more than the {count} training images of class {name}: "
                "choose at most that many"
            )


def random_real_images(data: ImageDataset, ipc: int, generator: torch.Generator) -> Tensor:
    """`ipc` different random training images of each class: (num_classes * ipc, C, H, W).

    Classes in order, as in `class_labels`. UserError where a class has fewer.
    """
    train = data.require_train()
    labels = train.labels.cpu()
    check_ipc(ipc, labels, data.class_names)
    chosen = []
    for label in range(data.num_classes):
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:ipc]])
    return train.images[torch.cat(chosen).to(train.images.device)]


def initial_images(data: ImageDataset, ipc: int, pix_init: str, seed: int) -> Tensor:
    """Where the distillation starts: random real images, or for "noise" standard normal values."""
    generator = stream(seed, "init")
    images = random_real_images(data, ipc, generator)
    if pix_init == "noise":
        return torch.randn(images.shape, generator=generator).to(images.device)
    return images
