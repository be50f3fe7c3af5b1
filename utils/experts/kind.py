"""Which experts a call asks for: their folder, the command that makes them, which are there."""

import shlex
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Protocol

from networks import NETWORKS, canonical_name
from utils.core.errors import UserError
from utils.experts.files import buffer_files

NATIVE_RES = {"digits": 8, "CIFAR10": 32, "CIFAR100": 32, "Tiny": 64}


class TrainedOn(Protocol):
    """The options of a call that say which experts it is about; without `res` the data set's."""

    @property
    def dataset(self) -> str: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def res(self) -> int | None: ...
    @property
    def zca(self) -> bool: ...
    @property
    def model(self) -> str: ...
    @property
    def data_path(self) -> str: ...
    @property
    def flat(self) -> bool: ...
    @property
    def val_fraction(self) -> float: ...


@dataclass(frozen=True)
class ExpertKind:
    """What experts are trained on and for: the part of their settings that names their folder."""

    dataset: str
    subset: str | None
    res: int
    zca: bool
    model: str
    data_path: str
    flat: bool = False
    val_fraction: float = 0.0

    @classmethod
    def of(cls, options: TrainedOn) -> "ExpertKind":
        """The experts that a call with `options` makes or asks for."""
        return cls(
            dataset=options.dataset,
            subset=options.subset,
            res=options.res or NATIVE_RES[options.dataset],
            zca=options.zca,
            model=options.model,
            data_path=options.data_path,
            flat=options.flat,
            val_fraction=options.val_fraction,
        )

    def folder(self, buffer_path: str) -> Path:
        """The field's folder of these experts.

        `_NO_ZCA` marks CIFAR without whitening, as in the field; the data sets that the field does
        not whiten get `_ZCA` when they are. `_FLAT` marks experts of sharpness-aware steps, `_VAL`
        and the fraction those that have not seen the images held out.
        """
        whitened_in_the_field = self.dataset in ("CIFAR10", "CIFAR100")
        marks = {
            "_NO_ZCA": whitened_in_the_field and not self.zca,
            "_ZCA": not whitened_in_the_field and self.zca,
            "_FLAT": self.flat,
            f"_VAL{self.val_fraction}": self.val_fraction > 0,
        }
        name = self.dataset + "".join(mark for mark, has in marks.items() if has)
        inner = {
            "ImageNet": [str(self.subset), str(self.res)],
            "folder": [Path(self.data_path).resolve().name, str(self.res)],
        }.get(self.dataset, [] if self._has_native_res else [str(self.res)])
        return Path(buffer_path, name, *inner, self.model)

    def command(self, buffer_path: str) -> str:
        """The command line that makes these experts."""
        flags = {
            "dataset": self.dataset,
            "subset": self.subset,
            "res": None if self._has_native_res else self.res,
            "model": self.model,
            "buffer_path": buffer_path,
            "data_path": self.data_path,
            "val_fraction": self.val_fraction or None,
        }
        given = [
            f"--{name} {shlex.quote(str(value))}"
            for name, value in flags.items()
            if value is not None
        ]
        switches = {"--zca": self.zca, "--flat": self.flat}
        given += [switch for switch, is_on in switches.items() if is_on]
        return " ".join(["python buffer.py", *given])

    @property
    def _has_native_res(self) -> bool:
        return NATIVE_RES.get(self.dataset) == self.res


def find_experts(
    buffer_path: str, kind: ExpertKind, *, model_fixed: bool, zca_fixed: bool
) -> ExpertKind:
    """The experts of `kind`, under either name of the same architecture.

    A model or zca that is not fixed (it came from a YAML file or a default, not from the user's
    hand) may differ where only experts of another kind are there; nothing else of `kind` may.
    UserError where there are none, naming the command that makes them.
    """
    same = [name for name in NETWORKS if canonical_name(name) == canonical_name(kind.model)]
    others = [] if model_fixed else [name for name in NETWORKS if name not in same]
    zcas = [kind.zca] if zca_fixed else [kind.zca, not kind.zca]
    for models in ([kind.model, *same], others):
        for zca, model in product(zcas, models):
            candidate = replace(kind, zca=zca, model=model)
            if buffer_files(candidate.folder(buffer_path)):
                return candidate
    raise UserError(
        f"no expert buffers in {kind.folder(buffer_path)}; make them with: "
        f"{kind.command(buffer_path)}"
    )
