"""A data set that was found but not yet read, and images held out of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.core.rng import stream
from utils.data.decode import Decoding
from utils.data.normalisation import Normalisation

SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True)
class DataRequest:
    """What is looked for: a data set's `splits` under the folder `root`, with images of a side."""

    name: str
    subset: str | None
    root: Path
    splits: tuple[SplitName, ...]
    size: int
    fit: str = "crop"
    test_fraction: float = 0.0  # of the training images, where there are no test images
    decoding: Decoding | None = None  # how pictures must be read; None: as they need it

    @property
    def cache(self) -> Path:
        """The beginning of the names of files that keep what is derived from the images."""
        fit = self.fit if self.fit != "crop" else None
        divided = f"test{self.test_fraction}" if self.test_fraction else None
        name = "_".join(filter(None, (self.name, self.subset, str(self.size), fit, divided)))
        return self.root / ".cache" / name


@dataclass(frozen=True)
class Source:
    """A data set that was found but not yet read.

    Attributes:
        class_names: by label.
        channels, image_size: what the images will have; they are square.
        labels: for each split asked for, int64 (N,).
        read: for each split on disk that was asked for, a function that returns its pixels (N, C,
            H, W), uint8 or float32 in [0, 1].
        parts: where images are held out, which of those on disk "train" and "val" consist of.
        normalisation: the field's constants, or None: computed from the training images.
        cache: what is derived from the images is kept in `<cache>_<what>.pt`; None: nowhere.
        decoded: for each split of picture files, where its pixels are kept once they are decoded.
        contents: for splits whose pixels depend on the size or are slow to read, a function that
            returns what their images are told apart by, uint8 (N, ...).
        val_fraction: the part of the training images that has been held out of them.
        decoding: how files become pixels; None where there are no files to decode.
        lines: what was found, and what is done to it, beside what `describe` says of all data sets.
        name, subset: what it was asked for as.
    """

    class_names: tuple[str, ...]
    channels: int
    image_size: int
    labels: dict[SplitName, Tensor]
    read: dict[SplitName, Callable[[], Tensor]]
    normalisation: Normalisation | None = None
    cache: Path | None = None
    decoded: dict[SplitName, Path] = field(default_factory=dict)
    contents: dict[SplitName, Callable[[], Tensor]] = field(default_factory=dict)
    parts: dict[SplitName, Tensor] = field(default_factory=dict)
    val_fraction: float = 0.0
    decoding: Decoding | None = None
    lines: tuple[str, ...] = ()
    name: str = ""
    subset: str | None = None

    @property
    def value_bytes(self) -> int:
        """Bytes of a pixel's value while pixels are read."""
        return self.decoding.value_bytes if self.decoding else 1

    def describe(self) -> str:
        """Say in lines what was found."""
        names = ", ".join(self.class_names[:5]) + ", ..." * (len(self.class_names) > 5)
        counts = [f"{len(labels)} {split}" for split, labels in self.labels.items()]
        shape = f"{self.channels}x{self.image_size}x{self.image_size}"
        title = " ".join(filter(None, (self.name, self.subset)))
        found = f"found {title}: {len(self.class_names)} classes ({names}), "
        return "\n  ".join([f"{found}{', '.join(counts)} images of {shape}", *self.lines])

    @property
    def zca_cache(self) -> Path | None:
        """Where a whitening fitted on the training images is kept."""
        held_out = f"_val{self.val_fraction}" if self.val_fraction else ""
        return self.cache and self.cache.with_name(f"{self.cache.name}{held_out}_zca.pt")

    def hold_out(self, fraction: float) -> "Source":
        """Make that part of the training images of every class a split of its own, "val".

        Which images depends on the labels alone, so that experts and distillations of one data set
        hold out the same.
        """
        whole = self.labels["train"]
        parts = divide(whole, fraction, self.class_names, "val")
        labels = {split: whole[members] for split, members in parts.items()}
        return replace(self, labels=self.labels | labels, parts=parts, val_fraction=fraction)

    def content(self, split: SplitName) -> Tensor:
        """Read what the images of a split on disk are told apart by, uint8 (N, ...).

        Their pixels; of picture files a hash of each, so that nothing is decoded.
        """
        return self.contents.get(split, self.read[split])()

    def pixels(self, splits: Iterable[SplitName]) -> dict[SplitName, Tensor]:
        """Read the pixels of `splits`, uint8 (N, C, H, W) each; training images once."""
        on_disk: dict[SplitName, SplitName] = {
            split: "train" if split in self.parts else split for split in splits
        }
        read = {split: self.read[split]() for split in dict.fromkeys(on_disk.values())}
        return {
            split: read[place][self.parts[split]] if split in self.parts else read[place]
            for split, place in on_disk.items()
        }


def divide(
    labels: Tensor, fraction: float, class_names: Sequence[str], held_out: SplitName
) -> dict[SplitName, Tensor]:
    """Divide images by their `labels`: which are left for training, which are `held_out`.

    Of every class that part, rounded, but at least one image on either side.
    """
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(class_names):
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            raise UserError(
                f"--{held_out}_fraction {fraction}: class {name} has {len(members)} training "
                f"images, too few to hold one out and keep one; leave --{held_out}_fraction out"
            )
        part = min(max(round(fraction * len(members)), 1), len(members) - 1)
        drawn = torch.randperm(len(members), generator=stream(0, held_out, label))[:part]
        is_held_out[members[drawn]] = True
    return {
        "train": (~is_held_out).nonzero().flatten(),
        held_out: is_held_out.nonzero().flatten(),
    }
