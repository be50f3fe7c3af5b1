"""What the paper's figures show, as arrays, from runs that have ended.

Each function takes all runs of one data set, chooses those that compare, and raises Missing where
they are not there. N_S is syn_steps, the most steps of a student; N_opt the one of them that is
nearest to the expert's target, so N_opt <= N_S; n the one that the policy picks and matches.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from networks import canonical_name
from scripts.figures.runs import Array, FigureRun
from scripts.results.runs import comparable
from utils.methods.trajectory.lengths import LENGTH_POLICIES

POLICIES = tuple(LENGTH_POLICIES)
RATES = ("lr_img", "lr_lr")
SETS = ("raw", "ema")


class Missing(Exception):
    """The runs of a figure are not there; the message says which it takes."""


@dataclass(frozen=True)
class Curve:
    """Squared L2 distance of theta_0 ... theta_{N_S} to the target, over that of theta_0."""

    policy: str  # whose images the student sees
    distances: Array
    n_opt: int

    @property
    def syn_steps(self) -> int:
        return len(self.distances) - 1


@dataclass(frozen=True)
class Mismatch:
    """Of a policy and an N_S, an entry for each interval of outer steps, a mean over seeds."""

    policy: str
    syn_steps: int
    cases: Array  # with |n - N_opt| > gamma
    mean: Array  # of |n - N_opt|, in steps


@dataclass(frozen=True)
class Accuracy:
    """Of a policy and a set, raw or ema: an entry for each evaluation."""

    policy: str
    set: str
    iterations: Array
    seconds: Array  # of all outer steps until then, a mean over seeds
    mean: Array  # over seeds, in percent
    std: Array  # over seeds, in percentage points
    seeds: int


@dataclass(frozen=True)
class Successes:
    """Of a policy and a rate: how many of the repeats at each multiplier ended in order."""

    policy: str
    rate: str
    multipliers: Array
    successes: Array
    repeats: Array


def distance_curves(runs: Iterable[FigureRun]) -> dict[int, list[Curve]]:
    """Fig. 1: at the first and the last iteration with distances, a curve for each policy.

    Of the seeds the smallest counts, of several N_S the largest. The matched step's distance over
    that of theta_0 is the loss, which gives the scale of the whole curve.
    """
    able = [run for run in runs if _curves(run)]
    chosen = _largest(
        comparable(able, "length", "seed"),
        lambda group: (len(_policies(group)), group[0].options.syn_steps),
        "runs with --log_distances",
    )
    of_policy = {run.policy: run for run in sorted(chosen, key=lambda run: -run.options.seed)}
    common = set.intersection(*(set(_curves(run)) for run in of_policy.values()))
    if len(common) < 2:
        raise Missing("two iterations with distances that all policies have")
    return {
        iteration: [_curves(run)[iteration] for run in _in_order(of_policy)]
        for iteration in (min(common), max(common))
    }


def _curves(run: FigureRun) -> dict[int, Curve]:
    """By iteration. None of several trajectories, nor where a part of the parameters is matched:
    there the loss is not the distance of one student.
    """
    if run.lengths.shape[1] > 1 or run.options.prune_threshold is not None:
        return {}
    return {
        record["iteration"]: _curve(run, record)
        for record in run.logged("distances")
        if record["iteration"] < run.steps
    }


def _curve(run: FigureRun, record: Mapping[str, Any]) -> Curve:
    squared = np.asarray(record["l2"], dtype=float)
    scale = run.losses[record["iteration"]] / squared[record["length"] - 1]
    return Curve(run.policy, np.concatenate([[1.0], squared * scale]), record["n_opt"])


def mismatches(runs: Iterable[FigureRun], *, gamma: float, interval: int) -> list[Mismatch]:
    """Fig. 2: of each N_S with a fixed length, and of att, every `interval` outer steps."""
    long_enough = [run for run in runs if run.steps >= interval]
    chosen = _largest(
        [g for g in comparable(long_enough, "length", "seed", "syn_steps") if _fixed(g)],
        lambda group: len({run.options.syn_steps for run in _fixed(group)}),
        f"runs with --length fixed of {interval} steps or more",
    )
    return [
        Mismatch(policy, syn_steps, *_mismatch(same, gamma=gamma, interval=interval))
        for (policy, syn_steps), same in _by(
            chosen, lambda run: (run.policy, run.options.syn_steps)
        )
    ]


def _mismatch(runs: Sequence[FigureRun], *, gamma: float, interval: int) -> tuple[Array, Array]:
    """Cases and mean of each whole interval that some of the runs have."""
    whole = max(run.steps for run in runs) // interval * interval
    off = np.stack([_padded(np.abs(run.lengths - run.n_opts), whole) for run in runs])
    off = off.reshape(len(runs), -1, interval * off.shape[-1])
    cases = np.where(np.isnan(off).any(-1), np.nan, (off > gamma).sum(-1))
    return np.nanmean(cases, 0), np.nanmean(off, (0, 2))


def _fixed(runs: Iterable[FigureRun]) -> list[FigureRun]:
    return [run for run in runs if run.policy == "fixed"]


def chosen_lengths(runs: Iterable[FigureRun]) -> dict[int, Array]:
    """Fig. 4, left: by N_S the lengths that att chose, (seeds, iterations); NaN behind a run's end.

    Of several trajectories the mean.
    """
    able = [run for run in runs if run.policy == "att" and run.steps]
    chosen = _largest(
        comparable(able, "seed", "syn_steps"),
        lambda group: len({run.options.syn_steps for run in group}),
        "runs with --length att",
    )
    steps = max(run.steps for run in chosen)
    return {
        syn_steps: np.stack([_padded(run.lengths, steps).mean(1) for run in same])
        for syn_steps, same in _by(chosen, lambda run: run.options.syn_steps)
    }


def successes(runs: Iterable[FigureRun]) -> list[Successes]:
    """Fig. 4, right: one rate at a time is a multiple of that of the common setting.

    A repeat failed if its run stopped for divergence: a loss or images that are not finite, or a
    syn_lr at or below zero.
    """
    chosen = _largest(
        [g for g in comparable(runs, "length", "seed", *RATES) if len(set(map(_rates, g))) > 1],
        lambda group: len(set(map(_rates, group))),
        "repeats with lr_img or lr_lr multiplied",
    )
    base = base_rates(set(map(_rates, chosen)))
    return [
        _successes(same, policy, which, base)
        for which in range(len(RATES))
        for policy, same in _by(chosen, lambda run: run.policy)
        if len({_rates(run)[which] for run in same}) > 1
    ]


def _rates(run: FigureRun) -> tuple[float, ...]:
    return tuple(getattr(run.options, name) for name in RATES)


def base_rates(settings: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """The setting from which all others differ in one rate only; of several the smallest."""
    settings = list(settings)
    candidates = itertools.product(*zip(*settings, strict=True))
    for base in sorted(candidates):
        if all(sum(a != b for a, b in zip(base, each, strict=True)) <= 1 for each in settings):
            return base
    raise Missing("repeats that vary lr_img or lr_lr, one at a time")


def _successes(
    runs: Sequence[FigureRun], policy: str, which: int, base: Sequence[float]
) -> Successes:
    varied = [run for run in runs if _rates(run)[1 - which] == base[1 - which]]
    by_rate = _by(varied, lambda run: _rates(run)[which])
    return Successes(
        policy,
        RATES[which],
        np.array([rate / base[which] for rate, _ in by_rate]),
        np.array([sum(run.diverged is None for run in same) for _, same in by_rate]),
        np.array([len(same) for _, same in by_rate]),
    )


def accuracies(runs: Iterable[FigureRun]) -> list[Accuracy]:
    """Mean and standard deviation over seeds, of the network that was distilled with; of several
    N_S that with most runs. A run that diverged is left out.
    """
    able = [run for run in runs if run.diverged is None and _evaluations(run, "raw")]
    chosen = _largest(
        comparable(able, "length", "seed"),
        lambda group: (len(_policies(group)), len(group)),
        "runs that were evaluated",
    )
    return [
        _accuracy(same, policy, which)
        for policy, same in _by(chosen, lambda run: run.policy)
        for which in SETS
    ]


def _accuracy(runs: Sequence[FigureRun], policy: str, which: str) -> Accuracy:
    measured = [_evaluations(run, which) for run in runs]
    iterations = sorted(set.intersection(*map(set, measured)))
    values = 100 * np.array([[found[at] for at in iterations] for found in measured])
    seconds = np.array([np.concatenate([[0.0], run.seconds.cumsum()])[iterations] for run in runs])
    return Accuracy(
        policy,
        which,
        np.array(iterations, dtype=float),
        seconds.mean(0),
        values.mean(0),
        values.std(0),
        len(runs),
    )


def _evaluations(run: FigureRun, which: str) -> dict[int, float]:
    """By iteration, the accuracy of the network that was distilled with."""
    return {
        record["iteration"]: record["acc_mean"]
        for record in run.logged("eval")
        if record.get("set") == which and canonical_name(record.get("model", "")) == run.model
    }


def pictures(runs: Iterable[FigureRun]) -> tuple[Path, Path]:
    """The initial images of a run and those it ended with: the best, else the last. An att run
    where there is one, then the one with the highest accuracy.
    """
    found = []
    for run in runs:
        files = [run.path / f"images_{tag}.png" for tag in ("0", "best", "last")]
        there = [file for file in files if file.exists()]
        if files[0] in there and len(there) > 1:
            best = max(_evaluations(run, "raw").values(), default=0.0)
            found.append((run.policy == "att", best, there[0], there[1]))
    if not found:
        raise Missing("a run with images_0.png and images_best.png or images_last.png")
    _, _, before, after = max(found)
    return before, after


def _largest(
    groups: Sequence[list[FigureRun]], size: Callable[[list[FigureRun]], Any], wanted: str
) -> list[FigureRun]:
    """The group that is first by `size`, then by outer steps; what is `wanted` if there is none."""
    if not groups:
        raise Missing(wanted)
    return max(groups, key=lambda group: (size(group), sum(run.steps for run in group)))


def _by(
    runs: Iterable[FigureRun], key: Callable[[FigureRun], Any]
) -> list[tuple[Any, list[FigureRun]]]:
    """The runs by `key`, in its order."""
    ordered = sorted(runs, key=key)
    return [(value, list(same)) for value, same in itertools.groupby(ordered, key)]


def _policies(runs: Iterable[FigureRun]) -> set[str]:
    return {run.policy for run in runs}


def _in_order(by_policy: Mapping[str, FigureRun]) -> list[FigureRun]:
    return [by_policy[policy] for policy in POLICIES if policy in by_policy]


def _padded(values: Array, steps: int) -> Array:
    """The first `steps` rows, NaN where there are fewer."""
    missing = max(0, steps - len(values))
    return np.pad(values[:steps], ((0, missing), (0, 0)), constant_values=np.nan)
