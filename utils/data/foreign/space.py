"""Tell what space images of another code are in, and bring them into that of the networks."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.data.foreign.content import Content, Stated
from utils.data.normalisation import Normalisation, fit_mean_std, in_unit_range
from utils.data.source import Source
from utils.data.values import shown

MOST_OUTSIDE = 1.0  # by which learned pixels that are said to be in [0, 1] may leave it
# DC, DSA, DM, IDC, NCFM, the ECCV 2024 challenge; else theirs are those of MTT, and of this code.
OF_DC = {"CIFAR100": Normalisation((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))}
STATISTICS = ("mtt", "dc")


@dataclass(frozen=True)
class Seen:
    """Images as networks see them, how test images get there, and how that is known."""

    images: Tensor
    normalisation: Normalisation
    said: tuple[str, ...]


def brought(content: Content, path: Path, stated: Stated, source: Source) -> Seen:
    """Find the space of images and bring pixels into that of networks.

    UserError where nothing proves the space and nobody states it.
    """
    images, are_bytes = _without_bytes(content.images)
    space, why = _space(images, content, path, stated, are_bytes)
    normalisation, statistics = _normalisation(space, content, path, stated, source)
    if space == "unit":
        images = normalisation.forward(images)
    return Seen(images, normalisation, (f"images: {space}, {why}", statistics))


def _without_bytes(images: Tensor) -> tuple[Tensor, bool]:
    """Images as floats, and whether they were bytes, or whole numbers from 0 to 255."""
    if images.dtype == torch.uint8:
        return in_unit_range(images), True
    low, high = images.aminmax()
    if low >= 0 and 1 < high <= 255 and bool((images == images.round()).all()):
        return images / 255, True
    return images, False


def _space(
    images: Tensor, content: Content, path: Path, stated: Stated, are_bytes: bool
) -> tuple[str, str]:
    """What the images are, and why."""
    low, high = (each.item() for each in images.aminmax())
    values = f"values from {low:.4g} to {high:.4g}"
    if are_bytes:
        if stated.space not in (None, "unit"):
            raise UserError(f"--space {stated.space}: the images of {shown(path)} are bytes: unit")
        return "unit", "since they are bytes"
    if stated.space is not None:
        if stated.space == "unit" and (low < -MOST_OUTSIDE or high > 1 + MOST_OUTSIDE):
            raise UserError(
                f"--space unit: the images of {shown(path)} have {values}, no pixels in [0, 1]; "
                "--space normalised or --space zca"
            )
        return stated.space, f"as said ({values})"
    if content.space is not None:
        return content.space, f"{content.why} ({values})"
    if low >= 0 and high <= 1:
        return "unit", f"since they have {values}"
    raise UserError(
        f"{shown(path)}: its images have {values}, so they may be normalised or whitened, and the "
        "file does not say: --space normalised or --space zca"
    )


def _normalisation(
    space: str, content: Content, path: Path, stated: Stated, source: Source
) -> tuple[Normalisation, str]:
    """How test images get to where the images are, and whose that is."""
    channels, own = source.channels, content.normalisation
    if space == "zca":
        if stated.statistics:
            raise UserError("--statistics are of normalised images: whitened ones have none")
        if own is not None and own.zca:
            length = content.images[0].numel()
            if own.zca_mean is None or len(own.zca_mean) != length:
                raise UserError(
                    f"{shown(path)}: its whitening is not for images of {length} values"
                )
            return own, "whitening: the file's"
        plain = Normalisation((0.0,) * channels, (1.0,) * channels, zca=True)
        return plain, "whitening: fitted on the training images, as in MTT and DATM"
    if stated.statistics:
        return _stated(stated.statistics, source), f"statistics: {' '.join(stated.statistics)}"
    if own is not None and not own.zca:
        return own, "statistics: the file's"
    if source.name in OF_DC and space == "normalised":
        if content.statistics is None:
            raise UserError(
                f"{shown(path)}: two means of {source.name} are in use, and the file does not say "
                f"which: --statistics mtt ({_usual(source)[0].mean}) or --statistics dc "
                f"({OF_DC[source.name].mean})"
            )
        return _stated((content.statistics,), source), (
            f"statistics: {content.statistics}, {content.why}"
        )
    normalisation, whose = _usual(source)
    return normalisation, f"statistics: {whose}"


def _usual(source: Source) -> tuple[Normalisation, str]:
    """How this code normalises the data set."""
    if source.normalisation is not None:
        return source.normalisation, f"those of {source.name} that MTT and this code use"
    train = source.pixels(["train"])["train"]
    return fit_mean_std(train), "mean and std of the training images"


def _stated(statistics: tuple[str, ...], source: Source) -> Normalisation:
    """What --statistics says: a name, or a mean and then a std for each channel."""
    if len(statistics) == 1 and statistics[0] in STATISTICS:
        usual = _usual(source)[0]
        return OF_DC.get(source.name, usual) if statistics[0] == "dc" else usual
    channels = source.channels
    try:
        numbers = [float(word) for word in statistics]
    except ValueError:
        numbers = []
    means, stds = numbers[:channels], numbers[channels:]
    is_sound = len(stds) == channels and all(abs(each) < 1e6 for each in numbers)
    if not is_sound or min(stds) <= 0:
        raise UserError(
            f"--statistics {' '.join(statistics)}: give {' or '.join(STATISTICS)}, or {channels} "
            f"means and then {channels} standard deviations above 0, of pixels in [0, 1]"
        )
    return Normalisation(tuple(means), tuple(stds))
