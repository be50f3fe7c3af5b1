"""Look at all files of a data set, choose how they are read, and say so."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.core.cache import Tensors, cached
from utils.core.errors import UserError
from utils.core.pictures import shown_as
from utils.data.decode import Decoding, fingerprint, in_parallel, span
from utils.data.values import MAX_BANDS, Kind, Look, look, marked_band, naming, read, shown

# Sensors have so many bits; what holds the largest value is what the values are scaled from.
DEPTHS = (10, 12, 14, 16)
COLUMNS = ("width", "height", "channels", "kind", "has_more", "is_marked")


@dataclass(frozen=True)
class Survey:
    """What was seen of `files`, a row each.

    `keeps_marked`: what TIFFs mark as transparency are values like those of other bands. `low` and
    `high` (N, C) are the least and largest value by channel where a file has more than 8 bits.
    """

    files: Sequence[Path]
    width: np.ndarray
    height: np.ndarray
    channels: np.ndarray
    kind: np.ndarray
    has_more: np.ndarray
    is_marked: np.ndarray
    keeps_marked: bool
    low: np.ndarray
    high: np.ndarray

    def first(self, where: np.ndarray) -> str:
        """Name the first file of those `where` says, for a message."""
        return shown(self.files[int(where.argmax())])

    def of(self, part: slice) -> "Survey":
        """What was seen of some of the files."""
        changed: dict[str, Any] = {
            name: value[part] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, files=self.files[part], **changed)


def survey(files: Sequence[Path], cache_file: Path, *, keep_marked: bool | None = None) -> Survey:
    """Look at the headers of `files`, and at the values of those with more than 8 bits.

    `keep_marked`: whether bands marked as transparency are kept; None: as their values say. All is
    kept in `cache_file` until a file changes. UserError names a file that cannot be used.
    """
    key = f"{fingerprint(files)} {keep_marked}"
    tensors = cached(cache_file, key, lambda: _look_at(files, keep_marked), level=logging.INFO)
    columns = dict(zip(COLUMNS, tensors["looks"].numpy().T, strict=True))
    return Survey(
        files,
        **columns,
        keeps_marked=bool(tensors["keeps_marked"]),
        low=tensors["low"].numpy(),
        high=tensors["high"].numpy(),
    )


def _look_at(files: Sequence[Path], keep_marked: bool | None) -> Tensors:
    looks = [*in_parallel(look, files, desc="looking", is_quick=True)]
    marked = [file for file, seen in zip(files, looks, strict=True) if seen.is_marked]
    if keep_marked is None:
        shares = [*in_parallel(_share_of_extremes, marked, desc="looking", is_quick=True)]
        keep_marked = bool(marked) and float(np.mean(shares)) < 0.5
    if keep_marked:
        looks = [replace(s, channels=s.channels + s.is_marked) for s in looks]
    rows = [[int(getattr(seen, name)) for name in COLUMNS] for seen in looks]
    low, high = (np.zeros((len(files), MAX_BANDS)) for _ in range(2))
    wide = [at for at, seen in enumerate(looks) if seen.kind != Kind.BYTES]

    def measure(at: int) -> tuple[np.ndarray, np.ndarray]:
        return _range_of(files[at], looks[at], keep_marked=keep_marked)

    for at, (least, most) in zip(
        wide, in_parallel(measure, wide, desc="measuring", is_quick=True), strict=True
    ):
        low[at, : len(least)], high[at, : len(most)] = least, most
    return {
        "looks": torch.tensor(rows, dtype=torch.int64).view(-1, len(COLUMNS)),
        "keeps_marked": torch.tensor(keep_marked),
        "low": torch.from_numpy(low),
        "high": torch.from_numpy(high),
    }


def _share_of_extremes(file: Path) -> float:
    """The part of a band that is nothing or all: most of a mask, little of what a sensor sees."""
    band = marked_band(file)
    return float(((band == 0) | (band == 1)).mean())


def _range_of(file: Path, seen: Look, *, keep_marked: bool) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value of each channel."""
    with naming(file):
        values = np.asarray(read(file, keep_marked=keep_marked)).reshape(-1, seen.channels)
        low, high = (limit.astype(np.float64) for limit in (values.min(0), values.max(0)))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("it has values that are no finite numbers")
        return low, high


def choose_decoding(seen: Survey, train: Survey, *, size: int, fit: str) -> Decoding:
    """Choose how the files `seen`, of which `train` are trained on, are read.

    UserError where they have different numbers of channels or kinds of values.
    """
    channels = _channels(seen)
    kinds = {Kind(kind) for kind in np.unique(seen.kind)}
    usual = Decoding(size, channels, fit, keep_marked=seen.keeps_marked)
    if kinds == {Kind.BYTES}:
        return usual
    odd = {Kind.FLOAT} if Kind.BYTES not in kinds else {Kind.SIGNED, Kind.FLOAT}
    if len(kinds) > 1 and kinds & odd:
        is_odd = np.isin(seen.kind, [*odd])
        raise UserError(
            f"the values of {seen.first(is_odd)} have no stated range, those of "
            f"{seen.first(~is_odd)} have: save all with 8 or 16 bits, or all as floats"
        )
    if Kind.BYTES in kinds:
        most = float(train.high.max(initial=0))
        return replace(usual, whole_max=2 ** next(d for d in DEPTHS if most < 2**d or d == 16) - 1)
    used = slice(0, train.channels.max())
    low, high = train.low[:, used].min(0), train.high[:, used].max(0)
    if channels == 3:  # colours stay what they are to each other
        low, high = np.full(3, low.min()), np.full(3, high.max())
    high = np.where(high > low, high, low + 1)
    return replace(usual, low=tuple(low.tolist()), high=tuple(high.tolist()))


def _channels(seen: Survey) -> int:
    """The channels of all files; grey ones may stand among colours."""
    numbers = Counter(seen.channels.tolist())
    if not {*numbers} <= {1, 3} and len(numbers) > 1:
        each = [
            f"{count} with {number} ({seen.first(seen.channels == number)})"
            for number, count in numbers.most_common()
        ]
        raise UserError(
            f"files of different numbers of channels: {', '.join(each)}; bring all to one number"
        )
    return max(numbers)


def check_decoding(seen: Survey, decoding: Decoding) -> None:
    """UserError where files do not have the channels or values that a `decoding` is for."""
    fits = seen.channels == decoding.channels
    fits |= (decoding.channels == 3) & (seen.channels == 1)
    wide = seen.kind != Kind.BYTES
    fits &= wide if decoding.low else ~wide | (seen.kind == Kind.WHOLE)
    if not fits.all():
        at = int((~fits).argmax())
        raise UserError(
            f"{seen.first(~fits)} has {seen.channels[at]} channels and "
            f"{_KINDS[Kind(seen.kind[at])]}, which is not how the pictures of the set were read: "
            f"{decoding}; give the --data_path that it is from"
        )


_KINDS = {
    Kind.BYTES: "8 bits",
    Kind.WHOLE: "more than 8 bits",
    Kind.SIGNED: "integers with a sign",
    Kind.FLOAT: "floats",
}


def describe(seen: Survey, decoding: Decoding) -> list[str]:
    """Say in lines what is done to the files that need something done to them."""
    lines = [_sizes(seen, decoding), *_shapes(seen, decoding), *_depths(seen, decoding)]
    grey = int((seen.channels == 1).sum())
    if decoding.channels == 1:
        lines.append(
            "all are grey: networks see 1 channel; experts and runs that were trained on grey "
            "repeated as 3 channels are not continued"
        )
    elif grey and decoding.channels == 3:
        lines.append(f"{grey} of {len(seen.files)} are grey: their channel is repeated as 3")
    if seen.is_marked.any():
        count = int(seen.is_marked.sum())
        lines.append(
            f"{count} TIFF have a band marked as transparency whose values are those of a picture: "
            "it is kept as a band"
            if decoding.keep_marked
            else f"{count} TIFF have a band marked as transparency: they are laid on white"
        )
    if seen.has_more.any():
        count = int(seen.has_more.sum())
        lines.append(f"{count} have several frames or pages: the first is used")
    if (shown_channels := shown_as(decoding.channels)) is not None:
        lines.append(f"pictures of results show {shown_channels}")
    return lines


def _sizes(seen: Survey, decoding: Decoding) -> str:
    sides = [*zip(seen.width.tolist(), seen.height.tolist(), strict=True)]
    least, most = (choose(sides, key=lambda s: s[0] * s[1]) for choose in (min, max))
    shown_sizes = " to ".join(dict.fromkeys(f"{width}x{height}" for width, height in (least, most)))
    kinds = [Kind(kind) for kind in np.unique(seen.kind)]
    types = ", ".join(
        f"{_KINDS[kind]}" + f" ({(seen.kind == kind).sum()})" * (len(kinds) > 1) for kind in kinds
    )
    return (
        f"{shown_sizes} pixels (width x height), {types}; scaled to {decoding.size}x{decoding.size}"
    )


def _shapes(seen: Survey, decoding: Decoding) -> list[str]:
    """What becomes of files that are not square."""
    sides = np.stack([seen.width, seen.height])
    lost = 1 - sides.min(0) / sides.max(0)
    count = int((lost > 0).sum())
    if count == 0:
        return []
    mean, most = lost[lost > 0].mean(), lost.max()
    done = {
        "crop": f"--fit crop cuts away {mean:.0%} of their area (at most {most:.0%}), all but the "
        "middle; --fit pad keeps it between black bars, --fit squeeze distorts it",
        "pad": f"--fit pad fills {mean:.0%} of the square (at most {most:.0%}) with black bars",
        "squeeze": f"--fit squeeze shortens their long side by {mean:.0%} (at most {most:.0%})",
    }
    return [f"{count} of {len(seen.files)} are not square: {done[decoding.fit]}"]


def _depths(seen: Survey, decoding: Decoding) -> list[str]:
    if decoding.low:
        return [
            f"values {span(decoding.low, decoding.high)}, measured on the training images, become "
            "0 ... 1 in all images; nothing is rounded"
        ]
    wide = int((seen.kind != Kind.BYTES).sum())
    if not wide:
        return []
    return [
        f"{wide} have more than 8 bits, others 8: their values 0 ... {decoding.whole_max} become "
        "0 ... 255"
    ]
