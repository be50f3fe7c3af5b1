"""The plan of run_all.sh: its command line, the estimated costs, and the queue that it works on.

    python -m scripts.plan --dry-run

Nothing is run here. With --queue the plan is written where run_all.sh reads it:

    slots/<device>/<n>    an empty file for each slot; a cell holds some slots of one device
    experts.tsv rows.tsv  a line for each cell: name, slots, needed cell, run directory, command
    logs                  one line: the folder of logs
    report                with --report only, two lines: the folder of runs, and that of the report
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from scripts.plan.cells import RUN_NAME, Cell, Settings, choose
from scripts.plan.estimate import ASSUMPTIONS
from utils.core.errors import UserError
from utils.core.script import Parser
from utils.options import DistillOptions

PYTHON, TORCHRUN = ".venv/bin/python", ".venv/bin/torchrun --standalone --nproc_per_node"
SLOTS_PER_GPU = 4  # the most cells that share a GPU
SMOKE_SLOTS = 4  # the most cells of a smoke run at a time
ALL = "all"  # instead of a number of slots: every device
FIXED_FLAGS = ("--dataset", "--subset", "--ipc", "--res", "--config")  # by the row


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name in CUDA_VISIBLE_DEVICES, and its memory in GB."""

    name: str
    memory: float


@dataclass(frozen=True)
class Devices:
    """What the queue runs on: GPUs, or without one the CPU, each divided into so many slots."""

    gpus: tuple[Gpu, ...]
    slots: int

    @property
    def names(self) -> list[str]:
        return [gpu.name for gpu in self.gpus] or ["cpu"]

    def slots_for(self, cell: Cell) -> str:
        """How many slots of one device a cell holds; experts are divided over all GPUs."""
        if not self.gpus:
            return "1"
        if cell.is_experts:
            return ALL if len(self.gpus) > 1 else str(self.slots)
        share = min(gpu.memory for gpu in self.gpus) / self.slots
        return str(min(self.slots, math.ceil(cell.estimate.memory / share)))

    def command_line(self, cell: Cell) -> str:
        spread = self.slots_for(cell) == ALL
        launcher = f"{TORCHRUN} {len(self.gpus)}" if spread else PYTHON
        return " && ".join(f"{launcher} {command}" for command in cell.commands)

    def __str__(self) -> str:
        if not self.gpus:
            return f"no GPU: {self.slots} cell(s) at a time on the CPU; the hours are a GPU's"
        sizes = ", ".join(sorted({f"{gpu.memory:.0f} GB" for gpu in self.gpus}))
        return (
            f"{len(self.gpus)} GPU(s) of {sizes}: experts take all of them, of the other cells up "
            f"to {self.slots} share one where their memory allows"
        )


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
    if args.queue is not None and not args.dry_run:
        write_queue(Path(args.queue), Path(args.save_path, "run_all"), experts, rows, devices)
        if args.report:
            Path(args.queue, "report").write_text(f"{args.save_path}\n{args.report}\n")
    return 0


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
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="cells with this name or these parts of it (CIFAR10/ipc1, Tiny, ipc1, imagenette; a "
        "rival's: FTD, CIFAR10/ipc10/MTT), rows with the experts that they need; may be given "
        "several times",
    )
    parser.add_argument(
        "--rivals", action="store_true", help="the rows of MTT, FTD, DATM and TESLA as well"
    )
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print the plan and its estimated cost"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="the plan in miniature, on digits, on the CPU"
    )
    parser.add_argument("--data_path", help="folder of the data sets (default: data)")
    parser.add_argument("--buffer_path", help="folder of expert trajectories (default: buffers)")
    parser.add_argument("--save_path", help="folder of results and logs (default: results)")
    parser.add_argument(
        "--run_name", default=RUN_NAME, help="name of the run directories (default: %(default)s)"
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const="docs",
        metavar="FOLDER",
        help="then write results.md and results.csv there (default: docs), from all runs",
    )
    parser.add_argument(
        "--list",
        nargs="?",
        const="rows",
        choices=("rows", "experts"),
        help="print the names of the rows or of the experts, for a job array",
    )
    parser.add_argument("--queue", help=argparse.SUPPRESS)
    parser.add_argument("distill_flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.distill_flags and "--" not in argv:
        parser.error(f"unrecognized arguments: {' '.join(args.distill_flags)}")
    for flag in args.distill_flags:
        if flag.split("=")[0] in FIXED_FLAGS:
            raise UserError(f"{flag} does not go behind --: --only selects rows, which fix it")
    args.data_path = args.data_path or DistillOptions.data_path
    args.save_path = args.save_path or (smoke_folder() if args.smoke else DistillOptions.save_path)
    default_buffers = DistillOptions.buffer_path
    args.buffer_path = args.buffer_path or (
        os.path.join(args.save_path, default_buffers) if args.smoke else default_buffers
    )
    return args


def smoke_folder() -> str:
    """A new one each time: a smoke run that continued an earlier one would test little."""
    return f"results/smoke/{datetime.now():%Y-%m-%d_%H-%M-%S}"


def find_devices(*, smoke: bool) -> Devices:
    """The GPUs that this process and so the cells see; the CPU where there is none, or for a smoke
    run, whose small cells run beside one another.
    """
    if smoke:
        return Devices((), min(SMOKE_SLOTS, len(os.sched_getaffinity(0))))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
    memories = [
        torch.cuda.get_device_properties(n).total_memory / 1e9
        for n in range(torch.cuda.device_count())
    ]
    gpus = tuple(map(Gpu, names, memories))
    return Devices(gpus, SLOTS_PER_GPU if gpus else 1)


def show(cells: list[Cell], devices: Devices, *more: str, commands: bool) -> None:
    """Print what the cells cost and, with `commands`, theirs and lines about `more` before."""
    if commands:
        lines = [f"{cell.name}: {devices.command_line(cell)}" for cell in cells]
        print(*lines, *more, sep="\n", end="\n\n")
    print(table(cells), devices, sep="\n")


def table(cells: list[Cell]) -> str:
    """An aligned line for each cell, and their sums."""
    width = max(len(cell.name) for cell in cells)
    text_width = max(len(cell.text) for cell in cells)
    lines = [f"{'cell':{width}}  {'':{text_width}}  {'GPU hours':>9} {'GPU GB':>7} {'disk GB':>8}"]
    for cell in cells:
        e = cell.estimate
        lines.append(
            f"{cell.name:{width}}  {cell.text:{text_width}}  {e.hours:9,.1f} {e.memory:7,.1f} "
            f"{e.disk:8,.1f}"
        )
    hours = sum(cell.estimate.hours for cell in cells)
    memory = max(cell.estimate.memory for cell in cells)
    disk = sum(cell.estimate.disk for cell in cells)
    total = f"{len(cells)} in all"
    lines.append(f"{total:{width}}  {'':{text_width}}  {hours:9,.1f} {memory:7,.1f} {disk:8,.1f}")
    return "\n".join([*lines, ASSUMPTIONS])


def write_queue(
    folder: Path, logs: Path, experts: list[Cell], rows: list[Cell], devices: Devices
) -> None:
    """The longest cells come first, so that none of them is left alone at the end."""
    for name in devices.names:
        (folder / "slots" / name).mkdir(parents=True)
        for n in range(devices.slots):
            (folder / "slots" / name / str(n)).touch()
    (folder / "logs").write_text(f"{logs}\n")
    for name, cells in (("experts", experts), ("rows", rows)):
        ordered = sorted(cells, key=lambda cell: -cell.estimate.hours)
        (folder / f"{name}.tsv").write_text("".join(queue_line(c, devices) for c in ordered))


def queue_line(cell: Cell, devices: Devices) -> str:
    slots, command = devices.slots_for(cell), devices.command_line(cell)
    return (
        "\t".join([cell.name, slots, cell.needs or "-", str(cell.run_dir or "-"), command]) + "\n"
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"run_all.sh: error: {error}", file=sys.stderr)
        sys.exit(2)
