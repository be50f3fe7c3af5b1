"""Folders of pictures: which classes and files lie in them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from utils.core.errors import UserError
from utils.data.values import shown

IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)  # compared in lower case


def class_names(folder: Path) -> tuple[str, ...]:
    """List the class folders in `folder`: sorted, by value where all are numbers.

    Raises:
        UserError: a name that cannot stand in a line of text; it would go into messages and files.
    """
    names = sorted(entry.name for entry in _visible(folder) if entry.is_dir())
    for name in names:
        if shown(name) != name:
            raise UserError(
                f"the name of the class folder {shown(folder / name)} has a control character or "
                "bytes that are no UTF-8 in it: rename the folder"
            )
    return tuple(in_order(names))


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names of classes, by value where all are numbers."""
    names = sorted(names)
    is_number = all(re.fullmatch("[0-9]+", name) for name in names)
    return sorted(names, key=int) if is_number else names


def image_files(folder: Path) -> list[Path]:
    """List the images directly inside `folder`, sorted, without hidden files and other suffixes.

    Nothing is descended into, so symbolic links in a circle do no harm. A link that leads
    nowhere is listed, for `decode` to name, rather than lost in silence.
    """
    return sorted(
        entry
        for entry in _visible(folder)
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.is_dir()
    )


def left_out(folder: Path, used: Iterable[Path]) -> Counter[str]:
    """Count by ending what lies directly in `folder` and is not `used`, hidden entries aside."""
    used = {*used}
    return Counter(
        "folders" if entry.is_dir() else entry.suffix.lower() or "without an ending"
        for entry in _visible(folder)
        if entry not in used
    )


def counted(names: Mapping[str, int]) -> str:
    """Write counts by name, the largest first."""
    pairs = sorted(names.items(), key=lambda pair: (-pair[1], pair[0]))
    more = f" and {len(pairs) - 8} more kinds" if len(pairs) > 8 else ""
    return ", ".join(f"{count} {shown(name)}" for name, count in pairs[:8]) + more


def some(names: Iterable[str]) -> str:
    """The first few of `names`, for a message of one line."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + more


def list_images(folders: Iterable[Path]) -> list[tuple[Path, int]]:
    """List (file, label) of every image in the class folders; a label is a folder's position.

    Raises:
        UserError: a class folder is missing or holds no image.
    """
    items: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        if not folder.is_dir():
            raise UserError(f"no class folder {shown(folder)}: put that class's images there")
        files = image_files(folder)
        if not files:
            others = left_out(folder, ())
            raise UserError(
                f"no images in the class folder {shown(folder)}: add some "
                f"({' '.join(IMAGE_SUFFIXES)}) or remove the class"
                + (f"; it has {counted(others)}" if others else "")
            )
        items += [(file, label) for file in files]
    return items


def _visible(folder: Path) -> list[Path]:
    """What lies directly in `folder`, hidden entries left out."""
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list the folder {shown(folder)}: {error.strerror}") from error
