"""The report's one table of records, of which results.md and results.csv are views.

A run counts as a row of the paper's table only if its settings, its experts and its evaluation are
those of the row; what differs is listed with it. Accuracies are in percent, `ipc` is 0 for whole
training sets.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from networks import CROSS_ARCHITECTURE, canonical_name
from scripts.plan.cells import RUN_NAME, Settings, make_cells
from scripts.results.evaluations import COLUMNS, measured
from scripts.results.runs import EXPERT_SETTINGS, Run, comparable, option_settings
from utils.experts.easy_first import PUBLISHED_EPOCHS
from utils.methods.registry import own_flags, title
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
    *("method", "length", "flat", "easy_first", "gradient", "select"),
    *("experts' number", "experts' epochs"),
}
FREE = ("seed", "select")  # every run may choose its seed; `select` has a column of its own
# Of a group of runs, beside the images and the method.
GROUP = ["group", "members", "shown_dataset", "seeds", "runs", "where", "settings", "protocol"]

Group = Sequence[Run]  # runs that differ in their seeds alone, in the order of these


def read_published(path: Path = PUBLISHED) -> pd.DataFrame:
    """Read what the paper prints; a standard deviation that cannot be read there is NaN."""
    frame = pd.read_csv(path, comment="#")
    frame = frame.fillna({"subset": "", "ipc": 0}).astype({"ipc": int})
    return frame.rename(columns={"mean": "paper_mean", "std": "paper_std"})


def planned_rows() -> pd.DataFrame:
    """Every row of configs/, ATT's and the rivals', at each of its places in the paper's tables,
    with the GPU hours that it and its experts are estimated to cost.
    """
    settings = Settings(
        data_path=DistillOptions.data_path,
        buffer_path=DistillOptions.buffer_path,
        save_path=DistillOptions.save_path,
        run_name=RUN_NAME,
    )
    experts, cells = make_cells(settings, rivals=True)
    hours = {cell.name: cell.estimate.hours for cell in experts}

    places = [
        (1, network, cell)
        for network in CROSS_ARCHITECTURE
        for cell in cells
        if cell.options[0].dataset == "CIFAR10" and cell.options[0].ipc in TABLE_1_IPC
    ]
    for cell in cells:
        options = cell.options[0]
        places.append((3 if options.dataset == "ImageNet" else 2, options.model, cell))
    return pd.DataFrame(
        {
            "table": table,
            **_images(cell.options[0]),
            "network": canonical_name(network),
            "method": title(vars(cell.options[0])),
            "gpu_hours": cell.estimate.hours,
            "expert_gpu_hours": hours.get(cell.needs or "", 0.0),
            "options": cell.options[0],
        }
        for table, network, cell in places
    )


def _images(options: DistillOptions) -> dict[str, Any]:
    return {"dataset": options.dataset, "subset": options.subset or "", "ipc": options.ipc}


def group_runs(runs: Iterable[Run]) -> pd.DataFrame:
    """A row for each group of runs that differ in their seeds alone, in the order of data sets,
    IPC, methods and lengths.
    """

    def order(group: Group) -> tuple[Any, ...]:
        run, options = group[0], group[0].options
        method = (run.method != OWN, run.method)
        return dataset_name(run), options.ipc, run.model, method, options.syn_steps, run.path

    by_seed = sorted(runs, key=lambda run: (run.options.seed, run.path))
    groups = sorted(comparable(by_seed, "seed"), key=order)
    rows = [
        {
            **_images(members[0].options),
            "method": members[0].method,
            "group": number,
            "members": members,
            "shown_dataset": dataset_name(members[0]),
            "seeds": _joined(run.options.seed for run in members),
            "runs": _joined(run.path for run in members),
            "where": _where(members),
            "settings": _shown_settings(members, groups),
            "protocol": _protocol(members[0].options),
        }
        for number, members in enumerate(groups)
    ]
    frame = pd.DataFrame(rows, columns=[*IMAGES, "method", *GROUP], dtype=object)
    return frame.astype({"ipc": int})


def measured_in(groups: pd.DataFrame) -> pd.DataFrame:
    """What was measured in the runs of all groups, beside what is known of these."""
    rows = [
        {"group": each.group, **row}
        for each in groups.itertuples()
        for run in each.members
        for row in measured(run)
    ]
    found = pd.DataFrame(rows, columns=["group", *COLUMNS], dtype=object)
    return found.merge(groups, on="group")


def make_records(
    groups: pd.DataFrame, found: pd.DataFrame, published: pd.DataFrame, planned: pd.DataFrame
) -> pd.DataFrame:
    """A row for each set in a line of the paper's tables, for each figure that stands beside none,
    and for each network in a line of the list of all runs. `line` tells lines apart.
    """
    beside = _table_records(_table_lines(groups, published, planned), groups, found)
    keys = [*PLACE, "method"]
    is_beside = published.set_index(keys).index.isin(beside.set_index(keys).index)
    others = published[~is_beside].assign(status="published")
    parts = [beside, others, _run_records(found), _real_records(found)]
    columns = [*CSV, "line", "where"]
    return pd.concat([part.reindex(columns=columns).astype(object) for part in parts])


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
    groups: pd.DataFrame, published: pd.DataFrame, planned: pd.DataFrame
) -> pd.DataFrame:
    """A line for each place and each method that has a row here or a published figure and runs."""
    ran = published[[*PLACE, "method"]].merge(groups[[*IMAGES, "method"]])
    lines = pd.concat([planned, ran]).drop_duplicates([*PLACE, "method"])
    lines = lines.assign(
        place=lines.groupby(PLACE, sort=False).ngroup(), is_rival=lines["method"] != OWN
    )
    lines = lines.sort_values(["place", "is_rival", "method"])
    lines = lines.merge(published, on=[*PLACE, "method"], how="left").astype(object)
    return lines.assign(number=range(len(lines)), has_row=lines["options"].notna())


def _table_records(lines: pd.DataFrame, groups: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """The records of each line: of the groups that are its row to the letter or, where none is,
    what the row would cost; then of the others that have been evaluated on its network.
    """
    distilled = found.loc[found["set"] != "", ["group", *COLUMNS]]
    # Each line beside each of its groups, and these beside what was measured on the line's network.
    seen = lines.merge(groups.drop(columns="settings"), on=[*IMAGES, "method"]).merge(
        distilled.sort_values("set", ascending=False, kind="stable"),
        on=["group", "network"],
        how="left",
    )
    seen["set"] = seen["set"].fillna("")
    seen["differences"], seen["status"] = "", "not evaluated"
    line = ["number", "group"]
    for _, same in seen.groupby(line):
        seen.loc[same.index, "differences"] = ", ".join(_differences(same))
    is_row, is_measured = seen["differences"] == "", seen["set"] != ""
    seen.loc[is_measured, "status"] = "differs"
    seen.loc[is_measured & is_row, "status"] = "run"
    is_missing = lines["has_row"] & ~lines["number"].isin(seen.loc[is_row, "number"])
    missing = lines[is_missing].assign(status="not run", differences="", line=lines["number"])
    records = pd.concat([missing, _scored(seen[is_row | is_measured], line, "set")])
    records["difference"] = records["mean"] - records["paper_mean"]
    records["is_row"] = records["differences"] == ""
    return records.sort_values(["number", "is_row", "group"], ascending=[True, False, True])


def _scored(found: pd.DataFrame, line: Sequence[str], entry: str) -> pd.DataFrame:
    """A record for each `entry` of each line: the score over its rows, beside what they share."""
    rows = [
        {**same.iloc[0].to_dict(), **_score(same), "line": key}
        for key, of_line in found.groupby(line, sort=False)
        for _, same in of_line.groupby(entry, sort=False)
    ]
    return pd.DataFrame(rows, columns=[*found.columns, "of", "line"], dtype=object)


def _score(measured: pd.DataFrame) -> dict[str, Any]:
    """Mean and population standard deviation over networks or, of several seeds, their means; of
    each seed what the most networks say.
    """
    seeds = measured.sort_values("n", ascending=False, kind="stable").drop_duplicates("seed")
    ways = {name: once(measured[name]) for name in ("chosen_by", "epochs")}
    if len(seeds) == 1:
        return {**seeds.iloc[0][["mean", "std", "n"]].to_dict(), "of": "networks", **ways}
    means = seeds["mean"].tolist()
    mean, std = statistics.fmean(means), statistics.pstdev(means)
    return {"mean": mean, "std": std, "n": len(means), "of": "seeds", **ways}


def _run_records(found: pd.DataFrame) -> pd.DataFrame:
    """A line for what is measured in the same way: the set, how it was chosen, and the epochs."""
    line = ["group", "set", "chosen_by", "epochs"]
    shown = found[found["set"] != ""].sort_values(
        line, ascending=[True, False, False, False], kind="stable"
    )
    return _scored(_in_list(shown), line, "network")


def _real_records(found: pd.DataFrame) -> pd.DataFrame:
    """Real images that eval.py trained networks on, each seed once, whatever runs it was beside."""
    real = _in_list(found[found["set"] == ""])
    real = real.assign(method=real["trained_on"], runs=None)
    real.loc[real["trained_on"] == "full", "ipc"] = 0
    line = ["dataset", "ipc", "trained_on", "protocol", "epochs"]
    real["seeds"] = real.groupby(line)["seed"].transform(lambda seeds: _joined(sorted(set(seeds))))
    real["settings"] = [{"also": protocol} for protocol in real["protocol"]]
    return _scored(real, line, "network")


def _in_list(found: pd.DataFrame) -> pd.DataFrame:
    return found.assign(table=ALL_RUNS, status="run", dataset=found["shown_dataset"], subset="")


def _differences(measured: pd.DataFrame) -> list[str]:
    """How the runs of a group differ from a row: in experts, settings, outcome and evaluation.

    `measured` is what they have on the raw and EMA sets.
    """
    line = measured.iloc[0]
    row, group = line["options"], line["members"]
    if not line["has_row"]:
        return ["there is no row of published settings here"]
    rewinds = [len(run.logged("rewind")) for run in group]
    usual = {n: v for n, v in option_settings(row).items() if n not in FREE}
    return [
        *(_expert_differences(group[0], row) if line["expert_gpu_hours"] else []),
        *_unlike(group[0].settings(), usual),
        *(f"diverged at iteration {r.diverged['iteration']}" for r in group if r.diverged),
        *(f"went back to half a rate {n} times" for n in rewinds if n),
        *_evaluation_differences(measured[measured["set"] != ""]),
    ]


def _expert_differences(run: Run, row: DistillOptions) -> list[str]:
    if run.experts is None:
        return ["experts that are not on record"]
    found = []
    number, epochs = run.experts.get("number"), run.experts.get("epochs")
    usual_epochs = PUBLISHED_EPOCHS if row.easy_first else BufferOptions.train_epochs
    needed = max(usual_epochs, row.last_epoch)
    if number != BufferOptions.num_experts:
        found.append(f"{number} experts instead of {BufferOptions.num_experts}")
    if not isinstance(epochs, int) or epochs < needed:
        found.append(f"experts of {epochs} epochs instead of {needed}")
    usual = {f"experts' {name}": getattr(BufferOptions, name) for name in EXPERT_SETTINGS}
    return found + _unlike(run.settings(), usual)


def _unlike(ours: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """The settings that differ from the usual ones; one that is not known is as usual."""
    pairs = ((name, ours.get(name, value), value) for name, value in usual.items())
    return [f"{name} {own} instead of {value}" for name, own, value in pairs if own != value]


def _evaluation_differences(measured: pd.DataFrame) -> list[str]:
    usual, epochs = EvaluationOptions.num_eval, EvaluationOptions.epoch_eval_train
    other = measured[(measured["n"] < usual) | (measured["epochs"] != epochs)]
    return [
        f"evaluated by {each.n} networks of {each.epochs} epochs instead of {usual} of {epochs}"
        for each in other[["n", "epochs"]].drop_duplicates().itertuples()
    ]


def _protocol(options: DistillOptions) -> str:
    """What alters the training on real images, beside the settings in columns."""
    parts = {
        "ZCA": options.zca,
        f"val_fraction {options.val_fraction}": options.val_fraction > 0,
        f"test_fraction {options.test_fraction}": options.test_fraction > 0,
        f"fit {options.fit}": options.fit != "crop",
    }
    return ", ".join(part for part, is_so in parts.items() if is_so)


def _shown_settings(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    """The columns of the list of all runs that are known of a distillation only."""
    run, options = group[0], group[0].options
    diverged = sum(each.diverged is not None for each in group)
    also = _also(run, groups) + [f"{diverged} of {len(group)} diverged"] * bool(diverged)
    matches = run.matches_trajectories
    return {
        "network": run.model,
        "N_S": options.syn_steps if "syn_steps" in own_flags(options.method) else "",
        "N_T": options.expert_epochs if matches else "",
        "iterations": options.Iteration,
        "experts": _experts(run) if matches else "",
        "also": ", ".join(also),
    }


def _experts(run: Run) -> str:
    if run.experts is None:
        return "not on record"
    marks = {" flat": run.options.flat, " easy-first": run.options.easy_first}
    kind = "".join(mark for mark, is_so in marks.items() if is_so)
    return f"{run.experts.get('number')}{kind} of {run.experts.get('epochs')} epochs"


def _also(run: Run, groups: Sequence[Group]) -> list[str]:
    """The settings, beyond those in columns, by which the runs at this data set and IPC differ."""
    images = dataset_name(run), run.options.ipc
    others = [other for other, *_ in groups if (dataset_name(other), other.options.ipc) == images]
    here = [other.settings("seed") for other in others]
    return [
        f"{name} {value}"
        for name, value in run.settings("seed").items()
        if name not in IN_COLUMNS and any(other.get(name, value) != value for other in here)
    ]


def dataset_name(run: Run) -> str:
    """The data set with its subset or, where pictures come in several sizes, their side."""
    options, res = run.options, run.settings()["res"]
    several = options.dataset in ("digits", "ImageNet", "folder")
    parts = (options.dataset, options.subset, f"{res}x{res}" if several and res else None)
    return " ".join(part for part in parts if part)


def _where(group: Group) -> str:
    others = len(group) - 1
    return f"{group[0].path}" + (f" and {others} of other seeds" if others else "")


def _joined(values: Iterable[Any]) -> str:
    return " ".join(map(str, values))


def once(values: Iterable[Any], between: str = " / ") -> str:
    """The values in a row, each once."""
    return between.join(dict.fromkeys(map(str, values)))
