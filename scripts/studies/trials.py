"""A study's distillations as cells of the queue, and what was measured in them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.plan.cells import Cell, Cells, Settings, experts_cells, run_cell, run_of
from scripts.results.runs import Run, option_settings, read_run
from utils.config.resolve import packaged_yaml, resolve
from utils.core.errors import UserError
from utils.methods.registry import check_own_flags
from utils.options import DistillOptions

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Trial:
    """A distillation of digits, once for each seed: what is compared, where, and how.

    `row` names the YAML file, if there is one; `flags` are more ones of distill_att.py,
    `evaluations`, by seed, those of calls of eval.py on the last set.
    """

    line: str  # "ATT", "window 5"
    place: str  # "8x8, IPC 1"
    row: str
    flags: str
    evaluations: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    name: str = ""  # of its runs; the line where that tells them apart

    def is_named(self, names: Sequence[str]) -> bool:
        """Whether one of the names is its line, its place or a part of that."""
        own = [self.line, self.place, *self.place.split(", ")]
        return any(name.lower() == each.lower() for name in names for each in own)

    def words(self, settings: Settings, seed: int) -> list[str]:
        """The flags of distill_att.py; the user's own come last, and win."""
        run_name = f"{self.name or slug(self.line)}_seed{seed}"
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
        evaluations = [
            [*distilled, *flags.split(), *data] for flags in self.evaluations.get(seed, ())
        ]
        name, text = f"{slug(self.place)}/{options.run_name}", f"{options.Iteration:,} steps"
        return run_cell(name, text, self.words(settings, seed), options, evaluations, settings)


def slug(words: str) -> str:
    """For names of files."""
    return "_".join("".join(c if c.isalnum() else " " for c in words.lower()).split())


def cells_of(trials: Iterable[Trial], settings: Settings) -> Cells:
    """The cells of the experts that the trials need, and those of the trials."""
    rows = [trial.cell(settings, seed) for trial in trials for seed in SEEDS]
    return experts_cells(rows, settings), rows


def runs_of(
    trials: Iterable[Trial], settings: Settings
) -> tuple[list[tuple[Trial, Run]], list[str]]:
    """The runs that have ended, each with its trial, and a line for each that has not, or that was
    made with other settings.
    """
    runs, problems = [], []
    for trial in trials:
        for seed in SEEDS:
            found = _run_of(trial.options(settings, seed))
            if isinstance(found, Run):
                runs.append((trial, found))
            else:
                problems.append(f"{trial.line}, {trial.place}, seed {seed}: {found}")
    return runs, problems


def _run_of(options: DistillOptions) -> Run | str:
    """The run with these options, or why there is none."""
    folder = run_of(options)
    if not folder.path.exists():
        return "not run"
    try:
        run = read_run(folder.path)
    except UserError as error:
        return " ".join(str(error).removeprefix(f"{folder.path}: ").split())
    own, asked = option_settings(run.options), option_settings(options)
    for name, value in asked.items():
        if own[name] != value:
            return f"{name} is {own[name]}, not {value}"
    return run
