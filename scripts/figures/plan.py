"""Plan the runs behind the paper's figures and work on them: the command line of paper_figures.sh.

    python -m scripts.figures.plan --dataset digits --dry-run

Nothing is run without --run, which paper_figures.sh adds.

Two kinds of cells. A distillation logs its distances: with a fixed length for several N_S (Fig. 2),
with ATT (Fig. 4, left), and with both policies and several seeds at the row's own N_S, evaluated
(Fig. 1, accuracies, pictures). A setting of Fig. 4, right, is one process for all its repeats.
"""

import argparse
import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.figures.data import RATES
from scripts.plan.cells import Cell, Settings, experts_cell, run_cell, run_of
from scripts.plan.devices import PYTHON, find_devices
from scripts.plan.queue import run_command, run_plan
from scripts.plan.tables import show
from utils.config.resolve import packaged_yaml, resolve
from utils.core.errors import UserError
from utils.core.script import Parser
from utils.experts.kind import ExpertKind
from utils.options import DistillOptions


@dataclass(frozen=True)
class Study:
    """What is run on a data set at one image per class, beside its row's own settings.

    `fixed` and `att` are the N_S of either policy. Fig. 4, right, multiplies the rates of
    `repeats`, one at a time, by the `multipliers`.
    """

    fixed: tuple[int, ...]
    att: tuple[int, ...]
    seeds: int
    runs: str
    eval_it: int
    repeats: str
    multipliers: tuple[float, ...] = (1, 10, 100, 1000)


# On digits the row's lr_lr of 1e-7 is so far from harm that no multiplier of lr_img ends a run
# within a minute; at twenty times that rate a fixed length of 20 lasts, but not far above.
STUDIES = {
    "digits": Study(
        fixed=(5, 10, 20, 30),
        att=(5, 10, 20),
        seeds=3,
        runs="--Iteration 150 --log_distances 10 --num_eval 2 --epoch_eval_train 100",
        eval_it=50,
        repeats="--Iteration 8 --lr_lr 2e-6",
    ),
    "CIFAR10": Study(
        fixed=(30, 50, 70, 80, 90, 110, 130),
        att=(30, 50, 70, 80),
        seeds=3,
        runs="--log_distances 50",
        eval_it=500,
        repeats="--Iteration 500",
    ),
}


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    settings = Settings(
        data_path=args.data_path,
        buffer_path=args.buffer_path,
        save_path=args.save_path,
        run_name="",
        distill_flags=tuple(args.distill_flags),
    )
    rows = [*distillations(args.dataset, settings)]
    rows += [*repeat_cells(args.dataset, settings, repeats=args.repeats)]
    experts = [experts_of(args.dataset, settings)]
    devices = find_devices(smoke=args.dataset == "digits")
    runs = Path(args.save_path, args.dataset)
    draw = [PYTHON, "-m", "scripts.figures", str(runs), "--out", args.out]
    show([*experts, *rows], devices, f"figures: {shlex.join(draw)}", commands=args.dry_run)
    if args.dry_run or not args.run:
        return 0
    status = run_plan(experts, rows, devices, Path(args.save_path, "logs"))
    return 1 if subprocess.run(draw).returncode else status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="paper_figures.sh",
        description="The runs behind the paper's figures, and the figures.",
        epilog="Flags behind -- go to all distillations.",
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", choices=STUDIES, required=True)
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print the commands and their cost"
    )
    parser.add_argument("--repeats", type=int, default=20, help="of fig4_right (default: 20)")
    parser.add_argument("--data_path", default=DistillOptions.data_path)
    parser.add_argument("--buffer_path", default=DistillOptions.buffer_path)
    parser.add_argument("--save_path", default="results/paper_figures")
    parser.add_argument("--out", default="docs/figures", help="folder of the figures")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("distill_flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {args.repeats}")
    return args


def distillations(dataset: str, settings: Settings) -> Iterator[Cell]:
    """Those with distances: every N_S once, the row's own with all seeds and evaluations."""
    study, own = STUDIES[dataset], resolved(words(dataset, "", settings)).syn_steps
    for policy, lengths in (("fixed", study.fixed), ("att", study.att)):
        for syn_steps in lengths:
            is_own = syn_steps == own
            for seed in range(study.seeds if is_own else 1):
                flags = f"--length {policy} --syn_steps {syn_steps} --seed {seed} {study.runs}"
                flags += f" --eval_it {study.eval_it if is_own else 0}"
                run_name = f"{policy}_NS{syn_steps}_seed{seed}"
                yield cell(dataset, f"{flags} --run_name {run_name}", settings)


def repeat_cells(dataset: str, settings: Settings, *, repeats: int) -> Iterator[Cell]:
    """A cell for each policy and rates; those without a multiplier count for both rates."""
    study = STUDIES[dataset]
    base = resolved(words(dataset, study.repeats, settings))
    multiples = [(rate, by) for rate in RATES for by in study.multipliers if by != 1]
    for policy in ("att", "fixed"):
        for rate, by in [("base", 1), *multiples]:
            flags = f"{study.repeats} --length {policy} --eval_it 0"
            if rate != "base":
                flags += f" --{rate} {getattr(base, rate) * by:g}"
            run_name = f"repeats_{policy}_{rate}_x{by:g}"
            yield cell(dataset, f"{flags} --run_name {run_name}", settings, repeats=repeats)


def cell(dataset: str, flags: str, settings: Settings, *, repeats: int = 0) -> Cell:
    """One distillation, or all repeats of one, which follow one another and leave little behind."""
    given = words(dataset, flags, settings)
    options = resolved(given)
    text = f"{options.Iteration:,} steps"
    once = run_cell(f"{dataset}/{options.run_name}", text, given, options, [], settings)
    if not repeats:
        return once
    path = run_of(options).path
    return dataclasses.replace(
        once,
        text=f"{repeats} x {text}",
        commands=(shlex.join(["-m", "scripts.figures.repeats", str(repeats), *given]),),
        estimate=dataclasses.replace(once.estimate, hours=once.estimate.hours * repeats),
        outputs=tuple(path.with_name(f"{path.name}_seed{k}") for k in range(repeats)),
    )


def experts_of(dataset: str, settings: Settings) -> Cell:
    options = resolved(words(dataset, "", settings))
    epochs = options.starts.end + options.expert_epochs
    kind = ExpertKind.of(options)
    return experts_cell(kind, {kind: epochs}, settings)


def words(dataset: str, flags: str, settings: Settings) -> list[str]:
    """`flags` among those that all distillations have; the user's own come last, and win."""
    where = ["--save_path", settings.save_path, "--buffer_path", settings.buffer_path]
    where += ["--data_path", settings.data_path]
    return ["--dataset", dataset, "--ipc", "1", *flags.split(), *where, *settings.distill_flags]


def resolved(flags: Sequence[str]) -> DistillOptions:
    return resolve(
        DistillOptions,
        flags,
        description="",
        find_yaml=lambda given: packaged_yaml(given["dataset"], "ipc1"),
    ).options


if __name__ == "__main__":
    sys.exit(run_command(main, script="paper_figures.sh"))
