"""Find the files of each data set and check them: one function per data set.

Finding is quick and refuses what is wrong; pixels are read only when a split's `read` is called.
"""

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import utils.data.decode as decode
from utils.core.cache import cached
from utils.core.errors import UserError
from utils.data.decode import Decoding
from utils.data.folders import class_names as class_folders
from utils.data.folders import list_images, some
from utils.data.imagenet_subsets import IMAGENET_SUBSETS
from utils.data.layout import Files, lay_out, read_folders
from utils.data.normalisation import Normalisation
from utils.data.source import DataRequest, Source, SplitName
from utils.data.spec import KNOWN
from utils.data.survey import check_decoding, choose_decoding, describe, survey

CIFAR_NORMALISATION = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
# As in DC's code (Zhao et al., ICLR 2021), which the field goes on using.
TORCHVISION_NORMALISATIONS = {
    "MNIST": Normalisation((0.1307,), (0.3081,)),
    "FashionMNIST": Normalisation((0.2861,), (0.3530,)),
    "SVHN": Normalisation((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
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
    _check_side(request)
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


def _check_side(request: DataRequest) -> None:
    """UserError where images are asked for in another size than their own."""
    side = KNOWN[request.name].spec.side
    if request.size != side:
        raise UserError(
            f"--res {request.size} does not fit {request.name}, whose images are {side}x{side}: "
            "leave it out"
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


def find_torchvision(request: DataRequest) -> Source:
    """MNIST and FashionMNIST, 1x28x28, and SVHN, 3x32x32: torchvision's files in `root`.

    They are downloaded where they are missing.
    """
    from torchvision import datasets  # slow to import, needed only here

    _check_side(request)
    name, root, spec = request.name, request.root, KNOWN[request.name].spec
    files: type[Any] = getattr(datasets, name)
    splits = {split: _torchvision_split(files, root, split) for split in request.splits}
    for split, images in splits.items():
        shape = (spec.channels, spec.side, spec.side)
        pixels, labels = _torchvision_pixels(images), torch.as_tensor(_torchvision_labels(images))
        if pixels.shape[1:] != shape or len(labels) != len(pixels) or len(labels) == 0:
            raise UserError(f"the {split} images of {name} in {root} are damaged: fetch them again")
    return Source(
        class_names=tuple(map(str, getattr(files, "classes", range(spec.classes)))),
        channels=spec.channels,
        image_size=spec.side,
        labels={
            split: torch.as_tensor(_torchvision_labels(images)).long()
            for split, images in splits.items()
        },
        read={split: partial(_torchvision_pixels, images) for split, images in splits.items()},
        normalisation=TORCHVISION_NORMALISATIONS[name],
        cache=request.cache,
    )


def _torchvision_split(files: type[Any], root: Path, split: SplitName) -> Any:
    """torchvision's data set object; downloads what is missing."""
    part = {"split": split} if files.__name__ == "SVHN" else {"train": split == "train"}
    try:
        with _network_timeout(seconds=20):
            return files(root, download=True, **part)
    except Exception as error:  # what reads the files raises whatever a broken one leads it to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"no complete {files.__name__} in {root}, where torchvision's files were looked for, "
            f"and the download failed ({reason}); put them there, or delete what is damaged"
        ) from error


def _torchvision_labels(images: Any) -> Any:
    return images.labels if hasattr(images, "labels") else images.targets


def _torchvision_pixels(images: Any) -> Tensor:
    """Images (N, H, W), or (N, C, H, W), as (N, C, H, W)."""
    pixels = torch.as_tensor(images.data)
    return pixels.unsqueeze(1) if pixels.ndim == 3 else pixels


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
        raise UserError(f"{annotations} lists no image of {some(missing)}; unzip it again")
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
    """The user's pictures and arrays at C x 32 x 32 (or `size`), as `lay_out` finds them.

    Classes are the same in all splits, sorted by name, or by value where all names are numbers.
    Files are read as `choose_decoding` chooses, or as the request says.
    """
    layout, given = lay_out(request), request.decoding
    files = [file for items in layout.files.values() for file, _ in items]
    splits = "_".join(layout.files)
    cache_file = request.cache.with_name(f"{request.cache.name}_{splits}.looks.pt")
    seen = survey(files, cache_file, keep_marked=None if given is None else given.keep_marked)
    if given is None:
        trained = slice(0, len(layout.files["train"])) if "train" in layout.files else slice(None)
        decoding = choose_decoding(seen, seen.of(trained), size=request.size, fit=request.fit)
    else:
        decoding = given
        check_decoding(seen, decoding)
    source = _tree_source(request, layout.files, layout.class_names, None, decoding)
    return replace(source, lines=(*layout.lines, *describe(seen, decoding)))


def _class_folders(
    request: DataRequest, folders: dict[SplitName, Path], normalisation: Normalisation
) -> Source:
    """A source whose splits hold the same class folders, the class names."""
    layout = read_folders(folders)
    return _tree_source(request, layout.files, layout.class_names, normalisation)


def _tree_source(
    request: DataRequest,
    files: dict[SplitName, Files],
    class_names: tuple[str, ...],
    normalisation: Normalisation | None,
    decoding: Decoding | None = None,
) -> Source:
    """A source that decodes files once, to 3 x size x size bytes where no `decoding` is given."""
    cache = request.cache
    how = decoding or Decoding(request.size, fit=request.fit)
    decoded = {split: cache.with_name(f"{cache.name}_{split}.pt") for split in files}
    paths = {split: [file for file, _ in items] for split, items in files.items()}
    return Source(
        class_names=class_names,
        channels=how.channels,
        image_size=how.size,
        labels={
            split: torch.tensor([label for _, label in items]) for split, items in files.items()
        },
        read={split: partial(_read_tree, paths[split], how, decoded[split]) for split in files},
        normalisation=normalisation,
        cache=cache,
        decoded=decoded,
        contents={
            split: partial(_hash_tree, paths[split], decoded[split].with_suffix(".hashes.pt"))
            for split in files
        },
        decoding=how,
    )


def _read_tree(files: Sequence[Path], decoding: Decoding, cache_file: Path) -> Tensor:
    key = decode.fingerprint(files, decoding)
    return cached(cache_file, key, lambda: {"images": decode.decode(files, decoding)})["images"]


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


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """torchvision sets no timeout, and a network that drops packets would hang it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
