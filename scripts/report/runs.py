"""Runs that differ in their seeds alone, and the lines of the report's list of all runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.results.evaluations import DISTILLED, EvaluatedRun, Measured, Score
from scripts.results.runs import comparable

OWN = "ATT"
# Settings that columns of the list of all runs show, or the method's name does.
IN_COLUMNS = {
    *("dataset", "subset", "res", "ipc", "model", "syn_steps", "expert_epochs", "Iteration"),
    *("length", "flat", "gradient", "select", "experts' number", "experts' epochs"),
}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    runs: tuple[EvaluatedRun, ...]

    @property
    def first(self) -> EvaluatedRun:
        return self.runs[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        return self.first.settings("seed")

    def measured(self, trained_on: str, network: str) -> list[Measured]:
        found = (run.measured.get((trained_on, network)) for run in self.runs)
        return [each for each in found if each is not None]

    @property
    def is_evaluated(self) -> bool:
        return any(run.measured for run in self.runs)

    @property
    def where(self) -> str:
        others = len(self.runs) - 1
        return f"{self.first.path}" + (f" and {others} of other seeds" if others else "")


@dataclass(frozen=True)
class RunLine:
    """A line of the list of all runs: of a group, or of real images under the same protocol."""

    dataset: str
    ipc: int | None
    method: str
    set: str  # raw or ema, empty for real images
    columns: Mapping[str, Any]  # by title, of what is known of a distillation only
    seeds: tuple[int, ...]
    scores: Mapping[str, Score]  # by network
    chosen_by: str
    epochs: int
    paths: tuple[Path, ...] = ()


def group_runs(runs: Iterable[EvaluatedRun]) -> list[Group]:
    """The runs by settings, in the order of data sets, IPC, methods and lengths."""
    ordered = sorted(runs, key=lambda run: (run.options.seed, run.path))
    return sorted((Group(tuple(same)) for same in comparable(ordered, "seed")), key=_order)


def _order(group: Group) -> tuple[Any, ...]:
    run = group.first
    options = run.options
    method = (run.method != OWN, run.method)
    return dataset_name(run), options.ipc, run.model, method, options.syn_steps, run.path


def run_lines(groups: Sequence[Group]) -> list[RunLine]:
    """Lines for the sets of each group, raw and EMA, and behind them those of real images."""
    lines = [line for group in groups for line in _group_lines(group, groups)]
    return [*lines, *_real_lines(groups)]


def _group_lines(group: Group, groups: Sequence[Group]) -> list[RunLine]:
    """One for what is measured in the same way: the set, how it was chosen, and the epochs."""
    ways: dict[tuple[str, str, int], dict[str, list[Measured]]] = {}
    names = {trained_on: name for name, trained_on in DISTILLED.items()}
    for run in group.runs:
        for (trained_on, network), each in run.measured.items():
            if trained_on in names:
                way = (names[trained_on], each.chosen_by, each.epochs)
                ways.setdefault(way, {}).setdefault(network, []).append(each)
    run, options = group.first, group.first.options
    diverged = sum(run.diverged is not None for run in group.runs)
    also = _also(group, groups) + [f"{diverged} of {len(group.runs)} diverged"] * bool(diverged)
    return [
        RunLine(
            dataset=dataset_name(run),
            ipc=options.ipc,
            method=run.method,
            columns={
                "network": run.model,
                "N_S": options.syn_steps,
                "N_T": options.expert_epochs,
                "iterations": options.Iteration,
                "experts": _experts(run),
                "also": ", ".join(also),
            },
            set=set,
            chosen_by=chosen_by,
            epochs=epochs,
            seeds=tuple(run.options.seed for run in group.runs),
            scores={network: Score.over(measured) for network, measured in networks.items()},
            paths=tuple(run.path for run in group.runs),
        )
        for (set, chosen_by, epochs), networks in sorted(ways.items(), reverse=True)
    ]


def dataset_name(run: EvaluatedRun) -> str:
    """With the subset or, of pictures that come in several sizes, the side in pixels."""
    options, res = run.options, run.settings()["res"]
    several = options.dataset in ("digits", "ImageNet", "folder")
    parts = (options.dataset, options.subset, f"{res}x{res}" if several and res else None)
    return " ".join(part for part in parts if part)


def _experts(run: EvaluatedRun) -> str:
    if run.experts is None:
        return "not on record"
    flat = " flat" if run.options.flat else ""
    return f"{run.experts.get('number')}{flat} of {run.experts.get('epochs')} epochs"


def _also(group: Group, groups: Sequence[Group]) -> list[str]:
    """The settings, beyond those in columns, by which the runs at this data set and IPC differ."""

    def where(group: Group) -> tuple[str, int]:
        return dataset_name(group.first), group.first.options.ipc

    others = [other.settings for other in groups if where(other) == where(group)]
    return [
        f"{name} {value}"
        for name, value in group.settings.items()
        if name not in IN_COLUMNS and any(other.get(name, value) != value for other in others)
    ]


def _real_lines(groups: Sequence[Group]) -> list[RunLine]:
    """Real images that eval.py trained networks on, each seed once, whatever runs it was beside."""
    found: dict[tuple[str, int | None, str, str, int], dict[str, dict[int, Measured]]] = {}
    for run in (run for group in groups for run in group.runs):
        options = run.options
        also = ", ".join(
            ["ZCA"] * options.zca
            + [f"val_fraction {options.val_fraction}"] * (options.val_fraction > 0)
        )
        for (name, network), each in run.measured.items():
            if name not in DISTILLED.values():
                ipc = None if name == "full" else options.ipc
                networks = found.setdefault((dataset_name(run), ipc, name, also, each.epochs), {})
                seeds = networks.setdefault(network, {})
                known = seeds.setdefault(each.seed, each)
                if len(known.accuracies.accs) < len(each.accuracies.accs):
                    seeds[each.seed] = each
    return [
        RunLine(
            dataset=dataset,
            ipc=ipc,
            method=name,
            columns={"also": also},
            set="",
            chosen_by="",
            epochs=epochs,
            seeds=tuple(sorted({seed for seeds in networks.values() for seed in seeds})),
            scores={network: Score.over([*seeds.values()]) for network, seeds in networks.items()},
        )
        for (dataset, ipc, name, also, epochs), networks in found.items()
    ]


def once(values: Iterable[Any], between: str = " / ") -> str:
    """The values in a row, each once."""
    return between.join(dict.fromkeys(map(str, values)))
