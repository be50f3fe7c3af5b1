"""Find the files of each data set and check them: one function per data set.

Finding is quick and refuses what is wrong; pixels are read only when a split's `read` is called.
"""

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.core.cache import cached
from utils.core.errors import UserError
from utils.data import decode
from utils.data.folders import class_names as class_folders
from utils.data.folders import list_images
from utils.data.imagenet_subsets import IMAGENET_SUBSETS
from utils.data.normalisation import Normalisation
from utils.data.source import DataRequest, Source, SplitName
from utils.data.spec import KNOWN

Files = list[tuple[Path, int]]  # (image file, label)

CIFAR_NORMALISATION = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET_NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def find_digits(request: DataRequest) -> Source:
    """scikit-learn's 1,797 scans, 1x8x8, split 80/20 by class the same way every time.

    A `size` other than 8 resizes them. Nothing is read from `root`.
    """
    from sklearn.datasets import load_digits  # slow to import, needed only here
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    labels = torch.from_numpy(scans.target).long()
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    members: dict[SplitName, Tensor] = {"train": train, "test": test}
    return Source(
        class_names=tuple("0123456789"),
        channels=1,
        image_size=request.size,
        labels={split: labels[members[split]] for split in request.splits},
        read={
            split: partial(_digits_pixels, scans.images, members[split], request.size)
            for split in request.splits
        },
        contents={
            split: partial(_digits_pixels, scans.images, members[split], KNOWN["digits"].spec.side)
            for split in request.splits
        },
    )


def _digits_pixels(scans: np.ndarray, members: Tensor, size: int) -> Tensor:
    """The scans, whose values are 0 ... 16, as bytes."""
    images = torch.from_numpy(scans)[members].float().unsqueeze(1) * (255 / 16)
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images.round().clamp(0, 255).to(torch.uint8)


def find_cifar(request: DataRequest) -> Source:
    """CIFAR, 3x32x32: torchvision's files in `root`, or a tree of class folders.

    A tree is `train/<class>/*` and `test/<class>/*` in `root/<name>` or in `root`. Where there is
    neither, torchvision's files are downloaded.
    """
    name, root, size = request.name, request.root, request.size
    spec = KNOWN[name].spec
    if size != spec.side:
        raise UserError(
            f"--res {size} does not fit {name}, whose images are {spec.side}x{spec.side}: "
            "leave it out"
        )
    from torchvision import datasets  # slow to import, needed only here

    files: type[Any] = getattr(datasets, name)
    if not (root / files.base_folder).is_dir():
        for tree in (root / name, root):
            if folders := _split_folders(tree, request.splits, test=("test", "val")):
                source = _class_folders(request, folders, CIFAR_NORMALISATION)
                return _with_classes(source, spec.classes, tree)
    batches = {split: _torchvision_cifar(files, root, split) for split in request.splits}
    return Source(
        class_names=tuple(batches[request.splits[0]].classes),
        channels=spec.channels,
        image_size=size,
        labels={split: torch.tensor(batch.targets) for split, batch in batches.items()},
        read={split: partial(_cifar_pixels, batch.data) for split, batch in batches.items()},
        normalisation=CIFAR_NORMALISATION,
        cache=request.cache,
    )


def _torchvision_cifar(files: type[Any], root: Path, split: SplitName) -> Any:
    """torchvision's data set object, after its checksums; downloads what is missing."""
    if split == "test":  # the training files need not be there
        files = type(files.__name__, (files,), {"train_list": []})
    try:
        with _network_timeout(seconds=20):
            return files(root, train=split == "train", download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"no complete {files.__name__} in {root}: looked for {files.base_folder}/ and for "
            f"train/<class>/*, test/<class>/*, and the download failed ({reason}); "
            f"fetch {files.url} and put {files.filename} there as it is"
        ) from error


def _cifar_pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def find_tiny(request: DataRequest) -> Source:
    """Tiny ImageNet, 3x64x64 (or `size`), in `root` or `root/tiny-imagenet-200`.

    Training images: `train/<wnid>/images/*`. Test images: `val/images/*` with
    `val/val_annotations.txt` as unzipped, or re-foldered `val/<wnid>/*`, with or without a
    folder `images` in between. Labels follow the sorted wnids.
    """
    folders = _locate(
        request,
        (request.root / "tiny-imagenet-200", request.root),
        "fetch http://cs231n.stanford.edu/tiny-imagenet-200.zip and unzip it there",
    )
    root = folders["test"].parent
    wnids = _tiny_wnids(root)
    if not wnids:
        raise UserError(f"no class folders in {root}: unzip the data set again")
    files: dict[SplitName, Files] = {}
    for split, folder in folders.items():
        annotations = folder / "val_annotations.txt"
        if annotations.is_file() and (folder / "images").is_dir():  # as unzipped
            files[split] = _annotated_files(annotations, wnids)
        else:
            files[split] = list_images(_inner(folder / wnid) for wnid in wnids)
    return _tree_source(request, files, _words(root, wnids), IMAGENET_NORMALISATION)


def _tiny_wnids(root: Path) -> tuple[str, ...]:
    """The classes: the training folders, or where those are not there wnids.txt or val's."""
    if (root / "train").is_dir():
        return class_folders(root / "train")
    if (root / "wnids.txt").is_file():
        return tuple(sorted(_lines(root / "wnids.txt")))
    return tuple(name for name in class_folders(root / "val") if name != "images")


def _inner(folder: Path) -> Path:
    """The folder `images` inside a class folder, where there is one."""
    inner = folder / "images"
    return inner if inner.is_dir() else folder


def _annotated_files(annotations: Path, wnids: Sequence[str]) -> Files:
    """What `val_annotations.txt` lists: a file of `images` and its wnid at each line's start."""
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    files: Files = []
    for number, line in enumerate(_lines(annotations), start=1):
        name, wnid, *_ = [*line.split(), "", ""]
        if wnid not in labels:
            raise UserError(
                f"{annotations} line {number}: {line[:80]!r} does not start with a file name and "
                f"one of the {len(wnids)} classes' wnids; unzip the data set again"
            )
        files.append((annotations.parent / "images" / name, labels[wnid]))
    if missing := set(wnids) - {wnids[label] for _, label in files}:
        raise UserError(f"{annotations} lists no image of {_some(missing)}; unzip it again")
    return files


def find_imagenet(request: DataRequest) -> Source:
    """Ten classes of ImageNet, 3x128x128 (or `size`): `train/<wnid>/*` and `val/<wnid>/*`.

    Only the ten folders need be there. A label is the wnid's position in IMAGENET_SUBSETS.
    """
    if request.subset not in IMAGENET_SUBSETS:
        raise UserError(
            f"--dataset ImageNet with --subset {request.subset}: choose one of "
            f"{', '.join(IMAGENET_SUBSETS)}"
        )
    wnids = IMAGENET_SUBSETS[request.subset]
    folders = _locate(
        request,
        (request.root, request.root / "ImageNet"),
        "get ImageNet (ILSVRC2012) from image-net.org and sort both into a folder a class",
    )
    files = {
        split: list_images(folder / wnid for wnid in wnids) for split, folder in folders.items()
    }
    words = _words(folders["test"].parent, wnids)
    return _tree_source(request, files, words, IMAGENET_NORMALISATION)


def find_folder(request: DataRequest) -> Source:
    """The user's pictures at 3x32x32 (or `size`): `train/<class>/*`, `test/<class>/*` or `val/`.

    Classes are the same in both, sorted by name, or by value where all names are numbers.
    """
    advice = "make a folder a class in each"
    folders = _locate(request, (request.root,), advice, test=("test", "val"))
    return _class_folders(request, folders)


def _class_folders(
    request: DataRequest,
    folders: dict[SplitName, Path],
    normalisation: Normalisation | None = None,
) -> Source:
    """A source whose splits hold the same class folders, the class names."""
    names = {split: class_folders(folder) for split, folder in folders.items()}
    for split, folder in folders.items():
        if not names[split]:
            raise UserError(f"no class folders in {folder}: put images into {folder}/<class>/")
        if odd := set(names[split]).symmetric_difference(names["test"]):
            raise UserError(
                f"{folder} and {folders['test']} must have the same classes; "
                f"only one of them has {_some(odd)}"
            )
    files = {
        split: list_images(folder / name for name in names[split])
        for split, folder in folders.items()
    }
    return _tree_source(request, files, names["test"], normalisation)


def _tree_source(
    request: DataRequest,
    files: dict[SplitName, Files],
    class_names: tuple[str, ...],
    normalisation: Normalisation | None,
) -> Source:
    """A source that decodes image files to 3 x size x size, once."""
    cache, size = request.cache, request.size
    decoded = {split: cache.with_name(f"{cache.name}_{split}.pt") for split in files}
    paths = {split: [file for file, _ in items] for split, items in files.items()}
    return Source(
        class_names=class_names,
        channels=3,
        image_size=size,
        labels={
            split: torch.tensor([label for _, label in items]) for split, items in files.items()
        },
        read={split: partial(_read_tree, paths[split], size, decoded[split]) for split in files},
        normalisation=normalisation,
        cache=cache,
        decoded=decoded,
        contents={
            split: partial(_hash_tree, paths[split], decoded[split].with_suffix(".hashes.pt"))
            for split in files
        },
    )


def _read_tree(files: Sequence[Path], size: int, cache_file: Path) -> Tensor:
    key = decode.fingerprint(files, size)
    return cached(cache_file, key, lambda: {"images": decode.decode(files, size)})["images"]


def _hash_tree(files: Sequence[Path], cache_file: Path) -> Tensor:
    key = decode.fingerprint(files)
    tensors = cached(
        cache_file, key, lambda: {"hashes": decode.hash_files(files)}, level=logging.INFO
    )  # quick without it, and where it cannot be written, the pixels' warns
    return tensors["hashes"]


def _locate(
    request: DataRequest, roots: Sequence[Path], advice: str, test: Sequence[str] = ("val",)
) -> dict[SplitName, Path]:
    """The folder of each split, in the first of `roots` that has all of them."""
    for root in roots:
        if folders := _split_folders(root, request.splits, test):
            return folders
    wanted = [*(["train"] if "train" in request.splits else []), " or ".join(test)]
    raise UserError(
        f"no data: looked for the folders {' and '.join(wanted)} in "
        f"{' and in '.join(map(str, roots))}; {advice}, or give another --data_path"
    )


def _split_folders(
    root: Path, splits: Sequence[SplitName], test: Sequence[str]
) -> dict[SplitName, Path] | None:
    """The folder of each split in `root`, or None if one is missing; `test`: names, best first."""
    choices: dict[SplitName, Sequence[str]] = {"train": ("train",), "test": test}
    folders: dict[SplitName, Path] = {}
    for split in splits:
        found = [root / name for name in choices[split] if (root / name).is_dir()]
        if not found:
            return None
        folders[split] = found[0]
    return folders


def _with_classes(source: Source, count: int, root: Path) -> Source:
    if len(source.class_names) != count:
        raise UserError(
            f"{root} has {len(source.class_names)} class folders instead of {count}: "
            "give another --data_path, or --dataset folder"
        )
    return source


def _words(root: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    """A readable name for each wnid, from the list that ImageNet comes with, if it is there."""
    words: dict[str, str] = {}
    for file in (root / "words.txt", root / "LOC_synset_mapping.txt"):
        if file.is_file():
            lines = (line.split(maxsplit=1) for line in _lines(file))
            words |= {line[0]: line[1].split(",")[0] for line in lines if len(line) == 2}
    return tuple(words.get(wnid, wnid) for wnid in wnids)


def _lines(file: Path) -> list[str]:
    """The lines of a text file, empty ones left out."""
    try:
        text = file.read_text("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _some(names: set[str]) -> str:
    """The first few of `names`, for a message of one line."""
    first = sorted(names)[:5]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """torchvision sets no timeout, and a network that drops packets would hang it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
