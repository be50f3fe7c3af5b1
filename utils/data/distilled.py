"""The distilled images with their labels and learned syn_lr: write, check, read.

A set is one file `distilled_<tag>.pt` that explains itself: a dict of tensors and plain values,
loadable with `torch.load(path, weights_only=True)`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from networks import NETWORKS
from utils.core.errors import UserError
from utils.core.files import torch_load, torch_save
from utils.data.dataset import DATASETS
from utils.data.normalisation import Normalisation


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
    rewinds: tuple[Mapping[str, Any], ...] = ()  # the run's, see OuterState

    def save(self, path: Path, *, include_whitening: bool) -> None:
        """Write the set, atomically.

        Without its ZCA matrix (37 MB for CIFAR) a reader has to fit the whitening again, which
        needs the training images.
        """
        values = {name: getattr(self, name) for name in _PLAIN}
        values |= {
            "images": self.images.detach().cpu().float(),
            "labels": self.labels.cpu(),
            "class_names": list(self.class_names),
            "config": dict(self.config),
            "rewinds": [dict(rewind) for rewind in self.rewinds],
        }
        torch_save(values | self.normalisation.to_dict(include_whitening), path)

    @classmethod
    def load(cls, path: Path) -> "SyntheticSet":
        """Read a set and check every value in it.

        UserError for a missing file and for one that holds no distilled set, naming what is wrong.
        """
        if not os.path.exists(path):
            raise UserError(f"no distilled set at {path}; distill_att.py writes distilled_<tag>.pt")
        values = torch_load(path)
        if problem := _problem(values):
            raise UserError(f"{path} is not a distilled set: {problem}")
        return cls(
            **{name: values[name] for name in _PLAIN},
            images=values["images"],
            labels=values["labels"],
            class_names=tuple(values["class_names"]),
            config=values["config"],
            rewinds=tuple(values.get("rewinds", ())),
            normalisation=Normalisation.from_dict(values),
        )


_PLAIN = ("syn_lr", "dataset", "subset", "model", "ipc", "iteration", "set")


def _problem(values: Any) -> str | None:
    """Say what is wrong with the content of a file; None if nothing is."""
    if not isinstance(values, dict):
        return f"it holds a {type(values).__name__} instead of a dict"
    whole = {**values, **_config_of(values)}
    if missing := [name for name in _FORM if name not in whole]:
        return f"it lacks {', '.join(missing)}"
    for name, (is_good, wanted) in (_FORM | _OPTIONAL).items():
        if name in whole and not is_good(whole[name]):
            return f"{name} is not {wanted}"
    return next((problem for holds, problem in _relations(whole) if not holds), None)


def _config_of(values: Mapping[str, Any]) -> dict[str, Any]:
    config = values.get("config")
    return {f"config.{k}": v for k, v in config.items()} if isinstance(config, dict) else {}


def _relations(values: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """Compare values that depend on each other: whether they agree, and what is wrong if not."""
    images, labels, classes = values["images"], values["labels"], len(values["class_names"])
    count, channels, *size = images.shape
    yield len(labels) == count, f"it has {count} images and {len(labels)} labels"
    least, most = labels.min().item(), labels.max().item()
    yield least >= 0 and most < classes, f"labels {least} to {most} are not of {classes} classes"
    res = values["config.res"]
    yield res is None or size == [res, res], f"images of {size} pixels are not of res {res}"
    for name in ("mean", "std"):
        given = len(values[name])
        yield given == channels, f"{name} is for {given} channels instead of {channels}"
    length = images[0].numel()
    for name, shape in (("zca_mean", [length]), ("zca_matrix", [length, length])):
        found = [*values[name].shape] if name in values else None
        yield found in (None, shape), f"{name} is {found} instead of {shape}"
    yield ("zca_mean" in values) == ("zca_matrix" in values), "it has one of zca_mean, zca_matrix"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_in_memory(value: Any) -> bool:
    """Whether it is a tensor with at least one value, and with all of them in its storage."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_nested
        and value.device.type == "cpu"
        and 0 < value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _is_finite(value: Any, *, dims: int) -> bool:
    return (
        _is_in_memory(value)
        and value.is_floating_point()
        and value.ndim == dims
        and bool(value.float().isfinite().all())
    )


def _are_labels(value: Any) -> bool:
    return _is_in_memory(value) and value.dtype == torch.int64 and value.ndim == 1


def _all(is_good: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_good, value))


# Whether a value of a file is good, and what it must be; config.<name> is what eval.py needs of it.
_Form = dict[str, tuple[Callable[[Any], bool], str]]
_FORM: _Form = {
    "images": (partial(_is_finite, dims=4), "a finite float tensor (N, C, H, W)"),
    "labels": (_are_labels, "an int64 tensor (N,)"),
    "syn_lr": (_is_positive, "a finite number above 0"),
    "dataset": (lambda value: _is_text(value) and value in DATASETS, "a known data set"),
    "subset": (lambda value: value is None or _is_text(value), "text or None"),
    "model": (lambda value: _is_text(value) and value in NETWORKS, "a known network"),
    "ipc": (_is_count, "a whole number above 0"),
    "iteration": (lambda value: type(value) is int and value >= 0, "a whole number from 0 on"),
    "set": (lambda value: _is_text(value) and value in ("raw", "ema"), "raw or ema"),
    "class_names": (partial(_all, _is_text), "a list of texts"),
    "mean": (partial(_all, _is_number), "a list of finite numbers"),
    "std": (partial(_all, _is_positive), "a list of finite numbers above 0"),
    "zca": (_is_bool, "true or false"),
    "config": (lambda value: isinstance(value, dict), "a dict"),
    "config.data_path": (_is_text, "text"),
    "config.res": (lambda value: value is None or _is_count(value), "a whole number or None"),
    "config.dsa": (_is_bool, "true or false"),
    "config.dsa_strategy": (_is_text, "text"),
    "config.batch_train": (_is_count, "a whole number above 0"),
}
_OPTIONAL: _Form = {
    "zca_mean": (partial(_is_finite, dims=1), "a finite float tensor (D,)"),
    "zca_matrix": (partial(_is_finite, dims=2), "a finite float tensor (D, D)"),
    "config.buffer_path": (_is_text, "text"),
    "config.flat": (_is_bool, "true or false"),
    "config.val_fraction": (
        lambda value: _is_number(value) and 0 <= value < 1,
        "a number from 0 to below 1",
    ),
    "rewinds": (
        lambda value: isinstance(value, (list, tuple)) and all(isinstance(v, dict) for v in value),
        "a list of dicts",
    ),
}
