"""Distil a folder of pictures in the minutes given, and show the result on one page.

    bash scripts/distil_folder.sh my_pictures [--ipc 10] [--minutes 30]

looks at my_pictures/train/<class>/* and my_pictures/test/<class>/*, says what it found, times this
machine, chooses size, network, experts and steps for the minutes, trains, distils, measures the
result beside as many random and k-center real images, and writes report.html. Interrupted, the same
command goes on.

Exit status: 0 done, 1 the run diverged or memory ran out, 2 bad input, 130 or 143 a signal.
"""

import utils.core.early  # noqa: F401 - hears signals from here on

# isort: split
import argparse
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

import buffer
import distill_att
import eval as evaluation
from scripts.folder.choose import (
    EPOCHS,
    EXPERT_STEPS,
    EXPERTS_SHARE,
    MEASURE_SHARE,
    Found,
    Plan,
    Speed,
    choose,
    expert_epoch_seconds,
    experts_that_fit,
    fill,
    steps_that_fit,
)
from scripts.folder.job import DISTILLING, EXPERTS, LOOKING, MEASURING, REPORT, Job
from scripts.folder.look import describe, find_flags, find_source, measure_epoch, measure_speed
from scripts.report.page import PAGE, write_page
from scripts.results.evaluations import measured
from scripts.results.runs import read_begun
from utils.compute.cost import NetworkCost, network_cost
from utils.compute.device import default_device
from utils.core import early, stopping
from utils.core.errors import UserError
from utils.core.files import check_writable
from utils.core.locks import locked
from utils.core.progress import WARM_UP
from utils.core.script import Parser, run_script
from utils.data.identity import identity_of
from utils.data.real_images import check_ipc
from utils.measure.protocol import mean_and_std
from utils.methods.unroll.work import COMPILED_FUNCTIONS
from utils.plan.choose import choose_compile
from utils.plan.machine import Machine

SCRIPT = "distil_folder.sh"
IPC, MINUTES = 10, 30.0
TIMED_EPOCH = 1.0  # seconds of an epoch that is timed as a whole
TRIAL_EXPERTS = 3  # after which their number is settled
TRIAL = 8  # outer steps after which their number is settled
FRAMES = 8  # sets that are saved on the way
LONG = 30  # seconds of outer steps whose number is settled once more half-way


def main(argv: Sequence[str]) -> int:
    try:
        return run(parse(argv))
    except (Exception, stopping.Interrupted):
        if not stopping.received():
            raise
        print(stopping.farewell(), file=sys.stderr)
        return stopping.status()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser.of(f"bash scripts/{SCRIPT}", __doc__)
    parser.add_argument("folder", type=path_from, help="with train/<class>/* and test/<class>/*")
    parser.add_argument(
        "--ipc",
        type=whole_number,
        help=f"images per class (default: {IPC}, or half of the smallest class)",
    )
    parser.add_argument(
        "--minutes", type=minutes, default=MINUTES, help=f"time to take (default: {MINUTES:g})"
    )
    parser.add_argument(
        "--out",
        type=path_from,
        help="folder of all results (default: results/<folder>_<minutes>min beside scripts/)",
    )
    args = parser.parse_args(argv)
    args.folder = args.folder.resolve()
    ipc = f"_ipc{args.ipc}" if args.ipc else ""
    name = f"{args.folder.name or 'pictures'}{ipc}_{args.minutes:g}min"
    here = Path.cwd()
    results = Path("results") if called_from() == here else here / "results"
    args.out = args.out or results / name
    return args


def called_from() -> Path:
    """The folder that the command was called in: the shell script works in its own."""
    return Path(os.environ.get("DISTIL_FOLDER_FROM", ".")).resolve()


def path_from(text: str) -> Path:
    """A path as it was written where the command was called."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    path = Path(text).expanduser()
    return path if called_from() == Path.cwd() else called_from() / path


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0")
    return value


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def run(args: argparse.Namespace) -> int:
    began = psutil.Process().create_time()
    flags = find_flags(args.folder)
    source = find_source(flags)
    if args.ipc:
        check_ipc(args.ipc, source.labels["train"], source.class_names)
    check_writable(args.out)
    refusal = f"another call is at work in {args.out}: wait until it ends, or give another --out"
    with locked(args.out / ".lock", refusal=refusal):
        job = Job.load(args.out)
        images = identity_of(source, str(args.folder))
        if job is None:
            job = begin(args, flags, began)
            job.data = images.to_dict()
            job.save()
        else:
            images.check_same_as(
                job.data,
                ("train", "test"),
                what=f"run {args.out}",
                advice="give the folder that it is from, or another --out",
            )
            check_same_plan(args, job)
            print(f"going on in {args.out}")
            print(*job.choices, sep="\n")
        return work(job)


def check_same_plan(args: argparse.Namespace, job: Job) -> None:
    """UserError where the call asks for another plan than that which goes on."""
    planned = {"minutes": job.minutes, "ipc": job.plan.ipc}
    for name, value in planned.items():
        given = getattr(args, name)
        if given not in (None, value):
            raise UserError(
                f"--{name} {given:g}: what is in {args.out} was planned with --{name} {value:g}; "
                "give that, or another --out"
            )


def begin(args: argparse.Namespace, flags: Sequence[str], began: float) -> Job:
    """Look, time the machine and choose; nothing is written yet but decoded pictures."""
    source = find_source(flags)
    found = describe(source, args.folder)
    ipc = args.ipc or min(IPC, max(1, found.smallest_class // 2))
    lines = [
        f"found {found.classes} classes, {found.train} training and {found.test} test pictures in "
        f"{args.folder}; the smallest class has {found.smallest_class} to train on; short sides "
        f"are about {found.short_side} pixels"
    ]
    print(lines[0])
    speeds: dict[tuple[str, int], Speed] = {}

    def count(model: str, res: int) -> NetworkCost:
        return network_cost(
            model, channels=found.channels, num_classes=found.classes, image_size=res
        )

    def speed(model: str, res: int) -> Speed:
        if (model, res) not in speeds:
            speeds[model, res] = measure_speed(found, model, res)
        return speeds[model, res]

    def left() -> float:
        return 60 * args.minutes - (time.time() - began)

    chosen = choose(found, count, speed, ipc=ipc, seconds=left())
    res, model = chosen.res, chosen.model
    decoded = find_source([*flags, "--res", str(res)])
    decoded.pixels(tuple(decoded.labels))  # kept for the scripts; what cannot be read is named here
    network, timed = count(model, res), speed(model, res)
    epoch = expert_epoch_seconds(found, network, timed)
    if epoch < TIMED_EPOCH:  # a longer one is well known from its steps
        epoch = measure_epoch([*flags, "--res", str(res)], model, decoded)
    seconds = left()
    plan = fill(found, network, timed, res, model, ipc, seconds, epoch)
    lines += explain(found, plan, args.minutes, seconds, len(speeds))
    print(*lines[1:], sep="\n")
    compiles = choose_compile(
        "auto",
        Machine.here(default_device()),
        plan.distil_seconds,
        kind="outer steps",
        layers=COMPILED_FUNCTIONS * count(model, res).layers,
    )
    job = Job(
        out=args.out,
        minutes=args.minutes,
        flags=[*flags, "--res", str(res)],
        data={},
        choices=lines,
        compile="on" if compiles else "off",
        plan=plan,
        planned_from=seconds,
    )
    job.used[LOOKING] = time.time() - began
    return job


def explain(found: Found, plan: Plan, minutes: float, seconds: float, tried: int) -> list[str]:
    """Say what was chosen, and why."""
    fits = plan.seconds <= 1.05 * seconds
    lines = [
        f"chose {plan.res}x{plan.res} pixels and {plan.model}: of {tried} networks timed here, "
        + ("the largest that fits" if fits else "the quickest"),
        f"chose {plan.num_experts} experts of {plan.train_epochs} epochs, which are about "
        f"{EXPERT_STEPS} steps or as near as {EPOCHS[0]} to {EPOCHS[1]} epochs come, for "
        f"{EXPERTS_SHARE:.0%} of the time",
        f"chose {plan.num_eval} networks of {plan.epoch_eval_train} epochs for each set that is "
        f"measured, for {MEASURE_SHARE:.0%} of the time, and for the rest about {plan.Iteration} "
        f"outer steps at {plan.ipc} images per class",
        "predicted: "
        + ", ".join(
            f"{name} {part / 60:.1f} min"
            for name, part in (
                ("experts", plan.expert_seconds),
                ("distilling", plan.distil_seconds),
                ("measuring", plan.measure_seconds),
            )
        ),
    ]
    if not fits:
        lines.append(
            f"{minutes:g} minutes are too few: the least that is worth it takes about "
            f"{minutes + (plan.seconds - seconds) / 60:.1f}; going on with that"
        )
    return lines


def work(job: Job) -> int:
    """Run the three scripts as far as they have not been, then report; the exit status."""
    plan, paths = job.plan, ["--buffer_path", str(job.out / "buffers")]
    flags = [*job.flags, "--model", plan.model, *paths]
    heading("1 of 3: experts")
    with job.part(EXPERTS):
        train_experts(job, flags)
    heading("2 of 3: distilling")
    with job.part(DISTILLING):
        flags += ["--ipc", str(plan.ipc), "--save_path", str(job.out), "--run_name", job.run.name]
        status = distil(job, flags)
    heading("3 of 3: measuring")
    with job.part(MEASURING):
        evaluation.main(
            [
                *("--distilled", str(job.run / "distilled_last.pt"), "--random", "--k_center"),
                *("--num_eval", str(plan.num_eval)),
                *("--epoch_eval_train", str(plan.epoch_eval_train)),
            ]
        )
    with job.part(REPORT):
        write_page(job.run, job.out, more=job.told)
    write_page(job.run, job.out, more=job.told)  # with the time that it took itself
    conclude(job)
    return status


def train_experts(job: Job, flags: Sequence[str]) -> None:
    """Train experts for the time that is theirs: after a few, their number is settled by how long
    they take.
    """
    plan = job.plan

    def train(count: int) -> None:
        number = ["--num_experts", str(count), "--train_epochs", str(plan.train_epochs)]
        buffer.main([*flags, *number])

    if not job.experts:
        trial, began = min(TRIAL_EXPERTS, plan.num_experts), time.monotonic()
        train(trial)
        each = (time.monotonic() - began) / trial
        job.experts = experts_that_fit(trial, each, plan)
        job.save()
        print(f"{each:.2g} s an expert: {job.experts} in all")
    train(job.experts)


def distil(job: Job, flags: Sequence[str]) -> int:
    """Take outer steps for the time that is left: after a few, and half-way once more, their number
    is settled by how long they take. The exit status of the last call.
    """
    began, used = time.monotonic(), sum(job.used.values())
    fixed = ["--eval_it", "0", "--on_divergence", "rewind", "--compile", job.compile]

    def left() -> float:
        spent = used + time.monotonic() - began
        return 60 * job.minutes - spent - job.predicted[MEASURING] - job.predicted[REPORT]

    job.goal = job.goal or min(TRIAL, job.plan.Iteration)
    while True:
        every = max(1, max(job.goal, job.plan.Iteration) // FRAMES)
        goal = ["--Iteration", str(job.goal), "--save_it", str(every)]
        status = distill_att.main([*flags, *fixed, *goal])
        if status or job.is_final:
            return status
        seconds = [step["seconds"] for step in read_begun(job.run).logged("step")]
        latest = seconds[max(WARM_UP, len(seconds) // 2) :]  # students take more steps by and by
        step = statistics.fmean(latest or seconds)
        whole = steps_that_fit(job.goal, step, left())
        job.is_final = job.goal > TRIAL or left() < LONG
        job.goal = whole if job.is_final else (job.goal + whole) // 2
        said = "so" if job.is_final else "to be settled half-way,"
        print(f"{step:.2g} s a step, {left() / 60:.1f} min left: {said} about {whole} in all")
        job.save()


def conclude(job: Job) -> None:
    """Print the table, the minutes, and where the files are."""
    heading("result")
    found = read_begun(job.run)
    rows = sorted(measured(found), key=lambda row: not row["set"])
    for row in rows:
        said = mean_and_std(row["mean"], row["std"], row["n"], unit="%")
        print(f"{row['trained_on']:14} {row['network']:12} {said} (n={row['n']})")
    print(*verdict(rows), sep="\n")
    print(f"\n{'minutes':22} predicted  used")
    for part, predicted, used in job.told["minutes"]:
        print(f"{part:22} {predicted:9.1f} {used:5.1f}")
    print(f"\nset:    {job.run / 'distilled_last.pt'}")
    print(f"report: {job.out / PAGE}")


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say where real images train as well: `rows` are of `measured`."""
    best = max((row["mean"] for row in rows if row["set"]), default=math.inf)
    as_good = [row["trained_on"] for row in rows if not row["set"] and row["mean"] >= best]
    if not as_good:
        return []
    return [f"the distilled images are no better than {' and '.join(as_good)}: try more --minutes"]


def heading(text: str) -> None:
    columns = min(100, shutil.get_terminal_size().columns)
    print(f"\n--- {text} ".ljust(columns, "-"), flush=True)


if __name__ == "__main__":
    early.name_shell()
    sys.exit(run_script(main))
