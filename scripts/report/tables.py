"""The lines of the report's tables: published figures beside what runs have measured.

A run counts as a row of the paper's table only if its settings, its experts and its evaluation are
those of the row; what differs is listed with it. Accuracies are in percent.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from networks import CROSS_ARCHITECTURE, canonical_name
from scripts.plan.cells import RUN_NAME, Row, Settings, make_cells, row_options, table_rows
from scripts.report.runs import OWN, Group, once
from scripts.results.evaluations import DISTILLED, Measured, Score
from scripts.results.runs import EXPERT_SETTINGS, option_settings
from utils.options import BufferOptions, DistillOptions, EvaluationOptions

PUBLISHED = Path(__file__).parents[1] / "published.csv"
TABLES = {
    1: "cross-architecture generalisation, CIFAR-10",
    2: "CIFAR-10, CIFAR-100 and Tiny ImageNet",
    3: "ImageNet subsets",
}
TABLE_1_IPC = (10, 50)


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

    def score(self, set: str) -> Score | None:
        measured = self.measured(set)
        return Score.over(measured) if measured else None

    def difference(self, set: str) -> float | None:
        """Percentage points above the published mean."""
        score = self.score(set)
        return score.mean - self.published.mean if score and self.published else None

    def chosen_by(self, *sets: str) -> str:
        return once(each.chosen_by for set in sets for each in self.measured(set))


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
        *_setting_differences(group.settings, option_settings(row)),
        *(f"diverged at iteration {r.diverged['iteration']}" for r in group.runs if r.diverged),
        *(
            f"went back to half a rate {n} times"
            for r in group.runs
            if (n := len(r.logged("rewind")))
        ),
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
    """But for seeds, which every run may choose, and `select`, which has a column of its own."""
    return [
        f"{name} {ours[name]} instead of {value}"
        for name, value in row.items()
        if name not in ("seed", "select") and ours[name] != value
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
