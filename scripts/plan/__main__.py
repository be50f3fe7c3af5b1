"""Plan the rows of the paper and work on them: the command line of run_all.sh.

    python -m scripts.plan --dry-run

Nothing is run without --run, which run_all.sh adds.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from scripts.plan.cells import RUN_NAME, Settings, choose
from scripts.plan.devices import PYTHON, find_devices
from scripts.plan.queue import run_command, run_plan
from scripts.plan.tables import show
from utils.core.errors import UserError
from utils.core.script import Parser
from utils.options import DistillOptions

FIXED_FLAGS = ("--dataset", "--subset", "--ipc", "--res", "--config")  # by the row


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    settings = Settings(
        data_path=args.data_path,
        buffer_path=args.buffer_path,
        save_path=args.save_path,
        run_name=args.run_name,
        distill_flags=tuple(args.distill_flags),
        smoke=args.smoke,
    )
    experts, rows = choose(settings, args.only, rivals=args.rivals)
    if args.list is not None:
        print(*(cell.name for cell in (experts if args.list == "experts" else rows)), sep="\n")
        return 0
    devices = find_devices(smoke=args.smoke)
    show([*experts, *rows], devices, commands=args.dry_run)
    if args.dry_run or not args.run:
        return 0
    status = run_plan(experts, rows, devices, Path(args.save_path, "run_all"))
    if args.report:
        report = [PYTHON, "-m", "scripts.report", args.save_path, "--out", args.report]
        status = subprocess.run(report).returncode or status
    return status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; UserError for what it should not hold."""
    parser = Parser(
        prog="run_all.sh",
        description="Every row of ATT's table: experts, distillation, evaluation. The same call "
        "again goes on where the last one stopped.",
        epilog="Flags behind -- go to distill_att.py, as in: run_all.sh --only CIFAR10 "
        "--run_name fixed -- --length fixed",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="cells with this name or these parts of it (CIFAR10/ipc1, Tiny, ipc1, imagenette; a "
        "rival's: FTD, CIFAR10/ipc10/MTT), rows with the experts that they need; may be given "
        "several times",
    )
    add("--rivals", action="store_true", help="the rows of all other methods as well")
    add("--dry_run", "--dry-run", action="store_true", help="print the plan and its estimated cost")
    add("--smoke", action="store_true", help="the plan in miniature, on digits, on the CPU")
    add(
        "--data_path",
        default=DistillOptions.data_path,
        help="folder of the data sets (default: data)",
    )
    add("--buffer_path", help="folder of expert trajectories (default: buffers)")
    add("--save_path", help="folder of results and logs (default: results)")
    add("--run_name", default=RUN_NAME, help="name of the run directories (default: %(default)s)")
    add(
        "--report",
        nargs="?",
        const="docs",
        metavar="FOLDER",
        help="then write results.md and results.csv there (default: docs), from all runs",
    )
    add(
        "--list",
        nargs="?",
        const="rows",
        choices=("rows", "experts"),
        help="print the names of the rows or of the experts, for a job array",
    )
    add("--run", action="store_true", help=argparse.SUPPRESS)
    add("distill_flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.distill_flags and "--" not in argv:
        parser.error(f"unrecognized arguments: {' '.join(args.distill_flags)}")
    for flag in args.distill_flags:
        if flag.split("=")[0] in FIXED_FLAGS:
            raise UserError(f"{flag} does not go behind --: --only selects rows, which fix it")
    folder = (args.save_path or smoke_folder()) if args.smoke else ""
    args.save_path = args.save_path or folder or DistillOptions.save_path
    args.buffer_path = args.buffer_path or os.path.join(folder, DistillOptions.buffer_path)
    return args


def smoke_folder() -> str:
    """A new one each time: a smoke run that continued an earlier one would test little."""
    return f"results/smoke/{datetime.now():%Y-%m-%d_%H-%M-%S}"


if __name__ == "__main__":
    sys.exit(run_command(main, script="run_all.sh"))
