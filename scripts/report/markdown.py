"""results.md: sections for the tables, all runs, the figures, and how runs were made."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from networks import CROSS_ARCHITECTURE
from scripts.plan.estimate import ASSUMPTIONS
from scripts.report.records import ALL_RUNS, OWN, TABLES, Group, once
from scripts.results.runs import Record
from utils.measure.protocol import mean_and_std

HEAD = """\
# Results

Written from run directories, nothing filled in by hand, by

```bash
{command}
```

What agrees with the paper and what does not is discussed in [findings.md](findings.md). The same
figures, each with its settings, are in [results.csv](results.csv).

Test accuracies in percent, mean ± population standard deviation; *n* counts the networks that were
trained on one distilled set or, of several runs, the seeds, over whose means it then is. *raw* are
the distilled images, *EMA* their moving average; the difference is in percentage points above the
paper. The field picks the iteration that is reported on the test set, which favours every method
alike; that is the default here too, so that figures compare. *Chosen by* says what was used: test,
val (held-out training images) or last. What eval.py has not measured is distill_att.py's own
evaluation at that iteration, the best of many. A run that is not the published row to the letter
has a †, and what differs is listed below the table.
"""
NOT_RUN = (
    "*not run*: experts are shared by the rows that need the same ones, and one run serves all "
    f"networks of Table 1; {ASSUMPTIONS}.\n"
)
TABLE_HEAD = "|method|paper|raw|difference|EMA|difference|n|chosen by|run".split("|")
VERSIONS = ("python", "torch", "torchvision", "kornia")


def as_markdown(
    records: pd.DataFrame,
    published: pd.DataFrame,
    evaluated: Sequence[Group],
    problems: Sequence[str],
    *,
    command: str,
    out: Path,
) -> str:
    sections = [
        HEAD.format(command=command),
        *(table_section(table, records, published) for table in TABLES),
        runs_section(records[records["table"] == ALL_RUNS]),
        figures_section(out),
        origins_section(evaluated),
        problems_section(problems),
    ]
    return "\n".join(filter(None, sections))


def table_section(table: int, records: pd.DataFrame, published: pd.DataFrame) -> str:
    own = records[(records["table"] == table) & (records["status"] != "published")]
    differing = own[own["differences"].fillna("") != ""]
    notes = (f"† `{each.where}`: {each.differences}.\n" for each in differing.itertuples())
    return "\n".join(
        [
            f"## Table {table}: {TABLES[table]}\n",
            "As published:\n",
            paper_table(published[published["table"] == table]),
            "Here:\n",
            markdown(TABLE_HEAD, (table_row(line) for _, line in own.groupby("line", sort=False))),
            *dict.fromkeys(notes),
            *([NOT_RUN] if (own["status"] == "not run").any() else []),
        ]
    )


def paper_table(published: pd.DataFrame) -> str:
    """As the paper has it: a line for each method, a column for each place that ATT has.

    Networks that the paper's columns do not tell apart count as one (DD's is an AlexNet), and what
    is measured on all images stands in each of the data set's columns.
    """
    figures = published.assign(
        title=[_title(each) for each in published.itertuples()],
        text=[_paper(each) for each in published.itertuples()],
    )
    places = figures[figures["method"] == OWN]
    is_whole = figures["ipc"] == 0
    whole = figures[is_whole].drop(columns="title").merge(places[["dataset", "subset", "title"]])
    cells = pd.concat([figures[~is_whole], whole]).pivot(
        index="method", columns="title", values="text"
    )
    cells = cells.reindex(index=figures["method"].unique(), columns=places["title"]).fillna("")
    return markdown(["", *cells.columns], cells.itertuples(name=None))


def _title(place: Any) -> str:
    name = place.network if place.table == 1 else place.subset or place.dataset
    return f"{name}, IPC {place.ipc}"


def _paper(figure: Any) -> str:
    """What the paper prints, if it does; the standard deviation where it can be read."""
    if pd.isna(figure.paper_mean):
        return ""
    return f"{figure.paper_mean}" + ("" if pd.isna(figure.paper_std) else f" ± {figure.paper_std}")


def table_row(line: pd.DataFrame) -> list[str]:
    """The cells of a line, from its records: one for each set, or one that says what is missing."""
    first, *_ = line.itertuples()
    head = [_title(first), first.method, _paper(first)]
    if first.status == "not run":
        return [*head, not_run(first), *[""] * 6]
    if first.status == "not evaluated":
        return [*head, "not evaluated", *[""] * 5, f"`{first.where}`"]
    by_set = {each.set: each for each in line.itertuples()}
    scores = [cell for name in ("raw", "ema") for cell in _score_cells(by_set.get(name))]
    chosen_by = once(each for text in line["chosen_by"] for each in text.split(" / "))
    return [*head, *scores, once(map(_count, by_set.values())), chosen_by, f"`{first.where}`"]


def _score_cells(record: Any) -> tuple[str, str]:
    """The score, and how far it is above the published one."""
    if record is None:
        return "", ""
    above = "" if pd.isna(record.difference) else f"{record.difference:+.1f}"
    return _score(record) + " †" * bool(record.differences), above


def _score(record: Any) -> str:
    return mean_and_std(record.mean, record.std, record.n).strip()


def _count(record: Any) -> str:
    return f"{record.n} {record.of if record.n > 1 else record.of.removesuffix('s')}"


def not_run(record: Any) -> str:
    """What the row would cost."""
    experts = record.expert_gpu_hours
    shared = f", experts {_hours(experts)}" if experts else ""
    return f"not run: {_hours(record.gpu_hours)} GPU hours{shared}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours < 10 else f"{hours:,.0f}"


def runs_section(records: pd.DataFrame) -> str:
    if records.empty:
        return ""
    networks = sorted(set(records["network"]), key=_network_order)
    settings = list(dict.fromkeys(name for each in records["settings"] for name in each))
    head = ["data set", "IPC", "method", *settings, "seeds", "set", "chosen by", "epochs"]
    rows = []
    for _, line in records.groupby("line", sort=False):
        first = next(line.fillna("").itertuples())
        scores = {each.network: f"{_score(each)} ({_count(each)})" for each in line.itertuples()}
        rows.append(
            [
                first.dataset,
                first.ipc or "",
                first.method,
                *(first.settings.get(name, "") for name in settings),
                _ranges([int(seed) for seed in first.seeds.split()]),
                first.set,
                first.chosen_by,
                first.epochs,
                *(scores.get(network, "") for network in networks),
            ]
        )
    return (
        "## All runs\n\nRuns that differ in their seeds alone share a line. *epochs* are those of "
        "the evaluation networks.\n\n" + markdown([*head, *networks], rows)
    )


def _network_order(network: str) -> tuple[bool, int, str]:
    """ConvNets first, then the paper's others in its order."""
    others = CROSS_ARCHITECTURE[1:]
    rank = others.index(network) if network in others else len(others)
    return not network.startswith("ConvNet"), rank, network


def _ranges(numbers: Sequence[int]) -> str:
    """Seeds that follow one another as 0-19."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)


def figures_section(out: Path) -> str:
    pictures = sorted((out / "figures").glob("*.png"))
    if not pictures:
        return ""
    shown = (f"![{path.stem}](figures/{path.name})\n" for path in pictures)
    return "\n".join(
        [
            "## Figures\n",
            "Drawn by `python -m scripts.figures` from run directories; "
            "`bash scripts/paper_figures.sh` makes the runs, and draws.\n",
            *shown,
        ]
    )


def origins_section(groups: Sequence[Group]) -> str:
    """For each group the commands of its first run, and what all of its runs were made with."""
    parts = ["## How the runs were made\n"] if groups else []
    for group in groups:
        paths = ", ".join(f"`{run.path}`" for run in group)
        others = " (the others in the same way)" if len(group) > 1 else ""
        commands = dict.fromkeys(str(call.get("command")) for call in group[0].environments)
        made_with = _made_with([call for run in group for call in run.environments])
        parts += [f"{paths}{others}:\n", "\n".join(["```bash", *commands, "```"]), f"{made_with}\n"]
    return "\n".join(parts)


def _made_with(calls: Sequence[Record]) -> str:
    """Hardware, versions and commits, each as often as it differs."""
    hardware = once((call.get("device") for call in calls), "; ")
    versions = once(
        (", ".join(f"{name} {call[name]}" for name in VERSIONS if name in call) for call in calls),
        "; ",
    )
    return f"{hardware}. {versions}. Commit {once((c.get('git_commit') for c in calls), ', ')}."


def problems_section(problems: Sequence[str]) -> str:
    lines = "".join(f"- {problem}\n" for problem in problems)
    return f"## Left out\n\n{lines}" if problems else ""


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_escaped(cell) for cell in line)} |\n" for line in lines)


def _escaped(cell: Any) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")
