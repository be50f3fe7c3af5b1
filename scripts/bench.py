"""Time and memory of the code's hot parts beside the way the field does it, in one run.

    python scripts/bench.py unroll --ipc 1 --syn_steps 80       # one outer step
    python scripts/bench.py experts                             # training experts
    python scripts/bench.py evaluation --ipc 1                  # five evaluation networks

Variants take turns, so that a noisy machine is noisy for all; medians of --repeats, ratios to the
first variant, the naive twin by default; warm-up and compiling are not counted but shown. Images
and parameters are random: times do not depend on them. Writes JSON with hardware, versions and
command to --out.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
    use_precision,
)
from utils.compute.execution import PLAIN, Execution
from utils.compute.flat import FlatNetwork, flatten
from utils.core import ranks
from utils.core.files import write_text
from utils.core.provenance import describe_environment
from utils.core.rng import derive_seed, stream
from utils.data import augment
from utils.data.augment import DSA_STRATEGY, parse_strategy
from utils.data.dataset import Split
from utils.measure.protocol import MOMENTUM, WEIGHT_DECAY, EvalExecution, Protocol, evaluate
from utils.methods.trajectory.lengths import DISTANCES, fixed
from utils.methods.trajectory.matching import (
    Matching,
    Objective,
    match_by_adjoint,
    match_by_autograd,
)
from utils.methods.trajectory.problems import draw_problem
from utils.methods.trajectory.unroll import Loss, Steps
from utils.methods.trajectory.work import count_work
from utils.options import DistillOptions
from utils.plan.choose import choose_at_once, choose_micro_batch, choose_unroll
from utils.plan.machine import Machine

# Variants by benchmark, and what they are.
OUTER_STEPS = {
    "twin": "twin: full graph, eager",
    "short": "default of short runs: {}",
    "long": "default of long runs: compiled",
    "eager": "adjoint, eager",
    "whole": "compiled, whole batches",
    "uncaptured": "compiled, no CUDA graphs",
    "nchw": "compiled, channels outermost",
    "no_combo": "compiled, kernels not combined",
    "unsplit": "compiled, sums in one kernel",
    "unpruned": "compiled, unused derivatives kept",
    "bf16": "compiled, bf16",
    "benchmark": "compiled, cudnn.benchmark",
}
TRAININGS = {
    "twin": "twin: modules, one by one, eager",
    "short": "one by one, uncompiled",
    "one": "one by one, compiled",
    "long": "default of long runs: {} at once",
    "together": "{} at once, compiled",
    "vmap": "{} at once, compiled, vmap",
}
VARIANTS = {"unroll": OUTER_STEPS, "experts": TRAININGS, "evaluation": TRAININGS}
_OF_TRAINING = ("twin", "short", "one", "long", "together")
DEFAULT_VARIANTS = {
    "unroll": ("twin", "short", "long", "eager"),
    "experts": _OF_TRAINING,
    "evaluation": _OF_TRAINING,
}
DSA = parse_strategy(DSA_STRATEGY)
FIXED = Objective(DISTANCES["l2"], fixed)


@dataclass
class Variant:
    """One way of doing the same work."""

    title: str
    work: Callable[[], object]
    warm_up: float = 0.0  # seconds of the first call: compiling, capturing
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # on a CUDA device
    outcome: object = None  # of the work


def compare(
    variants: dict[str, Variant], args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Run the variants in turns; print and return medians, ratios to the first, peak memory.

    The peak is that of the first call, which compiles and captures: what a CUDA graph uses belongs
    to it from then on and is not counted again. A variant that fails, for want of memory say, drops
    out.
    """
    for name, variant in list(variants.items()):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        try:
            variant.warm_up = _time(variant.work, device)
            variant.outcome = variant.work()
        except RuntimeError as error:
            print(f"{variant.title} failed: {str(error).strip().splitlines()[0]}")
            del variants[name]
            continue
        if device.type == "cuda":
            variant.peak_bytes = torch.cuda.max_memory_allocated() - before
    if not variants:
        raise SystemExit("no variant ran")
    for _ in range(args.repeats):
        for variant in variants.values():
            variant.seconds.append(_time(variant.work, device))
    baseline = next(iter(variants))
    print(f"{'variant':34} {'ratio':>6} {'median s':>9} {'min s':>8} {'first s':>8}  peak memory")
    results = {}
    for name, variant in variants.items():
        pairs = zip(variant.seconds, variants[baseline].seconds, strict=True)
        results[name] = {
            "title": variant.title,
            "baseline": baseline,
            "ratio": statistics.median(mine / theirs for mine, theirs in pairs),
            "median_seconds": statistics.median(variant.seconds),
            "min_seconds": min(variant.seconds),
            "first_seconds": variant.warm_up,
            "peak_bytes": variant.peak_bytes,
        }
        results[name] |= _errors(variant.outcome, variants[baseline].outcome)
        row = results[name]
        peak = "" if variant.peak_bytes is None else f"{variant.peak_bytes / 1e9:.3f} GB"
        print(
            f"{variant.title:34} {row['ratio']:6.3f} {row['median_seconds']:9.4f} "
            f"{row['min_seconds']:8.4f} {variant.warm_up:8.1f}  {peak}"
        )
    if args.launches and device.type == "cuda":
        for name, variant in variants.items():
            if name != "twin":  # whose kernels are too many to look at
                results[name] |= _launches(variant.work)
                print(f"{variant.title:34} {results[name]['launches']} launches on the GPU")
    return results


def _errors(outcome: object, baseline: object) -> dict[str, float]:
    """How far an outer step is from that of the baseline, relatively."""
    if not (isinstance(outcome, Matching) and isinstance(baseline, Matching)):
        return {}
    errors = {}
    for name in ("loss", "grad_images", "grad_syn_lr"):
        mine, theirs = getattr(outcome, name), getattr(baseline, name)
        errors[f"{name}_error"] = ((mine - theirs).norm() / theirs.norm()).item()
    return errors


def _launches(work: Callable[[], object], top: int = 30) -> dict[str, Any]:
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


def _time(work: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    began = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class OuterStep:
    """One outer step on random images from a random network, at the full length N_S."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.count = args.classes * args.ipc
        torch.manual_seed(0)
        theta_0 = flatten(new_network(args).parameters()).detach()[None]
        theta_star = theta_0 + 0.01 * torch.randn_like(theta_0)
        self.images = torch.randn(self.count, args.channels, args.res, args.res, device=device)
        self.syn_lr = torch.tensor(0.01, device=device)
        options = DistillOptions(ipc=args.ipc, syn_steps=args.syn_steps, batch_syn=args.batch_syn)
        self.work = count_work(options, cost_of(args), ranks.world(), classes=args.classes)
        self.labels = torch.arange(args.classes, device=device).repeat_interleave(args.ipc)
        self.problem = draw_problem(
            theta_0.to(device),
            theta_star.to(device),
            self.images[0],
            count=self.count,
            syn_steps=args.syn_steps,
            batch_syn=args.batch_syn,
            dsa_groups=DSA,
            generators=[torch.Generator().manual_seed(0)],
            share=(ranks.rank(), ranks.world()),
        )

    def _loss(self, execution: Execution, precision: str) -> Loss:
        network = execution.adapt(new_network(self.args)).to(self.device)
        flat = FlatNetwork(network, dtype=compute_dtype(precision))
        return lambda theta, x, y: F.cross_entropy(flat(theta, x), y)

    def twin(self) -> Callable[[], object]:
        """As the field does it: the whole graph, uncompiled."""
        loss = self._loss(PLAIN, self.args.precision)
        return lambda: match_by_autograd(
            self.problem, self.images, self.syn_lr, self.labels, loss, FIXED
        )

    def adjoint(
        self, execution: Execution, *, micro_batch: int | None = None, precision: str | None = None
    ) -> Callable[[], object]:
        asked = micro_batch or self.args.micro_batch
        size = choose_micro_batch(asked, self.work, Machine.here(self.device))
        loss = self._loss(execution, precision or self.args.precision)
        steps = Steps.of(loss, execution, one_by_one=ranks.world() > 1)
        return lambda: match_by_adjoint(
            self.problem,
            self.images,
            self.syn_lr,
            self.labels,
            steps,
            FIXED,
            micro_batch=size,
            sum_over_ranks=ranks.sum_over_ranks,
        )

    def variants(self, names: Sequence[str]) -> dict[str, Variant]:
        """Those named, of OUTER_STEPS; "short" and "long" are what auto takes for such runs."""
        short = choose_unroll(
            "auto",
            self.work,
            Machine.here(self.device),
            compiled=False,
            divided=self.work.divides_batches,
        )
        plain, compiled = (Execution.on(self.device, compiled=on) for on in (False, True))
        make: dict[str, Callable[[], Callable[[], object]]] = {
            "twin": self.twin,
            "short": lambda: self.twin() if short == "autograd" else self.adjoint(plain),
            "long": lambda: self.adjoint(compiled),
            "eager": lambda: self.adjoint(PLAIN),
            "whole": lambda: self.adjoint(compiled, micro_batch=self.work.whole_batch),
            "uncaptured": lambda: self.adjoint(replace(compiled, cuda_graphs="off")),
            "nchw": lambda: self.adjoint(replace(compiled, channels_last=False)),
            "no_combo": lambda: self.adjoint(replace(compiled, combined=False)),
            "unsplit": lambda: self.adjoint(replace(compiled, unsplit=True)),
            "unpruned": lambda: self.adjoint(replace(compiled, pruned=False)),
            "bf16": lambda: self.adjoint(compiled, precision="bf16"),
            "benchmark": lambda: _with_cudnn_benchmark(self.adjoint(compiled)),
        }
        return {name: Variant(OUTER_STEPS[name].format(short), make[name]()) for name in names}


def _with_cudnn_benchmark(work: Callable[[], object]) -> Callable[[], object]:
    def benchmarked() -> None:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32
        ):
            work()

    return benchmarked


def bench_unroll(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    step = OuterStep(args, device)
    if args.peak_only:  # a process of its own, whose peak is that of one variant
        (variant,) = step.variants(args.variants).values()
        variant.work()
        variant.work()
        return _peaks(device)
    results = compare(step.variants(args.variants), args, device)
    if device.type == "cpu" and ranks.world() == 1 and not args.no_peaks:
        for name, row in results.items():
            row["peak_bytes"] = _peak_apart(args, name)
            print(f"{row['title']:34} peak memory of a process {row['peak_bytes'] / 1e9:.3f} GB")
    return results


def _peaks(device: torch.device) -> dict[str, int]:
    """Peak bytes of this process: of its tensors on a GPU, where `device_bytes` is all that is
    taken there, with CUDA's context, code and what torch keeps; else of its memory.
    """
    if device.type != "cuda":
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    print(f"peak of tensors {peak / 1e9:.3f} GB, taken in all {(total - free) / 1e9:.3f} GB")
    return {"peak_bytes": peak, "device_bytes": total - free}


def _peak_apart(args: argparse.Namespace, variant: str) -> int:
    """The peak memory of `unroll` on one variant, in a process of its own."""
    out = args.out.with_suffix(".apart.json")
    flags = ["--variants", variant, "--peak_only", "--out", str(out)]
    for name in ("model", "classes", "channels", "syn_steps", "ipc", "res", "precision"):
        flags += [f"--{name}", str(getattr(args, name))]
    for name in ("batch_syn", "micro_batch"):
        flags += [f"--{name}", str(getattr(args, name))] if getattr(args, name) else []
    command = [sys.executable, __file__, "unroll", *flags]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {run.stderr.strip().splitlines()[-1]}")
    results = json.loads(out.read_text())["results"]
    out.unlink()
    return results["peak_bytes"]


def naive_training(
    args: argparse.Namespace,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    momentum: float,
    weight_decay: float,
) -> None:
    """Networks one after another, batch by batch, with modules and torch's optimiser."""
    for k in range(args.networks):
        network = new_network(args, seed=derive_seed(0, "init", k)).to(images.device)
        rng = stream(0, "minibatch", k)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=0.01, momentum=momentum, weight_decay=weight_decay
        )
        for _ in range(epochs):
            for indices in torch.randperm(len(images), generator=rng).split(args.batch_train):
                rows = indices.to(images.device)
                x = augment.apply(images[rows], augment.draw(DSA, len(rows), rng))
                loss = F.cross_entropy(network(x), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def compare_training(
    args: argparse.Namespace,
    device: torch.device,
    *,
    images: int,
    naive: Callable[[], object],
    train: Callable[[Execution, int], object],
) -> dict[str, Any]:
    """Compare the naive way with `train`, which gets an execution and how many networks at once."""
    plain, compiled = (Execution.on(device, compiled=on) for on in (False, True))
    vmapped = replace(compiled, branched=False, vectorised=True)
    training = Training(cost_of(args), images, min(args.batch_train, images))
    default = choose_at_once(None, training, Machine.here(device), networks=args.networks)
    make: dict[str, tuple[int, Callable[[], object]]] = {
        "twin": (1, naive),
        "short": (1, lambda: train(plain, 1)),
        "one": (1, lambda: train(compiled, 1)),
        "long": (default, lambda: train(compiled, default)),
        "together": (args.networks, lambda: train(compiled, args.networks)),
        "vmap": (args.networks, lambda: train(vmapped, args.networks)),
    }
    variants = {
        name: Variant(TRAININGS[name].format(make[name][0]), make[name][1])
        for name in args.variants
    }
    return compare(variants, args, device)


def bench_experts(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """`--networks` experts for `--steps` batches each."""
    count = args.steps * args.batch_train
    images = torch.randn(count, args.channels, args.res, args.res, device=device)
    labels = torch.randint(args.classes, (count,), device=device)

    def train(execution: Execution, at_once: int) -> None:
        recipe = Recipe(
            args.model,
            **shape_of(args),
            momentum=0.0,
            weight_decay=0.0,
            execution=execution,
            dtype=compute_dtype(args.precision),
        )
        for first in range(0, args.networks, at_once):
            numbers = range(first, min(first + at_once, args.networks))
            seeds = [derive_seed(0, "init", k) for k in numbers]
            Cohort(recipe, seeds, device=device, dtype=images.dtype).train(
                images,
                labels,
                epochs=1,
                lr=0.01,
                batch_size=args.batch_train,
                dsa_groups=DSA,
                generators=[stream(0, "minibatch", k) for k in numbers],
            )

    def naive() -> None:
        naive_training(args, images, labels, epochs=1, momentum=0.0, weight_decay=0.0)

    return compare_training(args, device, images=count, naive=naive, train=train)


def bench_evaluation(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """`--networks` evaluation networks for `--epochs` epochs each, on IPC images a class."""
    count = args.classes * args.ipc
    images = torch.randn(count, args.channels, args.res, args.res, device=device)
    labels = torch.arange(args.classes, device=device).repeat_interleave(args.ipc)

    def train(execution: Execution, at_once: int) -> None:
        evaluate(
            images,
            labels,
            Split(images[:1], labels[:1]),
            num_classes=args.classes,
            model=args.model,
            lr=0.01,
            protocol=Protocol(args.networks, args.epochs, args.batch_train, DSA),
            seed=0,
            run=EvalExecution(
                at_once=at_once, execution=execution, dtype=compute_dtype(args.precision)
            ),
        )

    def naive() -> None:
        naive_training(
            args,
            images,
            labels,
            epochs=args.epochs,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
        )

    return compare_training(args, device, images=count, naive=naive, train=train)


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    return {"channels": args.channels, "num_classes": args.classes, "image_size": args.res}


def new_network(args: argparse.Namespace, *, seed: int = 0) -> nn.Module:
    return build_network(args.model, **shape_of(args), seed=seed)


def cost_of(args: argparse.Namespace) -> NetworkCost:
    return network_cost(args.model, **shape_of(args))


BENCHMARKS: dict[str, Callable[[argparse.Namespace, torch.device], dict[str, Any]]] = {
    "unroll": bench_unroll,
    "experts": bench_experts,
    "evaluation": bench_evaluation,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    args.variants = args.variants or DEFAULT_VARIANTS[args.benchmark]
    if unknown := set(args.variants) - set(VARIANTS[args.benchmark]):
        choices = ", ".join(VARIANTS[args.benchmark])
        parser.error(f"--variants {' '.join(sorted(unknown))}: choose from {choices}")
    return args


def main() -> None:
    args = parse()
    with ranks.process_group():
        device = default_device()
        args.precision = use_precision(args.precision, device)
        results = BENCHMARKS[args.benchmark](args, device)
        settings = {key: str(value) for key, value in vars(args).items()}
        record = {"environment": describe_environment(), "settings": settings, "results": results}
        if ranks.is_main():
            write_text(json.dumps(record, indent=1) + "\n", args.out)
            print(f"written to {args.out}")


if __name__ == "__main__":
    main()
