"""Read what a picture file or an array holds, with all its bits and bands."""

import logging
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from utils.core.errors import UserError

# What those suffixes stand for. Others stay closed: Pillow hands EPS, for one, to an interpreter.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_BANDS = 16
HEADER_BYTES = 26  # of a PNG, up to its depth and kind of colour
TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# TIFF's numbers: kinds of colour that Pillow converts, and what a further sample may be marked as.
PALETTE, SEPARATED, YCBCR, CIELAB = 3, 5, 6, 8
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
TRANSPARENCY = (1, 2)

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it raises is enough


class Kind(IntEnum):
    """What the values of a file are: 8 bits, more bits without a sign, with one, or floats."""

    BYTES = 0
    WHOLE = 1
    SIGNED = 2
    FLOAT = 3

    @classmethod
    def of(cls, dtype: np.dtype) -> "Kind":
        """ValueError where these are no numbers that a network could see."""
        if dtype.kind == "b" or dtype == np.uint8:
            return cls.BYTES
        if dtype.kind not in "uif":
            raise ValueError(f"its values are {dtype}, no numbers: save them as floats or integers")
        return {"u": cls.WHOLE, "i": cls.SIGNED, "f": cls.FLOAT}[dtype.kind]


@dataclass(frozen=True)
class Look:
    """What the header of a file says.

    Attributes:
        channels: without transparency, which is laid on white.
        has_more: further pages or frames, of which the first is used.
        is_marked: the last band of a TIFF is said to be transparency. Writers say so of any fourth
            band, so its values decide; `channels` leaves it out.
    """

    width: int
    height: int
    channels: int
    kind: Kind
    has_more: bool = False
    is_marked: bool = False


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turn whatever reading `file` raises into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"not a picture ({', '.join(FORMATS)}): {shown(file)}; replace or remove it"
        ) from error
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise UserError(
            f"cannot read the image {shown(file)}: {reason(error)}; replace or remove it"
        ) from error


def shown(path: str | Path) -> str:
    """`path` as one line of text: line breaks, control characters, what is no UTF-8 escaped."""
    odd = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of characters, line and paragraph
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in odd else char
        for char in str(path)
    )


def reason(error: Exception) -> str:
    """What an error says, in one line and without the file's name."""
    text = getattr(error, "strerror", None) or str(error)
    return shown(" ".join(text.split())) or type(error).__name__


def look(file: Path) -> Look:
    """Read the header of `file`; UserError names one that cannot be read."""
    with naming(file):
        start = _start(file)
        if _is_array(file, start):
            array = _open_array(file)
            return _checked(Look(array.shape[1], array.shape[0], _bands(array), _kind(array)))
        with _tiff_page(file, start) as page:
            if page is not None and not page.is_for_pillow:
                return _checked(page.look)
        with Image.open(file, formats=FORMATS) as picture:
            wide = _wide_type(picture, start)
            channels = 1 if _is_grey(picture) else 3
            kind = Kind.BYTES if wide is None else Kind.of(np.dtype(wide))
            has_more = getattr(picture, "is_animated", False)
            return Look(
                *picture.size, channels, kind, has_more, page is not None and page.is_marked
            )


def read(file: Path, *, keep_marked: bool = False) -> Image.Image | np.ndarray:
    """Read `file` upright: a picture L or RGB of 8 bits, or an array (H, W, C) of other values.

    Transparent parts are white; with `keep_marked` the band that a TIFF marks as transparency is
    one like the others. Raises whatever the decoders raise; see `naming`.
    """
    start = _start(file)
    if _is_array(file, start):
        array = np.array(_open_array(file))
        return (array * np.uint8(255) if array.dtype == bool else array).reshape(
            *array.shape[:2], -1
        )
    with _tiff_page(file, start) as page:
        if page is not None and (not page.is_for_pillow or (page.is_marked and keep_marked)):
            return page.read(keep_marked=keep_marked)
    with Image.open(file, formats=FORMATS) as picture:
        wide = _wide_type(picture, start)
        if wide is None:
            return _on_white(_upright(picture))
        orientation, tiles = _orientation(picture), picture.tile
        picture.load()  # what is broken in the pixels comes to light here
        if picture.mode not in ("LA", "RGB", "RGBA"):
            array = np.asarray(picture).astype(wide)[..., None]
        elif picture.format == "PNG":  # Pillow has colours of 8 bits only
            array = _png_values(file)
        else:
            array = _ppm_values(file, picture, tiles[0])
    return _turned(array, orientation)


def marked_band(file: Path) -> np.ndarray:
    """Read the band (H, W) of a TIFF that is marked as transparency, scaled to 0 ... 1."""
    with naming(file):
        array = read(file, keep_marked=True)
        assert isinstance(array, np.ndarray)
        band = array[..., -1]
        return band / np.iinfo(band.dtype).max if band.dtype.kind in "ui" else band


def _start(file: Path) -> bytes:
    with open(file, "rb") as content:
        return content.read(HEADER_BYTES)


def _checked(seen: Look) -> Look:
    if not 1 <= seen.channels <= MAX_BANDS:
        raise ValueError(f"it has {seen.channels} channels: 1 to {MAX_BANDS} can be trained on")
    return seen


# arrays


def _is_array(file: Path, start: bytes) -> bool:
    return start.startswith(b"\x93NUMPY") or file.suffix.lower() == ".npy"


def _open_array(file: Path) -> np.ndarray:
    """Map a .npy file, (H, W) or (H, W, C); ValueError for anything else in it."""
    try:
        array = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # some say things that mislead, as of Python's objects
        raise ValueError("it is no whole .npy file of numbers") from error
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"its shape {array.shape} is not (H, W) or (H, W, C)")
    if array.ndim == 3 and array.shape[2] > MAX_BANDS:
        advice = ": channels come last" if array.shape[0] <= MAX_BANDS else ""
        raise ValueError(
            f"its shape {array.shape} is not (H, W) or (H, W, C) with C up to {MAX_BANDS}{advice}"
        )
    return array


def _bands(array: np.ndarray) -> int:
    return array.shape[2] if array.ndim == 3 else 1


def _kind(array: np.ndarray) -> Kind:
    return Kind.of(array.dtype)


# TIFF


@dataclass(frozen=True)
class _Page:
    """The first picture of a TIFF; its bands are samples of a page, or pages of one array."""

    look: Look
    is_for_pillow: bool  # 8 bits that have to be converted, or that are laid on white
    is_marked: bool
    source: Any  # a page or a series of tifffile
    band_axis: int | None
    is_inverted: bool
    orientation: int

    def read(self, *, keep_marked: bool) -> np.ndarray:
        array = self.source.asarray()
        array = (
            array[..., None] if self.band_axis is None else np.moveaxis(array, self.band_axis, -1)
        )
        if self.is_inverted and array.dtype.kind in "ui":
            array = np.iinfo(array.dtype).max - array
        if self.is_marked and not keep_marked:
            array = _blended(array)
        return _turned(array, self.orientation)


@contextmanager
def _tiff_page(file: Path, start: bytes) -> Iterator[_Page | None]:
    """The first picture of a TIFF; None for other files and where only Pillow makes sense of it."""
    if not start.startswith(TIFF_MARKS):
        yield None
        return
    import tifffile  # slow to import, needed only here

    with ExitStack() as opened:
        try:
            page = _describe(opened.enter_context(tifffile.TiffFile(file)))
        except ValueError:
            raise
        except Exception:
            page = None
        yield page


def _describe(tiff: Any) -> _Page:
    page, series = tiff.pages[0], tiff.series[0]
    if page.dtype is None:
        raise ValueError("its values are of no known type")
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"it is no picture: its axes are {page.axes}")
    if len(page.dataoffsets) < np.prod(page.chunked):
        raise ValueError("parts of it are missing")
    source, shape, axis = page, page.shape, {"YX": None, "YXS": 2, "SYX": 0}[page.axes]
    if page.axes == "YX" and series.axes in ("QYX", "CYX"):
        bands_at = _axis_of_bands(series.shape, is_named=series.axes == "CYX")
        if bands_at is not None:
            source, shape, axis = series, series.shape, bands_at
    if np.prod(shape, dtype=float) > 2 * 3 * (Image.MAX_IMAGE_PIXELS or np.inf):
        raise ValueError(f"{'x'.join(map(str, shape))} values are too many for a picture")
    bands = 1 if axis is None else shape[axis]
    height, width = (side for at, side in enumerate(shape) if at != axis)
    photometric, extra = int(page.photometric), [int(mark) for mark in page.extrasamples]
    has_one_more = bands == {RGB: 4, BLACK_IS_ZERO: 2, WHITE_IS_ZERO: 2}.get(photometric)
    # Where a fourth sample has no mark at all, Pillow takes it for transparency.
    is_marked = source is page and has_one_more and (not extra or extra[0] in TRANSPARENCY)
    kind = Kind.of(np.dtype(page.dtype))
    colours = bands - is_marked
    plain = {RGB: 3, BLACK_IS_ZERO: 1, WHITE_IS_ZERO: 1}
    is_simple = source is page and (
        photometric in (PALETTE, SEPARATED, YCBCR, CIELAB) or colours == plain.get(photometric)
    )
    orientation = page.tags.get(274)
    return _Page(
        Look(width, height, colours, kind, source is page and len(tiff.pages) > 1, is_marked),
        is_for_pillow=kind == Kind.BYTES and is_simple and (axis != 0 or not is_marked),
        is_marked=is_marked,
        source=source,
        band_axis=axis,
        is_inverted=photometric == WHITE_IS_ZERO,
        orientation=1 if orientation is None else int(orientation.value),
    )


def _axis_of_bands(shape: tuple[int, ...], *, is_named: bool) -> int | None:
    """Where the bands of an array that was written as pages are: first, last, or nowhere.

    tifffile writes an array (H, W, C) as H pages of W x C; the shorter axis has the bands, or where
    both may have them, that which leaves a square.
    """
    first, middle, last = shape
    if is_named or last > MAX_BANDS:
        return 0 if first <= MAX_BANDS else None
    if first > MAX_BANDS:
        return 2
    if (first == middle) != (middle == last):
        return 2 if first == middle else 0
    return 2 if last < first else 0


# pictures


def _wide_type(picture: ImageFile.ImageFile, start: bytes) -> str | None:
    """The type of values of more than 8 bits; None where there are none."""
    if picture.mode.startswith("I;16"):
        return "uint16"
    if picture.mode in ("I", "F"):
        is_16_bits = picture.mode == "I" and picture.format == "PPM"
        return "uint16" if is_16_bits else {"I": "int32", "F": "float32"}[picture.mode]
    if picture.format == "PNG" and len(start) == HEADER_BYTES and start[24] == 16:
        return "uint16"
    if picture.format == "PPM" and picture.mode == "RGB" and picture.tile:
        tile = picture.tile[0]
        maximum = tile.args[-1] if isinstance(tile.args, tuple) else 255
        is_binary = tile.codec_name == "ppm" and isinstance(maximum, int)
        return "uint16" if is_binary and maximum > 255 else None
    return None


def _is_grey(picture: Image.Image) -> bool:
    if picture.mode in ("P", "PA"):
        palette = np.array(picture.getpalette("RGB") or [0, 0, 1]).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return Image.getmodebase(picture.mode) == "L"


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()  # what is broken in the pixels comes to light here
    with suppress(Exception):  # an orientation that cannot be read is as good as none
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    """L where it is grey, else RGB."""
    is_grey = _is_grey(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB").convert("L") if is_grey else picture.convert("RGB")


def _orientation(picture: Image.Image) -> int:
    with suppress(Exception):  # one that cannot be read is as good as none
        return int(picture.getexif().get(274, 1))
    return 1


def _png_values(file: Path) -> np.ndarray:
    """Colours of 16 bits, on white."""
    from imagecodecs import png_decode  # slow to import, needed only here

    array = png_decode(file.read_bytes())
    return _blended(array) if array.shape[2] in (2, 4) else array


def _ppm_values(file: Path, picture: Image.Image, tile: Any) -> np.ndarray:
    """Colours of more than 8 bits, scaled to 16."""
    shape = (picture.height, picture.width, 3)
    array = np.fromfile(file, ">u2", int(np.prod(shape)), offset=tile.offset).reshape(shape)
    return np.rint(array * (65535 / tile.args[-1])).astype(np.uint16)


def _blended(array: np.ndarray) -> np.ndarray:
    """Lay the bands on white by the last one, their opacity."""
    top = np.iinfo(array.dtype).max if array.dtype.kind in "ui" else 1
    opacity = array[..., -1:].astype(np.float64) / top
    blended = array[..., :-1] * opacity + top * (1 - opacity)
    return (blended.round() if array.dtype.kind in "ui" else blended).astype(array.dtype)


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Set an array (H, W, C) upright, by the number that EXIF and TIFF have for it."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array
