"""Train experts, saved from time to time so that another call can continue them."""

import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.compute.cohort import Cohort, Recipe, accuracy
from utils.core import ranks, stopping
from utils.core.errors import UserError
from utils.core.files import torch_load, torch_save
from utils.core.rng import derive_seed, stream
from utils.data.dataset import ImageDataset
from utils.experts.files import Expert, snapshot, unfinished_file

SAVE_SECONDS = 600


@dataclass(frozen=True)
class Unfinished:
    """An expert in training: its snapshots so far, and the tensors that continue its training."""

    trajectory: Expert
    training: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path, number: int, *, like: "Unfinished") -> "Unfinished | None":
        """Read expert `number` as it was saved; None where it was not.

        A file that is damaged or unlike `like` only costs the time to train the expert anew.
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
        """Names, shapes and types of the tensors: equal for two states of the same training."""
        tensors = [*self.trajectory[0], *self.training.values()]
        return [*self.training], [(tensor.shape, tensor.dtype) for tensor in tensors]


@dataclass(frozen=True)
class Schedule:
    """How an expert is trained: epochs of SGD, in the second half at a tenth of `lr` with `decay`.

    Every batch gets one draw of DSA from `dsa_groups`, if there are any.
    """

    epochs: int
    lr: float
    decay: bool
    batch_size: int
    dsa_groups: tuple[str, ...] | None

    def lr_in(self, epoch: int) -> float:
        is_decayed = self.decay and self.epochs > 1 and epoch >= self.epochs // 2
        return self.lr * (0.1 if is_decayed else 1)


class ExpertTraining:
    """The experts `numbers`, trained together, each exactly as it would be trained alone.

    They continue from their files in `folder`, if there are any. Expert i depends on `seed` and i
    alone. `seen` gives the numbers of the images that an epoch sees; without it, all of them.
    """

    def __init__(
        self,
        recipe: Recipe,
        schedule: Schedule,
        numbers: Sequence[int],
        data: ImageDataset,
        *,
        seed: int,
        folder: Path,
        seen: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.numbers = list(numbers)
        self._train, self._test = data.require_train(), data.test
        self._cohort = Cohort(
            recipe,
            [derive_seed(seed, "expert", number, "init") for number in numbers],
            device=self._train.images.device,
            dtype=self._train.images.dtype,
        )
        self._generators = [stream(seed, "expert", number, "minibatch") for number in numbers]
        self._schedule = schedule
        self._folder, self._seen = folder, seen
        self._state = self._snapshot([[] for _ in numbers])
        self._resume()
        self._saved_epoch, self._saved_at = self.epochs, time.monotonic()

    @property
    def epochs(self) -> int:
        """How many epochs have been trained."""
        return len(self._state[0].trajectory) - 1

    @property
    def is_finished(self) -> bool:
        return self.epochs >= self._schedule.epochs

    @property
    def trajectories(self) -> dict[int, Expert]:
        """By number, each expert's snapshots: before the first epoch and after each."""
        each = zip(self.numbers, self._state, strict=True)
        return {number: state.trajectory for number, state in each}

    def epoch(self) -> tuple[float, float]:
        """Train one more epoch; returns the mean accuracies on its batches and on the test set.

        After a signal the experts are saved as of the last epoch, and Interrupted is raised; they
        are also saved so often that a kill costs at most the work of one expert, or ten minutes.
        UserError where an expert diverges.
        """
        with stopping.immediate(keep=self._save):
            trained = self._cohort.train(
                self._train.images,
                self._train.labels,
                epochs=1,
                lr=self._schedule.lr_in(self.epochs),
                batch_size=self._schedule.batch_size,
                dsa_groups=self._schedule.dsa_groups,
                generators=self._generators,
                seen=None if self._seen is None else self._seen(self.epochs),
            )
        for number, loss in zip(self.numbers, trained.losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"expert {number} diverged in epoch {self.epochs + 1}: lower --lr_teacher, "
                    f"which is {self._schedule.lr}, --mom or --l2; the experts before it are kept"
                )
        self._state = self._snapshot([state.trajectory for state in self._state])
        if self._is_save_due():
            self._save()
        with stopping.immediate(keep=self._save):
            tested = [
                accuracy(network, self._test.images, self._test.labels)
                for network in self._cohort.networks
            ]
        return trained.accuracies.mean().item(), statistics.fmean(tested)

    def _is_save_due(self) -> bool:
        """Whether a whole expert's work, or ten minutes', is not on disk yet."""
        if self.is_finished:
            # Kept as experts from now on, but another process may be cut off before that.
            return ranks.world() > 1
        work = (self.epochs - self._saved_epoch) * len(self.numbers)
        return work >= self._schedule.epochs or time.monotonic() - self._saved_at > SAVE_SECONDS

    def _save(self) -> None:
        """Write a file for each expert; UserError where that fails.

        All are written before the first replaces that of an earlier epoch: experts at different
        epochs are not trained together.
        """
        files = [unfinished_file(self._folder, number) for number in self.numbers]
        for file, state in zip(files, self._state, strict=True):
            torch_save(vars(state), file.with_name(f"{file.name}.next"))
        for file in files:
            os.replace(file.with_name(f"{file.name}.next"), file)
        self._saved_epoch, self._saved_at = self.epochs, time.monotonic()

    def _snapshot(self, trajectories: Sequence[Expert]) -> list[Unfinished]:
        """Take the state of each expert, its trajectory so far with one snapshot more."""
        return [
            Unfinished(
                [*trajectory, snapshot(network)],
                training | {"generator": generator.get_state()},
            )
            for network, training, generator, trajectory in zip(
                self._cohort.networks,
                self._cohort.state_dicts(),
                self._generators,
                trajectories,
                strict=True,
            )
        ]

    def _resume(self) -> None:
        """Continue from the files if all experts have one, of the same epoch."""
        found = [
            Unfinished.load(self._folder, number, like=state)
            for number, state in zip(self.numbers, self._state, strict=True)
        ]
        left = [state for state in found if state is not None]
        if len(left) < len(found) or len({len(state.trajectory) for state in left}) > 1:
            return
        self._cohort.load_state_dicts([state.training for state in left])
        for generator, state in zip(self._generators, left, strict=True):
            generator.set_state(state.training["generator"])
        self._state = left
        print(f"going on with expert {self} after {self.epochs} epochs")

    def __str__(self) -> str:
        first, last = self.numbers[0], self.numbers[-1]
        return str(first) if first == last else f"{first}-{last}"
