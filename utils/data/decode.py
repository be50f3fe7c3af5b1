"""Decode picture files to one tensor of uint8 pixels."""

import hashlib
import os
import stat
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from utils.core.errors import UserError

# What those suffixes stand for. Others stay closed: Pillow hands EPS, for one, to an interpreter.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
HASH_BYTES = 16
DECODER_VERSION = 2  # to be raised when `decode` changes what it returns


def fingerprint(files: Iterable[Path], res: int | None = None) -> str:
    """Compute a key that changes with any file's path, size or times, and with `res`.

    The time of modification alone would not do: archives set it, and bitmaps have equal sizes.

    Raises:
        UserError: a file is not there, or is something else that reading might wait for forever.
    """
    state = hashlib.blake2b(f"{DECODER_VERSION} {res}".encode(), digest_size=16)
    for file in files:
        try:
            status = file.stat()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the image {shown(file)}: {_reason(error)}") from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"cannot read the image {shown(file)}, which is no file: remove it")
        stamp = f"\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0"
        state.update(os.fsencode(file) + stamp.encode())
    return state.hexdigest()


def decode(files: Sequence[Path], res: int) -> Tensor:
    """Decode pictures in parallel to one uint8 tensor (N, 3, res, res).

    The first frame, upright (EXIF), as RGB, with transparent parts on white; the short side
    scaled to `res` (bilinear, antialiased), then the centre kept. 16 bits are scaled to 8.

    Memory: a picture of 179 million pixels, the largest that Pillow opens, takes 0.5 GB (1.5 GB
    with transparency) while it is decoded, in each of a few threads.

    Raises:
        UserError: a file cannot be read as a picture; it is named.
    """
    images = torch.empty(len(files), 3, res, res, dtype=torch.uint8)

    def fill(index: int) -> None:
        images[index] = torch.from_numpy(_decode_one(files[index], res)).permute(2, 0, 1)

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # Pillow frees the GIL
        # It warns of odd metadata and of 90 million pixels, a photograph; twice that it refuses.
        warnings.simplefilter("ignore")
        done = pool.map(fill, range(len(files)))
        for _ in tqdm(done, total=len(files), desc="decoding", unit="image", disable=None):
            pass
    return images


def hash_files(files: Sequence[Path]) -> Tensor:
    """Hash what each file holds, in parallel: uint8 (N, 16).

    Raises:
        UserError: a file cannot be read; it is named.
    """
    with ThreadPoolExecutor() as pool:  # hashing frees the GIL
        progress = tqdm(
            pool.map(_hash_one, files),
            total=len(files),
            desc="hashing",
            unit="image",
            leave=False,
            delay=2,
            disable=None,
        )
        hashes = bytearray(b"".join(progress))
    return torch.frombuffer(hashes, dtype=torch.uint8).view(len(files), HASH_BYTES)


def _hash_one(file: Path) -> bytes:
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, _new_hash).digest()
    except OSError as error:
        raise UserError(
            f"cannot read the image {shown(file)}: {_reason(error)}; replace or remove it"
        ) from error


def _new_hash() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=HASH_BYTES)


def shown(path: str | Path) -> str:
    """`path` as one line of text: line breaks, control characters, what is no UTF-8 escaped."""
    odd = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of characters, line and paragraph
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in odd else char
        for char in str(path)
    )


def _decode_one(file: Path, res: int) -> np.ndarray:
    """One picture as (res, res, 3) uint8."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            return np.array(_short_side_and_centre(_rgb(_upright(picture)), res))
    except UnidentifiedImageError as error:
        raise UserError(
            f"not a picture ({', '.join(FORMATS)}): {shown(file)}; replace or remove it"
        ) from error
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise UserError(
            f"cannot read the image {shown(file)}: {_reason(error)}; replace or remove it"
        ) from error


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()  # what is broken in the pixels comes to light here
    with suppress(Exception):  # an orientation that cannot be read is as good as none
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        # 16 bits, which Pillow would clip to 255 instead of scaling.
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its values have 32 bits and no stated range, save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _reason(error: Exception) -> str:
    """What an error says, in one line and without the file's name."""
    text = getattr(error, "strerror", None) or str(error)
    return shown(" ".join(text.split())) or type(error).__name__


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
