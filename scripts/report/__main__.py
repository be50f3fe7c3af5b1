"""The tables of the paper beside what runs here have measured, as docs/results.md and results.csv.

    python -m scripts.report [RUN_DIR ...] [--out docs]
    python -m scripts.report --html RUN_DIR [--out FOLDER]

With --html it is one page about one run instead, finished or not: report.html in the run's own
folder, which opens in a browser without a network.

A path may be a run directory or a folder of them at any depth (default: results). What is in no
run directory is not in the report: a row without a run says so, and what it would cost. What cannot
be used is named in one line each, and the report covers the rest; without any run it has the
published figures and the costs.

Exit status: 0 the report is written, 2 bad input.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from scripts.report.markdown import as_markdown
from scripts.report.records import (
    as_csv,
    group_runs,
    make_records,
    measured_in,
    planned_rows,
    read_published,
)
from scripts.results.runs import read_runs
from utils.core.files import check_writable, write_text
from utils.core.script import Parser, run_script
from utils.options import DistillOptions


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.html:
        from scripts.folder.job import Job  # slow to import, as plotly is, and needed only here
        from scripts.report.page import write_page

        job = Job.of_run(args.html)
        page = write_page(args.html, args.out or args.html, more=job.told if job else None)
        print(f"written: {page}")
        return 0
    write_tables(args, argv)
    return 0


def write_tables(args: argparse.Namespace, argv: Sequence[str]) -> None:
    check_writable(args.out)
    runs, problems = read_runs(args.paths, attrgetter("evaluations"))
    groups = group_runs(runs)
    found = measured_in(groups)
    is_evaluated = groups["group"].isin(found["group"])
    unknown = groups.loc[~is_evaluated, "where"]
    problems += [f"{where}: not evaluated, see eval.py" for where in unknown]
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    published = read_published()
    records = make_records(groups, found, published, planned_rows())
    command = shlex.join(["python", "-m", "scripts.report", *argv])
    evaluated = groups.loc[is_evaluated, "members"].tolist()
    text = as_markdown(records, published, evaluated, problems, command=command, out=args.out)
    write_text(text, args.out / "results.md")
    write_text(as_csv(records), args.out / "results.csv")
    print(f"{len(runs)} runs in {args.out / 'results.md'} and {args.out / 'results.csv'}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser.of("python -m scripts.report", __doc__)
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="RUN_DIR",
        help=f"a run, or a folder of runs (default: {DistillOptions.save_path})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the report (default: docs, or with --html that of the run)",
    )
    parser.add_argument(
        "--html", type=Path, metavar="RUN_DIR", help="write a page about this run, report.html"
    )
    args = parser.parse_args(argv)
    if args.html and args.paths:
        parser.error(f"--html {args.html} is about one run: leave out {args.paths[0]}")
    if not args.html:
        args.out = args.out or Path("docs")
        args.paths = args.paths or [Path(DistillOptions.save_path)]
    return args


if __name__ == "__main__":
    sys.exit(run_script(main))
