"""Time and memory of the code's hot parts beside the way the field does it, in one run.

    python scripts/bench.py unroll --ipc 1 --syn_steps 80       # one outer step
    python scripts/bench.py experts                             # training experts
    python scripts/bench.py evaluation --ipc 1                  # five evaluation networks
    python scripts/bench.py precision                           # rounding errors
    python scripts/bench.py scaling                             # cost against size, with a plot

Variants take turns, so that a noisy machine is noisy for all; medians of --repeats, ratios to the
naive twin first; warm-up and compiling are not counted but shown. Images and parameters are random:
times do not depend on them. Writes JSON with hardware, versions and command to --out.
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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import build_network
from utils.compute.cohort import Cohort, Recipe
from utils.compute.cost import NetworkCost, Training, network_cost
from utils.compute.device import (
    PRECISIONS,
    compute_dtype,
    default_device,
    storage_dtype,
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
from utils.measure.protocol import MOMENTUM, WEIGHT_DECAY, HowToRun, Protocol, evaluate
from utils.methods.trajectory import unroll
from utils.methods.trajectory.lengths import DISTANCES, fixed
from utils.methods.trajectory.matching import draw_problem
from utils.methods.trajectory.work import count_work
from utils.options import DistillOptions
from utils.plan.choose import choose_at_once, choose_micro_batch, choose_unroll
from utils.plan.machine import Machine

DSA = parse_strategy(DSA_STRATEGY)
FIXED = unroll.Objective(DISTANCES["l2"], fixed)


@dataclass
class Variant:
    """One way of doing the same work."""

    work: Callable[[], object]
    warm_up: float = 0.0  # seconds of the first call: compiling, capturing
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # on a CUDA device


def compare(variants: dict[str, Variant], repeats: int, device: torch.device) -> dict[str, Any]:
    """Run the variants in turns; print and return medians, ratios to the first, peak memory.

    The peak is that of the first call, which compiles and captures: what a CUDA graph uses belongs
    to it from then on and is not counted again. A variant that runs out of memory drops out.
    """
    for name, variant in list(variants.items()):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        try:
            variant.warm_up = _time(variant.work, device)
            _time(variant.work, device)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
            del variants[name]
            continue
        if device.type == "cuda":
            variant.peak_bytes = torch.cuda.max_memory_allocated() - before
    for _ in range(repeats):
        for variant in variants.values():
            variant.seconds.append(_time(variant.work, device))
    twin = next(iter(variants.values()))
    print(f"{'variant':34} {'ratio':>6} {'median s':>9} {'min s':>8} {'first s':>8}  peak memory")
    results = {}
    for name, variant in variants.items():
        pairs = zip(variant.seconds, twin.seconds, strict=True)
        results[name] = {
            "ratio": statistics.median(mine / theirs for mine, theirs in pairs),
            "median_seconds": statistics.median(variant.seconds),
            "min_seconds": min(variant.seconds),
            "first_seconds": variant.warm_up,
            "peak_bytes": variant.peak_bytes,
        }
        row = results[name]
        peak = "" if variant.peak_bytes is None else f"{variant.peak_bytes / 1e9:.3f} GB"
        print(
            f"{name:34} {row['ratio']:6.3f} {row['median_seconds']:9.4f} "
            f"{row['min_seconds']:8.4f} {variant.warm_up:8.1f}  {peak}"
        )
    return results


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
        network = self._network()
        theta_0 = flatten(network.parameters()).detach()[None]
        theta_star = theta_0 + 0.01 * torch.randn_like(theta_0)
        self.images = torch.randn(self.count, args.channels, args.res, args.res, device=device)
        self.syn_lr = torch.tensor(0.01, device=device)
        options = DistillOptions(ipc=args.ipc, syn_steps=args.syn_steps, batch_syn=args.batch_syn)
        self.work = count_work(options, cost_of(args), ranks.world(), classes=args.classes)
        self.problem = draw_problem(
            theta_0.to(device),
            theta_star.to(device),
            torch.arange(args.classes, device=device).repeat_interleave(args.ipc),
            self.images[0],
            syn_steps=args.syn_steps,
            batch_syn=args.batch_syn,
            dsa_groups=DSA,
            generators=[torch.Generator().manual_seed(0)],
            share=(ranks.rank(), ranks.world()),
        )

    def _network(self) -> nn.Module:
        a = self.args
        return build_network(
            a.model, channels=a.channels, num_classes=a.classes, image_size=a.res, seed=0
        )

    def _loss(self, execution: Execution) -> unroll.Loss:
        network = execution.adapt(self._network()).to(self.device)
        flat = FlatNetwork(network, dtype=compute_dtype(self.args.precision))
        return lambda theta, x, y: F.cross_entropy(flat(theta, x), y)

    def twin(self) -> Variant:
        """As the field does it: the whole graph, uncompiled."""
        loss = self._loss(PLAIN)
        return Variant(lambda: unroll.autograd(self.problem, self.images, self.syn_lr, loss, FIXED))

    def adjoint(self, execution: Execution, micro_batch: int | None) -> Variant:
        size = choose_micro_batch(micro_batch, self.work, Machine.here(self.device))
        steps = unroll.Steps.of(self._loss(execution), execution)
        return Variant(
            lambda: unroll.adjoint(
                self.problem,
                self.images,
                self.syn_lr,
                steps,
                FIXED,
                micro_batch=size,
                sum_over_ranks=ranks.sum_over_ranks,
            )
        )

    def match(self, dtype: torch.dtype) -> unroll.Matching:
        """The adjoint's outcome with everything stored in `dtype`."""
        p = self.problem
        problem = replace(p, theta_0=p.theta_0.to(dtype), theta_star=p.theta_star.to(dtype))
        return unroll.adjoint(
            problem,
            self.images.to(dtype),
            self.syn_lr.to(dtype),
            unroll.Steps.of(self._loss(PLAIN), PLAIN),
            FIXED,
        )

    def variants(self, names: Sequence[str]) -> dict[str, Variant]:
        """Those named, of "twin", "short" and "long" (what auto takes for short and for long runs),
        "eager" (the adjoint uncompiled) and "whole" (compiled, batches in one piece).
        """
        short = choose_unroll(
            "auto",
            self.work,
            Machine.here(self.device),
            compiled=False,
            divided=self.work.divides_batches,
        )
        plain, compiled = (Execution.on(self.device, compiled=on) for on in (False, True))
        asked = self.args.micro_batch
        make = {
            "twin": self.twin,
            "short": lambda: self.twin() if short == "autograd" else self.adjoint(plain, asked),
            "long": lambda: self.adjoint(compiled, asked),
            "eager": lambda: self.adjoint(PLAIN, asked),
            "whole": lambda: self.adjoint(compiled, self.work.whole_batch),
        }
        titles = {
            "twin": "twin: full graph, eager",
            "short": f"default of short runs: {short}",
            "long": "default of long runs: compiled",
            "eager": "adjoint, eager",
            "whole": "compiled, whole batches",
        }
        return {titles[name]: make[name]() for name in names}


def bench_unroll(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    step = OuterStep(args, device)
    if args.peak_only:  # a process of its own, whose peak is that of one variant
        (variant,) = step.variants(args.variants).values()
        variant.work()
        variant.work()
        return {"peak_bytes": _peak_bytes(device)}
    results = compare(step.variants(args.variants), args.repeats, device)
    if device.type == "cpu" and ranks.world() == 1 and not args.no_peaks:
        titles = dict(zip(args.variants, step.variants(args.variants), strict=True))
        for name, title in titles.items():
            peak = _run_apart(args, name, ["--peak_only"])["peak_bytes"]
            results[title]["peak_bytes"] = peak
            print(f"{title:34} peak memory of a process {peak / 1e9:.3f} GB")
    return results


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def naive_training(
    args: argparse.Namespace,
    images: Tensor,
    labels: Tensor,
    *,
    networks: int,
    epochs: int,
    momentum: float,
    weight_decay: float,
) -> None:
    """Networks one after another, batch by batch, with modules and torch's optimiser."""
    for k in range(networks):
        network = build_network(
            args.model,
            channels=args.channels,
            num_classes=args.classes,
            image_size=args.res,
            seed=derive_seed(0, "init", k),
        ).to(images.device)
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


def bench_experts(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """`--networks` experts for `--steps` batches each."""
    count = args.steps * args.batch_train
    images = torch.randn(count, args.channels, args.res, args.res, device=device)
    labels = torch.randint(args.classes, (count,), device=device)

    def cohorts(compiled: bool, at_once: int) -> Variant:
        recipe = Recipe(
            args.model,
            channels=args.channels,
            num_classes=args.classes,
            image_size=args.res,
            momentum=0.0,
            weight_decay=0.0,
            execution=Execution.on(device, compiled=compiled),
            dtype=compute_dtype(args.precision),
        )

        def work() -> None:
            for first in range(0, args.networks, at_once):
                numbers = range(first, min(first + at_once, args.networks))
                cohort = Cohort(
                    recipe,
                    [derive_seed(0, "init", k) for k in numbers],
                    device=device,
                    dtype=images.dtype,
                )
                cohort.train(
                    images,
                    labels,
                    epochs=1,
                    lr=0.01,
                    batch_size=args.batch_train,
                    dsa_groups=DSA,
                    generators=[stream(0, "minibatch", k) for k in numbers],
                )

        return Variant(work)

    naive = Variant(
        lambda: naive_training(
            args, images, labels, networks=args.networks, epochs=1, momentum=0.0, weight_decay=0.0
        )
    )
    training = Training(cost_of(args), len(images), args.batch_train)
    at_once = choose_at_once(None, training, Machine.here(device), networks=args.networks)
    return compare(
        {
            "twin: modules, one by one, eager": naive,
            "one by one, uncompiled": cohorts(False, 1),
            "one by one, compiled": cohorts(True, 1),
            f"default of long runs: {at_once} at once": cohorts(True, at_once),
            f"{args.networks} at once, compiled": cohorts(True, args.networks),
        },
        args.repeats,
        device,
    )


def bench_evaluation(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """`--networks` evaluation networks for `--epochs` epochs each, on IPC images a class."""
    count = args.classes * args.ipc
    images = torch.randn(count, args.channels, args.res, args.res, device=device)
    labels = torch.arange(args.classes, device=device).repeat_interleave(args.ipc)
    test = Split(images[:1], labels[:1])
    protocol = Protocol(args.networks, args.epochs, args.batch_train, DSA)

    def measured(compiled: bool, at_once: int) -> Variant:
        run = HowToRun(
            at_once=at_once,
            execution=Execution.on(device, compiled=compiled),
            dtype=compute_dtype(args.precision),
        )
        return Variant(
            lambda: evaluate(
                images,
                labels,
                test,
                num_classes=args.classes,
                model=args.model,
                lr=0.01,
                protocol=protocol,
                seed=0,
                run=run,
            )
        )

    naive = Variant(
        lambda: naive_training(
            args,
            images,
            labels,
            networks=args.networks,
            epochs=args.epochs,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
        )
    )
    training = Training(cost_of(args), count, min(args.batch_train, count), args.epochs)
    at_once = choose_at_once(None, training, Machine.here(device), networks=args.networks)
    return compare(
        {
            "twin: modules, one by one, eager": naive,
            "one by one, uncompiled": measured(False, 1),
            f"default of long runs: {at_once} at once": measured(True, at_once),
            f"{args.networks} at once, compiled": measured(True, args.networks),
        },
        args.repeats,
        device,
    )


def bench_scaling(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time and peak memory of one outer step against one size at a time, each point a process."""
    sweeps: dict[str, list[int]] = {
        "syn_steps": [10, 20, 50, 100, 200],
        "ipc": [1, 10, 50],
        "res": [8, 16, 32, 64, 128],
        "ranks": _rank_counts(device),
    }
    results: dict[str, Any] = {}
    for name in args.sweeps:
        points = [_measure_apart(args, name, value) for value in sweeps[name]]
        results[name] = {
            "points": points,
            "time_exponent": _exponent(points, "median_seconds"),
            "memory_growth": points[-1]["peak_bytes"] / points[0]["peak_bytes"],
        }
        print(
            f"{name}: time ~ {name}^{results[name]['time_exponent']:.2f}, peak memory "
            f"x {results[name]['memory_growth']:.2f} from {points[0]['value']} "
            f"to {points[-1]['value']}"
        )
    write_text(json.dumps(results, indent=1) + "\n", args.out)  # before the plot, which may fail
    _plot(results, args.out.with_suffix(".png"))
    return results


def _rank_counts(device: torch.device) -> list[int]:
    most = torch.cuda.device_count() if device.type == "cuda" else 2
    return [2**k for k in range(most.bit_length())]


def _measure_apart(args: argparse.Namespace, name: str, value: int) -> dict[str, Any]:
    """The median time and the peak memory of a point, in fresh processes."""
    at = argparse.Namespace(**{**vars(args), name: value})
    found = _run_apart(at, args.variant, ["--repeats", str(args.repeats), "--no_peaks"])
    found |= _run_apart(at, args.variant, ["--peak_only"])
    peak = found.pop("peak_bytes")
    (times,) = found.values()
    point = {"value": value, "median_seconds": times["median_seconds"], "peak_bytes": peak}
    print(f"  {name} {value}: {point['median_seconds']:.3f} s, {peak / 1e9:.3f} GB", flush=True)
    return point


def _run_apart(args: argparse.Namespace, variant: str, flags: list[str]) -> dict[str, Any]:
    """The results of `unroll` on one variant, by a process of its own, or by args.ranks of them."""
    ranks = getattr(args, "ranks", 1)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [__file__, "unroll", "--variants", variant, *flags]
    for name in (
        "model",
        "classes",
        "syn_steps",
        "ipc",
        "res",
        "precision",
        "batch_syn",
        "micro_batch",
    ):
        if getattr(args, name, None) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    out = args.out.with_suffix(".apart.json")
    run = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {run.stderr.strip().splitlines()[-1]}")
    results = json.loads(out.read_text())["results"]
    out.unlink()
    return results


def _exponent(points: Sequence[dict[str, Any]], key: str) -> float:
    """The b of key ~ value^b, by least squares on logarithms."""
    if len(points) < 2:
        return 0.0
    x, y = (np.log([point[k] for point in points]) for k in ("value", key))
    return float(np.polyfit(x, y, 1)[0])


def _plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib  # only here: the other benchmarks need none

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(results), figsize=(3.2 * len(results), 5.5), squeeze=False
    )
    for column, (name, sweep) in zip(axes.T, results.items(), strict=True):
        values = [point["value"] for point in sweep["points"]]
        seconds = [point["median_seconds"] for point in sweep["points"]]
        memory = [point["peak_bytes"] / 1e9 for point in sweep["points"]]
        column[0].loglog(values, seconds, "o-")
        column[0].set_ylim(min(seconds) / 2, max(seconds) * 2)
        column[0].set_title(f"time ~ {name}^{sweep['time_exponent']:.2f}", fontsize=10)
        column[1].semilogx(values, memory, "s-")
        column[1].set_ylim(0, 1.2 * max(memory))
        column[1].set_xlabel(name)
        for axis in column:
            axis.set_xticks(values, [str(value) for value in values])
            axis.xaxis.minorticks_off()
    axes[0][0].set_ylabel("seconds an outer step")
    axes[1][0].set_ylabel("peak memory, GB")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cost_of(args: argparse.Namespace) -> NetworkCost:
    return network_cost(
        args.model, channels=args.channels, num_classes=args.classes, image_size=args.res
    )


def bench_precision(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Relative error of loss and gradients of one outer step, by precision, against fp64."""
    names = ("fp64", "fp32", "tf32", "bf16") if device.type == "cuda" else ("fp64", "fp32", "bf16")
    found = {}
    for name in names:
        use_precision(name if name != "bf16" or device.type == "cuda" else "fp32", device)
        args.precision = name
        step = OuterStep(args, device)
        found[name] = step.match(storage_dtype(name))
    results = {}
    for name in names[1:]:
        errors = {
            part: ((value.double() - exact).norm() / exact.norm()).item()
            for part, value, exact in (
                (part, getattr(found[name], part), getattr(found["fp64"], part))
                for part in ("loss", "grad_images", "grad_syn_lr")
            )
        }
        results[name] = errors
        print(name, " ".join(f"{part} {error:.1e}" for part, error in errors.items()))
    return results


BENCHMARKS: dict[str, Callable[[argparse.Namespace, torch.device], dict[str, Any]]] = {
    "unroll": bench_unroll,
    "experts": bench_experts,
    "evaluation": bench_evaluation,
    "precision": bench_precision,
    "scaling": bench_scaling,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsers = parser.add_subparsers(dest="benchmark", required=True)
    for name, function in BENCHMARKS.items():
        sub = parsers.add_parser(name, help=(function.__doc__ or "one outer step").split("\n")[0])
        sub.add_argument("--model", default="ConvNetD3")
        sub.add_argument("--classes", type=int, default=10)
        sub.add_argument("--channels", type=int, default=3)
        sub.add_argument("--res", type=int, default=32)
        sub.add_argument("--ipc", type=int, default=1)
        sub.add_argument("--precision", choices=PRECISIONS)
        sub.add_argument("--repeats", type=int, default=5)
        sub.add_argument("--out", type=Path, help="JSON file (default: bench/<benchmark>.json)")
        if name in ("unroll", "scaling", "precision"):
            sub.add_argument("--syn_steps", type=int, default=20)
        if name in ("unroll", "precision"):
            sub.add_argument("--batch_syn", type=int)
        if name == "unroll":
            sub.add_argument("--micro_batch", type=int)
            sub.add_argument("--variants", nargs="+", default=["twin", "short", "long", "eager"])
            sub.add_argument("--peak_only", action="store_true", help="of one variant, no times")
            sub.add_argument("--no_peaks", action="store_true", help="no memory, on a CPU")
        if name == "scaling":
            sub.add_argument("--variant", default="short", help="as in unroll --variants")
            sub.add_argument("--sweeps", nargs="+", default=["syn_steps", "ipc", "res", "ranks"])
        if name in ("experts", "evaluation"):
            sub.add_argument("--networks", type=int, default=5)
            sub.add_argument("--batch_train", type=int, default=256)
        if name == "experts":
            sub.add_argument("--steps", type=int, default=5)
        if name == "evaluation":
            sub.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args(argv)
    args.out = args.out or Path("bench", f"{args.benchmark}.json")
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
