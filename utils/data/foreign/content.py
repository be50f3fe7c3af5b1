"""What a file of another code holds, and what its user says about it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.core.files import is_dense
from utils.data.label_forms import LABEL_FORMS
from utils.data.normalisation import Normalisation
from utils.data.values import shown

SPACES = ("normalised", "zca", "unit")
PARTS = ("classes", "images")
LABELS_ARE = tuple(LABEL_FORMS)
PAIR = 2  # of images and labels


@dataclass(frozen=True)
class Stated:
    """What the user says of a file, by flags of these names; None where nothing is said.

    Attributes:
        space: of SPACES, what the stored images are: mean and std taken out, whitened, or pixels
            in [0, 1].
        statistics: mtt, dc, or the means and then the standard deviations of all channels.
        labels_are: of LABELS_ARE, what soft labels are.
        factor: a stored image holds factor x factor smaller ones.
        experiment: which one of a file that holds several, from 0 on.
        parts: of PARTS, what each file of a folder holds: some of the classes, or some images of
            every class.
        label_dir, lr_dir: the files of labels and rate, as DATM calls these flags.
    """

    dataset: str | None = None
    subset: str | None = None
    space: str | None = None
    statistics: tuple[str, ...] = ()
    lr: float | None = None
    labels_are: str | None = None
    factor: int | None = None
    experiment: int | None = None
    parts: str | None = None
    label_dir: str | None = None
    lr_dir: str | None = None
    data_path: str = "data"
    model: str | None = None

    @property
    def flags(self) -> list[str]:
        """The flags that only a file of another code has a use for, as far as they are given."""
        names = [each.name for each in fields(self) if each.name not in ("data_path", "model")]
        return [f"--{name}" for name in names if getattr(self, name) not in (None, ())]


@dataclass(frozen=True)
class Content:
    """What a file holds, not interpreted yet.

    Attributes:
        format: the family that writes such files, in words.
        images: (N, C, H, W), float32 as stored, or uint8.
        labels: classes (N,), or something about every class (N, classes).
        soft_labels: (N, classes), where a file has them beside classes.
        lr: the learned rate.
        space, statistics: as in Stated, where the file or its name says so; `why` says how.
        normalisation: where the file holds it.
        blocks: how many images stand in each part, inside which they are class by class.
        is_packed: whether images of this family may hold several smaller ones; no file says so.
        class_names: of folders, which `labels` number.
        known: plain values that the file says of itself.
        said: what was chosen among several things, in lines.
    """

    format: str
    images: Tensor
    labels: Tensor | None = None
    soft_labels: Tensor | None = None
    lr: float | None = None
    space: str | None = None
    statistics: str | None = None
    why: str = ""
    normalisation: Normalisation | None = None
    blocks: tuple[int, ...] = ()
    is_packed: bool = False
    class_names: tuple[str, ...] = ()
    known: Mapping[str, Any] = field(default_factory=dict)
    said: tuple[str, ...] = ()


def as_tensor(value: Any, path: Path, what: str) -> Tensor:
    """A tensor whose values are all there, finite numbers in memory; UserError for anything else.

    Bytes stay bytes; other numbers become float32 or, where they are whole, int64.
    """
    if not is_dense(value) or value.is_complex() or value.is_quantized:
        raise UserError(f"{shown(path)}: its {what} are a {type(value).__name__}, no plain tensor")
    value = value.detach()
    # A small file can name a huge shape: all values would be one stored number.
    if value.numel() == 0 or value.nbytes > value.untyped_storage().nbytes():
        raise UserError(f"{shown(path)}: its {what} of shape {[*value.shape]} have no values")
    if value.dtype == torch.uint8:
        return value
    value = value.float() if value.is_floating_point() else value.long()
    if not bool(value.isfinite().all()):
        raise UserError(f"{shown(path)}: its {what} have values that are no finite numbers")
    return value


def as_images(value: Any, path: Path) -> Tensor:
    """Square images (N, C, H, W), uint8 or float32; channels may come last. UserError otherwise."""
    images = as_tensor(value, path, "images")
    if images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise UserError(
            f"{shown(path)}: its images have the shape {[*images.shape]}, not (N, C, H, W) with "
            "H = W"
        )
    return images.contiguous() if images.dtype == torch.uint8 else images.float().contiguous()


def as_labels(value: Any, path: Path, count: int) -> Tensor:
    """Labels of `count` images: classes (N,) int64, or floats (N, classes). UserError otherwise."""
    labels = as_tensor(value, path, "labels")
    labels = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim not in (1, 2) or len(labels) != count:
        raise UserError(
            f"{shown(path)}: its labels have the shape {[*labels.shape]}, which does not fit "
            f"{count} images"
        )
    if labels.ndim == 2:
        return labels.float()
    if bool((labels != labels.round()).any()):
        raise UserError(f"{shown(path)}: its labels {labels[:3].tolist()} ... are no classes")
    return labels.long()


def as_rate(value: Any, path: Path) -> float:
    """A learning rate: a number, or a tensor of one. UserError where it cannot train a network."""
    if isinstance(value, Tensor):
        if as_tensor(value, path, "rate").numel() != 1:
            raise UserError(f"{shown(path)} holds {value.numel()} rates: --lr says which")
        value = value.item()  # in its own precision
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise UserError(f"{shown(path)}: its rate {value!s:.40} is no number above 0: give --lr")
    return float(value)


def by_number(name: str) -> list[Any]:
    """Sort names by the numbers in them: images_9 before images_10."""
    return [int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", name)]


def described(value: Any) -> str:
    """Say in a few words what a file holds."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {[*value.shape]}"
    if isinstance(value, dict):
        keys = ", ".join(f"{shown(str(key)):.20}" for key in list(value)[:6])
        return f"a dict of {keys or 'nothing'}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


# (path, what it holds, what is said of it) -> content; None where it is of another family.
Reader = Callable[[Path, Any, Stated], Content | None]
