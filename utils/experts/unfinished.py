"""Experts in training, kept in files from time to time: another call can go on with them."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.compute.cohort import Cohort, Recipe
from utils.core import stopping
from utils.core.errors import UserError
from utils.core.files import torch_load, torch_save
from utils.core.rng import derive_seed, stream
from utils.experts.files import Expert, snapshot, unfinished_file

KEEP_SECONDS = 600


@dataclass(frozen=True)
class Unfinished:
    """An expert in training: its snapshots so far, and tensors that its training goes on from."""

    trajectory: Expert
    training: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path, number: int, *, like: "Unfinished") -> "Unfinished | None":
        """Expert `number` where it was left. None where it was not begun and where the file is of
        no use, damaged or unlike `like`: that only costs the time to train it anew.
        """
        path = unfinished_file(folder, number)
        if not path.exists():
            return None
        try:
            found = cls(**torch_load(path))
            if found._form() == like._form():
                return found
        except (UserError, TypeError, AttributeError, LookupError):
            pass
        logging.getLogger(__name__).warning("%s is of no use: training it anew", path)
        return None

    def _form(self) -> Any:
        """What two states of the same training have in common."""
        tensors = [*self.trajectory[0], *self.training.values()]
        return [*self.training], [(tensor.shape, tensor.dtype) for tensor in tensors]


class ExpertTraining:
    """The experts `numbers`, trained in step, as of the end of an epoch: where their files in
    `folder` leave them, or where they begin. Expert i depends on `seed` and i alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        numbers: Sequence[int],
        *,
        seed: int,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.numbers = list(numbers)
        self.cohort = Cohort(
            recipe,
            [derive_seed(seed, "expert", number, "init") for number in numbers],
            device=device,
            dtype=dtype,
        )
        self.generators = [stream(seed, "expert", number, "minibatch") for number in numbers]
        self._folder = folder
        self._state = self._as_it_is([[] for _ in numbers])
        self._resume()
        self._kept_epoch, self._kept_at = self.epoch, time.monotonic()

    @property
    def epoch(self) -> int:
        """How many epochs have been trained."""
        return len(self._state[0].trajectory) - 1

    @property
    def trajectories(self) -> dict[int, Expert]:
        """By number, each expert's snapshots: before the first epoch and after each."""
        each = zip(self.numbers, self._state, strict=True)
        return {number: state.trajectory for number, state in each}

    def end_epoch(self) -> None:
        """The cohort has been trained for an epoch more."""
        self._state = self._as_it_is([state.trajectory for state in self._state])

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block a signal ends the call, behind `keep`."""
        try:
            with stopping.deferred(False):
                yield
        except stopping.Interrupted:
            self.keep()
            raise

    def is_much_unkept(self, train_epochs: int) -> bool:
        """Whether the work of an expert of so many epochs would be lost, or that of ten minutes."""
        work = (self.epoch - self._kept_epoch) * len(self.numbers)
        return work >= train_epochs or time.monotonic() - self._kept_at > KEEP_SECONDS

    def keep(self) -> None:
        """Write the files; UserError where they cannot be written.

        All are written before the first replaces that of an earlier epoch: experts at different
        epochs do not train in step.
        """
        files = [unfinished_file(self._folder, number) for number in self.numbers]
        for file, state in zip(files, self._state, strict=True):
            torch_save(vars(state), file.with_name(f"{file.name}.next"))
        for file in files:
            os.replace(file.with_name(f"{file.name}.next"), file)
        self._kept_epoch, self._kept_at = self.epoch, time.monotonic()

    def _as_it_is(self, trajectories: Sequence[Expert]) -> list[Unfinished]:
        """The state of each expert now, with one snapshot more than its trajectory has."""
        return [
            Unfinished(
                [*trajectory, snapshot(network)],
                training | {"generator": generator.get_state()},
            )
            for network, training, generator, trajectory in zip(
                self.cohort.networks,
                self.cohort.state_dicts(),
                self.generators,
                trajectories,
                strict=True,
            )
        ]

    def _resume(self) -> None:
        """Go to where the files leave the experts, if they all do and at the same epoch."""
        found = [
            Unfinished.load(self._folder, number, like=state)
            for number, state in zip(self.numbers, self._state, strict=True)
        ]
        left = [state for state in found if state is not None]
        if len(left) < len(found) or len({len(state.trajectory) for state in left}) > 1:
            return
        self.cohort.load_state_dicts([state.training for state in left])
        for generator, state in zip(self.generators, left, strict=True):
            generator.set_state(state.training["generator"])
        self._state = left
        print(f"going on with expert {self} after {self.epoch} epochs")

    def __str__(self) -> str:
        first, last = self.numbers[0], self.numbers[-1]
        return str(first) if first == last else f"{first}-{last}"
