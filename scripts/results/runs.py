"""Read run directories: how a run was made, and how far it came.

A run without a setting that came later had that setting's default. One that lacks what every
version has had, or has what this one does not know, is of another version.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from networks import canonical_name
from utils.config.resolve import fixed_values, resolve
from utils.core.errors import UserError
from utils.data.identity import KEY
from utils.data.spec import side_of
from utils.measure.record import read_evaluations
from utils.methods.registry import METHODS, foreign_flags, title
from utils.options import DistillOptions
from utils.run.log import read_records

Record = Mapping[str, Any]

FILES = ("config.yaml", "metrics.jsonl")
SMOKE = "smoke"  # run_all.sh --smoke writes its runs to a folder of this name: they show nothing
# What config.yaml must say, as far as the run's method has such settings.
NEEDED = tuple(
    "dataset model ipc lr_img lr_lr syn_steps expert_epochs length Iteration seed".split()
)
# How experts are trained, as far as the settings of the run that uses them do not say it.
EXPERT_SETTINGS = tuple(
    "batch_train lr_teacher mom l2 decay dsa dsa_strategy rho alpha easy_share el2n_experts "
    "el2n_epoch".split()
)


@dataclass(frozen=True, eq=False)
class Run:
    """A run, which has ended at its last iteration, or before that with a record in `diverged`, or
    has not ended yet.

    `experts` is None where config.yaml says nothing of them, `data` where it does not tell the
    images apart. `calls` are the environments of distill_att.py. `records` are those of
    metrics.jsonl.
    """

    path: Path
    options: DistillOptions
    experts: Record | None
    calls: Sequence[Record]
    records: Sequence[Record]
    data: Record | None = None

    @property
    def model(self) -> str:
        return canonical_name(self.options.model)

    @property
    def method(self) -> str:
        return title(vars(self.options))

    @property
    def matches_trajectories(self) -> bool:
        """Whether its steps have lengths, as every method that matches trajectories logs them."""
        return METHODS[self.options.method].needs_experts

    @property
    def diverged(self) -> Record | None:
        """The record of the divergence that the run ended with, if it did."""
        ends = [record for record in self.records if record["kind"] in ("step", "diverged")]
        return ends[-1] if ends and ends[-1]["kind"] == "diverged" else None

    @property
    def steps_taken(self) -> int:
        """Outer steps up to the last iteration, each once."""
        taken = {step["iteration"] for step in self.logged("step")}
        return len(taken & set(range(self.options.Iteration)))

    @cached_property
    def evaluations(self) -> Sequence[Record]:
        """The entries of eval.json. UserError where it is damaged."""
        entries = read_evaluations(self.path / "eval.json")
        if not all(isinstance(entry.get("epochs"), int) for entry in entries):
            raise UserError(f"{self.path / 'eval.json'}: an evaluation lacks its epochs")
        return entries

    @property
    def environments(self) -> list[Record]:
        """Those of every call, of distill_att.py and of eval.py: command, versions, hardware."""
        found = [entry.get("environment") for entry in self.evaluations]
        return [*self.calls, *(each for each in found if isinstance(each, dict))]

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The outer steps: iteration, loss, seconds and, of a method that matches trajectories,
        length and n_opt; a row for each of the trajectories that a step averages.

        UserError where the steps are of another version or damaged.
        """
        steps = self.logged("step")
        if [step["iteration"] for step in steps] != list(range(len(steps))):
            raise UserError(f"{self.path}: is damaged, its steps do not follow one another")
        lengths = ["length", "n_opt"] if self.matches_trajectories else []
        names = ["loss", "seconds", *lengths]
        if lacking := [name for name in names if any(name not in step for step in steps)]:
            raise UserError(f"{self.path}: is of another version, its steps lack {lacking[0]!r}")
        frame = pd.DataFrame(steps, columns=["iteration", *names])
        try:
            if lengths:
                frame = frame.explode(lengths, ignore_index=True)
            if frame["iteration"].value_counts().nunique() > 1:
                raise ValueError("steps average different numbers of trajectories")
            return frame.astype(dict.fromkeys(names, float))
        except (TypeError, ValueError):
            raise UserError(f"{self.path}: is damaged, its steps hold no numbers") from None

    def logged(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def settings(self, *varied: str) -> dict[str, Any]:
        """All that alters the result but `varied`, in one spelling."""
        every = option_settings(self.options)
        for name in ("number", "epochs", *EXPERT_SETTINGS):
            if self.experts and name in self.experts:
                every[f"experts' {name}"] = self.experts[name]
        return {name: value for name, value in every.items() if name not in varied}


def option_settings(options: DistillOptions) -> dict[str, Any]:
    """The options that alter a result, in one spelling."""
    return {
        **fixed_values(options),
        "Iteration": options.Iteration,
        "model": canonical_name(options.model),
        "res": side_of(options.dataset, options.res),
    }


def comparable(runs: Iterable[Run], *varied: str, also: Sequence[str] = ()) -> list[list[Run]]:
    """Group the runs that differ in nothing but `varied`, in their order.

    Options in `also`, which alter no result of a distillation, must agree as well.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = run.settings(*varied) | {name: getattr(run.options, name) for name in also}
        groups.setdefault(repr(key), []).append(run)
    return list(groups.values())


def read_runs(
    paths: Iterable[Path], check: Callable[[Run], object], *, also: Sequence[str] = ()
) -> tuple[list[Run], list[str]]:
    """Read the runs in and below `paths`; a line for each path or directory that cannot be used.

    `check` raises UserError where something is wrong with what is wanted of a run. Of runs that
    `comparable` does not tell apart the first counts.
    """
    found = {path: find_run_dirs(path) for path in paths}
    problems = [f"{path}: there is no run directory" for path in found if not found[path]]
    runs = []
    for folder in {each.resolve(): each for folders in found.values() for each in folders}.values():
        try:
            run = read_run(folder)
            check(run)
        except UserError as error:
            problems.append(" ".join(str(error).split()))
        else:
            runs.append(run)
    groups = comparable(runs, also=also)
    for first, *twins in groups:
        problems += [f"{twin.path}: has the settings and seed of {first.path}" for twin in twins]
    return [first for first, *_ in groups], problems


def find_run_dirs(path: Path) -> list[Path]:
    """Find the run directories in and below `path`, but for those of smoke runs below it."""
    found = {file.parent for name in FILES for file in path.rglob(name)}
    return sorted(folder for folder in found if SMOKE not in folder.relative_to(path).parts)


def read_run(path: Path) -> Run:
    """Read a run that has ended. UserError names a directory that is unfinished, damaged or of
    another version.
    """
    run = read_begun(path)
    if run.steps_taken < run.options.Iteration and run.diverged is None:
        raise UserError(
            f"{path}: is unfinished, {run.steps_taken} of {run.options.Iteration} steps"
        )
    return run


def read_begun(path: Path) -> Run:
    """Read a run that has ended or not. UserError as for `read_run`."""
    config = path / "config.yaml"
    options = resolve(DistillOptions, [], description="", find_yaml=lambda given: config).options
    content = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    needed = [name for name in NEEDED if name not in foreign_flags(options.method)]
    if missing := [name for name in needed if name not in content]:
        raise UserError(f"{config}: is of another version, it lacks {', '.join(missing)}")
    experts, calls = content.get("experts"), content.get("environment") or []
    data = content.get(KEY)
    return Run(
        path,
        options,
        experts if isinstance(experts, dict) else None,
        [e for e in (calls if isinstance(calls, list) else [calls]) if isinstance(e, dict)],
        read_records(path / "metrics.jsonl"),
        data if isinstance(data, dict) else None,
    )
