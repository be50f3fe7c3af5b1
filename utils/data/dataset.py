"""Find data sets, read them into tensors, normalise them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.core import ranks
from utils.core.cache import cached, digest
from utils.core.errors import UserError
from utils.data.decode import FITS, Decoding
from utils.data.normalisation import (
    CHUNK,
    Normalisation,
    check_zca_size,
    fit_mean_std,
    fit_zca,
    in_unit_range,
)
from utils.data.source import DataRequest, Source, SplitName
from utils.data.sources import (
    find_cifar,
    find_digits,
    find_folder,
    find_imagenet,
    find_tiny,
    find_torchvision,
)
from utils.data.spec import side_of

MIN_RES = 8

DATASETS: dict[str, Callable[[DataRequest], Source]] = {
    "digits": find_digits,
    "CIFAR10": find_cifar,
    "CIFAR100": find_cifar,
    "MNIST": find_torchvision,
    "FashionMNIST": find_torchvision,
    "SVHN": find_torchvision,
    "Tiny": find_tiny,
    "ImageNet": find_imagenet,
    "folder": find_folder,
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images (N, C, H, W), float32 as read, in the space the network sees; labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Split":
        return Split(self.images.to(device, dtype), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set in memory; `train` and `val` are None where they were not read."""

    name: str
    subset: str | None
    train: Split | None
    val: Split | None
    test: Split
    class_names: tuple[str, ...]
    normalisation: Normalisation

    @property
    def channels(self) -> int:
        return self.test.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width, in pixels."""
        return self.test.images.shape[-1]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def require_train(self) -> Split:
        """The training images; ValueError where they were not read."""
        if self.train is None:
            raise ValueError(f"{self.name} was loaded without its training images")
        return self.train

    def without_train(self) -> "ImageDataset":
        """Leave out the training images, so that their memory is freed."""
        return replace(self, train=None)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "ImageDataset":
        """Move the images to `device`, in `dtype`."""
        train, val = (
            None if split is None else split.to(device, dtype) for split in (self.train, self.val)
        )
        return replace(self, train=train, val=val, test=self.test.to(device, dtype))


def find_dataset(
    name: str,
    *,
    data_path: str | Path = "data",
    subset: str | None = None,
    res: int | None = None,
    zca: bool = False,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    fit: str = "crop",
    pixels: Mapping[str, Any] | None = None,
    splits: tuple[SplitName, ...] = ("train", "test"),
) -> Source:
    """Find a data set without reading its pixels: its classes, labels and image size; quick.

    Of several processes the main one goes first, since it may download.

    Args:
        data_path: the folder that holds it; each `find_*` in `utils/data/sources.py` says how.
        subset: for ImageNet, one of IMAGENET_SUBSETS.
        res: image size, for those without a native one (ImageNet 128, folder 32 by default).
        zca: check that images of that size can be whitened.
        val_fraction: hold out that part of the training images of every class as the split "val".
        test_fraction: the same as the split "test", for a folder that has none.
        fit: how pictures that are not square become so, one of FITS.
        pixels: read the user's own files as this record of a DataIdentity says; None: choose it.
        splits: "val" is found in a folder of its own, where there is one and none is held out.

    Raises:
        UserError: an unknown name or option, or data that are missing or incomplete.
    """
    if name not in DATASETS:
        raise UserError(f"unknown --dataset {name}: choose one of {', '.join(DATASETS)}")
    if subset is not None and name != "ImageNet":
        raise UserError(f"--subset {subset} goes with --dataset ImageNet only, not with {name}")
    if res is not None and res < MIN_RES:
        raise UserError(f"--res {res} is too small: give {MIN_RES} or more")
    _check_own_pictures(name, fit=fit, test_fraction=test_fraction)
    size = side_of(name, res)
    decoding = Decoding.from_dict(size, pixels) if pixels is not None else None
    if val_fraction > 0 or name != "folder":
        splits = tuple(split for split in splits if split != "val")
    request = DataRequest(
        name, subset, _root(data_path), splits, size, fit, test_fraction, decoding
    )
    try:
        with ranks.main_first():
            source = DATASETS[name](request)
    except OSError as error:
        raise UserError(f"cannot look into {request.root}: {error}") from error
    if zca:
        check_zca_size(source.channels, source.image_size, source.image_size)
    if val_fraction > 0 and "train" in splits:
        source = source.hold_out(val_fraction)
    return replace(source, name=name, subset=subset)


def _check_own_pictures(name: str, *, fit: str, test_fraction: float) -> None:
    """UserError where flags for pictures of any shape and place go with another data set."""
    if fit not in FITS:
        raise UserError(f"unknown --fit {fit}: choose one of {', '.join(FITS)}")
    if fit != "crop" and name not in ("folder", "ImageNet"):
        raise UserError(f"--fit {fit} is for --dataset folder and ImageNet: {name} is square")
    if test_fraction > 0 and name != "folder":
        raise UserError(
            f"--test_fraction {test_fraction} is for --dataset folder: {name} has test images"
        )


def _root(data_path: str | Path) -> Path:
    """Resolve `data_path`; UserError where that fails, or where it is a file."""
    try:
        root = Path(data_path).expanduser().resolve()
        is_else = root.exists() and not root.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, an unknown ~user
        raise UserError(f"cannot look into --data_path {data_path}: {error}") from error
    if is_else:
        raise UserError(f"--data_path {root} is no folder: give the one that the data set lies in")
    return root


def read_dataset(
    source: Source,
    *,
    zca: bool = False,
    normalisation: Normalisation | None = None,
    test_only: bool = False,
    val: bool = False,
) -> ImageDataset:
    """Read what `find_dataset` found into memory, on the CPU.

    Of several processes the main one goes first, since it may fill caches.

    Args:
        zca: whiten instead of standardising; fitted on the training images, without those held
            out, and cached.
        normalisation: use this one (of a distilled set) and fit nothing but a whitening that it
            lacks; `zca` is then ignored.
        test_only: leave out the training images, apart from such a fit.
        val: read the images held out too, where there are any.

    Memory: 4 bytes a value for what is returned, and one byte while it is made, or 4 where files
    have more than 8 bits; fitting ZCA
    takes twice the training images more.

    Raises:
        UserError: a broken picture, or a normalisation for images of another shape.
    """
    if normalisation is not None:
        _check_match(normalisation, source)
        zca = normalisation.zca
    elif not zca:
        normalisation = source.normalisation

    with ranks.main_first():
        fits = normalisation is None or normalisation.needs_fit
        splits: list[SplitName] = ["test"]
        splits += ["train"] if fits or not test_only else []
        splits += ["val"] if val and "val" in source.labels else []
        pixels = source.pixels(splits)
        if normalisation is None or fits:
            train = pixels["train"]
            normalisation = _fit_zca(train, source.zca_cache) if zca else fit_mean_std(train)
    return ImageDataset(
        name=source.name,
        subset=source.subset,
        train=None if test_only else _normalise(source, "train", pixels, normalisation),
        val=_normalise(source, "val", pixels, normalisation) if "val" in pixels else None,
        test=_normalise(source, "test", pixels, normalisation),
        class_names=source.class_names,
        normalisation=normalisation,
    )


def needed_splits(normalisation: Normalisation | None, *, test_only: bool) -> tuple[SplitName, ...]:
    """List the splits that `read_dataset` will read."""
    complete = normalisation is not None and not normalisation.needs_fit
    return ("test",) if test_only and complete else ("train", "test")


def load_dataset(
    name: str,
    *,
    data_path: str | Path = "data",
    subset: str | None = None,
    res: int | None = None,
    zca: bool = False,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    fit: str = "crop",
    normalisation: Normalisation | None = None,
    test_only: bool = False,
) -> ImageDataset:
    """Find and read a data set in one call, for use from Python.

    The images held out are read too, where there are any.

    With `test_only` the training images need not be there where `normalisation` is complete.
    """
    splits = needed_splits(normalisation, test_only=test_only)
    source = find_dataset(
        name,
        data_path=data_path,
        subset=subset,
        res=res,
        zca=zca,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        fit=fit,
        splits=splits,
    )
    return read_dataset(source, zca=zca, normalisation=normalisation, test_only=test_only, val=True)


def _check_match(normalisation: Normalisation, source: Source) -> None:
    """Refuse a normalisation that was made for images of another shape."""
    shape = (source.channels, source.image_size, source.image_size)
    matrix = normalisation.zca_matrix
    if normalisation.channels != source.channels or (
        matrix is not None and len(matrix) != math.prod(shape)
    ):
        raise UserError(
            f"the images are {'x'.join(map(str, shape))}, but the given normalisation is for "
            f"{normalisation.channels} channels"
            + (f" and {len(matrix)} values an image" if matrix is not None else "")
            + ": give the --dataset and --res that it was made for"
        )


def _fit_zca(pixels: Tensor, cache: Path | None) -> Normalisation:
    """`fit_zca` of training images, kept on disk under the hash of those images."""

    def fit() -> dict[str, Tensor]:
        fitted = fit_zca(in_unit_range(pixels))
        assert fitted.zca_mean is not None and fitted.zca_matrix is not None
        return {"zca_mean": fitted.zca_mean, "zca_matrix": fitted.zca_matrix}

    tensors = fit() if cache is None else cached(cache, digest({"": pixels}), fit)
    return Normalisation.whitened(pixels.shape[1], **tensors)


def _normalise(
    source: Source, split: SplitName, pixels: dict[SplitName, Tensor], normalisation: Normalisation
) -> Split:
    """Pixels to what the network sees; converted in chunks, so only the result is large."""
    seen = torch.empty(pixels[split].shape)
    for images, target in zip(pixels[split].split(CHUNK), seen.split(CHUNK), strict=True):
        target.copy_(normalisation.forward(in_unit_range(images)))
    return Split(seen, source.labels[split])
