"""Folders of image files: what lies in them, and their pixels as one tensor."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError

IMAGE_SUFFIXES = tuple(
    f".{kind}" for kind in ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
)  # compared in lower case
DECODER_VERSION = 1  # to be raised when `decode` changes what it returns


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in `folder`: sorted, by value where all are numbers."""
    names = sorted(entry.name for entry in _visible(folder) if entry.is_dir())
    if all(re.fullmatch("[0-9]+", name) for name in names):
        names.sort(key=int)
    return tuple(names)


def image_files(folder: Path) -> list[Path]:
    """The images directly inside `folder`, sorted; hidden files and other suffixes are ignored.

    Nothing is descended into, so symbolic links in a circle do no harm. A link that leads
    nowhere is listed, for `decode` to name, rather than lost in silence.
    """
    return sorted(
        entry
        for entry in _visible(folder)
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.is_dir()
    )


def list_images(folders: Iterable[Path]) -> list[tuple[Path, int]]:
    """(file, label) of every image in the class folders, the label being a folder's position.

    Raises:
        UserError: a class folder is missing or holds no image.
    """
    items: list[tuple[Path, int]] = []
    for label, folder in enumerate(folders):
        if not folder.is_dir():
            raise UserError(f"no class folder {folder}: put that class's images there")
        files = image_files(folder)
        if not files:
            raise UserError(
                f"no images in the class folder {folder}: add some "
                f"({' '.join(IMAGE_SUFFIXES)}) or remove the class"
            )
        items += [(file, label) for file in files]
    return items


def fingerprint(files: Iterable[Path], res: int) -> str:
    """A key that changes with any file's path, size or modification time, and with `res`.

    Raises:
        UserError: a file is not there.
    """
    state = hashlib.blake2b(f"{DECODER_VERSION} {res}".encode(), digest_size=16)
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise UserError(f"cannot read the image {file}: {error.strerror}") from error
        state.update(os.fsencode(file) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return state.hexdigest()


def decode(files: Sequence[Path], res: int) -> Tensor:
    """All pictures as one uint8 tensor (N, 3, res, res), decoded in parallel.

    The first frame, upright (EXIF), as RGB, with transparent parts on white; the short side
    scaled to `res` (bilinear, antialiased), then the centre kept.

    Raises:
        UserError: a file cannot be read as a picture; it is named.
    """
    images = torch.empty(len(files), 3, res, res, dtype=torch.uint8)

    def fill(index: int) -> None:
        images[index] = torch.from_numpy(_decode_one(files[index], res)).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the interpreter lock
        done = pool.map(fill, range(len(files)))
        for _ in tqdm(done, total=len(files), desc="decoding", unit="image", disable=None):
            pass
    return images


def _visible(folder: Path) -> list[Path]:
    """What lies directly in `folder`, hidden entries left out."""
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error


def _decode_one(file: Path, res: int) -> np.ndarray:
    """One picture as (res, res, 3) uint8."""
    try:
        with Image.open(file) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            return np.array(_short_side_and_centre(_rgb(picture), res))
    except UnidentifiedImageError as error:
        raise UserError(f"not a picture: {file}; replace or remove it") from error
    except Exception as error:  # decoders raise whatever a broken file leads them to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the image {file}: {reason}; replace or remove it") from error


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255 instead of scaling
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _short_side_and_centre(picture: Image.Image, res: int) -> Image.Image:
    """torchvision's Resize(res) and CenterCrop(res), computing only the pixels that are kept."""
    short = min(picture.size)
    scaled = [int(res * side / short) for side in picture.size]
    corner = [round((side - res) / 2) for side in scaled]
    scale = [side / after for side, after in zip(picture.size, scaled, strict=True)]
    left, top = (start * factor for start, factor in zip(corner, scale, strict=True))
    right = min(left + res * scale[0], picture.width)
    bottom = min(top + res * scale[1], picture.height)
    box = (left, top, right, bottom)
    return picture.resize((res, res), Image.Resampling.BILINEAR, box=box)
