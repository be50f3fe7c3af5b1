"""The tables of the paper beside what runs here have measured, as docs/results.md and results.csv.

    python -m scripts.report [RUN_DIR ...] [--out docs]

A path may be a run directory or a folder of them at any depth (default: results). What is in no
run directory is not in the report: a row without a run says so, and what it would cost. What cannot
be used is named in one line each, and the report covers the rest; without any run it has the
published figures and the costs.

Exit status: 0 the report is written, 2 bad input.
"""

import argparse
import csv
import io
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from networks import CROSS_ARCHITECTURE
from scripts.estimate import ASSUMPTIONS
from scripts.report_tables import (
    OWN,
    TABLES,
    Group,
    Line,
    Place,
    Published,
    RunLine,
    Score,
    group_runs,
    planned_rows,
    read_published,
    run_lines,
    table_lines,
)
from scripts.runs import DISTILLED, Record, read_runs
from utils.errors import UserError
from utils.files import check_writable, write_text
from utils.options import DistillOptions

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
VERSIONS = ("python", "torch", "torchvision", "kornia")
COLUMNS = (
    *("table", "dataset", "subset", "ipc", "network", "method", "status", "set"),
    *("paper_mean", "paper_std", "mean", "std", "difference", "n", "of", "chosen_by", "epochs"),
    *("seeds", "settings", "differences", "gpu_hours", "expert_gpu_hours", "runs"),
)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    out = Path(args.out)
    check_writable(out)
    runs, problems = read_runs(map(Path, args.paths))
    groups = group_runs(runs)
    problems += [_not_evaluated(group) for group in groups if not _is_evaluated(group)]
    published, planned = read_published(), planned_rows()
    lines = {table: table_lines(table, groups, published, planned) for table in TABLES}
    listed = run_lines(groups)
    for problem in problems:
        print(f"report: left out: {problem}", file=sys.stderr)
    command = shlex.join(["python", "-m", "scripts.report", *argv])
    sections = [
        HEAD.format(command=command),
        *(table_section(table, lines[table], published) for table in TABLES),
        runs_section(listed),
        figures_section(out),
        origins_section([group for group in groups if _is_evaluated(group)]),
        problems_section(problems),
    ]
    write_text("\n".join(filter(None, sections)), out / "results.md")
    every_line = [line for table in TABLES for line in lines[table]]
    records = [*table_records(every_line, published), *run_records(listed)]
    write_text(as_csv(records), out / "results.csv")
    print(f"{len(runs)} runs in {out / 'results.md'} and {out / 'results.csv'}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m scripts.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="*", metavar="RUN_DIR", help="a run, or a folder of runs")
    parser.add_argument("--out", default="docs", help="folder of the report (default: docs)")
    args = parser.parse_args(argv)
    args.paths = args.paths or [DistillOptions.save_path]
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def _is_evaluated(group: Group) -> bool:
    return any(run.measured for run in group.runs)


def _not_evaluated(group: Group) -> str:
    return f"{_paths(group)}: not evaluated, see eval.py"


def _paths(group: Group) -> str:
    more = len(group.runs) - 1
    return f"{group.first.path}" + (f" and {more} of other seeds" if more else "")


def table_section(table: int, lines: Sequence[Line], published: Sequence[Published]) -> str:
    notes = dict.fromkeys(
        f"† `{_paths(line.group)}`: {', '.join(line.differences)}."
        for line in lines
        if line.group and line.differences
    )
    return "\n".join(
        [
            f"## Table {table}: {TABLES[table]}\n",
            "As published:\n",
            paper_table([figure for figure in published if figure.place.table == table]),
            "Here:\n",
            markdown(
                [
                    "",
                    "method",
                    "paper",
                    "raw",
                    "difference",
                    "EMA",
                    "difference",
                    "n",
                    "chosen by",
                    "run",
                ],
                (table_row(line) for line in lines),
            ),
            *(f"{note}\n" for note in notes),
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
    for figure in published:
        there = figure.place
        is_whole = there.ipc is None and (there.dataset, there.subset) == (
            place.dataset,
            place.subset,
        )
        if figure.method == method and (is_whole or there.title == place.title):
            return str(figure)
    return ""


def table_row(line: Line) -> list[str]:
    head = [line.place.title, line.method, str(line.published or "")]
    if line.group is None:
        return [*head, not_run(line), *[""] * 6]
    measured = {name: line.measured(name) for name in DISTILLED}
    scores = {name: Score.over(some) for name, some in measured.items() if some}
    dagger = " †" if line.differences else ""
    cells = []
    for name in DISTILLED:
        value, above = scores.get(name), line.difference(name)
        cells.append(f"{value}{dagger}" if value else "")
        cells.append("" if above is None else f"{above:+.1f}")
    if not scores:
        cells = ["not evaluated", "", "", ""]
    counts = dict.fromkeys(score.count for score in scores.values())
    chosen = dict.fromkeys(each.chosen_by for some in measured.values() for each in some)
    return [*head, *cells, " / ".join(counts), " / ".join(chosen), f"`{_paths(line.group)}`"]


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


def _network_order(network: str) -> tuple[int, str]:
    """ConvNets first, then the paper's others in its order."""
    others = CROSS_ARCHITECTURE[1:]
    if network.startswith("ConvNet"):
        return 0, network
    return 1 + (others.index(network) if network in others else len(others)), network


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
        calls = [call for run in group.runs for call in run.calls]
        paths = ", ".join(f"`{run.path}`" for run in group.runs)
        commands = dict.fromkeys(str(call.get("command")) for call in group.first.calls)
        others = " (the others in the same way)" if len(group.runs) > 1 else ""
        parts += [
            f"{paths}{others}:\n",
            "\n".join(["```bash", *commands, "```"]),
            f"{_made_with(calls)}\n",
        ]
    return "\n".join(parts)


def _made_with(calls: Sequence[Record]) -> str:
    """Hardware, versions and commits, each as often as it differs."""
    hardware = dict.fromkeys(str(call.get("device")) for call in calls)
    versions = dict.fromkeys(
        ", ".join(f"{name} {call[name]}" for name in VERSIONS if name in call) for call in calls
    )
    commits = dict.fromkeys(str(call.get("git_commit")) for call in calls)
    return f"{'; '.join(hardware)}. {'; '.join(versions)}. Commit {', '.join(commits)}."


def problems_section(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    return "\n".join(["## Left out\n", *(f"- {problem}" for problem in problems), ""])


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_escaped(cell) for cell in line)} |\n" for line in lines)


def _escaped(cell: Any) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def table_records(
    lines: Iterable[Line], published: Sequence[Published]
) -> Iterator[dict[str, Any]]:
    """For the CSV: of each line its sets, and the published figures that no line has."""
    beside = set()
    for line in lines:
        place, planned = line.place, line.planned
        beside.add((place, line.method))
        record = asdict(place) | {"method": line.method, **_paper_record(line.published)}
        if planned:
            hours, experts = planned.hours, planned.expert_hours
            record |= {"gpu_hours": f"{hours:.2f}", "expert_gpu_hours": f"{experts:.2f}"}
        if line.group is None:
            yield record | {"status": "not run"}
            continue
        for name in DISTILLED:
            if measured := line.measured(name):
                yield {
                    **record,
                    "status": "differs" if line.differences else "run",
                    "set": name,
                    **_score_record(Score.over(measured)),
                    "difference": _rounded(line.difference(name)),
                    "chosen_by": " / ".join(dict.fromkeys(each.chosen_by for each in measured)),
                    "epochs": " / ".join(dict.fromkeys(str(each.epochs) for each in measured)),
                    "seeds": " ".join(str(run.options.seed) for run in line.group.runs),
                    "differences": ", ".join(line.differences),
                    "runs": " ".join(str(run.path) for run in line.group.runs),
                }
    for figure in published:
        if (figure.place, figure.method) not in beside:
            record = asdict(figure.place) | {"method": figure.method}
            yield record | _paper_record(figure) | {"status": "published"}


def run_records(lines: Iterable[RunLine]) -> Iterator[dict[str, Any]]:
    for line in lines:
        for network, score in line.scores.items():
            yield {
                "table": "all runs",
                "dataset": line.dataset,
                "ipc": line.ipc,
                "network": network,
                "method": line.method,
                "status": "run",
                "set": line.set,
                **_score_record(score),
                "chosen_by": line.chosen_by,
                "epochs": line.epochs,
                "seeds": " ".join(map(str, line.seeds)),
                "settings": ", ".join(f"{k} {v}" for k, v in line.columns.items() if v != ""),
                "runs": " ".join(map(str, line.paths)),
            }


def _paper_record(published: Published | None) -> dict[str, Any]:
    return {"paper_mean": published.mean, "paper_std": published.std} if published else {}


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _score_record(score: Score) -> dict[str, Any]:
    return {
        "mean": _rounded(score.mean),
        "std": _rounded(score.std),
        "n": score.n,
        "of": score.of,
    }


def as_csv(records: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"report: error: {error}", file=sys.stderr)
        sys.exit(2)
