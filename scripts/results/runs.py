"""Run directories as report and figures see them: how a run was made, and how far it came.

A run without a setting that came later had that setting's default; one that lacks what every
version has had, or has what this one does not know, is of another version.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from networks import canonical_name
from utils.config.resolve import fixed_values, resolve
from utils.core.errors import UserError
from utils.data.spec import side_of
from utils.options import DistillOptions
from utils.run.log import read_records

Record = Mapping[str, Any]

FILES = ("config.yaml", "metrics.jsonl")
SMOKE = "smoke"  # run_all.sh --smoke leaves its runs in a folder of this name: they show nothing
NEEDED = (
    *("dataset", "model", "ipc", "lr_img", "lr_lr", "syn_steps", "expert_epochs", "length"),
    *("Iteration", "seed"),
)
# How experts are trained, as far as the settings of the run that uses them do not say it.
EXPERT_SETTINGS = tuple("batch_train lr_teacher mom l2 decay dsa dsa_strategy rho alpha".split())


@dataclass(frozen=True)
class Run:
    """A run that has ended: at its last iteration or, with a record in `diverged`, before.

    `experts` is None where config.yaml says nothing of them. `calls` are the environments of
    distill_att.py. `records` are those of metrics.jsonl.
    """

    path: Path
    options: DistillOptions
    experts: Record | None
    calls: Sequence[Record]
    records: Sequence[Record]
    diverged: Record | None

    @property
    def model(self) -> str:
        return canonical_name(self.options.model)

    @property
    def method(self) -> str:
        return method_name(self.options)

    def logged(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def settings(self, *varied: str) -> dict[str, Any]:
        """All that alters the result but `varied`, in one spelling."""
        known, names = self.experts or {}, ("number", "epochs", *EXPERT_SETTINGS)
        experts = {f"experts' {name}": known[name] for name in names if name in known}
        every = option_settings(self.options) | experts
        return {name: value for name, value in every.items() if name not in varied}


R = TypeVar("R", bound=Run)


def option_settings(options: DistillOptions) -> dict[str, Any]:
    """The options that alter a result, in one spelling."""
    return {
        **fixed_values(options),
        "Iteration": options.Iteration,
        "model": canonical_name(options.model),
        "res": side_of(options.dataset, options.res),
    }


def method_name(options: DistillOptions) -> str:
    """The method that a configuration amounts to: ATT, MTT, or what is added to it, as ATT + PP.

    DATM trains on FTD's experts, so flat ones are part of it.
    """
    from_two = options.start_epochs is not None
    parts = {
        "ATT": options.length == "att",
        options.length: options.length not in ("att", "fixed"),  # a policy of one's own
        "FTD": options.flat and not from_two,
        "DATM": from_two,
        "PP": options.prune_threshold is not None,
        "TESLA": options.gradient == "tesla",
    }
    return " + ".join(name for name, is_in in parts.items() if is_in) or "MTT"


def comparable(runs: Iterable[R], *varied: str) -> list[list[R]]:
    """The runs in groups that differ in nothing but `varied`, in their order."""
    groups: dict[str, list[R]] = {}
    for run in runs:
        groups.setdefault(repr(run.settings(*varied)), []).append(run)
    return list(groups.values())


def read_runs(paths: Iterable[Path], complete: Callable[[Run], R]) -> tuple[list[R], list[str]]:
    """The runs in and below `paths`, and a line for each path or directory that cannot be used.

    `complete` adds what is wanted of a run, or raises UserError where that is not there.
    """
    found = {path: find_run_dirs(path) for path in paths}
    problems = [f"{path}: there is no run directory" for path in found if not found[path]]
    runs: dict[str, R] = {}
    for folder in {each.resolve(): each for folders in found.values() for each in folders}.values():
        try:
            run = complete(read_run(folder))
        except UserError as error:
            problems.append(" ".join(str(error).split()))
            continue
        twin = runs.setdefault(repr(run.settings()), run)
        if twin is not run:
            problems.append(f"{folder}: has the settings and seed of {twin.path}")
    return list(runs.values()), problems


def find_run_dirs(path: Path) -> list[Path]:
    """The run directories in and below `path`, but for those of smoke runs below it."""
    found = {file.parent for name in FILES for file in path.rglob(name)}
    return sorted(folder for folder in found if SMOKE not in folder.relative_to(path).parts)


def read_run(path: Path) -> Run:
    """UserError names a directory that is unfinished, damaged or of another version."""
    options, experts, calls = read_config(path / "config.yaml")
    records = read_records(path / "metrics.jsonl")
    run = Run(path, options, experts, calls, records, _divergence(records))
    steps = {step["iteration"] for step in run.logged("step")}
    done = len(steps & set(range(options.Iteration)))
    if done < options.Iteration and run.diverged is None:
        raise UserError(f"{path}: is unfinished, {done} of {options.Iteration} steps")
    return run


def read_config(path: Path) -> tuple[DistillOptions, Record | None, list[Record]]:
    """The options in a run's config.yaml, what it says of the experts, and the calls so far."""
    options = resolve(DistillOptions, [], description="", find_yaml=lambda given: path).options
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if missing := [name for name in NEEDED if name not in content]:
        raise UserError(f"{path}: is of another version, it lacks {', '.join(missing)}")
    experts, calls = content.get("experts"), content.get("environment") or []
    return (
        options,
        experts if isinstance(experts, dict) else None,
        [
            call
            for call in (calls if isinstance(calls, list) else [calls])
            if isinstance(call, dict)
        ],
    )


def _divergence(records: Sequence[Record]) -> Record | None:
    """The record of the divergence that the run ended with, if it did."""
    ends = [record for record in records if record["kind"] in ("step", "diverged")]
    return ends[-1] if ends and ends[-1]["kind"] == "diverged" else None
