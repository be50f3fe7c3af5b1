"""Read the experts of one folder: all checked at the start, then read as they are needed."""

import math
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.compute.flat import flatten
from utils.core.errors import UserError
from utils.experts.files import (
    Expert,
    Snapshot,
    buffer_files,
    file_number,
    read_file,
    read_settings,
)

READERS = 4  # threads that check files, which wait for the disk as much as they compute


class ExpertBuffer:
    """The experts of one folder, read from disk as they are needed.

    `shapes` are the parameter shapes of the network that they must fit. The files are memory-mapped
    and cost no memory of their own. `max_files` and `max_experts` take the first ones.

    Every file that is used is read once here, to check that it is whole, fits and is finite.
    UserError names the first that is not, or that is missing from the sequence; with `skip_bad`
    such files are left out and listed in `skipped`, and only an empty result is an error.
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
        """Read everything into memory; the files are not needed any more."""
        self._experts = [
            [[param.clone() for param in snap] for snap in expert] for expert in self._experts
        ]

    def __len__(self) -> int:
        return len(self._experts)

    @property
    def settings(self) -> dict[str, Any]:
        """How they were trained, as far as that is recorded."""
        return read_settings(self.folder) or {}

    @property
    def epochs(self) -> int:
        """The epochs that every expert has; epoch 0 is its initialisation."""
        return min(len(expert) for expert in self._experts) - 1

    def params(self, expert: int, epoch: int) -> Tensor:
        """Read the parameters (P,) of `expert` after `epoch` epochs, float32 on the CPU."""
        return flatten(self._experts[expert][epoch]).float()

    def segment(self, expert: int, start: int, epochs: int) -> tuple[Tensor, Tensor]:
        """Read theta_0 and theta* (P,): `expert` after `start` epochs and `epochs` later.

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
    """Read the experts of each file, in order and ahead in parallel; report gaps between files."""
    with ThreadPoolExecutor(READERS) as pool:
        reading = [pool.submit(_read_checked, path, shapes) for path in paths]
        progress = tqdm(
            reading, desc="checking experts", unit="file", leave=False, delay=2, disable=None
        )
        try:
            expected = 0
            for path, outcome in zip(paths, progress, strict=True):
                if (number := file_number(path)) > expected:
                    yield _missing(path.parent, expected, number)
                yield outcome.result()
                expected = number + 1
        finally:
            progress.close()
            pool.shutdown(cancel_futures=True)


def _missing(folder: Path, first: int, behind: int) -> _BadFile:
    """Report that the files `first` ... `behind` - 1 of the sequence are missing."""
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
    """Say how the parameters differ from those of the model; None if they do not."""
    found = [param.shape for param in snap]
    if found == list(shapes):
        return None
    if len(found) != len(shapes):
        return f"{len(found)} parameter tensors where the model has {len(shapes)}"
    n = next(i for i in range(len(found)) if found[i] != shapes[i])
    return f"parameter {n} is {tuple(found[n])} where the model has {tuple(shapes[n])}"


def _is_finite(param: Tensor) -> bool:
    """`param.float().isfinite().all()` without temporaries: six times as fast."""
    return param.numel() == 0 or all(math.isfinite(bound) for bound in param.float().aminmax())
