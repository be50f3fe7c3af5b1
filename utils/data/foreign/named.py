"""Read tensors that have names: .npz, .safetensors, and a dict in a .pt file.

Names say what is what; in .safetensors the metadata may also say data set, space, rate and network.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.core.errors import UserError
from utils.data.foreign.content import (
    Content,
    Stated,
    as_images,
    as_labels,
    as_rate,
    as_tensor,
    described,
)
from utils.data.normalisation import Normalisation
from utils.data.values import reason, shown

# The first that is there counts.
NAMES: Mapping[str, tuple[str, ...]] = {
    "images": ("images", "image", "x", "x_train"),
    "labels": ("labels", "label", "y", "y_train", "targets"),
    "soft_labels": ("soft_labels", "soft_label"),
    "lr": ("syn_lr", "lr"),
}
# What the metadata may say, by the names of Stated.
KNOWN = {
    "dataset": ("dataset",),
    "subset": ("subset",),
    "space": ("space",),
    "labels_are": ("label_form",),
    "lr": NAMES["lr"],
    "model": ("network", "model"),
}


def read_named(path: Path, value: Any, stated: Stated) -> Content | None:
    """Read a dict of tensors from a .pt file."""
    if not isinstance(value, dict) or _pick(value, "images") is None:
        return None
    return _content(path, value, {}, 'a dict with "images"')


def read_npz(path: Path) -> Content:
    """Read arrays of numpy; UserError for damaged files and for arrays of Python objects."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: _as_tensor(archive[name]) for name in archive.files}
    except MemoryError:
        raise torch.OutOfMemoryError(f"{path} does not fit into memory") from None
    except Exception as error:  # a damaged file can fail anywhere in the readers
        raise UserError(
            f"{shown(path)} is damaged, or more than arrays of numbers ({reason(error):.80})"
        ) from None
    return _content(path, arrays, {}, ".npz")


def _as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def read_safetensors(path: Path) -> Content:
    """Read tensors and metadata; UserError for damaged files."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{shown(path)} is damaged: {reason(error):.80}") from None
    return _content(path, tensors, _plain(metadata), ".safetensors")


def _plain(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Metadata as plain values: each is JSON, maybe of all of them, or text."""
    values: dict[str, Any] = {}
    for name, text in metadata.items():
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        values |= value if isinstance(value, dict) else {name: value}
    return values


def _content(
    path: Path, values: Mapping[str, Any], metadata: Mapping[str, Any], format: str
) -> Content:
    if (found := _pick(values, "images")) is None:
        raise UserError(
            f"{shown(path)} holds {described(dict(values))}: its images must be called "
            f"{' or '.join(NAMES['images'])}"
        )
    images = as_images(found, path)
    labels, soft, rate = (_pick(values, name) for name in ("labels", "soft_labels", "lr"))
    known = {
        name: metadata[key] for name, keys in KNOWN.items() for key in keys[::-1] if key in metadata
    }
    for name, value in known.items():
        if name != "lr" and not isinstance(value, str | None):
            raise UserError(f"{shown(path)}: its metadata have {value!r:.40} as {name}")
    rate = known.get("lr") if rate is None else rate
    return Content(
        format,
        images,
        None if labels is None else as_labels(labels, path, len(images)),
        None if soft is None else as_labels(soft, path, len(images)),
        lr=None if rate is None else as_rate(rate, path),
        space=known.get("space"),
        why="as the file says",
        normalisation=_normalisation(path, values, channels=images.shape[1]),
        known=known,
    )


def _pick(values: Mapping[str, Any], what: str) -> Any:
    return next((values[name] for name in NAMES[what] if name in values), None)


def _normalisation(path: Path, values: Mapping[str, Any], *, channels: int) -> Normalisation | None:
    """The whitening, or else mean and std, that the file holds."""
    for names, make in ((("zca_mean", "zca_matrix"), _whitened), (("mean", "std"), _standardised)):
        if all(name in values for name in names):
            first, second = (as_tensor(torch.as_tensor(values[n]), path, n) for n in names)
            return make(path, first.float(), second.float(), channels)
    return None


def _whitened(path: Path, mean: Tensor, matrix: Tensor, channels: int) -> Normalisation:
    if mean.ndim != 1 or [*matrix.shape] != [len(mean), len(mean)]:
        raise UserError(
            f"{shown(path)}: its whitening is {[*mean.shape]} and {[*matrix.shape]}, not (D,) and "
            "(D, D)"
        )
    return Normalisation.whitened(channels, mean, matrix)


def _standardised(path: Path, mean: Tensor, std: Tensor, channels: int) -> Normalisation:
    mean, std = mean.flatten(), std.flatten()
    if {len(mean), len(std)} != {channels} or not bool((std > 0).all()):
        raise UserError(
            f"{shown(path)}: its mean {mean.tolist()} and std {std.tolist()} do not fit "
            f"{channels} channels"
        )
    return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))
