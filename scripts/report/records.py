"""The report's one table of records, of which results.md and results.csv are views.

A run counts as a row of the paper's table only if its settings, its experts and its evaluation are
those of the row; what differs is listed with it. Accuracies are in percent, `ipc` is 0 for whole
training sets.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd

from networks import CROSS_ARCHITECTURE, canonical_name
from scripts.plan.cells import RUN_NAME, Settings, make_cells, row_options, table_rows
from scripts.results.evaluations import measured
from scripts.results.runs import EXPERT_SETTINGS, Run, comparable, option_settings
from utils.options import BufferOptions, DistillOptions, EvaluationOptions

PUBLISHED = Path(__file__).parents[1] / "published.csv"
OWN = "ATT"
TABLES = {
    1: "cross-architecture generalisation, CIFAR-10",
    2: "CIFAR-10, CIFAR-100 and Tiny ImageNet",
    3: "ImageNet subsets",
}
TABLE_1_IPC = (10, 50)
ALL_RUNS = "all runs"  # the `table` of records that stand in none of the paper's
IMAGES = ["dataset", "subset", "ipc"]
PLACE = ["table", *IMAGES, "network"]  # a cell of a table: what is distilled, what it trains
CSV = (
    *(*PLACE, "method", "status", "set", "paper_mean", "paper_std", "mean", "std", "difference"),
    *("n", "of", "chosen_by", "epochs", "seeds", "settings", "differences"),
    *("gpu_hours", "expert_gpu_hours", "runs"),
)
DIGITS = {"mean": 4, "std": 4, "difference": 4, "gpu_hours": 2, "expert_gpu_hours": 2}
# Settings that columns of the list of all runs show, or the method's name does.
IN_COLUMNS = {
    *("dataset", "subset", "res", "ipc", "model", "syn_steps", "expert_epochs", "Iteration"),
    *("method", "length", "flat", "gradient", "select", "experts' number", "experts' epochs"),
}

Group = list[Run]  # runs that differ in their seeds alone, in the order of these


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Group the runs by settings, in the order of data sets, IPC, methods and lengths."""

    def order(group: Group) -> tuple[Any, ...]:
        run, options = group[0], group[0].options
        method = (run.method != OWN, run.method)
        return dataset_name(run), options.ipc, run.model, method, options.syn_steps, run.path

    by_seed = sorted(runs, key=lambda run: (run.options.seed, run.path))
    return sorted(comparable(by_seed, "seed"), key=order)


def measured_in(groups: Sequence[Group]) -> pd.DataFrame:
    """What was measured in the runs of all groups; `group` numbers these."""
    numbers = [number for number, group in enumerate(groups) for _ in group]
    frame = measured(run for group in groups for run in group)
    return frame.assign(group=[numbers[run] for run in frame["run"]])


def read_published(path: Path = PUBLISHED) -> pd.DataFrame:
    """Read what the paper prints; a standard deviation that cannot be read there is NaN."""
    frame = pd.read_csv(path, comment="#")
    frame = frame.fillna({"subset": "", "ipc": 0}).astype({"ipc": int})
    return frame.rename(columns={"mean": "paper_mean", "std": "paper_std"})


def planned_rows() -> pd.DataFrame:
    """Every row of configs/, ATT's and the rivals', with the GPU hours that it and its experts are
    estimated to cost.
    """
    settings = Settings(
        data_path=DistillOptions.data_path,
        buffer_path=DistillOptions.buffer_path,
        save_path=DistillOptions.save_path,
        run_name=RUN_NAME,
    )
    experts, cells = make_cells(settings, rivals=True)
    hours = {cell.name: cell.estimate.hours for cell in experts}
    rows = []
    for row, cell in zip(table_rows(rivals=True), cells, strict=True):
        options = row_options(row)
        rows.append(
            {
                "table": 3 if row.dataset == "ImageNet" else 2,
                "dataset": row.dataset,
                "subset": row.subset or "",
                "ipc": row.ipc,
                "network": canonical_name(options.model),
                "method": row.method.upper() if row.method else OWN,
                "gpu_hours": cell.estimate.hours,
                "expert_gpu_hours": hours.get(cell.needs or "", 0.0),
                "options": options,
            }
        )
    return pd.DataFrame(rows)


def make_records(
    groups: Sequence[Group],
    found: pd.DataFrame,
    published: pd.DataFrame,
    planned: pd.DataFrame,
) -> pd.DataFrame:
    """A row for each set in a line of the paper's tables, for each figure that stands beside none,
    and for each network in a line of the list of all runs. `line` numbers lines.
    """
    lines = _table_lines(groups, published, planned)
    number = count()
    rows = list(_table_records(lines, groups, found, number))
    cell = itemgetter(*PLACE, "method")
    beside = {cell(row) for row in rows}
    others = (row for row in published.to_dict("records") if cell(row) not in beside)
    rows += [row | {"status": "published"} for row in others]
    rows += [*_run_records(groups, found, number), *_real_records(groups, found, number)]
    return pd.DataFrame(rows, columns=[*CSV, "line", "where"], dtype=object)


def as_csv(records: pd.DataFrame) -> str:
    """results.csv: every record that has a figure or a cost."""
    frame = records.loc[records["status"] != "not evaluated", list(CSV)]
    frame["ipc"] = frame["ipc"].replace(0, "")
    frame["settings"] = frame["settings"].map(_listed, na_action="ignore")
    for name, digits in DIGITS.items():
        frame[name] = frame[name].map(f"{{:.{digits}f}}".format, na_action="ignore")
    return frame.to_csv(index=False, lineterminator="\n")


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value != "")


def _table_lines(
    groups: Sequence[Group], published: pd.DataFrame, planned: pd.DataFrame
) -> pd.DataFrame:
    """A line for each place and each method that has a row here or a published figure and runs."""
    first = [
        {"table": 1, "dataset": "CIFAR10", "subset": "", "ipc": ipc, "network": network}
        for network in map(canonical_name, CROSS_ARCHITECTURE)
        for ipc in TABLE_1_IPC
    ]
    others = planned[PLACE].drop_duplicates().sort_values("table", kind="stable")
    places = pd.concat([pd.DataFrame(first), others], ignore_index=True)
    places["place"] = places.index
    ran = pd.DataFrame(
        [(*_images(group[0].options), group[0].method) for group in groups],
        columns=[*IMAGES, "method"],
    ).astype({"ipc": int})
    rows = places.merge(planned.drop(columns=["table", "network"]), on=IMAGES)
    with_figures = places.merge(ran, on=IMAGES).merge(published[[*PLACE, "method"]])
    lines = pd.concat([rows, with_figures]).drop_duplicates([*PLACE, "method"])
    lines = lines.assign(is_rival=lines["method"] != OWN)
    lines = lines.sort_values(["place", "is_rival", "method"])
    return lines.merge(published, on=[*PLACE, "method"], how="left")


def _images(options: DistillOptions) -> tuple[str, str, int]:
    return options.dataset, options.subset or "", options.ipc


def _table_records(
    lines: pd.DataFrame, groups: Sequence[Group], found: pd.DataFrame, number: Iterator[int]
) -> Iterator[dict[str, Any]]:
    for line in lines.to_dict("records"):
        for at, differences in _groups_of(line, groups, found):
            record = line | {"line": next(number), "status": "not run"}
            if at is None:
                yield record
                continue
            record |= {
                "status": "differs" if differences else "run",
                "differences": ", ".join(differences),
                "where": where(groups[at]),
                **_runs_record(groups[at]),
            }
            measured = _measured_on(found, at, line["network"])
            if measured.empty:
                yield record | {"status": "not evaluated"}
            for name, same in measured.groupby("set", sort=False):
                score = score_over(same)
                yield {
                    **record,
                    **score,
                    "set": name,
                    "difference": score["mean"] - line["paper_mean"],
                    "chosen_by": once(same["chosen_by"]),
                    "epochs": once(same["epochs"]),
                }


def _groups_of(
    line: Mapping[str, Any], groups: Sequence[Group], found: pd.DataFrame
) -> list[tuple[int | None, list[str]]]:
    """The groups of a line, with how they differ from it: those that are the row itself first, or
    None where none is. Others appear where they have been evaluated on the line's network.
    """
    images = tuple(line[name] for name in IMAGES)
    exact: list[tuple[int | None, list[str]]] = []
    others: list[tuple[int | None, list[str]]] = []
    for at, group in enumerate(groups):
        if (_images(group[0].options), group[0].method) == (images, line["method"]):
            measured = _measured_on(found, at, line["network"])
            if not (differs := differences(group, measured, line)):
                exact.append((at, differs))
            elif not measured.empty:
                others.append((at, differs))
    is_row = isinstance(line["options"], DistillOptions)
    return [*(exact or ([(None, [])] if is_row else [])), *others]


def _measured_on(found: pd.DataFrame, group: int, network: str) -> pd.DataFrame:
    """What was measured on the raw and the EMA sets of a group, the raw first."""
    is_there = (found["group"] == group) & (found["network"] == network) & (found["set"] != "")
    return found[is_there].sort_values("set", ascending=False, kind="stable")


def score_over(measured: pd.DataFrame) -> dict[str, Any]:
    """Mean and population standard deviation over networks or, of several seeds, their means."""
    if len(measured) == 1:
        one = measured.iloc[0]
        return {"mean": one["mean"], "std": one["std"], "n": one["n"], "of": "networks"}
    means = measured["mean"].tolist()
    mean, std = statistics.fmean(means), statistics.pstdev(means)
    return {"mean": mean, "std": std, "n": len(means), "of": "seeds"}


def differences(group: Group, measured: pd.DataFrame, line: Mapping[str, Any]) -> list[str]:
    """How the runs differ from the row: in experts, settings, outcome and evaluation."""
    row = line["options"]
    if not isinstance(row, DistillOptions):
        return ["there is no row of published settings here"]
    rewinds = [len(run.logged("rewind")) for run in group]
    return [
        *(_expert_differences(group[0].experts, row) if line["expert_gpu_hours"] else []),
        *_setting_differences(group[0].settings("seed"), option_settings(row)),
        *(f"diverged at iteration {r.diverged['iteration']}" for r in group if r.diverged),
        *(f"went back to half a rate {n} times" for n in rewinds if n),
        *_evaluation_differences(measured),
    ]


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


def _evaluation_differences(measured: pd.DataFrame) -> list[str]:
    usual, epochs = EvaluationOptions.num_eval, EvaluationOptions.epoch_eval_train
    other = measured[(measured["n"] < usual) | (measured["epochs"] != epochs)]
    return [
        f"evaluated by {each.n} networks of {each.epochs} epochs instead of {usual} of {epochs}"
        for each in other[["n", "epochs"]].drop_duplicates().itertuples()
    ]


def _run_records(
    groups: Sequence[Group], found: pd.DataFrame, number: Iterator[int]
) -> Iterator[dict[str, Any]]:
    """A line for what is measured in the same way: the set, how it was chosen, and the epochs."""
    distilled = found[found["set"] != ""]
    for at, group in enumerate(groups):
        settings = _shown_settings(group, groups)
        own = distilled[distilled["group"] == at]
        for way, same in reversed(list(own.groupby(["set", "chosen_by", "epochs"]))):
            record = dict(zip(("set", "chosen_by", "epochs"), way, strict=True))
            record |= {
                "table": ALL_RUNS,
                "dataset": dataset_name(group[0]),
                "ipc": group[0].options.ipc,
                "method": group[0].method,
                "status": "run",
                "settings": settings,
                "line": next(number),
                **_runs_record(group),
            }
            for network, each in same.groupby("network", sort=False):
                yield {**record, "network": network, **score_over(each)}


def _real_records(
    groups: Sequence[Group], found: pd.DataFrame, number: Iterator[int]
) -> Iterator[dict[str, Any]]:
    """Real images that eval.py trained networks on, each seed once, whatever runs it was beside:
    the evaluation by the most networks.
    """
    runs = [run for group in groups for run in group]
    real = found[found["set"] == ""]
    own = [runs[run] for run in real["run"]]
    real = real.assign(
        dataset=[dataset_name(run) for run in own],
        ipc=[run.options.ipc for run in own],
        also=[_protocol(run.options) for run in own],
    )
    real.loc[real["trained_on"] == "full", "ipc"] = 0
    keys = ["dataset", "ipc", "trained_on", "also", "epochs"]
    for (dataset, ipc, trained_on, also, epochs), same in real.groupby(keys, sort=False):
        record = {
            "table": ALL_RUNS,
            "dataset": dataset,
            "ipc": ipc,
            "method": trained_on,
            "status": "run",
            "epochs": epochs,
            "seeds": _joined(sorted(set(same["seed"]))),
            "settings": {"also": also},
            "line": next(number),
        }
        for network, each in same.groupby("network", sort=False):
            most = each.sort_values("n", ascending=False, kind="stable").drop_duplicates("seed")
            yield {**record, "network": network, **score_over(most)}


def _protocol(options: DistillOptions) -> str:
    """What alters the training on real images, beside the settings in columns."""
    held_out = f"val_fraction {options.val_fraction}"
    return ", ".join(["ZCA"] * options.zca + [held_out] * (options.val_fraction > 0))


def _shown_settings(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    """The columns of the list of all runs that are known of a distillation only."""
    run, options = group[0], group[0].options
    diverged = sum(each.diverged is not None for each in group)
    also = _also(group, groups) + [f"{diverged} of {len(group)} diverged"] * bool(diverged)
    matches = run.matches_trajectories
    return {
        "network": run.model,
        "N_S": options.syn_steps if matches else "",
        "N_T": options.expert_epochs if matches else "",
        "iterations": options.Iteration,
        "experts": _experts(run) if matches else "",
        "also": ", ".join(also),
    }


def _experts(run: Run) -> str:
    if run.experts is None:
        return "not on record"
    flat = " flat" if run.options.flat else ""
    return f"{run.experts.get('number')}{flat} of {run.experts.get('epochs')} epochs"


def _also(group: Group, groups: Sequence[Group]) -> list[str]:
    """The settings, beyond those in columns, by which the runs at this data set and IPC differ."""

    def images(group: Group) -> tuple[str, int]:
        return dataset_name(group[0]), group[0].options.ipc

    here = [each[0].settings("seed") for each in groups if images(each) == images(group)]
    return [
        f"{name} {value}"
        for name, value in group[0].settings("seed").items()
        if name not in IN_COLUMNS and any(other.get(name, value) != value for other in here)
    ]


def dataset_name(run: Run) -> str:
    """The data set with its subset or, where pictures come in several sizes, their side."""
    options, res = run.options, run.settings()["res"]
    several = options.dataset in ("digits", "ImageNet", "folder")
    parts = (options.dataset, options.subset, f"{res}x{res}" if several and res else None)
    return " ".join(part for part in parts if part)


def where(group: Group) -> str:
    others = len(group) - 1
    return f"{group[0].path}" + (f" and {others} of other seeds" if others else "")


def _runs_record(group: Group) -> dict[str, str]:
    seeds = _joined(run.options.seed for run in group)
    return {"seeds": seeds, "runs": _joined(run.path for run in group)}


def _joined(values: Iterable[Any]) -> str:
    return " ".join(map(str, values))


def once(values: Iterable[Any], between: str = " / ") -> str:
    """The values in a row, each once."""
    return between.join(dict.fromkeys(map(str, values)))
