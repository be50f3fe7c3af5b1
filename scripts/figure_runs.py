"""Run directories as the figures see them: which there are, which can be used, which compare."""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from utils.config import fixed_values
from utils.errors import UserError
from utils.options import DistillOptions
from utils.run_dir import RunDir, read_records
from utils.trajectory_length import LENGTH_POLICIES

Array = NDArray[np.float64]

FILES = ("config.yaml", "metrics.jsonl")
NEEDED: dict[str, Any] = {
    "dataset": str,
    "length": str,
    "syn_steps": int,
    "seed": int,
    "Iteration": int,
    "lr_img": float | int,
    "lr_lr": float | int,
}
DEFAULTS = dataclasses.asdict(DistillOptions())
# What may change within a run has to agree as well where runs are compared.
COMPARED = (
    *fixed_values(DistillOptions()),
    *("Iteration", "num_eval", "epoch_eval_train", "experts"),
)


@dataclass(frozen=True)
class Run:
    """A run that has ended: at its last outer step, or, with a record in `diverged`, before.

    lengths and n_opts (steps, trajectories): the step that was matched, and the nearest one.
    losses and seconds (steps,). evals and distances are the records as they were logged.
    """

    path: Path
    config: Mapping[str, Any]
    lengths: Array
    n_opts: Array
    losses: Array
    seconds: Array
    evals: Sequence[Mapping[str, Any]]
    distances: Sequence[Mapping[str, Any]]
    diverged: Mapping[str, Any] | None

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def policy(self) -> str:
        return str(self.config["length"])

    @property
    def syn_steps(self) -> int:
        return int(self.config["syn_steps"])

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def dataset(self) -> str:
        """The name of the data set, with an ImageNet subset's behind it."""
        return "_".join(filter(None, (self.config["dataset"], self.config.get("subset"))))

    def settings(self, *varied: str) -> Hashable:
        """All that alters a result but `varied`. What the run does not know yet had no other value
        than the default.
        """
        values = {name: self.config.get(name, DEFAULTS.get(name)) for name in COMPARED}
        return tuple((name, str(value)) for name, value in values.items() if name not in varied)


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs in and below `paths`, and a line for each directory that cannot be used."""
    runs: dict[Hashable, Run] = {}
    complaints = []
    for path in paths:
        folders = sorted({file.parent for name in FILES for file in path.rglob(name)})
        if not folders:
            complaints.append(f"{path}: there is no run directory")
        for folder in folders:
            try:
                run = read_run(folder)
            except UserError as error:
                complaints.append(f"left out: {error}")
                continue
            twin = runs.setdefault(run.settings(), run)
            if twin.path.resolve() != run.path.resolve():
                complaints.append(f"left out: {run.path} has the settings and seed of {twin.path}")
    return list(runs.values()), complaints


def read_run(path: Path) -> Run:
    """UserError, naming the directory, for one of another kind or version, or without an end."""
    config = _read_config(path)
    records: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(RunDir(path).metrics):
        records.setdefault(record["kind"], []).append(record)
    steps = records.get("step", [])
    try:
        run = Run(
            path=path,
            config=config,
            lengths=_numbers(steps, "length"),
            n_opts=_numbers(steps, "n_opt"),
            losses=_numbers(steps, "loss")[:, 0],
            seconds=_numbers(steps, "seconds")[:, 0],
            evals=records.get("eval", []),
            distances=records.get("distances", []),
            diverged=next(iter(records.get("diverged", [])), None),
        )
    except KeyError as missing:
        raise UserError(f"{path} is of another version: its steps lack {missing}") from None
    except (TypeError, ValueError):
        raise UserError(f"{path} is damaged: its steps hold no numbers") from None
    if [step["iteration"] for step in steps] != list(range(len(steps))):
        raise UserError(f"{path} is damaged: its steps do not follow one another")
    if run.diverged is None and run.steps < config["Iteration"]:
        raise UserError(f"{path} is unfinished: {run.steps} of {config['Iteration']} steps")
    return run


def _read_config(path: Path) -> Mapping[str, Any]:
    file = path / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read {file.name}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{path}: {file.name} is not valid YAML") from None
    known = config if isinstance(config, dict) else {}
    for name, kind in NEEDED.items():
        if not isinstance(known.get(name), kind):
            raise UserError(f"{path} is no run of distill_att.py: {file.name} has no valid {name}")
    if known["length"] not in LENGTH_POLICIES:
        choices = ", ".join(LENGTH_POLICIES)
        raise UserError(f"{path} has --length {known['length']!r}; known: {choices}")
    return known


def _numbers(steps: Sequence[Mapping[str, Any]], name: str) -> Array:
    """The values of all steps, (steps, values a step)."""
    rows = [np.atleast_1d(np.asarray(step[name], dtype=float)) for step in steps]
    return np.stack(rows) if rows else np.empty((0, 1))


def comparable(runs: Iterable[Run], *varied: str) -> list[list[Run]]:
    """The runs in groups that differ in nothing but `varied`."""
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.settings(*varied), []).append(run)
    return list(groups.values())
