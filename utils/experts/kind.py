"""Which experts a call needs: their folder, the command that makes them, which are there."""

import shlex
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from networks import NETWORKS, canonical_name, folder_name
from utils.compute.cost import fitting_network, network_cost
from utils.core.errors import UserError
from utils.data.identity import DataIdentity
from utils.data.spec import is_native, side_of
from utils.experts.buffer import ExpertBuffer
from utils.experts.files import buffer_files, check_images, kept_experts


@dataclass(frozen=True)
class ExpertKind:
    """What experts are trained on and for: the settings that name their folder."""

    dataset: str
    subset: str | None
    res: int
    zca: bool
    model: str
    data_path: str
    flat: bool = False
    easy_first: bool = False
    val_fraction: float = 0.0
    fit: str = "crop"
    test_fraction: float = 0.0

    @classmethod
    def of(cls, options: Any) -> "ExpertKind":
        """The kind that the options of buffer.py or distill_att.py ask for."""
        values = {field.name: getattr(options, field.name) for field in fields(cls)}
        return cls(**values | {"res": side_of(options.dataset, options.res)})

    @property
    def ordinary(self) -> "ExpertKind":
        """The same trained on all images in every epoch."""
        return replace(self, easy_first=False)

    def folder(self, buffer_path: str) -> Path:
        """The field's folder of these experts.

        `_NO_ZCA` marks CIFAR without whitening, as in the field; data sets that the field does not
        whiten get `_ZCA` when they are. `_FLAT` marks sharpness-aware steps, `_EASY_FIRST` easy
        images first, `_VAL<fraction>` experts that have not seen the images held out; so do
        `_TEST<fraction>`, and `_PAD` and `_SQUEEZE` for other pixels.
        """
        whitened_in_the_field = self.dataset in ("CIFAR10", "CIFAR100")
        marks = {
            "_NO_ZCA": whitened_in_the_field and not self.zca,
            "_ZCA": not whitened_in_the_field and self.zca,
            "_FLAT": self.flat,
            "_EASY_FIRST": self.easy_first,
            f"_VAL{self.val_fraction}": self.val_fraction > 0,
            f"_TEST{self.test_fraction}": self.test_fraction > 0,
            f"_{self.fit.upper()}": self.fit != "crop",
        }
        name = self.dataset + "".join(mark for mark, has in marks.items() if has)
        inner = {
            "ImageNet": [str(self.subset), str(self.res)],
            "folder": [Path(self.data_path).resolve().name, str(self.res)],
        }.get(self.dataset, [] if is_native(self.dataset, self.res) else [str(self.res)])
        return Path(buffer_path, name, *inner, folder_name(self.model))

    def command(
        self, buffer_path: str, script: str = "buffer.py", *, train_epochs: int | None = None
    ) -> str:
        """The command line that makes these experts, or that calls another script with them.

        `train_epochs` is their length where the script's default is not meant.
        """
        flags = {
            "dataset": self.dataset,
            "subset": self.subset,
            "res": None if is_native(self.dataset, self.res) else self.res,
            "model": self.model,
            "buffer_path": buffer_path,
            "data_path": self.data_path,
            "val_fraction": self.val_fraction or None,
            "test_fraction": self.test_fraction or None,
            "fit": None if self.fit == "crop" else self.fit,
            "train_epochs": train_epochs,
        }
        given = [
            f"--{name} {shlex.quote(str(value))}"
            for name, value in flags.items()
            if value is not None
        ]
        switches = {"--zca": self.zca, "--flat": self.flat, "--easy_first": self.easy_first}
        given += [switch for switch, is_on in switches.items() if is_on]
        return " ".join([f"python {script}", *given])


class NoExperts(UserError):
    """There are no experts of a kind, or their files are not complete yet."""


def find_experts(
    buffer_path: str,
    kind: ExpertKind,
    *,
    model_fixed: bool,
    zca_fixed: bool,
    command: str | None = None,
) -> ExpertKind:
    """Find the experts of `kind`, under either name of the same architecture.

    A model or zca that is not fixed (it came from a YAML file or a default, not from a flag) may
    differ where only experts of another kind are there; nothing else may. NoExperts where there
    are none names the `command` that makes them.
    """
    same = [name for name in NETWORKS if canonical_name(name) == canonical_name(kind.model)]
    others = [] if model_fixed else [name for name in NETWORKS if name not in same]
    zcas = [kind.zca] if zca_fixed else [kind.zca, not kind.zca]
    for models in ([kind.model, *same], others):
        for zca, model in product(zcas, models):
            candidate = replace(kind, zca=zca, model=model)
            if buffer_files(candidate.folder(buffer_path)):
                return candidate
    folder, command = kind.folder(buffer_path), command or kind.command(buffer_path)
    if kept := kept_experts(folder, "finished") | kept_experts(folder, "unfinished"):
        raise NoExperts(
            f"no buffer file is complete in {folder} yet, where {len(kept)} experts are begun or "
            f"finished; wait for buffer.py, or go on with: {command}"
        )
    found = ""
    variants = {
        f"--{'no_' * kind.flat}flat": replace(kind, flat=not kind.flat),
        f"--{'no_' * kind.easy_first}easy_first": replace(kind, easy_first=not kind.easy_first),
    }
    for flag, other in variants.items():
        if buffer_files(there := other.folder(buffer_path)):
            found += f", but in {there}, for {flag}"
    raise NoExperts(f"no expert buffers in {folder}{found}; make them with: {command}")


def open_experts(
    asked: ExpertKind,
    buffer_path: str,
    *,
    images: DataIdentity,
    channels: int,
    num_classes: int,
    model_fixed: bool,
    zca_fixed: bool,
    command: str | None = None,
    max_files: int | None = None,
    max_experts: int | None = None,
    skip_bad: bool = False,
) -> tuple[ExpertKind, ExpertBuffer]:
    """Find experts as `find_experts` does and check them all; also of what kind they are.

    Two names of one architecture are one kind: the found one then has the name that was asked for.
    UserError where the network does not fit the images, where the experts were trained on others
    than `images`, and as of ExpertBuffer.
    """
    shape = {"channels": channels, "num_classes": num_classes, "image_size": asked.res}
    if model_fixed:
        network_cost(asked.model, **shape)  # refused rather than sent to make experts of it
    found = find_experts(
        buffer_path, asked, model_fixed=model_fixed, zca_fixed=zca_fixed, command=command
    )
    network = fitting_network(found.model, **shape)
    check_images(found.folder(buffer_path), images)
    experts = ExpertBuffer(
        found.folder(buffer_path),
        [param.shape for param in network.parameters()],
        max_files=max_files,
        max_experts=max_experts,
        skip_bad=skip_bad,
    )
    if canonical_name(found.model) == canonical_name(asked.model):
        found = replace(found, model=asked.model)
    return found, experts
