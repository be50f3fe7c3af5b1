"""A study's distillations as cells of the queue, and what was measured in them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scripts.plan.cells import Cell, Cells, Settings, experts_cells, run_cell, run_of
from scripts.results.runs import Run, read_run
from utils.config.resolve import packaged_yaml, resolve
from utils.core.errors import UserError
from utils.methods.registry import check_own_flags
from utils.options import DistillOptions

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Trial:
    """A distillation of digits, once for each seed: what is compared, where, and how.

    `row` names the YAML file, if there is one, `flags` are more ones of distill_att.py, `evaluations` those of calls
    of eval.py on the last set.
    """

    line: str  # "ATT", "window 5"
    place: str  # "8x8, IPC 1"
    row: str
    flags: str
    evaluations: tuple[str, ...] = ()

    def words(self, settings: Settings, seed: int) -> list[str]:
        """The flags of distill_att.py; the user's own come last, and win."""
        run_name = f"{_slug(self.line)}_seed{seed}"
        where = ["--save_path", settings.save_path, "--buffer_path", settings.buffer_path]
        where += ["--data_path", settings.data_path]
        config = ["--config", str(self._yaml)] if self._yaml else []
        named = ["--seed", str(seed), "--run_name", run_name]
        return [*config, *self.flags.split(), *named, *where, *settings.distill_flags]

    def options(self, settings: Settings, seed: int) -> DistillOptions:
        """What these amount to."""
        words = self.words(settings, seed)
        found = resolve(DistillOptions, words, description="", find_yaml=lambda given: self._yaml)
        check_own_flags(found.options.method, found.sources)
        return found.options

    @property
    def _yaml(self) -> Path | None:
        return packaged_yaml("digits", self.row)

    def cell(self, settings: Settings, seed: int) -> Cell:
        """The distillation from one seed, and the evaluations of its result."""
        options = self.options(settings, seed)
        distilled = ["--distilled", str(run_of(options).distilled("last"))]
        data = ["--data_path", settings.data_path]
        evaluations = [[*distilled, *flags.split(), *data] for flags in self.evaluations]
        name, text = f"{_slug(self.place)}/{options.run_name}", f"{options.Iteration:,} steps"
        return run_cell(name, text, self.words(settings, seed), options, evaluations, settings)


def _slug(words: str) -> str:
    """For names of files."""
    return "_".join("".join(c if c.isalnum() else " " for c in words.lower()).split())


def cells_of(trials: Iterable[Trial], settings: Settings) -> Cells:
    """The cells of the experts that the trials need, and those of the trials."""
    rows = [trial.cell(settings, seed) for trial in trials for seed in SEEDS]
    return experts_cells(rows, settings), rows


def runs_of(
    trials: Iterable[Trial], settings: Settings
) -> tuple[list[tuple[Trial, Run]], list[str]]:
    """The runs that have ended, each with its trial, and a line for each that has not."""
    runs, problems = [], []
    for trial in trials:
        for seed in SEEDS:
            try:
                runs.append((trial, read_run(run_of(trial.options(settings, seed)).path)))
            except UserError as error:
                problems.append(" ".join(str(error).split()))
    return runs, problems
