"""The report's Markdown: sections for the tables, all runs, the figures, and how runs were made."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from networks import CROSS_ARCHITECTURE
from scripts.plan.estimate import ASSUMPTIONS
from scripts.report.runs import OWN, Group, RunLine, once
from scripts.report.tables import TABLES, Line, Place, Published
from scripts.results.evaluations import DISTILLED, Score
from scripts.results.runs import Record

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


def table_section(table: int, lines: Sequence[Line], published: Sequence[Published]) -> str:
    notes = (
        f"† `{line.group.where}`: {', '.join(line.differences)}.\n"
        for line in lines
        if line.group and line.differences
    )
    return "\n".join(
        [
            f"## Table {table}: {TABLES[table]}\n",
            "As published:\n",
            paper_table([figure for figure in published if figure.place.table == table]),
            "Here:\n",
            markdown(TABLE_HEAD, map(table_row, lines)),
            *dict.fromkeys(notes),
            *([NOT_RUN] if any(line.group is None for line in lines) else []),
        ]
    )


def paper_table(published: Sequence[Published]) -> str:
    """As the paper has it: a line for each method, a column for each place that ATT has."""
    places = [figure.place for figure in published if figure.method == OWN]
    rows = [
        [method, *(_figure(published, place, method) for place in places)]
        for method in dict.fromkeys(figure.method for figure in published)
    ]
    return markdown(["", *(place.title for place in places)], rows)


def _figure(published: Sequence[Published], place: Place, method: str) -> str:
    """Networks that the paper's columns do not tell apart count as one (DD's is an AlexNet), and
    what is measured on all images stands in each of the data set's columns.
    """
    whole = (place.dataset, place.subset, None)
    for figure in published:
        there = figure.place
        is_there = there.title == place.title or (there.dataset, there.subset, there.ipc) == whole
        if figure.method == method and is_there:
            return str(figure)
    return ""


def table_row(line: Line) -> list[str]:
    head = [line.place.title, line.method, str(line.published or "")]
    if line.group is None:
        return [*head, not_run(line), *[""] * 6]
    cells = [cell for name in DISTILLED for cell in _score_cells(line, name)]
    if not line.is_evaluated:
        cells[0] = "not evaluated"
    counts = once(score.count for name in DISTILLED if (score := line.score(name)))
    return [*head, *cells, counts, line.chosen_by(*DISTILLED), f"`{line.group.where}`"]


def _score_cells(line: Line, set: str) -> tuple[str, str]:
    """The score, and how far it is above the published one."""
    score, above = line.score(set), line.difference(set)
    dagger = " †" if line.differences else ""
    return f"{score}{dagger}" if score else "", "" if above is None else f"{above:+.1f}"


def not_run(line: Line) -> str:
    """What the row would cost; `planned` is there, for lines without runs are of rows."""
    assert line.planned is not None
    return (
        f"not run: {_hours(line.planned.hours)} GPU hours, experts "
        f"{_hours(line.planned.expert_hours)}"
    )


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours < 10 else f"{hours:,.0f}"


def runs_section(lines: Sequence[RunLine]) -> str:
    if not lines:
        return ""
    networks = sorted({network for line in lines for network in line.scores}, key=_network_order)
    columns = list(dict.fromkeys(name for line in lines for name in line.columns))
    head = ["data set", "IPC", "method", *columns, "seeds", "set", "chosen by", "epochs"]
    rows = [
        [
            line.dataset,
            line.ipc or "",
            line.method,
            *(line.columns.get(name, "") for name in columns),
            _ranges(line.seeds),
            line.set,
            line.chosen_by,
            line.epochs,
            *(_with_n(line.scores.get(network)) for network in networks),
        ]
        for line in lines
    ]
    return (
        "## All runs\n\nRuns that differ in their seeds alone share a line. *epochs* are those of "
        "the evaluation networks.\n\n" + markdown([*head, *networks], rows)
    )


def _network_order(network: str) -> tuple[bool, int, str]:
    """ConvNets first, then the paper's others in its order."""
    others = CROSS_ARCHITECTURE[1:]
    rank = others.index(network) if network in others else len(others)
    return not network.startswith("ConvNet"), rank, network


def _with_n(score: Score | None) -> str:
    return f"{score} ({score.count})" if score else ""


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
        paths = ", ".join(f"`{run.path}`" for run in group.runs)
        others = " (the others in the same way)" if len(group.runs) > 1 else ""
        commands = dict.fromkeys(str(call.get("command")) for call in group.first.calls)
        made_with = _made_with([call for run in group.runs for call in run.calls])
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
