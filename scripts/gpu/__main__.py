"""Tests, benchmarks and a row of the paper, as far as the time on a GPU goes.

    python -m scripts.gpu measure OUT                # checks of each mode, benchmarks
    python -m scripts.gpu test OUT                   # the cuda tests
    python -m scripts.gpu row OUT --data DIR         # CIFAR-10 at one image per class: ATT, rivals

`row` runs in the mode, and plans with the seconds, that `measure` has found for the same --work; a
second call goes on with the same experts and the same runs. A step that fails or is cut off stops
no other. OUT/session.tgz holds logs and results, packed again after every step, OUT/summary.txt how
the steps went. --tiny rehearses on a CPU.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from scripts.gpu.choice import EXPERTS_A_FILE, MODES, choose, experts_within
from scripts.gpu.steps import Session, Step
from scripts.plan.queue import run_command
from utils.core.errors import UserError
from utils.core.files import write_text
from utils.core.script import Parser
from utils.experts.files import fill_files, missing_experts

PYTHON = sys.executable
SECONDS = {"measure": 420, "test": 300, "row": 560}
PACKING_SECONDS = 5
MOST_THREADS = 16
EVALUATED_AT_ONCE = 6
SIDE_BY_SIDE = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}


Steps = Mapping[str, tuple[int, str]]  # by name the seconds that each may take, and its flags


@dataclass(frozen=True)
class Measurement:
    """What `measure` runs, and the flags of pytest for `test`."""

    beside: Steps  # benchmarks whose times do not count: gates, and warm-ups of compiler and GPU
    timed: Steps  # benchmarks one by one
    tests: str


def gates(flags: str, modes: Iterable[str] = MODES) -> Steps:
    """Compare each of the `modes` with the plain full graph before anything relies on it."""
    unroll = f"unroll {flags} --precision fp64 --repeats 1 --variants twin"
    return {f"gate_{mode}": (110, f"{unroll} {MODES[mode].unrolled}") for mode in modes}


UNROLL = "unroll --ipc 1 --syn_steps 80"
CIFAR100 = "unroll --classes 100 --ipc 10"
EVALUATED = "twin short one together vmap"
H100 = Measurement(
    beside={
        **gates("--syn_steps 5"),
        "warm_long": (75, f"{UNROLL} --repeats 1 --variants long"),
        "warm_experts": (75, "experts --networks 1 --steps 2 --repeats 1 --variants one"),
        "warm_last_batch": (
            75,
            "experts --networks 1 --steps 1 --batch_train 80 --repeats 1 --variants one",
        ),
        "warm_cifar100": (75, f"{CIFAR100} --syn_steps 2 --repeats 1 --variants long"),
        "warm_evaluation": (75, "evaluation --epochs 2 --repeats 1 --variants one"),
    },
    timed={
        "cifar100_20": (75, f"{CIFAR100} --syn_steps 20 --repeats 3 --variants long"),
        "peak_200": (40, "unroll --syn_steps 200 --variants long --peak_only"),
        "peak_10": (40, "unroll --syn_steps 10 --variants long --peak_only"),
        "evaluation": (90, f"evaluation --epochs 100 --repeats 3 --variants {EVALUATED}"),
        "unroll_ipc1": (90, f"{UNROLL} --repeats 3 --launches --variants twin short long"),
        "experts": (60, "experts --networks 2 --steps 30 --repeats 3 --launches"),
        "cifar100_20_pieces": (
            60,
            f"{CIFAR100} --syn_steps 20 --micro_batch 100 --repeats 3 --variants long",
        ),
        "cifar100_8": (45, f"{CIFAR100} --syn_steps 8 --repeats 3 --variants twin long"),
        "unroll_variants": (
            240,
            f"{UNROLL} --repeats 3 --launches --variants twin long unsplit nchw no_combo bf16 "
            "benchmark uncaptured eager",
        ),
    },
    tests="-v -n 4 -m cuda tests/test_unroll.py tests/test_training.py tests/test_batches.py "
    "tests/test_normalisation.py",
)
SMALL = "--model ConvNetD1 --classes 2 --res 8 --repeats 1"
TINY = Measurement(
    beside={
        **gates("--model ConvNetD1 --res 8 --syn_steps 2 --no_peaks", ["graphs", "plain"]),
        "warm_short": (120, f"unroll {SMALL} --syn_steps 1 --variants short --no_peaks"),
    },
    timed={
        "unroll_ipc1": (90, f"unroll {SMALL} --syn_steps 2 --variants twin short --no_peaks"),
        "experts": (90, f"experts {SMALL} --networks 2 --steps 1 --variants twin short"),
        "peak_2": (60, f"unroll {SMALL} --syn_steps 2 --variants short --peak_only"),
    },
    tests="-n 0 -m cuda tests/test_batches.py",
)


@dataclass(frozen=True)
class Row:
    """What `row` runs: flags of the scripts, and no more experts than these."""

    data: str
    network: str
    folder: str  # of the experts, by the field's names
    epochs: int
    most_experts: int
    runs: Mapping[str, str]  # by name; the first is the row, and the others come after it
    others: str  # networks that the row's set is then tried on
    evaluate: str = ""


MATCHING = "--zca --model ConvNetD3"
CIFAR10 = Row(
    data="--dataset CIFAR10",
    network=MATCHING,
    folder="CIFAR10/ConvNetD3",
    epochs=5,
    most_experts=100,
    runs={
        "att": MATCHING,
        "fixed": f"{MATCHING} --length fixed",
        "bptt": "--config configs/CIFAR10/ipc1_bptt.yaml",
        "att_soft": f"{MATCHING} --soft_labels --lr_y 5 --ema_decay 0.999",
        "bptt_60": "--config configs/CIFAR10/ipc1_bptt.yaml --syn_steps 60 --lr_img 0.003 "
        "--batch_target 1024 --ema_decay 0.999",
        "dsa": "--config configs/CIFAR10/ipc1_dsa.yaml",
        "dm": "--config configs/CIFAR10/ipc1_dm.yaml",
        "bptt_window": "--config configs/CIFAR10/ipc1_bptt.yaml --syn_steps 120 --window 40 "
        "--random_length --lr_img 0.003 --batch_target 1024 --ema_decay 0.999",
        "att_ipc10": f"{MATCHING} --ipc 10 --max_start_epoch 4 --ema_decay 0.999 --Iteration 5000",
        "dc": "--config configs/CIFAR10/ipc1_dc.yaml",
        "kip": "--config configs/CIFAR10/ipc1_kip.yaml",
        "cafe_dsa": "--config configs/CIFAR10/ipc1_cafe_dsa.yaml",
    },
    others="--model ResNet18 VGG11 AlexNet",
)
DIGITS_MATCHING = "--syn_steps 3 --expert_epochs 1 --max_start_epoch 1"
DIGITS = Row(
    data="--dataset digits --model ConvNetD2",
    network="",
    folder="digits/ConvNetD2",
    epochs=2,
    most_experts=2,
    runs={
        "att": f"--Iteration 100000 --save_it 5 {DIGITS_MATCHING}",
        "dm": "--config configs/digits/ipc1_dm.yaml --model ConvNetD2 --Iteration 3 --save_it 3",
    },
    others="--model MLP --num_eval 1 --epoch_eval_train 3",
    evaluate="--num_eval 2 --epoch_eval_train 3",
)
SAVE_IT = 500
# Of the time of `row`: for the evaluations at its end, and the experts' share of the rest.
EVALUATION_SECONDS, EXPERTS_SHARE = 60, 0.4


def measure(session: Session, plan: Measurement, work: Path) -> None:
    """Check each mode and fill the compiler's cache side by side; then time one by one."""

    def benches(steps: Steps) -> list[Step]:
        return [
            Step(
                name,
                [PYTHON, "scripts/bench.py", *flags.split(), "--out", results / f"{name}.json"],
                seconds,
            )
            for name, (seconds, flags) in steps.items()
        ]

    results = session.results
    if shutil.which("nvidia-smi"):
        session.run(Step("nvidia-smi", ["nvidia-smi"], 10))
    session.run(*benches(plan.beside), environment=SIDE_BY_SIDE)
    for chosen in (work / "inductor").rglob("*.best_config"):
        chosen.unlink()  # variants of kernels that were chosen while others used the GPU
    for bench in benches(plan.timed):
        session.run(bench)
    choice = choose(results)
    write_text(json.dumps(asdict(choice), indent=1) + "\n", results / "choice.json")
    print(*choice.notes, sep="\n", flush=True)


def test(session: Session, plan: Measurement) -> None:
    pytest = [PYTHON, "-m", "pytest", *plan.tests.split(), "--tb=short", "-p", "no:cacheprovider"]
    junit = f"--junitxml={session.results / 'tests.xml'}"
    session.run(Step("tests", [*pytest, junit]), environment=SIDE_BY_SIDE)


def row(session: Session, plan: Row, work: Path, data: Path, at_once: int) -> None:
    """Train experts with a share of the time that is really left, distil `at_once` of the runs side
    by side, then evaluate the latest set of each. What fails from the start in the chosen mode is
    tried again in the plain one.
    """
    choice = choose(work / "measure")
    print(*choice.notes, sep="\n", flush=True)
    modes = {"": choice.flags, "_plain": MODES["plain"].flags.split()}
    common = [*plan.data.split(), "--data_path", data, "--buffer_path", work / "buffers"]
    save_path = session.results / "results"

    def train(name: str, flags: Sequence[str]) -> int:
        """The number of experts that are complete."""
        seconds, most = EXPERTS_SHARE * (session.left() - EVALUATION_SECONDS), plan.most_experts
        count = experts_within(seconds, choice.epoch_seconds, epochs=plan.epochs, most=most)
        print(f"experts: {count} of {plan.epochs} epochs fit into {seconds:.0f} s", flush=True)
        command = [PYTHON, "buffer.py", *common, *plan.network.split(), *flags]
        command += ["--num_experts", str(count), "--train_epochs", str(plan.epochs)]
        command += ["--experts_at_once", "1", "--save_interval", str(EXPERTS_A_FILE)]
        session.run(Step(name, command, seconds, grace=10))
        return fill(work / "buffers" / plan.folder, count)

    def distil(run: str, mode: str) -> Step:
        command = [PYTHON, "distill_att.py", *common, "--save_path", save_path, "--run_name", run]
        command += ["--eval_it", "0", "--save_it", str(SAVE_IT), "--checkpoint_it", str(SAVE_IT)]
        command += [*modes[mode], *plan.runs[run].split()]
        return Step(f"{run}{mode}", command, grace=10)

    def evaluate(name: str, set: Path, *flags: str) -> Step:
        command = [PYTHON, "eval.py", "--distilled", set, *choice.flags, "--compile", "off"]
        return Step(name, [*command, *flags])

    def sets() -> dict[str, list[Path]]:
        """By run those of its sets that are there, the latest last."""
        found = {run: [*save_path.glob(f"*/*/*/{run}/distilled_[1-9]*.pt")] for run in plan.runs}
        return {run: sorted(there, key=_iteration) for run, there in found.items()}

    goes_on = any(save_path.glob("*/*/*/*/checkpoint.pt"))  # with the experts that are there
    if not goes_on and not any(train(f"experts{mode}", flags) for mode, flags in modes.items()):
        raise UserError("no expert is complete: see experts.log and experts_plain.log")
    waiting = [*plan.runs]
    for mode in modes:
        steps = [distil(run, mode) for run in waiting]
        outcomes = session.run(*steps, at_once=at_once, keep=EVALUATION_SECONDS)
        begun = [run for run, end in zip(waiting, outcomes, strict=True) if end.status is not None]
        waiting = [run for run in begun if not sets()[run]]
    found = {run: there for run, there in sets().items() if there}
    latest = [
        evaluate(f"evaluate_{run}", there[-1], *plan.evaluate.split(), *(["--random"] * (not k)))
        for k, (run, there) in enumerate(found.items())
    ]
    if found:
        row_set = next(iter(found.values()))[-1]
        others = evaluate("evaluate_others", row_set, *plan.others.split())
        session.run(*latest, others, at_once=EVALUATED_AT_ONCE)


def _iteration(set: Path) -> int:
    return int(set.stem.partition("_")[2])


def fill(folder: Path, count: int) -> int:
    """Write the buffer files of the first experts of `count` that are complete; how many these
    are.
    """
    missing = missing_experts(folder, range(count), experts_per_file=EXPERTS_A_FILE)
    complete = missing[0] if missing else count
    print(f"{complete} of {count} experts are complete", flush=True)
    fill_files(folder, range(complete), experts_per_file=EXPERTS_A_FILE)
    return complete


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m scripts.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=SECONDS)
    parser.add_argument("out", type=Path, help="folder of session.tgz and summary.txt")
    said = ", ".join(f"{name} {seconds}" for name, seconds in SECONDS.items())
    parser.add_argument("--seconds", type=float, help=f"that the call may take (default: {said})")
    default = Path(tempfile.gettempdir(), "gpu_session")
    help = "folder of all else, the compiler's cache too (default: %(default)s)"
    parser.add_argument("--work", type=Path, default=default, help=help)
    help = "folder of cifar-10-batches-py (default: %(default)s)"
    parser.add_argument("--data", type=Path, default=Path("data"), help=help)
    help = "runs of `row` side by side on the GPU (default: %(default)s)"
    parser.add_argument("--at_once", type=int, default=1, help=help)
    parser.add_argument("--tiny", action="store_true", help="rehearse, in minutes on a CPU")
    args = parser.parse_args(argv)
    args.seconds = args.seconds or SECONDS[args.what]
    return args


def main(argv: Sequence[str]) -> int:
    began = time.monotonic() - (time.time() - psutil.Process().create_time())
    args = parse(argv)
    out, work, data = (path.resolve() for path in (args.out, args.work, args.data))
    if args.what == "row" and not args.tiny and not (data / "cifar-10-batches-py").is_dir():
        raise UserError(f"--data {data} holds no folder cifar-10-batches-py")
    if args.what != "row":  # what an earlier call has found does not count any more
        shutil.rmtree(work / args.what, ignore_errors=True)
    session = Session(
        out,
        work / args.what,
        end=began + args.seconds - PACKING_SECONDS,
        environment={
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(min(os.cpu_count() or 1, MOST_THREADS)),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TRITON_CACHE_DIR": str(work / "triton"),
        },
    )
    try:
        if args.what == "measure":
            measure(session, TINY if args.tiny else H100, work)
        elif args.what == "test":
            test(session, TINY if args.tiny else H100)
        else:
            row(session, DIGITS if args.tiny else CIFAR10, work, data, args.at_once)
    finally:
        session.pack()
        print(session.table(), f"packed: {out / 'session.tgz'}", sep="\n", flush=True)
    return 0 if all(outcome.status == 0 for outcome in session.outcomes) else 1


if __name__ == "__main__":
    sys.exit(run_command(main, script="scripts.gpu"))
