"""Open a distilled set of any code: what its file proves, what the user says, what is refused.

Nothing is guessed in silence: whatever a set's file does not hold is printed, and kept in the set
as config["imported"].
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.core.errors import UserError
from utils.core.files import torch_load
from utils.data.augment import DSA_STRATEGY
from utils.data.dataset import DATASETS, find_dataset
from utils.data.distilled import IMPORTED, SyntheticSet
from utils.data.foreign.condensation import read_experiments
from utils.data.foreign.content import (
    LABELS_ARE,
    SPACES,
    Content,
    Reader,
    Stated,
    as_labels,
    as_rate,
    described,
)
from utils.data.foreign.formations import decoded, read_pair
from utils.data.foreign.labels import read_labels
from utils.data.foreign.named import read_named, read_npz, read_safetensors
from utils.data.foreign.pictures import read_pictures
from utils.data.foreign.space import brought
from utils.data.foreign.trajectory import read_folder, read_tensor
from utils.data.imagenet_subsets import IMAGENET_SUBSETS
from utils.data.source import Source, SplitName
from utils.data.spec import KNOWN
from utils.data.values import shown

USUAL_LR = 0.01  # of networks on images without a learned rate, in DC, MTT and others
USUAL_BATCH = 256
OWN_KEYS = {"config", "class_names"}  # of the sets of this code
OF_TORCH: tuple[Reader, ...] = (read_tensor, read_experiments, read_pair, read_named)
BY_SUFFIX: dict[str, Callable[[Path], Content]] = {
    ".npz": read_npz,
    ".safetensors": read_safetensors,
}
# Words in names of files and folders that stand for a data set.
WORDS = {name.lower(): name for name in KNOWN if name not in ("digits", "ImageNet")}
WORDS |= {"tinyimagenet": "Tiny"}
SQUARE_ONLY = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "SVHN")  # in one size alone
# Of numpy, in the accuracies that DC stores beside its images: plain numbers, and no code.
_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS: list[Any] = [
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def open_set(path: Path, stated: Stated) -> SyntheticSet:
    """Read the set in `path`, of this code or of another, and print what was assumed.

    UserError in one line for files that are damaged or hold anything else than tensors and plain
    values, and where two readings are possible, with the flag that decides.
    """
    found = _read(path, stated)
    if isinstance(found, SyntheticSet):
        distilled = found
        if stated.flags:
            print(f"{' '.join(stated.flags)}: no effect here, the distilled set says it itself")
    else:
        distilled = _made(found, path, stated)
    for line in provenance(distilled):
        print(line)
    return distilled


def provenance(distilled: SyntheticSet) -> list[str]:
    """Say in lines which file of another code a set is from and what was assumed; else nothing."""
    imported = distilled.config.get(IMPORTED)
    if imported is None:
        return []
    first = f"imported from {shown(imported['file'])}: {shown(imported['format'])}"
    return [first, *(f"  {shown(line)}" for line in imported["said"])]


def _read(path: Path, stated: Stated) -> SyntheticSet | Content:
    if path.is_dir():
        tensors = any(path.glob("*.pt"))
        return read_folder(path, stated) if tensors else read_pictures(path)
    if path.suffix in BY_SUFFIX:
        if not path.is_file():
            raise UserError(f"no distilled set at {path}: there is no such file")
        return BY_SUFFIX[path.suffix](path)
    if not path.exists():
        raise UserError(f"no distilled set at {path}; distill_att.py writes distilled_<tag>.pt")
    value = torch_load(path, also=NUMPY_NUMBERS)
    if isinstance(value, dict) and OWN_KEYS & value.keys():
        return SyntheticSet.from_values(value, path)
    for read in OF_TORCH:
        if (content := read(path, value, stated)) is not None:
            return content
    raise UserError(
        f"{shown(path)} is not a distilled set: it holds {described(value)}; known are sets of "
        'this code, a tensor of images, a dict with "data" or "images", and a list [images, labels]'
    )


def _made(content: Content, path: Path, stated: Stated) -> SyntheticSet:
    """Make a set of what a file holds and what is said."""
    taken = _told(content, stated)
    said = [*content.said, *(f"the file says: {name} {value}" for name, value in taken.items())]
    content, stated = _with_files(content, stated), replace(stated, **taken)
    factor = _factor(content, path, stated)
    dataset, why = _dataset(content, path, stated)
    said.append(f"data set: {dataset}{f' {stated.subset}' if stated.subset else ''}, {why}")
    source = _find(dataset, content, path, stated)
    wnids = IMAGENET_SUBSETS.get(stated.subset or "", ())
    labels = read_labels(content, path, source.class_names, wnids, stated.labels_are)
    seen = brought(content, path, stated, source)
    said += [*seen.said, *labels.said]
    order = labels.classes.argsort(stable=True)
    if not torch.equal(order, torch.arange(len(order))):
        said.append("images: put in the order of their classes")
    images, classes = seen.images[order], labels.classes[order]
    soft = None if labels.soft is None else labels.soft[order]
    if factor > 1:
        images, copies = decoded(images, factor, path), factor**2
        classes = classes.repeat_interleave(copies)
        soft = None if soft is None else soft.repeat_interleave(copies, 0)
        stored = len(order) // len(source.class_names)
        said.append(f"--factor {factor}: {stored} stored images a class hold {stored * copies}")
    lr, whose = _rate(content, stated)
    model = stated.model or usual_network(source.image_size)
    said += [
        f"rate: {lr:.6g}, {whose}",
        f"network: {model}, {'as said' if stated.model else 'as the field has it at this size'}; "
        f"batches of {USUAL_BATCH} and DSA, unless flags say otherwise",
    ]
    iteration = re.fullmatch(r"\D*_(\d{1,9})\.pt", path.name)
    return SyntheticSet(
        images=images,
        labels=classes,
        syn_lr=lr,
        dataset=dataset,
        subset=stated.subset,
        model=model,
        ipc=len(classes) // len(source.class_names),
        class_names=source.class_names,
        normalisation=seen.normalisation,
        iteration=int(iteration[1]) if iteration else 0,
        set="ema" if "ema" in re.split("[^a-z]", path.stem) else "raw",
        config={
            "data_path": stated.data_path,
            "res": source.image_size,
            "dsa": True,
            "dsa_strategy": DSA_STRATEGY,
            "batch_train": USUAL_BATCH,
            IMPORTED: {"file": path.name, "format": content.format, "said": said},
        },
        soft_labels=soft,
        label_form=labels.form,
    )


def _told(content: Content, stated: Stated) -> dict[str, Any]:
    """What the file says of itself and the user does not, as far as it has no place in Content."""
    known = {name: value for name, value in content.known.items() if value is not None}
    missing = {name: value for name, value in known.items() if getattr(stated, name) is None}
    for name, choices in (("space", SPACES), ("labels_are", LABELS_ARE), ("dataset", DATASETS)):
        if missing.get(name) not in (None, *choices):
            raise UserError(
                f"the file says {name} {missing[name]!r:.40}; choices: {', '.join(choices)}, by "
                f"--{name}"
            )
    return {name: value for name, value in missing.items() if name not in ("lr", "space")}


def _with_files(content: Content, stated: Stated) -> Content:
    """Take labels and rate from the files that are named for them."""
    if stated.label_dir is not None:
        file = Path(stated.label_dir)
        labels = as_labels(torch_load(file), file, len(content.images))
        content = replace(content, labels=labels, soft_labels=None, class_names=())
    if stated.lr_dir is not None:
        file = Path(stated.lr_dir)
        content = replace(content, lr=as_rate(torch_load(file), file))
    return content


def _factor(content: Content, path: Path, stated: Stated) -> int:
    if content.is_packed and stated.factor is None:
        raise UserError(
            f"{shown(path)} holds {content.format}: no such file says whether an image holds "
            "several smaller ones: --factor 2 where four, --factor 1 where it is one"
        )
    return stated.factor or 1


def _dataset(content: Content, path: Path, stated: Stated) -> tuple[str, str]:
    """Which data set the images are of, and why."""
    _, channels, side, _ = content.images.shape
    shape = f"{channels}x{side}x{side}"
    if stated.dataset is not None:
        name, why = stated.dataset, "as said"
    else:
        words = {word for part in path.parts for word in re.split(r"[_.-]", part.lower())}
        named = {WORDS[word] for word in words | {*map(str.lower, path.parts)} if word in WORDS}
        if len(named) != 1:
            shapes = {each: facts.spec for each, facts in KNOWN.items()}
            same = (channels, side)
            likely = [each for each, of in shapes.items() if (of.channels, of.side) == same]
            raise UserError(
                f"{shown(path)}: images of {shape} of an unknown data set: --dataset says which"
                + (f", such as {', '.join(likely)}" if likely else "")
            )
        (name,), why = named, "as the path says"
    if name in KNOWN and not _fits(name, channels, side):
        spec = KNOWN[name].spec
        raise UserError(
            f"{shown(path)}: images of {shape} are not of {name} ({spec.channels}x{spec.side}x"
            f"{spec.side}): --dataset says which data set it is"
        )
    return name, why


def _fits(dataset: str, channels: int, side: int) -> bool:
    spec = KNOWN[dataset].spec
    return channels == spec.channels and (dataset not in SQUARE_ONLY or side == spec.side)


def _find(dataset: str, content: Content, path: Path, stated: Stated) -> Source:
    """Find the data set with images of that size, with training images where mean and std are
    theirs.
    """
    _, channels, side, _ = content.images.shape
    fits = dataset not in KNOWN or dataset == "digits"
    splits: tuple[SplitName, ...] = ("train", "test") if fits else ("test",)
    source = find_dataset(
        dataset, data_path=stated.data_path, subset=stated.subset, res=side, splits=splits
    )
    if source.channels != channels:
        raise UserError(
            f"{shown(path)}: its images have {channels} channels, those of {stated.data_path} "
            f"{source.channels}"
        )
    return source


def usual_network(side: int) -> str:
    """The ConvNet of the field by the side of images: D3 at 28 and 32, D4 at 64, D5 from 128 on."""
    return f"ConvNetD{min(max(round(math.log2(side)) - 2, 1), 5)}"


def _rate(content: Content, stated: Stated) -> tuple[float, str]:
    if stated.lr is not None:
        return stated.lr, "as said"
    if content.lr is not None:
        return content.lr, "the file's"
    return USUAL_LR, "as the field trains on images without a learned rate; --lr says another"
