"""Expert trajectories on disk, in the field's layout (MTT, FTD, ATT, DATM): write, check, read.

`<buffer_path>/<dataset>/<model>/replay_buffer_<n>.pt` is a list of experts, an expert a list of
snapshots (before the first epoch, then after each), a snapshot the list of parameter tensors in
`network.parameters()` order, float32 on the CPU.
"""

import json
import math
import re
import shlex
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from networks import NETWORKS, canonical_name
from utils.config import check_unchanged
from utils.errors import UserError
from utils.files import torch_load, torch_save, write_text
from utils.flat_params import flatten
from utils.locks import is_held, locked
from utils.sources import Source

Snapshot = list[Tensor]
Expert = list[Snapshot]

SETTINGS = "experts.json"
UNFINISHED = "unfinished_expert_{}.pt"
LOCKS = ".replay_buffer_*.lock"
READERS = 4  # threads that check files, which wait for the disk as much as they compute
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
    flat: bool = False
    val_fraction: float = 0.0

    @classmethod
    def of(
        cls, source: Source, *, zca: bool, model: str, data_path: str, flat: bool
    ) -> "ExpertKind":
        return cls(
            dataset=source.name,
            subset=source.subset,
            res=source.image_size,
            zca=zca,
            model=model,
            data_path=data_path,
            flat=flat,
            val_fraction=source.val_fraction,
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


def snapshot(network: nn.Module) -> Snapshot:
    """A copy of the parameters, float32 on the CPU; `cpu()` alone would alias what is there."""
    return [param.detach().cpu().float().clone() for param in network.parameters()]


def buffer_files(folder: Path) -> list[Path]:
    """The files replay_buffer_<n>.pt of `folder`, by n."""
    names = re.compile(r"replay_buffer_(0|[1-9][0-9]*)\.pt")
    files = (path for path in folder.glob("replay_buffer_*.pt") if names.fullmatch(path.name))
    try:
        return sorted(files, key=_number)
    except OSError as error:
        raise UserError(f"cannot look into {folder}: {error.strerror}") from None


def _number(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def read_file(path: Path, *, mmap: bool = True) -> list[Expert]:
    """The experts of one file; with `mmap` read from disk when they are used.

    Raises UserError for a file that is damaged or holds something else. Shapes and values are
    checked where they are used, by ExpertBuffer.
    """
    try:
        experts = torch_load(path, mmap=mmap)
    except UserError as error:
        raise UserError(f"buffer file {error}") from None
    if not _is_list_of_experts(experts):
        raise UserError(f"buffer file {path} does not hold a list of expert trajectories")
    return experts


def _is_list_of_experts(content: Any) -> bool:
    return (
        isinstance(content, list)
        and len(content) > 0
        and all(isinstance(expert, list) and len(expert) > 1 for expert in content)
        and all(isinstance(snap, list) for expert in content for snap in expert)
        and all(_is_plain(param) for expert in content for snap in expert for param in snap)
    )


def _is_plain(param: Any) -> bool:
    """Whether it is a tensor of numbers in memory, not a sparse, nested or empty shell of one."""
    return (
        isinstance(param, Tensor)
        and param.is_floating_point()
        and param.layout == torch.strided
        and not param.is_nested
        and param.device.type == "cpu"
    )


@contextmanager
def adding(
    folder: Path, settings: dict[str, Any], numbers: Sequence[int], *, experts_per_file: int
) -> Iterator[list[int]]:
    """Have the files of the experts `numbers` to oneself during the block; yields those missing.

    Another process may add other files meanwhile. UserError where one is at work on these, and
    where the experts in `folder` are trained otherwise than with `settings`.
    """
    with ExitStack() as held:
        with locked(folder / ".lock"):  # one process at a time takes and begins
            taken = {_lock_of(_file_of(folder, number, experts_per_file)) for number in numbers}
            for lock in sorted(taken):
                refusal = (
                    f"another process trains the experts of {lock.stem[1:]} in {folder}: wait "
                    "until it ends, or choose others by --first_expert and --num_experts"
                )
                held.enter_context(locked(lock, refusal=refusal))
            missing = missing_experts(folder, numbers, experts_per_file=experts_per_file)
            is_alone = not any(is_held(lock) for lock in set(folder.glob(LOCKS)) - taken)
            begin(folder, settings, adding=bool(missing), alone=is_alone)
        for number in set(numbers).difference(missing):
            _forget_unfinished(folder, str(number))  # saved, then killed
        yield missing


def _lock_of(file: Path) -> Path:
    return file.with_name(f".{file.stem}.lock")


def begin(
    folder: Path, settings: dict[str, Any], *, adding: bool = True, alone: bool = True
) -> None:
    """Record how the experts of `folder` are trained; refuse to add to others than such.

    Settings without a single buffer file (nobody got that far) are replaced where this process is
    `alone`. Experts from elsewhere have no settings beside them: good as they are, but not for
    `adding`.
    """
    path, recorded = folder / SETTINGS, read_settings(folder)
    if alone and recorded != settings and not buffer_files(folder):
        _forget_unfinished(folder, "*")
        write_text(json.dumps(settings, indent=1) + "\n", path)
    elif recorded is None:
        raise UserError(f"{path} holds no settings as JSON; move {folder} away or mend it")
    elif recorded:
        check_unchanged(recorded, settings, where=folder, instead="--buffer_path")
    elif adding:
        raise UserError(
            f"the experts in {folder} are not from this buffer.py (no {SETTINGS} beside them): "
            "they can be used, but not added to; pass another --buffer_path"
        )


def read_settings(folder: Path) -> dict[str, Any] | None:
    """How the experts of `folder` were trained: {} where nothing says so, None where the record
    cannot be read.
    """
    try:
        recorded = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    return recorded if isinstance(recorded, dict) else None


def missing_experts(folder: Path, numbers: Sequence[int], *, experts_per_file: int) -> list[int]:
    """Which of the experts `numbers`, a range, are not in `folder`; file n holds those from
    n * experts_per_file on. UserError names a damaged file.
    """
    there: set[int] = set()
    for first in sorted({number - number % experts_per_file for number in numbers}):
        path = _file_of(folder, first, experts_per_file)
        try:
            count = _count_experts(path, _version(path)) if path.exists() else 0
        except UserError as error:
            raise UserError(f"{error}; delete it, and its experts are trained again") from None
        there.update(range(first, first + count))
    return [number for number in numbers if number not in there]


@cache
def _count_experts(path: Path, version: tuple[int, ...]) -> int:
    """How many a file holds; in one call a file is read and checked once as long as it is the same,
    for those of a hundred experts take seconds.
    """
    return len(read_file(path))


def _version(path: Path) -> tuple[int, ...]:
    """What changes when the file is replaced."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def save_expert(folder: Path, number: int, expert: Expert, *, experts_per_file: int) -> Path:
    """Add expert `number` behind those that its file holds already, atomically."""
    path = _file_of(folder, number, experts_per_file)
    experts = read_file(path, mmap=False) if path.exists() else []
    if len(experts) != number % experts_per_file:
        raise ValueError(f"{path} holds {len(experts)} experts, so {number} is not the next")
    torch_save([*experts, expert], path)
    _forget_unfinished(folder, str(number))
    return path


def _file_of(folder: Path, number: int, experts_per_file: int) -> Path:
    return folder / f"replay_buffer_{number // experts_per_file}.pt"


def unfinished_file(folder: Path, number: int) -> Path:
    """Where an expert is kept whose training was cut off (`utils/expert_training.py`)."""
    return folder / UNFINISHED.format(number)


def _forget_unfinished(folder: Path, number: str) -> None:
    """Remove the files of an unfinished expert, or of all: `number` may be a pattern."""
    for file in folder.glob(f"{UNFINISHED.format(number)}*"):
        file.unlink(missing_ok=True)


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


class ExpertBuffer:
    """The experts of one folder, read from disk as they are needed.

    `shapes` are the parameter shapes of the network they must fit. The files are memory-mapped
    and cost no memory of their own. `max_files` and `max_experts` take the first of them.

    Every file that is used is read once here, to find out whether it is whole, fits and is finite.
    UserError names the first that is not, or that is missing from the sequence; with `skip_bad`
    they are left out and listed in `skipped`, and it is an error only if none is left.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Sequence[torch.Size],
        *,
        max_files: int | None = None,
        max_experts: int | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.folder = folder
        self.skipped: list[str] = []
        self._experts: list[Expert] = []
        with closing(_read_in_order(buffer_files(folder)[:max_files], shapes)) as outcomes:
            for outcome in outcomes:
                if not isinstance(outcome, _BadFile):
                    self._experts += outcome
                elif skip_bad:
                    self.skipped.append(outcome.problem)
                else:
                    raise UserError(
                        f"{outcome.problem}; {outcome.advice}, or pass --skip_bad_buffers"
                    )
                if max_experts is not None and len(self._experts) >= max_experts:
                    self._experts = self._experts[:max_experts]
                    break
        if not self._experts:
            reasons = self.skipped[:3]
            if more := len(self.skipped) - len(reasons):
                reasons.append(f"and {more} more")
            raise UserError("; ".join([f"no usable expert buffer in {folder}", *reasons]))

    def read_all(self) -> None:
        """Read everything into memory, and leave the files alone from now on."""
        self._experts = [
            [[param.clone() for param in snap] for snap in expert] for expert in self._experts
        ]

    def __len__(self) -> int:
        return len(self._experts)

    @property
    def settings(self) -> dict[str, Any]:
        """How they were trained, as far as it is on record."""
        return read_settings(self.folder) or {}

    @property
    def epochs(self) -> int:
        """The epochs that every expert has; epoch 0 is its initialisation."""
        return min(len(expert) for expert in self._experts) - 1

    def params(self, expert: int, epoch: int) -> Tensor:
        """The parameters (P,) of `expert` after `epoch` epochs, float32 on the CPU."""
        return flatten(self._experts[expert][epoch]).float()

    def segment(self, expert: int, start: int, epochs: int) -> tuple[Tensor, Tensor]:
        """theta_0 and theta* (P,): `expert` after `start` epochs and `epochs` later.

        UserError where they are equal, as in buffers whose snapshots alias the last weights.
        """
        theta_0, theta_star = self.params(expert, start), self.params(expert, start + epochs)
        if torch.equal(theta_0, theta_star):
            raise UserError(
                f"expert {expert} in {self.folder} is the same after {start} and after "
                f"{start + epochs} epochs: its snapshots are no trajectory, train it again"
            )
        return theta_0, theta_star


@dataclass(frozen=True)
class _BadFile:
    """What is wrong with a file, and what to do about it."""

    problem: str
    advice: str = "delete it and run buffer.py again"


def _read_in_order(
    paths: Sequence[Path], shapes: Sequence[torch.Size]
) -> Generator[list[Expert] | _BadFile, None, None]:
    """The experts of each file, in turn, read ahead in parallel; gaps between the files as well."""
    with ThreadPoolExecutor(READERS) as pool:
        reading = [pool.submit(_read_checked, path, shapes) for path in paths]
        progress = tqdm(
            reading, desc="checking experts", unit="file", leave=False, delay=2, disable=None
        )
        try:
            expected = 0
            for path, outcome in zip(paths, progress, strict=True):
                if (number := _number(path)) > expected:
                    yield _missing(path.parent, expected, number)
                yield outcome.result()
                expected = number + 1
        finally:
            progress.close()
            pool.shutdown(cancel_futures=True)


def _missing(folder: Path, first: int, behind: int) -> _BadFile:
    """The files `first` ... `behind` - 1 of the sequence."""
    others = f" and {behind - first - 1} after it" if behind > first + 1 else ""
    return _BadFile(
        f"buffer file {folder / f'replay_buffer_{first}.pt'}{others} is missing, but "
        f"replay_buffer_{behind}.pt is there",
        advice="run buffer.py again",
    )


def _read_checked(path: Path, shapes: Sequence[torch.Size]) -> list[Expert] | _BadFile:
    try:
        experts = read_file(path)
    except UserError as error:
        return _BadFile(str(error))
    for number, expert in enumerate(experts):
        for epoch, snap in enumerate(expert):
            if difference := _difference(snap, shapes):
                return _BadFile(
                    f"buffer file {path} is of another architecture, image size or class count: "
                    f"{difference}",
                    advice="give the --model, --res and data set that it was made for",
                )
            if not all(map(_is_finite, snap)):
                return _BadFile(
                    f"buffer file {path} holds an expert, number {number} of it, that is not "
                    f"finite after {epoch} epochs",
                    advice="delete it and train again with a lower --lr_teacher",
                )
    return experts


def _difference(snap: Snapshot, shapes: Sequence[torch.Size]) -> str | None:
    """How the parameters differ from those of the model, or None."""
    found = [param.shape for param in snap]
    if found == list(shapes):
        return None
    if len(found) != len(shapes):
        return f"{len(found)} parameter tensors where the model has {len(shapes)}"
    n = next(i for i in range(len(found)) if found[i] != shapes[i])
    return f"parameter {n} is {tuple(found[n])} where the model has {tuple(shapes[n])}"


def _is_finite(param: Tensor) -> bool:
    """As `param.float().isfinite().all()`, without temporaries: six times as fast."""
    return param.numel() == 0 or all(math.isfinite(bound) for bound in param.float().aminmax())
