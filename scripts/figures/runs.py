"""Runs as the figures need them, with what each outer step has logged as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.results.runs import Record, Run
from utils.core.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FigureRun(Run):
    """lengths and n_opts (steps, trajectories): the step that was matched, and the nearest one.
    losses and seconds (steps,).
    """

    lengths: Array
    n_opts: Array
    losses: Array
    seconds: Array

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def policy(self) -> str:
        return self.options.length

    @property
    def dataset(self) -> str:
        """The name of the data set, with an ImageNet subset's behind it."""
        return "_".join(filter(None, (self.options.dataset, self.options.subset)))

    def settings(self, *varied: str) -> dict[str, Any]:
        """With how the run was evaluated: that has to agree where accuracies are compared."""
        evaluation = {
            name: getattr(self.options, name) for name in ("num_eval", "epoch_eval_train")
        }
        return super().settings(*varied) | evaluation


def with_arrays(run: Run) -> FigureRun:
    """UserError names a run whose steps are of another version or damaged."""
    steps = run.logged("step")
    if [step["iteration"] for step in steps] != list(range(len(steps))):
        raise UserError(f"{run.path}: is damaged, its steps do not follow one another")
    try:
        return FigureRun(
            **vars(run),
            lengths=_numbers(steps, "length"),
            n_opts=_numbers(steps, "n_opt"),
            losses=_numbers(steps, "loss")[:, 0],
            seconds=_numbers(steps, "seconds")[:, 0],
        )
    except KeyError as missing:
        raise UserError(f"{run.path}: is of another version, its steps lack {missing}") from None
    except (TypeError, ValueError):
        raise UserError(f"{run.path}: is damaged, its steps hold no numbers") from None


def _numbers(steps: Sequence[Record], name: str) -> Array:
    """The values of all steps, (steps, values a step)."""
    rows = [np.atleast_1d(np.asarray(step[name], dtype=float)) for step in steps]
    return np.stack(rows) if rows else np.empty((0, 1))
