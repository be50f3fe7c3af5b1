"""Folders of pictures: which classes and files lie in them."""

import re
from collections.abc import Iterable
from pathlib import Path

from utils.core.errors import UserError
from utils.data.decode import shown

IMAGE_SUFFIXES = tuple(
    f".{kind}" for kind in ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
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
    if all(re.fullmatch("[0-9]+", name) for name in names):
        names.sort(key=int)
    return tuple(names)


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
            raise UserError(
                f"no images in the class folder {shown(folder)}: add some "
                f"({' '.join(IMAGE_SUFFIXES)}) or remove the class"
            )
        items += [(file, label) for file in files]
    return items


def _visible(folder: Path) -> list[Path]:
    """What lies directly in `folder`, hidden entries left out."""
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list the folder {shown(folder)}: {error.strerror}") from error
