"""Know images again: the digest that files made from them carry, and what differs where it does."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from utils.core import ranks
from utils.core.cache import digest
from utils.core.errors import UserError
from utils.data.decode import Decoding
from utils.data.source import Source, SplitName
from utils.data.spec import KNOWN

KEY = "data"  # of the identity in files that carry one
PIXELS = "pixels"  # in it, where it is not as usual
SHOWN = 8  # characters of a digest in a message


@dataclass(frozen=True)
class Part:
    """One split: how many images, and a digest of their content, labels and class names."""

    images: int
    digest: str


@dataclass(frozen=True)
class DataIdentity:
    """What tells data sets apart, wherever they lie.

    Attributes:
        path: the --data_path that they were found by; it is shown, not compared.
        classes: how many.
        class_names: by label, where they are the user's own; else empty, since the names of Tiny
            and ImageNet come from optional files.
        normalisation: how pixels are normalised where they are not whitened.
        parts: by split. "train" is without the images held out; its digest knows which those are.
        pixels: how files become pixels, where that is not as RGB of 8 bits, cut to their middle
            (`Decoding.to_dict`).
    """

    path: str
    classes: int
    class_names: tuple[str, ...]
    normalisation: str
    parts: Mapping[str, Part]
    pixels: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Convert to what JSON, YAML and `torch.load(weights_only=True)` read back."""
        values = asdict(self) | {"class_names": list(self.class_names)}
        return {name: value for name, value in values.items() if name != PIXELS or value}

    @classmethod
    def from_dict(cls, values: Any) -> "DataIdentity":
        """Undo `to_dict`; ValueError for anything else."""
        if not is_identity(values):
            raise ValueError("no identity of a data set")
        parts = {split: Part(**part) for split, part in values["parts"].items()}
        return cls(**values | {"class_names": tuple(values["class_names"]), "parts": parts})

    def check_same_as(
        self, before: Any, splits: Collection[SplitName], *, what: str, advice: str
    ) -> None:
        """UserError where `what` was made from other images in `splits` than these.

        `before` is the identity that it carries. Where it is None, as in files of other codes and
        of earlier versions, one line says that nothing can be compared. The error names both,
        what differs, and the `advice`.
        """
        if before is None:
            print(f"{what}: made from images that are not recorded, taken for those of {self.path}")
            return
        try:
            theirs = DataIdentity.from_dict(before)
        except ValueError:
            raise UserError(f"{what}: its record of images is damaged; {advice}") from None
        both = [split for split in splits if split in self.parts and split in theirs.parts]
        if difference := self._difference(theirs, both):
            raise UserError(
                f"{what}: made from {theirs._shown(self, both)}, not from "
                f"{self._shown(theirs, both)}: {difference}; {advice}"
            )

    def _difference(self, before: "DataIdentity", splits: Collection[SplitName]) -> str | None:
        """Say how these images differ from those of `before`; None if they do not."""
        if self.classes != before.classes:
            return f"{self.classes} classes instead of {before.classes}"
        for name, other in zip(self.class_names, before.class_names, strict=False):
            if name != other:
                return f"class {name} instead of {other}"
        for split in splits:
            now, then = self.parts[split], before.parts[split]
            if now.images != then.images:
                return f"{now.images} {split} images instead of {then.images}"
            if now.digest != then.digest:
                return f"as many {split} images, of other content, labels or order"
        ours, theirs = (Decoding.from_dict(0, each.pixels) for each in (self, before))
        if ours != theirs:
            return f"pictures read as {ours} instead of {theirs}"
        if self.normalisation != before.normalisation:
            return f"normalised by {self.normalisation} instead of {before.normalisation}"
        return None

    def _shown(self, other: "DataIdentity", splits: Collection[SplitName]) -> str:
        """Name these images by their path and the first digest in which `other` differs."""
        digests = [(self.parts[split].digest, other.parts[split].digest) for split in splits]
        own = next((ours for ours, theirs in digests if ours != theirs), None)
        return f"the images of {self.path}" + (f" (digest {own[:SHOWN]})" if own else "")


def identity_of(source: Source, path: str) -> DataIdentity:
    """Compute the identity of what `find_dataset` found by the --data_path `path`.

    The main process reads the images, the others get what it found. UserError where one cannot be
    read.
    """
    identity = ranks.from_main(_identify(source, path) if ranks.is_main() else None)
    assert identity is not None
    return identity


def _identify(source: Source, path: str) -> DataIdentity:
    names = () if source.name in KNOWN else source.class_names
    constants = source.normalisation
    # Images held out are part of the training images on disk.
    splits = [split for split in source.labels if split in source.read]
    return DataIdentity(
        path=path,
        classes=len(source.class_names),
        class_names=names,
        normalisation=(
            f"mean {constants.mean} std {constants.std}"
            if constants
            else "mean and std of the training images"
        ),
        parts={
            split: Part(len(source.labels[split]), _digest_of(source, split, names))
            for split in splits
        },
        pixels=source.decoding.to_dict() if source.decoding else {},
    )


def _digest_of(source: Source, split: SplitName, names: Collection[str]) -> str:
    tensors = {"content": source.content(split), "labels": source.labels[split]}
    if split in source.parts:
        tensors["members"] = source.parts[split]
    state = hashlib.blake2b("\0".join(names).encode(), digest_size=16)
    state.update(digest(tensors).encode())
    return state.hexdigest()


def is_identity(values: Any) -> bool:
    """Whether it is what `DataIdentity.to_dict` returns."""
    return (
        isinstance(values, dict)
        and values.keys() | {PIXELS} == DataIdentity.__dataclass_fields__.keys()
        and _is_decoding(values.get(PIXELS, {}))
        and all(isinstance(values[name], str) for name in ("path", "normalisation"))
        and isinstance(values["classes"], int)
        and isinstance(values["class_names"], list)
        and isinstance(values["parts"], dict)
        and all(_is_part(part) for part in values["parts"].values())
    )


def _is_decoding(value: Any) -> bool:
    try:
        Decoding.from_dict(0, value)
    except ValueError:
        return False
    return True


def _is_part(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == Part.__dataclass_fields__.keys()
        and isinstance(value["images"], int)
        and isinstance(value["digest"], str)
    )
