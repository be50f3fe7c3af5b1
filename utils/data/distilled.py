"""The distilled images with their labels and learned syn_lr: write, check, read.

A set is one file `distilled_<tag>.pt` that explains itself: a dict of tensors and plain values,
loadable with `torch.load(path, weights_only=True)`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from networks import is_name
from utils.core.errors import UserError
from utils.core.files import is_dense, torch_load, torch_save
from utils.data.dataset import DATASETS
from utils.data.decode import FITS
from utils.data.identity import KEY, is_identity
from utils.data.label_forms import CENTRED, LABEL_FORMS
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
    data: Mapping[str, Any] | None = None  # the DataIdentity that it was distilled from
    soft_labels: Tensor | None = None  # (classes * ipc, classes), where they are learned
    label_form: str | None = None  # of soft labels: a name in _LABEL_FORMS
    step_lrs: Tensor | None = None  # (T,), where the steps on batches of the set are learned
    train_steps: int | None = None  # of Adam, that train a network on the set, where they are known

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
        if self.data is not None:
            values[KEY] = dict(self.data)
        if self.soft_labels is not None:
            values["soft_labels"] = self.soft_labels.detach().cpu().float()
            values["label_form"] = self.label_form
        if self.step_lrs is not None:
            values["step_lrs"] = self.step_lrs.detach().cpu().float()
        if self.train_steps is not None:
            values["train_steps"] = self.train_steps
        torch_save(values | self.normalisation.to_dict(include_whitening), path)

    @classmethod
    def load(cls, path: Path) -> "SyntheticSet":
        """Read a set and check every value in it.

        UserError for a missing file and for one that holds no distilled set, naming what is wrong.
        """
        if not os.path.exists(path):
            raise UserError(f"no distilled set at {path}; distill_att.py writes distilled_<tag>.pt")
        return cls.from_values(torch_load(path), path)

    @classmethod
    def from_values(cls, values: Any, path: Path) -> "SyntheticSet":
        """Check what `path` holds and make a set of it. UserError as in `load`."""
        if problem := _problem(values):
            raise UserError(f"{path} is not a distilled set: {problem}")
        return cls(
            **{name: values[name] for name in _PLAIN},
            images=values["images"],
            labels=values["labels"],
            class_names=tuple(values["class_names"]),
            config=values["config"],
            rewinds=tuple(values.get("rewinds", ())),
            data=values.get(KEY),
            soft_labels=values.get("soft_labels"),
            label_form=values.get("label_form"),
            step_lrs=values.get("step_lrs"),
            train_steps=values.get("train_steps"),
            normalisation=Normalisation.from_dict(values),
        )


def batches_in_order(classes: int, ipc: int, steps: int) -> list[Tensor]:
    """Divide images, classes in order, into `steps` batches with every class: their numbers."""
    numbers = torch.arange(classes * ipc).view(classes, steps, ipc // steps)
    return [numbers[:, step].flatten() for step in range(steps)]


_PLAIN = ("syn_lr", "dataset", "subset", "model", "ipc", "iteration", "set")


def _problem(values: Any) -> str | None:
    """Say what is wrong with the content of a file; None if nothing is."""
    if not isinstance(values, dict):
        return f"it holds a {type(values).__name__} instead of a dict"
    config = values.get("config")
    of_config = config.items() if isinstance(config, dict) else ()
    whole = {**values, **{f"config.{name}": value for name, value in of_config}}
    if missing := [name for name in _FORMS if name not in whole]:
        return f"it lacks {', '.join(missing)}"
    for name, form in (_FORMS | _OPTIONAL).items():
        if name in whole and not form.fits(whole[name]):
            return f"{name} is not {form.what}"
    return next((problem for holds, problem in _relations(whole) if not holds), None)


def _relations(values: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """Compare values that depend on each other: whether they agree, and what is wrong if not."""
    images, labels, classes = values["images"], values["labels"], len(values["class_names"])
    count, channels, *size = images.shape
    yield len(labels) == count, f"it has {count} images and {len(labels)} labels"
    least, most = labels.min().item(), labels.max().item()
    yield least >= 0 and most < classes, f"labels {least} to {most} are not of {classes} classes"
    soft = values.get("soft_labels")
    if soft is not None:
        shape = [*soft.shape]
        yield shape == [count, classes], f"soft labels {shape} are not of {count} x {classes}"
        sums = soft.sum(1)
        are_shares = bool((soft >= 0).all() and (sums - 1).abs().max() < 1e-3)
        yield (
            are_shares or values.get("label_form") != "probabilities",
            "its soft labels are no probabilities",
        )
    yield (soft is None) == ("label_form" not in values), "it has one of soft_labels, label_form"
    if "step_lrs" in values:
        rates, batches = values["step_lrs"], values.get("config.distill_steps", 0)
        divides = batches > 0 and values["ipc"] % batches == 0 and len(rates) % batches == 0
        yield divides, f"{len(rates)} step_lrs are not of {batches} batches (config.distill_steps)"
        yield bool((rates > 0).all()), "step_lrs are not above 0"
    if "train_steps" in values:
        needed = ("soft_labels", "config.lr_adam", "config.batch_syn")
        lacking = next((name for name in needed if name not in values), "")
        yield not lacking, f"it has train_steps and lacks {lacking}"
    if "config.kernel" in values:
        of_kernel = ("config.kernel_depth", "config.reg")
        lacking = next((name for name in of_kernel if name not in values), "")
        yield not lacking, f"it has config.kernel and lacks {lacking}"
        depth, fits = values["config.kernel_depth"], min(size).bit_length() - 1
        is_small = values["config.kernel"] == "conv" and depth > fits
        yield not is_small, f"a conv kernel of depth {depth} does not fit {size} pixels"
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


class _Form(NamedTuple):
    """What a value of a file must be, in words, and whether one is that."""

    what: str
    fits: Callable[[Any], bool]


def _list_of(form: _Form, what: str) -> _Form:
    def fits(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) > 0 and all(map(form.fits, value))

    return _Form(what, fits)


def _is_filled(value: Any, dims: int) -> bool:
    """Whether it is a tensor with at least one value, and with all of them in its storage."""
    is_whole = is_dense(value) and 0 < value.nbytes <= value.untyped_storage().nbytes()
    return is_whole and value.ndim == dims


def _is_finite(value: Any, dims: int) -> bool:
    is_float = _is_filled(value, dims) and value.is_floating_point()
    return is_float and bool(value.float().isfinite().all())


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_import(value: Any) -> bool:
    is_text = isinstance(value, dict) and all(map(_TEXT.fits, map(value.get, ("file", "format"))))
    return is_text and isinstance(value.get("said"), list) and all(map(_TEXT.fits, value["said"]))


_TEXT = _Form("text", lambda value: isinstance(value, str))
_BOOL = _Form("true or false", lambda value: isinstance(value, bool))
_DICT = _Form("a dict", lambda value: isinstance(value, dict))
_NUMBER = _Form("a finite number", _is_number)
_POSITIVE = _Form("a finite number above 0", lambda value: _is_number(value) and value > 0)
_COUNT = _Form("a whole number above 0", lambda value: type(value) is int and value > 0)
# config.<name> is what eval.py needs of it.
_FORMS = {
    "images": _Form("a finite float tensor (N, C, H, W)", partial(_is_finite, dims=4)),
    "labels": _Form("an int64 tensor (N,)", lambda v: _is_filled(v, 1) and v.dtype == torch.int64),
    "syn_lr": _POSITIVE,
    "dataset": _Form("a known data set", lambda v: _TEXT.fits(v) and v in DATASETS),
    "subset": _Form("text or None", lambda v: v is None or _TEXT.fits(v)),
    "model": _Form("a known network", lambda v: _TEXT.fits(v) and is_name(v)),
    "ipc": _COUNT,
    "iteration": _Form("a whole number from 0 on", lambda v: type(v) is int and v >= 0),
    "set": _Form("raw or ema", lambda v: _TEXT.fits(v) and v in ("raw", "ema")),
    "class_names": _list_of(_TEXT, "a list of texts"),
    "mean": _list_of(_NUMBER, "a list of finite numbers"),
    "std": _list_of(_POSITIVE, "a list of finite numbers above 0"),
    "zca": _BOOL,
    "config": _DICT,
    "config.data_path": _TEXT,
    "config.res": _Form("a whole number or None", lambda v: v is None or _COUNT.fits(v)),
    "config.dsa": _BOOL,
    "config.dsa_strategy": _TEXT,
    "config.batch_train": _COUNT,
}
IMPORTED = "imported"  # in the config of a set of another code: what its file was taken for
_FRACTION = _Form("a number from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1)
_LABEL_FORMS = (*LABEL_FORMS, CENTRED)
_OPTIONAL = {
    "zca_mean": _Form("a finite float tensor (D,)", partial(_is_finite, dims=1)),
    "zca_matrix": _Form("a finite float tensor (D, D)", partial(_is_finite, dims=2)),
    KEY: _Form("a record of images", is_identity),
    "soft_labels": _Form("a finite float tensor (N, classes)", partial(_is_finite, dims=2)),
    "step_lrs": _Form("a finite float tensor (T,)", partial(_is_finite, dims=1)),
    "config.distill_steps": _COUNT,
    "train_steps": _COUNT,
    "config.lr_adam": _POSITIVE,
    "config.batch_syn": _Form(
        "a whole number above 0 or None", lambda v: v is None or _COUNT.fits(v)
    ),
    "label_form": _Form(
        "logits, probabilities or centred", lambda v: _TEXT.fits(v) and v in _LABEL_FORMS
    ),
    "config.kernel": _Form("fc or conv", lambda v: _TEXT.fits(v) and v in ("fc", "conv")),
    "config.kernel_depth": _COUNT,
    "config.reg": _POSITIVE,
    "config.buffer_path": _TEXT,
    "config.flat": _BOOL,
    "config.easy_first": _BOOL,
    "config.val_fraction": _FRACTION,
    "config.test_fraction": _FRACTION,
    f"config.{IMPORTED}": _Form("a record of a file", _is_import),
    "config.fit": _Form("a known fit", lambda v: _TEXT.fits(v) and v in FITS),
    "rewinds": _Form(
        "a list of dicts", lambda v: isinstance(v, list | tuple) and all(map(_DICT.fits, v))
    ),
}
