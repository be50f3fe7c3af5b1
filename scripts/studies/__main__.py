"""Plan the runs of a study, work on them, write its page: the command line of run_study.sh.

    python -m scripts.studies digits --dry-run

Nothing is run without --run, which run_study.sh adds.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.plan.cells import Settings
from scripts.plan.devices import find_devices
from scripts.plan.queue import run_command, run_plan
from scripts.plan.tables import show
from scripts.studies import digits, exactness, lengths
from scripts.studies.page import write_page
from scripts.studies.trials import cells_of, runs_of
from utils.core.errors import UserError
from utils.core.files import check_writable
from utils.core.script import Parser
from utils.options import DistillOptions

STUDIES = {"digits": digits, "exactness": exactness, "lengths": lengths}


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    settings = Settings(
        data_path=DistillOptions.data_path,
        buffer_path=args.buffer_path,
        save_path=args.save_path or f"results/study_{args.study}",
        run_name="",
        distill_flags=tuple(args.distill_flags),
    )
    study = STUDIES[args.study]
    trials = [trial for trial in study.trials() if not args.only or trial.is_named(args.only)]
    if not trials:
        names = dict.fromkeys(
            name for trial in study.trials() for name in (trial.line, trial.place)
        )
        raise UserError(f"--only {args.only[0]!r} is no trial; choices: {'; '.join(names)}")
    experts, rows = cells_of(trials, settings)
    devices = find_devices(smoke=True)
    show([*experts, *rows], devices, commands=args.dry_run)
    if args.dry_run:
        return 0
    check_writable(args.out)
    status = 0
    if args.run:
        status = run_plan(experts, rows, devices, Path(settings.save_path, "logs"))
    runs, problems = runs_of(trials, settings)
    if not runs:
        raise UserError(f"no run in {settings.save_path} has ended: nothing to write about")
    path = args.out / f"study_{args.study}.md"
    only = [word for name in args.only for word in ("--only", name)]
    command = shlex.join(["bash", "scripts/run_study.sh", args.study, *only])
    text = study.page(runs, args.out)
    write_page(path, text, runs, problems, command)
    print(f"written: {path}, about {len(runs)} runs")
    return status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="run_study.sh",
        description="The runs of a study, on the CPU, and a page about them. The same call again "
        "goes on where the last one stopped.",
        epilog="Flags behind -- go to all distillations.",
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="trials of this line or place, as in ATT, 8x8 or '8x8, IPC 1'; may be given several "
        "times",
    )
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print the commands and their cost"
    )
    parser.add_argument("--buffer_path", default=DistillOptions.buffer_path)
    parser.add_argument("--save_path", help="folder of the runs (default: results/study_<name>)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the page")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("distill_flags", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, script="run_study.sh"))
