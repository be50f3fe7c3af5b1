"""Time and memory of the code's hot parts beside the way the field does it, in one run.

    python scripts/bench.py unroll --ipc 1 --syn_steps 80       # one outer step
    python scripts/bench.py experts                             # training experts
    python scripts/bench.py evaluation --ipc 1                  # five evaluation networks

Variants take turns, so that a noisy machine is noisy for all; medians of --repeats, ratios to the
first variant, the naive twin by default; warm-up and compiling are not counted but shown. Images
and parameters are random: times do not depend on them. Losses and gradients of outer steps are
compared with those of the first variant. Writes JSON with hardware, versions and command to --out.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from networks import build_network
from utils.compute.cohort import Cohort, Recipe
from utils.compute.cost import NetworkCost, Training, network_cost
from utils.compute.device import (
    PRECISIONS,
    compute_dtype,
    default_device,
    peak_memory,
    storage_dtype,
    use_device,
    use_precision,
)
from utils.compute.execution import PLAIN, Execution
from utils.compute.flat import FlatNetwork, flatten
from utils.compute.optimisers import OPTIMISERS
from utils.core import ranks
from utils.core.files import write_text
from utils.core.provenance import describe_environment
from utils.core.rng import derive_seed, stream
from utils.core.script import Parser, run_script
from utils.data import augment
from utils.data.augment import DSA_STRATEGY, parse_strategy
from utils.data.recipe import MOMENTUM, WEIGHT_DECAY
from utils.methods.trajectory.family import count_matching
from utils.methods.trajectory.lengths import DISTANCES, fixed
from utils.methods.trajectory.matching import (
    Matching,
    Objective,
    match_by_adjoint,
    match_by_autograd,
)
from utils.methods.unroll.problem import Problem, draw_problem
from utils.methods.unroll.steps import Loss, Steps
from utils.options import DistillOptions
from utils.plan.choose import choose_at_once, choose_micro_batch, choose_unroll
from utils.plan.machine import Machine

Work = Callable[[], object]  # what is timed

DSA = parse_strategy(DSA_STRATEGY)
FIXED = Objective(DISTANCES["l2"], fixed)
WARM_UPS = 3  # the first call compiles and captures, the others replay on other numbers
LR = 0.01
COMPARED = ("loss", "grad_images", "grad_syn_lr")  # of outer steps


@dataclass
class Variant:
    """One way of doing the same work, which `prepare` returns once it is its turn."""

    title: str
    prepare: Callable[[], Work]
    first_seconds: float = 0.0  # compiling, capturing
    outcomes: list[object] = field(default_factory=list)  # of the first calls
    peak_bytes: int | None = None  # of them, on a CUDA device
    seconds: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """The peak is that of the first calls: what a CUDA graph uses belongs to it from then on
        and is not counted again.
        """
        self.work, before = self.prepare(), 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.first_seconds, outcome = timed(self.work)
        self.outcomes = [outcome, *(self.work() for _ in range(WARM_UPS - 1))]
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def summary(self, baseline: "Variant") -> dict[str, Any]:
        pairs = zip(self.seconds, baseline.seconds, strict=True)
        return {
            "title": self.title,
            "ratio": statistics.median(mine / theirs for mine, theirs in pairs),
            "median_seconds": statistics.median(self.seconds),
            "min_seconds": min(self.seconds),
            "first_seconds": self.first_seconds,
            "peak_bytes": self.peak_bytes,
        } | worst_errors(self.outcomes, baseline.outcomes)


def timed(work: Work) -> tuple[float, object]:
    """The seconds of a call, and what it returns."""
    began = clock()
    outcome = work()
    return clock() - began, outcome


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(variants: dict[str, Variant], *, repeats: int) -> dict[str, dict[str, Any]]:
    """Run the variants in turns; print and return medians, ratios to the first, peak memory. A
    variant that fails, for want of memory say, drops out.
    """
    for name, variant in list(variants.items()):
        try:
            variant.warm_up()
        except RuntimeError as error:
            print(f"{variant.title} failed: {str(error).strip().splitlines()[0]}")
            del variants[name]
    if not variants:
        raise SystemExit("no variant ran")
    for _ in range(repeats):
        for variant in variants.values():
            variant.seconds.append(timed(variant.work)[0])
    baseline = next(iter(variants))
    print(f"{'variant':34} {'ratio':>6} {'median s':>9} {'min s':>8} {'first s':>8}  peak memory")
    results = {}
    for name, variant in variants.items():
        results[name] = row = {"baseline": baseline} | variant.summary(variants[baseline])
        peak = "" if variant.peak_bytes is None else f"{variant.peak_bytes / 1e9:.3f} GB"
        print(
            f"{variant.title:34} {row['ratio']:6.3f} {row['median_seconds']:9.4f} "
            f"{row['min_seconds']:8.4f} {row['first_seconds']:8.1f}  {peak}"
        )
    return results


def worst_errors(found: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
    """The largest relative error of the outer steps `found`, of the loss and of each gradient."""
    errors = {}
    for name in COMPARED if isinstance(found[0], Matching) else ():
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(found, expected, strict=True)]
        of_steps = [(mine - right).norm() / right.norm() for mine, right in pairs]
        errors[f"{name}_error"] = torch.stack(of_steps).max().item()  # which keeps NaN
    return errors


def launches(work: Work, top: int = 30) -> dict[str, Any]:
    """How many kernels and copies a call launches, their time, and the most costly of them."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    kernels = [row for row in profiler.key_averages() if row.self_device_time_total > 0]
    kernels.sort(key=lambda row: row.self_device_time_total, reverse=True)
    return {
        "launches": sum(row.count for row in kernels),
        "device_seconds": sum(row.self_device_time_total for row in kernels) / 1e6,
        "kernels": [
            {"name": row.key[:120], "count": row.count, "us": row.self_device_time_total}
            for row in kernels[:top]
        ],
    }


class OuterSteps:
    """Outer steps on random images from random networks, at the full length N_S: call after call
    another one, the same for every variant.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.machine = args, Machine.here(device)
        options = DistillOptions(ipc=args.ipc, syn_steps=args.syn_steps, batch_syn=args.batch_syn)
        self.work = count_matching(options, cost_of(args), ranks.world(), classes=args.classes)
        self.images, self.labels = random_images(args, args.classes * args.ipc, device)
        self.syn_lr = torch.tensor(LR).to(self.images)
        self.problems = [self._draw(step) for step in range(WARM_UPS)]
        self.plain, self.compiled = (Execution.on(device, compiled=on) for on in (False, True))
        divided = self.work.divides_batches
        self.unroll = choose_unroll(
            "auto", self.work, self.machine, compiled=False, divided=divided
        )

    def _draw(self, step: int) -> Problem:
        rng = stream(0, "bench", step)
        theta_0 = flatten(new_network(self.args, seed=step).parameters()).detach()[None].double()
        theta_star = theta_0 + 0.01 * torch.randn(theta_0.shape, generator=rng)
        return draw_problem(
            theta_0.to(self.images),
            theta_star.to(self.images),
            self.images[0],
            count=len(self.images),
            syn_steps=self.args.syn_steps,
            batch_syn=self.args.batch_syn,
            dsa_groups=DSA,
            generators=[rng],
            share=(ranks.rank(), ranks.world()),
        )

    def _in_turn(self, match: Callable[..., Matching]) -> Work:
        problems = itertools.cycle(self.problems)
        return lambda: match(next(problems), self.images, self.syn_lr, self.labels)

    def _loss(self, execution: Execution, precision: str) -> Loss:
        network = execution.adapt(new_network(self.args)).to(self.images)
        flat = FlatNetwork(network, dtype=compute_dtype(precision))
        return lambda theta, x, y: F.cross_entropy(flat(theta, x), y)

    def twin(self) -> Work:
        """As the field does it: the whole graph, uncompiled."""
        loss, optimiser = self._loss(PLAIN, self.args.precision), OPTIMISERS[self.args.inner_opt]
        return self._in_turn(
            partial(match_by_autograd, loss=loss, objective=FIXED, optimiser=optimiser)
        )

    def adjoint(
        self, execution: Execution, *, micro_batch: int | None = None, precision: str | None = None
    ) -> Work:
        loss = self._loss(execution, precision or self.args.precision)
        asked = micro_batch or self.args.micro_batch
        match = partial(
            match_by_adjoint,
            steps=Steps.of(
                loss,
                execution,
                one_by_one=ranks.world() > 1,
                optimiser=OPTIMISERS[self.args.inner_opt],
            ),
            objective=FIXED,
            micro_batch=choose_micro_batch(asked, self.work, self.machine),
            sum_over_ranks=ranks.sum_over_ranks,
        )
        return self._in_turn(match)

    def short(self) -> Work:
        return self.twin() if self.unroll == "autograd" else self.adjoint(self.plain)

    def whole(self) -> Work:
        return self.adjoint(self.compiled, micro_batch=self.work.whole_batch)

    def long(self, **changes: Any) -> Work:
        """The default of long runs, but for these fields of its execution."""
        return self.adjoint(replace(self.compiled, **changes))

    def benchmarked(self) -> Work:
        tf32 = torch.backends.cudnn.allow_tf32
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32)
        return flags(self.long())


class Trainings:
    """`--networks` experts for `--steps` batches each, or evaluation networks for `--epochs` epochs
    on IPC images a class.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.networks = args, args.networks
        if args.benchmark == "experts":
            count, self.epochs = args.steps * args.batch_train, 1
            self.momentum = self.weight_decay = 0.0
        else:
            count, self.epochs = args.classes * args.ipc, args.epochs
            self.momentum, self.weight_decay = MOMENTUM, WEIGHT_DECAY
        self.images, self.labels = random_images(args, count, device)
        self.plain, self.compiled = (Execution.on(device, compiled=on) for on in (False, True))
        self.vmapped = replace(self.compiled, branched=False, vectorised=True)
        training = Training(cost_of(args), count, min(args.batch_train, count))
        machine = Machine.here(device)
        self.default = choose_at_once(None, training, machine, networks=args.networks)

    def train_naively(self) -> None:
        """Networks one after another, batch by batch, with modules and torch's optimiser."""
        for k in range(self.networks):
            network = new_network(self.args, seed=derive_seed(0, "init", k)).to(self.images)
            rng = stream(0, "minibatch", k)
            optimizer = torch.optim.SGD(
                network.parameters(),
                lr=LR,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
            for _ in range(self.epochs):
                order = torch.randperm(len(self.images), generator=rng)
                for indices in order.split(self.args.batch_train):
                    rows = indices.to(self.images.device)
                    x = augment.apply(self.images[rows], augment.draw(DSA, len(rows), rng))
                    loss = F.cross_entropy(network(x), self.labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

    def train(self, execution: Execution, at_once: int) -> None:
        """As many networks at once as the scripts would train."""
        recipe = Recipe(
            self.args.model,
            **shape_of(self.args),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            execution=execution,
            dtype=compute_dtype(self.args.precision),
        )
        for first in range(0, self.networks, at_once):
            numbers = range(first, min(first + at_once, self.networks))
            seeds = [derive_seed(0, "init", k) for k in numbers]
            cohort = Cohort(recipe, seeds, device=self.images.device, dtype=self.images.dtype)
            cohort.train(
                self.images,
                self.labels,
                epochs=self.epochs,
                lr=LR,
                batch_size=self.args.batch_train,
                dsa_groups=DSA,
                generators=[stream(0, "minibatch", k) for k in numbers],
            )


# Variants by name: titles, and how each is made ready.
Table = dict[str, tuple[str, Callable[[Any], Work]]]
OUTER_STEPS: Table = {
    "twin": ("twin: full graph, eager", OuterSteps.twin),
    "short": ("default of short runs: {0.unroll}", OuterSteps.short),
    "long": ("default of long runs: compiled", OuterSteps.long),
    "eager": ("adjoint, eager", lambda steps: steps.adjoint(PLAIN)),
    "whole": ("compiled, whole batches", OuterSteps.whole),
    "uncaptured": ("compiled, no CUDA graphs", lambda steps: steps.long(cuda_graphs="off")),
    "nchw": ("compiled, channels outermost", lambda steps: steps.long(channels_last=False)),
    "no_combo": ("compiled, kernels not combined", lambda steps: steps.long(combined=False)),
    "unsplit": ("compiled, sums in one kernel", lambda steps: steps.long(unsplit=True)),
    "unpruned": ("compiled, unused derivatives kept", lambda steps: steps.long(pruned=False)),
    "bf16": ("compiled, bf16", lambda steps: steps.adjoint(steps.compiled, precision="bf16")),
    "benchmark": ("compiled, cudnn.benchmark", OuterSteps.benchmarked),
}
TRAININGS: Table = {
    "twin": ("twin: modules, one by one, eager", lambda each: each.train_naively),
    "short": ("one by one, uncompiled", lambda each: partial(each.train, each.plain, 1)),
    "one": ("one by one, compiled", lambda each: partial(each.train, each.compiled, 1)),
    "long": (
        "default of long runs: {0.default} at once",
        lambda each: partial(each.train, each.compiled, each.default),
    ),
    "together": (
        "{0.networks} at once, compiled",
        lambda each: partial(each.train, each.compiled, each.networks),
    ),
    "vmap": (
        "{0.networks} at once, compiled, vmap",
        lambda each: partial(each.train, each.vmapped, each.networks),
    ),
}
BENCHMARKS: dict[str, tuple[Callable[..., Any], Table]] = {
    "unroll": (OuterSteps, OUTER_STEPS),
    "experts": (Trainings, TRAININGS),
    "evaluation": (Trainings, TRAININGS),
}
BY_DEFAULT = {
    "unroll": ("twin", "short", "long", "eager"),
    "experts": ("twin", "short", "one", "long", "together"),
    "evaluation": ("twin", "short", "one", "long", "together"),
}


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    prepare, table = BENCHMARKS[args.benchmark]
    subject = prepare(args, device)
    variants = {}
    for name in args.variants:
        title, make = table[name]
        variants[name] = Variant(title.format(subject), partial(make, subject))
    if args.peak_only:
        (variant,) = variants.values()
        return peaks(variant.prepare())
    results = compare(variants, repeats=args.repeats)
    if args.launches and device.type == "cuda":
        for name, row in results.items():
            if name != "twin":  # whose kernels are too many to look at
                row |= launches(variants[name].work)
                print(f"{row['title']:34} {row['launches']} launches on the GPU")
    measures_peaks = args.benchmark == "unroll" and ranks.world() == 1 and not args.no_peaks
    if device.type == "cpu" and measures_peaks:
        for name, row in results.items():
            row["peak_bytes"] = peak_apart(name, args.out.with_suffix(".apart.json"))
            print(f"{row['title']:34} peak memory of a process {row['peak_bytes'] / 1e9:.3f} GB")
    return results


def peaks(work: Work) -> dict[str, int]:
    """Peak bytes of this process, which runs nothing else: of its tensors on a GPU, where
    `device_bytes` is all that is taken there, with CUDA's context, code and what torch keeps; else
    of its memory.
    """
    work()
    work()
    device = default_device()
    peak = peak_memory(device)
    if device.type != "cuda":
        return {"peak_bytes": peak}
    free, total = torch.cuda.mem_get_info()
    print(f"peak of tensors {peak / 1e9:.3f} GB, taken in all {(total - free) / 1e9:.3f} GB")
    return {"peak_bytes": peak, "device_bytes": total - free}


def peak_apart(variant: str, out: Path) -> int:
    """The peak memory of this command on one variant, in a process of its own."""
    more = ["--variants", variant, "--peak_only", "--out", str(out)]
    command = [sys.executable, *sys.argv, *more]  # the last of two flags counts
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {run.stderr.strip().splitlines()[-1]}")
    results = json.loads(out.read_text())["results"]
    out.unlink()
    return results["peak_bytes"]


def random_images(
    args: argparse.Namespace, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and labels (N,)."""
    torch.manual_seed(0)
    shape, dtype = (count, args.channels, args.res, args.res), storage_dtype(args.precision)
    images = torch.randn(shape, dtype=dtype, device=device)
    return images, torch.arange(count, device=device) % args.classes


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    return {"channels": args.channels, "num_classes": args.classes, "image_size": args.res}


def new_network(args: argparse.Namespace, *, seed: int = 0) -> nn.Module:
    return build_network(args.model, **shape_of(args), seed=seed)


def cost_of(args: argparse.Namespace) -> NetworkCost:
    return network_cost(args.model, **shape_of(args))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--model", default="ConvNetD3")
    for name, default in (("classes", 10), ("channels", 3), ("res", 32), ("ipc", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="the first is the baseline")
    parser.add_argument("--launches", action="store_true", help="count them, on a CUDA device")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/<benchmark>.json)")
    unrolled = parser.add_argument_group("unroll")
    unrolled.add_argument("--syn_steps", type=int, default=20)
    unrolled.add_argument("--batch_syn", type=int)
    unrolled.add_argument("--inner_opt", choices=OPTIMISERS, default="sgd", help="of the students")
    unrolled.add_argument("--micro_batch", type=int)
    unrolled.add_argument("--peak_only", action="store_true", help="of one variant, no times")
    unrolled.add_argument("--no_peaks", action="store_true", help="no memory, on a CPU")
    trained = parser.add_argument_group("experts and evaluation")
    trained.add_argument("--networks", type=int, default=5)
    trained.add_argument("--batch_train", type=int, default=256)
    trained.add_argument("--steps", type=int, default=5, help="batches an expert")
    trained.add_argument("--epochs", type=int, default=30, help="of an evaluation network")
    args = parser.parse_args(argv)
    args.out = args.out or Path("bench", f"{args.benchmark}.json")
    args.variants = args.variants or BY_DEFAULT[args.benchmark]
    _, table = BENCHMARKS[args.benchmark]
    if unknown := set(args.variants) - set(table):
        parser.error(f"--variants {' '.join(sorted(unknown))}: choose from {', '.join(table)}")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    with ranks.process_group():
        device = use_device(None)
        args.precision = use_precision(args.precision, device)
        results = measure(args, device)
        settings = {key: str(value) for key, value in vars(args).items()}
        record = {
            "environment": describe_environment(device),
            "settings": settings,
            "results": results,
        }
        if ranks.is_main():
            write_text(json.dumps(record, indent=1) + "\n", args.out)
            print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
