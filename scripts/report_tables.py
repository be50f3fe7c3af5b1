"""The lines of the report's tables: published figures beside what runs have measured.

A run counts as a row of the paper's table only if its settings, its experts and its evaluation are
those of the row; what differs is listed with it. Accuracies are in percent.
"""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from networks import CROSS_ARCHITECTURE, canonical_name
from scripts.cells import RUN_NAME, Row, Settings, make_cells, row_options, table_rows
from scripts.runs import DISTILLED, EXPERT_SETTINGS, Measured, Run, row_settings
from utils.options import BufferOptions, DistillOptions, EvaluationOptions

PUBLISHED = Path(__file__).parent / "published.csv"
OWN = "ATT"
TABLES = {
    1: "cross-architecture generalisation, CIFAR-10",
    2: "CIFAR-10, CIFAR-100 and Tiny ImageNet",
    3: "ImageNet subsets",
}
TABLE_1_IPC = (10, 50)
# Settings that columns of the list of all runs show, or the method's name does.
IN_COLUMNS = {
    *("dataset", "subset", "res", "ipc", "model", "syn_steps", "expert_epochs", "Iteration"),
    *("length", "flat", "gradient", "select", "experts' number", "experts' epochs"),
}


@dataclass(frozen=True)
class Score:
    """Mean and population standard deviation over `n` networks, or over the means of `n` seeds."""

    mean: float
    std: float
    n: int
    of: str

    @classmethod
    def over(cls, measured: Sequence[Measured]) -> "Score":
        if len(measured) == 1:
            accuracies = measured[0].accuracies
            return cls(
                100 * accuracies.mean, 100 * accuracies.std, len(accuracies.accs), "networks"
            )
        means = [100 * each.accuracies.mean for each in measured]
        return cls(statistics.fmean(means), statistics.pstdev(means), len(means), "seeds")

    @property
    def count(self) -> str:
        return f"{self.n} {self.of if self.n > 1 else self.of.removesuffix('s')}"

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True)
class Place:
    """A cell of a table: what is distilled (ipc None: all of it), and the network it trains."""

    table: int
    dataset: str
    subset: str | None
    ipc: int | None
    network: str

    @property
    def title(self) -> str:
        name = self.network if self.table == 1 else self.subset or self.dataset
        return f"{name}, IPC {self.ipc}"


@dataclass(frozen=True)
class Published:
    """What the paper prints; a standard deviation that cannot be read is None."""

    place: Place
    method: str
    mean: float
    std: float | None

    def __str__(self) -> str:
        return f"{self.mean}" if self.std is None else f"{self.mean} ± {self.std}"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        return self.first.settings()

    def measured(self, trained_on: str, network: str) -> list[Measured]:
        found = (run.measured.get((trained_on, network)) for run in self.runs)
        return [each for each in found if each is not None]


@dataclass(frozen=True)
class Planned:
    """A row as it is published, and the GPU hours that it and its experts are estimated to cost."""

    options: DistillOptions
    hours: float
    expert_hours: float


@dataclass(frozen=True)
class Line:
    """A line of a table: what is published and, where there are runs (`group`), what these have
    measured on the `raw` and the `ema` set and how they differ from the row.
    """

    place: Place
    method: str
    published: Published | None
    planned: Planned | None
    group: Group | None = None
    differences: tuple[str, ...] = ()

    def measured(self, set: str) -> list[Measured]:
        return self.group.measured(DISTILLED[set], self.place.network) if self.group else []

    @property
    def is_evaluated(self) -> bool:
        return any(self.measured(set) for set in DISTILLED)

    def difference(self, set: str) -> float | None:
        """Percentage points above the published mean."""
        measured = self.measured(set)
        return (
            Score.over(measured).mean - self.published.mean if measured and self.published else None
        )


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


def read_published(path: Path = PUBLISHED) -> list[Published]:
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    return [
        Published(
            Place(
                int(line["table"]),
                line["dataset"],
                line["subset"] or None,
                int(line["ipc"]) if line["ipc"] else None,
                line["network"],
            ),
            line["method"],
            float(line["mean"]),
            float(line["std"]) if line["std"] else None,
        )
        for line in csv.DictReader(lines)
    ]


def planned_rows() -> dict[Row, Planned]:
    """Every row of configs/, ATT's and the rivals'."""
    settings = Settings(
        data_path=DistillOptions.data_path,
        buffer_path=DistillOptions.buffer_path,
        save_path=DistillOptions.save_path,
        run_name=RUN_NAME,
    )
    experts, cells = make_cells(settings, rivals=True)
    hours = {cell.name: cell.estimate.hours for cell in experts}
    return {
        row: Planned(row_options(row), cell.estimate.hours, hours[cell.needs or ""])
        for row, cell in zip(table_rows(rivals=True), cells, strict=True)
    }


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """The runs by settings, in the order of data sets, IPC, methods and lengths."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.options.seed, run.path)):
        groups.setdefault(repr(sorted(run.settings().items())), []).append(run)
    return sorted((Group(tuple(runs)) for runs in groups.values()), key=_order)


def _order(group: Group) -> tuple[Any, ...]:
    run = group.first
    options = run.options
    method = (run.method != OWN, run.method)
    return dataset_name(run), options.ipc, run.model, method, options.syn_steps, run.path


def table_lines(
    table: int,
    groups: Sequence[Group],
    published: Sequence[Published],
    planned: Mapping[Row, Planned],
) -> list[Line]:
    """For each place and each method that has a row here or a published figure and runs."""
    lines = []
    figures = {(figure.place, figure.method): figure for figure in published}
    for place in _places(table, planned):
        here = [group for group in groups if _is_of(group.first.options, place)]
        rows = {_method(row): plan for row, plan in planned.items() if _is_of(row, place)}
        methods = {*rows, *(g.first.method for g in here if (place, g.first.method) in figures)}
        for method in sorted(methods, key=lambda method: (method != OWN, method)):
            bare = Line(place, method, figures.get((place, method)), rows.get(method))
            lines += _with_runs(bare, [group for group in here if group.first.method == method])
    return lines


def _method(row: Row) -> str:
    return row.method.upper() if row.method else OWN


def _places(table: int, planned: Mapping[Row, Planned]) -> list[Place]:
    """In the order of the paper's columns."""
    if table == 1:
        return [
            Place(1, "CIFAR10", None, ipc, canonical_name(network))
            for network in CROSS_ARCHITECTURE
            for ipc in TABLE_1_IPC
        ]
    places = (
        Place(table, row.dataset, row.subset, row.ipc, canonical_name(plan.options.model))
        for row, plan in planned.items()
        if table == (3 if row.dataset == "ImageNet" else 2)
    )
    return list(dict.fromkeys(places))


def _is_of(settings: Row | DistillOptions, place: Place) -> bool:
    return (settings.dataset, settings.subset, settings.ipc) == (
        place.dataset,
        place.subset,
        place.ipc,
    )


def _with_runs(bare: Line, groups: Sequence[Group]) -> list[Line]:
    """The line with each of the groups, those that are the row itself first, or without where none
    is. Other runs appear where they have been evaluated on the line's network.
    """
    lines = [
        replace(bare, group=group, differences=differences(group, bare.planned, bare.place.network))
        for group in groups
    ]
    exact = [line for line in lines if not line.differences]
    others = [line for line in lines if line.differences and line.is_evaluated]
    if bare.planned is None:
        return others
    return [*(exact or [bare]), *others]


def differences(group: Group, planned: Planned | None, network: str) -> tuple[str, ...]:
    """How the runs differ from the row: in experts, settings, outcome and evaluation."""
    if planned is None:
        return ("there is no row of published settings here",)
    row = planned.options
    measured = [each for name in DISTILLED.values() for each in group.measured(name, network)]
    return (
        *_expert_differences(group.first.experts, row),
        *_setting_differences(group.settings, row_settings(row)),
        *(f"diverged at iteration {r.diverged}" for r in group.runs if r.diverged is not None),
        *(f"went back to half a rate {r.rewinds} times" for r in group.runs if r.rewinds),
        *_evaluation_differences(measured),
    )


def _expert_differences(experts: Mapping[str, Any] | None, row: DistillOptions) -> list[str]:
    if experts is None:
        return ["experts that are not on record"]
    found = []
    number, epochs = experts.get("number"), experts.get("epochs")
    needed = max(BufferOptions.train_epochs, row.starts.end + row.expert_epochs)
    if number != BufferOptions.num_experts:
        found.append(f"{number} experts instead of {BufferOptions.num_experts}")
    if not isinstance(epochs, int) or epochs < needed:
        found.append(f"experts of {epochs} epochs instead of {needed}")
    for name in EXPERT_SETTINGS:
        usual = getattr(BufferOptions, name)
        if experts.get(name, usual) != usual:
            found.append(f"experts' {name} {experts[name]} instead of {usual}")
    return found


def _setting_differences(ours: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """How the iteration is chosen has a column of its own."""
    return [
        f"{name} {ours[name]} instead of {value}"
        for name, value in row.items()
        if name != "select" and ours[name] != value
    ]


def _evaluation_differences(measured: Sequence[Measured]) -> list[str]:
    usual, epochs = EvaluationOptions.num_eval, EvaluationOptions.epoch_eval_train
    return list(
        dict.fromkeys(
            f"evaluated by {len(each.accuracies.accs)} networks of {each.epochs} epochs instead of "
            f"{usual} of {epochs}"
            for each in measured
            if len(each.accuracies.accs) < usual or each.epochs != epochs
        )
    )


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


def dataset_name(run: Run) -> str:
    """With the subset or, of pictures that come in several sizes, the side in pixels."""
    options, res = run.options, run.settings()["res"]
    several = options.dataset in ("digits", "ImageNet", "folder")
    parts = (options.dataset, options.subset, f"{res}x{res}" if several and res else None)
    return " ".join(part for part in parts if part)


def _experts(run: Run) -> str:
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
