"""Decode picture files and arrays to one tensor of pixels."""

import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils.core.errors import UserError
from utils.data.values import Kind, naming, read, reason, shown

HASH_BYTES = 16
DECODER_VERSION = 3  # to be raised when `decode` changes what it returns
WHOLE_MAX = 2**16 - 1


@dataclass(frozen=True)
class Decoding:
    """How files become pixels, the same for all files of a data set.

    Attributes:
        size: the side of the images, in pixels.
        channels: of the images. Grey files get three equal ones where others have colours.
        fit: how files that are not square become so: "crop" scales the short side and keeps the
            centre, "pad" scales the long one and adds black bars, "squeeze" scales each.
        whole_max: the value that becomes white, of files of more than 8 bits among others of 8.
        low, high: one number a channel, what becomes 0 and 1 where pixels are floats; empty where
            they are bytes.
        keep_marked: whether the band that TIFFs mark as transparency is a band like the others.
    """

    size: int
    channels: int = 3
    fit: str = "crop"
    whole_max: int = WHOLE_MAX
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    keep_marked: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Convert what differs from RGB pictures of 8 bits, but the size, to plain values."""
        usual = asdict(Decoding(self.size))
        different = {name: value for name, value in asdict(self).items() if value != usual[name]}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in different.items()}

    @classmethod
    def from_dict(cls, size: int, values: Any) -> "Decoding":
        """Undo `to_dict`; ValueError for anything else."""
        if not isinstance(values, Mapping):
            raise ValueError("no record of how pictures are read")
        usual = {field.name: field.default for field in fields(cls) if field.name != "size"}
        for name, value in values.items():
            fits = usual.get(name)
            if isinstance(fits, tuple):
                is_right = isinstance(value, list | tuple) and all(
                    isinstance(item, int | float) for item in value
                )
            else:
                is_right = name in usual and type(value) is type(fits)
            if not is_right:
                raise ValueError(f"no record of how pictures are read: {name} is {value}")
        given: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in values.items()
        }
        decoding = cls(size, **given)
        if {len(decoding.low), len(decoding.high)} not in ({0}, {decoding.channels}):
            raise ValueError("no record of how pictures are read: low and high do not fit channels")
        return decoding

    def __str__(self) -> str:
        """Name what differs from one data set to another, for a message."""
        parts = [f"{self.channels} channel" + "s" * (self.channels > 1), f"--fit {self.fit}"]
        if self.low:
            parts.append(f"values {span(self.low, self.high)}")
        if self.whole_max != WHOLE_MAX:
            parts.append(f"values 0 ... {self.whole_max} as 8 bits")
        parts += ["the band marked as transparency kept"] * self.keep_marked
        return ", ".join(parts)

    @property
    def value_bytes(self) -> int:
        """Bytes of a pixel's value."""
        return 4 if self.low else 1


def span(low: Sequence[float], high: Sequence[float]) -> str:
    """Write the range of values of each channel, or of many channels that of all."""
    ranges = dict.fromkeys(f"{a:.6g} ... {b:.6g}" for a, b in zip(low, high, strict=True))
    if len(ranges) > 4:
        return f"{min(low):.6g} ... {max(high):.6g} (each of {len(low)} channels has its own range)"
    return ", ".join(ranges)


def fingerprint(files: Iterable[Path], decoding: Decoding | None = None) -> str:
    """Compute a key that changes with any file's path, size or times, and with `decoding`.

    The time of modification alone would not do: archives set it, and bitmaps have equal sizes.

    Raises:
        UserError: a file is not there, or is something else that reading might wait for forever.
    """
    state = hashlib.blake2b(f"{DECODER_VERSION} {decoding!r}".encode(), digest_size=16)
    for file in files:
        try:
            status = file.stat()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the image {shown(file)}: {reason(error)}") from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"cannot read the image {shown(file)}, which is no file: remove it")
        stamp = f"\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0"
        state.update(os.fsencode(file) + stamp.encode())
    return state.hexdigest()


def decode(files: Sequence[Path], decoding: Decoding) -> Tensor:
    """Decode files in parallel to one tensor (N, channels, size, size), uint8, or float32 where the
    `decoding` has ranges.

    The first frame, upright (EXIF), with transparent parts on white; scaled bilinearly,
    antialiased.

    Memory: a picture of 179 million pixels, the largest that Pillow opens, takes 0.5 GB (1.5 GB
    with transparency) while it is decoded, in each of a few threads.

    Raises:
        UserError: a file cannot be read as the `decoding` says; it is named.
    """
    shape = (len(files), decoding.channels, decoding.size, decoding.size)
    images = torch.empty(shape, dtype=torch.float32 if decoding.low else torch.uint8)

    def fill(index: int) -> None:
        pixels = torch.from_numpy(_decode_one(files[index], decoding))
        images[index] = pixels.permute(2, 0, 1)

    for _ in in_parallel(fill, range(len(files)), desc="decoding"):
        pass
    return images


def hash_files(files: Sequence[Path]) -> Tensor:
    """Hash what each file holds, in parallel: uint8 (N, 16).

    Raises:
        UserError: a file cannot be read; it is named.
    """
    hashes = bytearray(b"".join(in_parallel(_hash_one, files, desc="hashing", is_quick=True)))
    return torch.frombuffer(hashes, dtype=torch.uint8).view(len(files), HASH_BYTES)


def in_parallel(
    work: Callable[[Any], Any], items: Sequence[Any], *, desc: str, is_quick: bool = False
) -> Iterator[Any]:
    """Yield what `work` makes of each item, in their order, by threads: decoders free the GIL.

    The bar of what `is_quick` shows late and does not stay.
    """
    with _no_warnings(), ThreadPoolExecutor() as pool:
        yield from tqdm(
            pool.map(work, items),
            total=len(items),
            desc=desc,
            unit="image",
            leave=not is_quick,
            delay=2 if is_quick else 0,
            disable=None,
        )


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence Pillow on odd metadata and on 90 million pixels, a photograph; twice it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _hash_one(file: Path) -> bytes:
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, _new_hash).digest()
    except OSError as error:
        raise UserError(
            f"cannot read the image {shown(file)}: {reason(error)}; replace or remove it"
        ) from error


def _new_hash() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=HASH_BYTES)


def _decode_one(file: Path, decoding: Decoding) -> np.ndarray:
    """One file as (size, size, channels), uint8 or float32."""
    with naming(file):
        values = read(file, keep_marked=decoding.keep_marked)
        if decoding.low:
            values = _mapped(np.asarray(values), decoding)
        elif isinstance(values, np.ndarray):
            values = _as_bytes(values, decoding)
        return fitted(values, decoding)


def _mapped(values: np.ndarray, decoding: Decoding) -> np.ndarray:
    """Map values (H, W, C or 1) to float32, where `low` is 0 and `high` 1."""
    if Kind.of(values.dtype) == Kind.BYTES:
        raise ValueError("it has 8 bits, other files of the data set more")
    low, high = np.array(decoding.low), np.array(decoding.high)
    values = values[..., None] if values.ndim == 2 else values
    mapped = ((values - low) / (high - low)).astype(np.float32)
    if not np.isfinite(mapped).all():
        raise ValueError("it has values that are no finite numbers: replace them")
    return mapped


def _as_bytes(values: np.ndarray, decoding: Decoding) -> np.ndarray:
    kind = Kind.of(values.dtype)
    if kind == Kind.BYTES:
        return values
    if kind != Kind.WHOLE:
        raise ValueError("its values have no stated range, save it with 8 or 16 bits")
    scaled = values.astype(np.uint64) * 255 // decoding.whole_max
    return scaled.clip(max=255).astype(np.uint8)


def fitted(values: Image.Image | np.ndarray, decoding: Decoding) -> np.ndarray:
    """Bring a picture or an array (H, W, C) to (size, size, channels)."""
    fit, size = FITS[decoding.fit], decoding.size
    if isinstance(values, Image.Image):
        mode = {1: "L", 3: "RGB"}.get(decoding.channels)
        if mode is None or (mode == "L" and values.mode != "L"):
            raise ValueError(f"it has {len(values.getbands())} channels, not {decoding.channels}")
        pixels = np.array(fit(values.convert(mode), size))
    else:
        bands = [np.ascontiguousarray(band) for band in np.moveaxis(values, -1, 0)]
        fitted = [np.asarray(fit(Image.fromarray(band), size)) for band in bands]
        pixels = np.stack(fitted, axis=-1)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] == 1 and decoding.channels == 3:
        pixels = pixels.repeat(3, axis=2)
    if pixels.shape[2] != decoding.channels:
        raise ValueError(f"it has {pixels.shape[2]} channels, not {decoding.channels}")
    return pixels


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


def _long_side_and_bars(picture: Image.Image, res: int) -> Image.Image:
    long = max(picture.size)
    width, height = (max(1, round(res * side / long)) for side in picture.size)
    padded = Image.new(picture.mode, (res, res))
    scaled = picture.resize((width, height), Image.Resampling.BILINEAR)
    padded.paste(scaled, ((res - width) // 2, (res - height) // 2))
    return padded


def _both_sides(picture: Image.Image, res: int) -> Image.Image:
    return picture.resize((res, res), Image.Resampling.BILINEAR)


# By the values of --fit.
FITS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "crop": _short_side_and_centre,
    "pad": _long_side_and_bars,
    "squeeze": _both_sides,
}
