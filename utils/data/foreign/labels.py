"""Tell what labels of another code are: classes, probabilities or logits, and of which image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.data.folders import some
from utils.data.foreign.content import Content, by_number
from utils.data.values import shown

TOLERANCE = 1e-3  # of a sum that should be 1, or 0


@dataclass(frozen=True)
class Labels:
    """Classes (N,), soft labels (N, classes) of a form where there are any, and how it is known."""

    classes: Tensor
    soft: Tensor | None
    form: str | None
    said: tuple[str, ...]


def read_labels(
    content: Content,
    path: Path,
    class_names: Sequence[str],
    wnids: Sequence[str],
    stated: str | None,
) -> Labels:
    """Interpret labels for the classes of a data set; `stated` is what soft ones are.

    `wnids` are other names of the classes, where they have any. UserError where labels do not fit
    the classes, where two readings are possible, and where classes have different numbers of
    images.
    """
    count = len(class_names)
    hard, soft = content.labels, content.soft_labels
    if hard is not None and hard.ndim == 2:
        hard, soft = None, hard if soft is None else soft
    if soft is not None and soft.shape[1] != count:
        raise UserError(
            f"{shown(path)}: its labels are of {soft.shape[1]} classes, the data set has {count}: "
            "--dataset says which it is"
        )
    said: list[str] = []
    form = None
    if soft is not None and _is_one_hot(soft):
        hard, soft = soft.argmax(1), None
        said.append("labels: classes, written as 0 and 1")
    elif soft is not None:
        form, why = _form(soft, path, stated)
        said.append(f"soft labels: {form}, {why}")
    if content.class_names and hard is not None:
        hard, why = _by_folders(hard, content.class_names, class_names, wnids, path)
        said.append(f"labels: {why}")
    if hard is None:
        hard, why = _by_order(content, soft, count, path)
        said.append(f"classes: {why}")
    _check_classes(hard, class_names, path)
    return Labels(hard, soft, form, tuple(said))


def _is_one_hot(soft: Tensor) -> bool:
    return bool(((soft == 0) | (soft == 1)).all() and (soft.sum(1) == 1).all())


def _form(soft: Tensor, path: Path, stated: str | None) -> tuple[str, str]:
    """What soft labels are, and why."""
    sums = soft.double().sum(1)
    are_shares = bool((soft >= 0).all() and (sums - 1).abs().max() < TOLERANCE)
    if stated == "probabilities" and not are_shares:
        raise UserError(
            f"--labels_are probabilities: those of {shown(path)} have rows that sum to "
            f"{sums.min():.4g} ... {sums.max():.4g}, values from {soft.min():.4g}"
        )
    if stated is not None:
        return stated, "as said"
    if are_shares:
        return "probabilities", "since rows sum to 1"
    if bool(sums.abs().max() < TOLERANCE):
        raise UserError(
            f"{shown(path)}: rows of its labels sum to 0, as those of logits may and those of a "
            "kernel regression do: --labels_are logits takes them as logits"
        )
    return "logits", f"since rows sum to {sums.min():.4g} ... {sums.max():.4g}"


def _by_order(
    content: Content, soft: Tensor | None, classes: int, path: Path
) -> tuple[Tensor, str]:
    """Classes of images without such labels: class by class, unless soft labels say otherwise."""
    number = len(content.images)
    blocks = content.blocks or (number,)
    if uneven := [size for size in blocks if size % classes]:
        raise UserError(
            f"{shown(path)}: {uneven[0]} images without labels cannot be class by class of "
            f"{classes} classes: --dataset says which data set it is, --label_dir where labels are"
        )
    order = [torch.arange(classes).repeat_interleave(size // classes) for size in blocks]
    by_order = torch.cat(order)
    if soft is None:
        return by_order, f"by order, {number // classes} images of each class"
    likeliest = soft.argmax(1)
    alike = int((likeliest == by_order).sum())
    if 2 * alike > number:
        return by_order, f"by order, the likeliest of the soft labels for {alike} of {number}"
    return likeliest, f"the likeliest of the soft labels; only {alike} of {number} are by order"


def _by_folders(
    labels: Tensor,
    folders: Sequence[str],
    class_names: Sequence[str],
    wnids: Sequence[str],
    path: Path,
) -> tuple[Tensor, str]:
    """Labels that number folders as those that number classes."""
    for names in (class_names, wnids):
        if {*folders} == {*names} and len(folders) == len(names):
            places = torch.tensor([list(names).index(folder) for folder in folders])
            return places[labels], "folders have the names of the classes"
    # new000, new001; 00000, 00001; n01443537, ...
    prefixes = {str(by_number(name)[0]) for name in folders if len(by_number(name)) == 3}
    are_numbered = len(prefixes) == 1 and all(by_number(name)[2:] == [""] for name in folders)
    if len(folders) == len(class_names) and are_numbered:
        return labels, f"by the order of the numbers of the folders {folders[0]}, ..."
    raise UserError(
        f"{shown(path)}: its {len(folders)} class folders {some(folders)} are neither numbered nor "
        f"those of the {len(class_names)} classes {some(class_names)}: rename them"
    )


def _check_classes(labels: Tensor, class_names: Sequence[str], path: Path) -> None:
    classes = len(class_names)
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise UserError(
            f"{shown(path)}: its labels {least} to {most} are not of {classes} classes: --dataset "
            "says which data set it is"
        )
    counts = labels.bincount(minlength=classes)
    if counts.min() != counts.max():
        few, many = int(counts.argmin()), int(counts.argmax())
        raise UserError(
            f"{shown(path)}: class {few} has {counts[few]} images, class {many} {counts[many]}: "
            "a set has as many of each class (--dataset, --label_dir)"
        )
