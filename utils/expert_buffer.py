"""Expert trajectories on disk, in the field's layout (MTT, FTD, ATT, DATM): write, check, read.

`<buffer_path>/<dataset>/<model>/replay_buffer_<n>.pt` is a list of experts, an expert a list of
snapshots (before the first epoch, then after each), a snapshot the list of parameter tensors in
`network.parameters()` order, float32 on the CPU.
"""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks import NETWORKS, canonical_name
from utils.config import check_unchanged
from utils.errors import UserError
from utils.files import torch_load, torch_save, write_text
from utils.flat_params import flatten
from utils.sources import Source

Snapshot = list[Tensor]
Expert = list[Snapshot]

SETTINGS = "experts.json"
NATIVE_RES = {"digits": 8, "CIFAR10": 32, "CIFAR100": 32, "Tiny": 64}


@dataclass(frozen=True)
class ExpertKind:
    """What experts are trained on and for: the part of their settings that names their folder."""

    dataset: str
    subset: str | None
    res: int
    zca: bool
    model: str
    data_path: str

    @classmethod
    def of(cls, source: Source, *, zca: bool, model: str, data_path: str) -> "ExpertKind":
        return cls(source.name, source.subset, source.image_size, zca, model, data_path)

    def folder(self, buffer_path: str) -> Path:
        """The field's folder of these experts.

        `_NO_ZCA` marks CIFAR without whitening, as in the field; the data sets that the field does
        not whiten get `_ZCA` when they are.
        """
        if self.dataset in ("CIFAR10", "CIFAR100"):
            return Path(buffer_path, self.dataset + ("" if self.zca else "_NO_ZCA"), self.model)
        name = self.dataset + ("_ZCA" if self.zca else "")
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
        }
        given = [
            f"--{name} {shlex.quote(str(value))}"
            for name, value in flags.items()
            if value is not None
        ]
        return " ".join(["python buffer.py", *given, *(["--zca"] if self.zca else [])])

    @property
    def _has_native_res(self) -> bool:
        return NATIVE_RES.get(self.dataset) == self.res


def snapshot(network: nn.Module) -> Snapshot:
    """A copy of the parameters, float32 on the CPU; `cpu()` alone would alias what is there."""
    return [param.detach().cpu().float().clone() for param in network.parameters()]


def buffer_files(folder: Path) -> list[Path]:
    """The files replay_buffer_<n>.pt of `folder`, by n."""
    numbered = {
        int(match[1]): path
        for path in folder.glob("replay_buffer_*.pt")
        if (match := re.fullmatch(r"replay_buffer_(\d+)\.pt", path.name))
    }
    return [numbered[n] for n in sorted(numbered)]


def read_file(path: Path, *, mmap: bool = True) -> list[Expert]:
    """The experts of one file; with `mmap` read from disk when they are used.

    Raises UserError for a file that does not load or holds something else.
    """
    experts = torch_load(path, mmap=mmap)
    if not _is_list_of_experts(experts):
        raise UserError(f"buffer file {path} does not hold a list of expert trajectories")
    return experts


def _is_list_of_experts(content: Any) -> bool:
    return (
        isinstance(content, list)
        and len(content) > 0
        and all(isinstance(expert, list) and len(expert) > 1 for expert in content)
        and all(isinstance(snap, list) for expert in content for snap in expert)
        and all(isinstance(p, Tensor) for expert in content for snap in expert for p in snap)
    )


def begin(folder: Path, settings: dict[str, Any], *, adding: bool = True) -> None:
    """Record how the experts of `folder` are trained; refuse to add to others than such.

    Settings without a single buffer file (nobody got that far) are replaced. Experts from elsewhere
    have no settings beside them: good as they are, but not for `adding`.
    """
    path = folder / SETTINGS
    if not buffer_files(folder):
        write_text(json.dumps(settings, indent=1) + "\n", path)
        return
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not adding:
            return
        raise UserError(
            f"the experts in {folder} are not from this buffer.py (no {SETTINGS} beside them): "
            "they can be used, but not added to; pass another --buffer_path"
        ) from None
    except (OSError, ValueError):
        recorded = None
    if not isinstance(recorded, dict):
        raise UserError(f"{path} holds no settings as JSON; move {folder} away or mend it")
    check_unchanged(recorded, settings, where=folder, instead="--buffer_path")


def missing_experts(folder: Path, num_experts: int, *, experts_per_file: int) -> list[int]:
    """Which of the experts 0 ... num_experts - 1 are not in `folder`; file n holds those from
    n * experts_per_file on. UserError names a damaged file.
    """
    missing: list[int] = []
    for first in range(0, num_experts, experts_per_file):
        path = _file_of(folder, first, experts_per_file)
        try:
            there = len(read_file(path)) if path.exists() else 0
        except UserError as error:
            raise UserError(f"{error}; delete it, and its experts are trained again") from None
        missing += range(first + there, min(first + experts_per_file, num_experts))
    return missing


def save_expert(folder: Path, number: int, expert: Expert, *, experts_per_file: int) -> Path:
    """Add expert `number` behind those that its file holds already, atomically."""
    path = _file_of(folder, number, experts_per_file)
    experts = read_file(path, mmap=False) if path.exists() else []
    if len(experts) != number % experts_per_file:
        raise ValueError(f"{path} holds {len(experts)} experts, so {number} is not the next")
    torch_save([*experts, expert], path)
    return path


def _file_of(folder: Path, number: int, experts_per_file: int) -> Path:
    return folder / f"replay_buffer_{number // experts_per_file}.pt"


def find_experts(
    buffer_path: str, kind: ExpertKind, *, model_fixed: bool, zca_fixed: bool
) -> ExpertKind:
    """The experts of `kind`, under either name of the same architecture.

    A model or zca that is not fixed (it came from a YAML file or a default, not from the user's
    hand) may differ where only experts of another kind are there. UserError where there are none,
    naming the command that makes them.
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


class ExpertBuffer:
    """The experts of one folder, read from disk as they are needed.

    `shapes` are the parameter shapes of the network they must fit. With `in_memory` everything is
    read at once; otherwise the files are memory-mapped and cost no memory of their own.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Sequence[torch.Size],
        *,
        max_files: int | None = None,
        max_experts: int | None = None,
        in_memory: bool = False,
        skip_bad: bool = False,
    ) -> None:
        self._folder = folder
        self.skipped: list[str] = []
        self._experts: list[Expert] = []
        for path in buffer_files(folder)[:max_files]:
            try:
                experts = read_file(path, mmap=not in_memory)
            except UserError as error:
                if not skip_bad:
                    raise UserError(
                        f"{error}; delete it and run buffer.py again, or pass --skip_bad_buffers"
                    ) from None
                self.skipped.append(str(error))
                continue
            _check_shapes(path, experts, shapes)
            self._experts += experts
            if max_experts is not None and len(self._experts) >= max_experts:
                self._experts = self._experts[:max_experts]
                break
        if not self._experts:
            raise UserError("; ".join([f"no usable expert buffer in {folder}", *self.skipped]))

    def __len__(self) -> int:
        return len(self._experts)

    @property
    def epochs(self) -> int:
        """The epochs that every expert has; epoch 0 is its initialisation."""
        return min(len(expert) for expert in self._experts) - 1

    def params(self, expert: int, epoch: int) -> Tensor:
        """The parameters (P,) of `expert` after `epoch` epochs, float32 on the CPU.

        UserError where they are not finite.
        """
        theta = flatten(self._experts[expert][epoch]).float()
        if not theta.isfinite().all():
            raise UserError(
                f"expert {expert} in {self._folder} is not finite after {epoch} epochs: train it "
                "again with a lower --lr_teacher"
            )
        return theta

    def segment(self, expert: int, start: int, epochs: int) -> tuple[Tensor, Tensor]:
        """theta_0 and theta* (P,): `expert` after `start` epochs and `epochs` later.

        UserError where they are equal, as in buffers whose snapshots alias the last weights.
        """
        theta_0, theta_star = self.params(expert, start), self.params(expert, start + epochs)
        if torch.equal(theta_0, theta_star):
            raise UserError(
                f"expert {expert} in {self._folder} is the same after {start} and after "
                f"{start + epochs} epochs: its snapshots are no trajectory, train it again"
            )
        return theta_0, theta_star


def _check_shapes(path: Path, experts: list[Expert], shapes: Sequence[torch.Size]) -> None:
    for snap in (snap for expert in experts for snap in expert):
        found = [param.shape for param in snap]
        if found == list(shapes):
            continue
        if len(found) != len(shapes):
            detail = f"{len(found)} parameter tensors where the model has {len(shapes)}"
        else:
            n = next(i for i in range(len(found)) if found[i] != shapes[i])
            detail = f"parameter {n} is {tuple(found[n])} where the model has {tuple(shapes[n])}"
        raise UserError(
            f"buffer file {path} is of another architecture, image size or class count: {detail}"
        )
