"""What the paper's figures show, as frames, from runs that have ended.

Each function takes all runs of one data set, chooses those that compare, and raises Missing where
they are not there. N_S is syn_steps, the most steps of a student; N_opt the one of them that is
nearest to the expert's target, so N_opt <= N_S; n the one that the policy picks and matches.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from networks import canonical_name
from scripts.results import runs as results
from scripts.results.evaluations import logged_evaluations
from scripts.results.runs import Run
from utils.methods.trajectory.lengths import LENGTH_POLICIES

POLICIES = tuple(LENGTH_POLICIES)
RATES = ["lr_img", "lr_lr"]
ONE_AT_A_TIME = "repeats that vary lr_img or lr_lr, one at a time"
EVALUATION = ("num_eval", "epoch_eval_train")  # have to agree where accuracies are compared

comparable = partial(results.comparable, also=EVALUATION)


class Missing(Exception):
    """The runs of a figure are not there; the message says which it takes."""


def policy_of(run: Run) -> str:
    """How the run chose lengths; the name of a method that has none."""
    return run.options.length if run.matches_trajectories else run.method


def dataset_of(run: Run) -> str:
    """The name of the data set, with an ImageNet subset's behind it."""
    return "_".join(filter(None, (run.options.dataset, run.options.subset)))


def distance_curves(runs: Iterable[Run]) -> pd.DataFrame:
    """Fig. 1: a curve for each policy at the first and the last iteration with distances.

    `distances` holds the squared L2 distance of theta_0 ... theta_{N_S} to the target, over that of
    theta_0. Of the seeds the smallest counts, of several N_S the largest.
    """
    curves = {run: found for run in runs if (found := _curves(run))}
    chosen = _largest(
        comparable(curves, "length", "seed"),
        lambda group: (len(set(map(policy_of, group))), group[0].options.syn_steps),
        "runs with --log_distances",
    )
    of_policy = {policy_of(run): run for run in sorted(chosen, key=lambda run: -run.options.seed)}
    common = set.intersection(*(set(curves[run]) for run in of_policy.values()))
    if len(common) < 2:
        raise Missing("two iterations with distances that all policies have")
    return pd.DataFrame(
        {"iteration": iteration, "policy": policy, **curves[of_policy[policy]][iteration]}
        for iteration in (min(common), max(common))
        for policy in POLICIES
        if policy in of_policy
    )


def _curves(run: Run) -> dict[int, dict[str, Any]]:
    """By iteration. None of several trajectories, nor where a part of the parameters is matched:
    there the loss is not the distance of one student.
    """
    if run.options.trajectories > 1 or run.options.prune_threshold is not None:
        return {}
    losses = run.steps["loss"]
    return {
        record["iteration"]: {"distances": _curve(record, losses), "n_opt": record["n_opt"]}
        for record in run.logged("distances")
        if record["iteration"] < len(losses)
    }


def _curve(record: Mapping[str, Any], losses: pd.Series) -> np.ndarray:
    """The matched step's distance over that of theta_0 is the loss, which gives the scale."""
    squared = np.asarray(record["l2"], dtype=float)
    scale = losses[record["iteration"]] / squared[record["length"] - 1]
    return np.concatenate([[1.0], squared * scale])


def mismatches(runs: Iterable[Run], *, gamma: float, interval: int) -> pd.DataFrame:
    """Fig. 2: |n - N_opt| of each N_S with a fixed length, and of att, by `interval` outer steps.

    `cases` with more than gamma in a whole interval, and the `mean`, both over seeds.
    """

    def fixed_lengths(group: Sequence[Run]) -> set[int]:
        return {run.options.syn_steps for run in group if policy_of(run) == "fixed"}

    able = [run for run in runs if run.matches_trajectories and _count(run) >= interval]
    chosen = _largest(
        [g for g in comparable(able, "length", "seed", "syn_steps") if fixed_lengths(g)],
        lambda group: len(fixed_lengths(group)),
        f"runs with --length fixed of {interval} steps or more",
    )
    steps = _steps(chosen)
    steps["interval"] = steps["iteration"] // interval
    steps["off"] = (steps["length"] - steps["n_opt"]).abs()
    steps["case"] = steps["off"] > gamma
    series = ["policy", "syn_steps"]
    ends = steps.groupby(series)["iteration"].transform("max") + 1
    steps = steps[steps["interval"] < ends // interval]
    counted = steps.groupby([*series, "interval", "run"]).agg(
        cases=("case", "sum"), steps=("iteration", "nunique")
    )
    whole = counted[counted["steps"] == interval]
    by = [*series, "interval"]
    cases = whole.groupby(by)["cases"].mean()
    return pd.DataFrame({"cases": cases, "mean": steps.groupby(by)["off"].mean()}).reset_index()


def chosen_lengths(runs: Iterable[Run]) -> dict[int, pd.DataFrame]:
    """Fig. 4, left: by N_S the lengths that att chose, (seeds, iterations); NaN behind a run's end.

    Of several trajectories the mean.
    """
    able = [run for run in runs if policy_of(run) == "att" and _count(run)]
    chosen = _largest(
        comparable(able, "seed", "syn_steps"),
        lambda group: len({run.options.syn_steps for run in group}),
        "runs with --length att",
    )
    iterations = range(max(map(_count, chosen)))
    return {
        syn_steps: same.pivot_table("length", "run", "iteration").reindex(columns=iterations)
        for syn_steps, same in _steps(chosen).groupby("syn_steps")
    }


def successes(runs: Iterable[Run]) -> pd.DataFrame:
    """Fig. 4, right: how many of the repeats at each multiplier of a rate ended in order.

    One rate at a time is a multiple of that of the common setting. A repeat failed if its run
    stopped for divergence: a loss or images that are not finite, or a syn_lr at or below zero.
    """

    def settings(group: Iterable[Run]) -> set[tuple[float, ...]]:
        return {tuple(getattr(run.options, name) for name in RATES) for run in group}

    chosen = _largest(
        [g for g in comparable(runs, "length", "seed", *RATES) if len(settings(g)) > 1],
        lambda group: len(settings(group)),
        "repeats with lr_img or lr_lr multiplied",
    )
    base = base_rates(settings(chosen))
    repeats = pd.DataFrame(
        {
            "policy": policy_of(run),
            **{name: getattr(run.options, name) for name in RATES},
            "success": run.diverged is None,
        }
        for run in chosen
    )
    parts = []
    for rate, other in zip(RATES, reversed(RATES), strict=True):
        is_varied = repeats.groupby("policy")[rate].transform("nunique") > 1
        varied = repeats[is_varied & (repeats[other] == base[other])]
        counts = varied.groupby(["policy", rate])["success"].agg(successes="sum", repeats="size")
        part = counts.reset_index().rename(columns={rate: "multiplier"})
        parts.append(part.assign(rate=rate, multiplier=part["multiplier"] / base[rate]))
    found = pd.concat(parts, ignore_index=True)
    if found.empty:
        raise Missing(ONE_AT_A_TIME)
    return found


def base_rates(settings: Iterable[tuple[float, ...]]) -> dict[str, float]:
    """The setting from which all others differ in one rate only; of several the smallest."""
    settings = list(settings)
    candidates = itertools.product(*zip(*settings, strict=True))
    for base in sorted(candidates):
        if all(sum(a != b for a, b in zip(base, each, strict=True)) <= 1 for each in settings):
            return dict(zip(RATES, base, strict=True))
    raise Missing(ONE_AT_A_TIME)


def accuracies(runs: Iterable[Run]) -> dict[tuple[str, str, int], pd.DataFrame]:
    """By policy, set and number of seeds: mean and std in percent, by iteration, of the network
    that was distilled with, and the seconds of all outer steps until then.

    Of several N_S that with most runs. A run that diverged is left out.
    """
    able = [run for run in runs if run.diverged is None and evaluations(run, "raw")]
    chosen = _largest(
        comparable(able, "length", "seed"),
        lambda group: (len(set(map(policy_of, group))), len(group)),
        "runs that were evaluated",
    )
    return {
        (policy, name, len(same)): _accuracy(same, name)
        for policy, same in _by_policy(chosen).items()
        for name in ("raw", "ema")
    }


def _by_policy(runs: Iterable[Run]) -> dict[str, list[Run]]:
    ordered = sorted(runs, key=policy_of)
    return {policy: list(same) for policy, same in itertools.groupby(ordered, policy_of)}


def _accuracy(runs: Sequence[Run], name: str) -> pd.DataFrame:
    """At the iterations that all runs have."""
    measured = pd.DataFrame({n: evaluations(run, name) for n, run in enumerate(runs)}, dtype=float)
    measured = 100 * measured.dropna().sort_index()
    seconds = pd.DataFrame({n: _seconds_until(run) for n, run in enumerate(runs)})
    return pd.DataFrame(
        {
            "seconds": seconds.mean(axis=1).reindex(measured.index),
            "mean": measured.mean(axis=1),
            "std": measured.std(axis=1, ddof=0),
        }
    )


def _seconds_until(run: Run) -> np.ndarray:
    first = run.steps[run.steps["trajectory"] == 0]
    return np.concatenate([[0.0], first["seconds"].cumsum()])


def evaluations(run: Run, name: str) -> dict[int, float]:
    """By iteration, the accuracy of the network that was distilled with."""
    return {
        record["iteration"]: record["acc_mean"]
        for record in logged_evaluations(run)
        if record.get("set") == name and canonical_name(record["model"]) == run.model
    }


def pictures(runs: Iterable[Run]) -> tuple[Path, Path]:
    """The initial images of a run and those it ended with: the best, else the last. An att run
    where there is one, then the one with the highest accuracy.
    """
    found = []
    for run in runs:
        files = [run.path / f"images_{tag}.png" for tag in ("0", "best", "last")]
        there = [file for file in files if file.exists()]
        if files[0] in there and len(there) > 1:
            best = max(evaluations(run, "raw").values(), default=0.0)
            found.append((policy_of(run) == "att", best, there[0], there[1]))
    if not found:
        raise Missing("a run with images_0.png and images_best.png or images_last.png")
    _, _, before, after = max(found)
    return before, after


def _largest(
    groups: Sequence[list[Run]], size: Callable[[list[Run]], Any], wanted: str
) -> list[Run]:
    """The group that is first by `size`, then by outer steps; what is `wanted` if there is none."""
    if not groups:
        raise Missing(wanted)
    return max(groups, key=lambda group: (size(group), sum(map(_count, group))))


def _count(run: Run) -> int:
    """Of outer steps."""
    return len(run.logged("step"))


def _steps(runs: Iterable[Run]) -> pd.DataFrame:
    """The outer steps of all runs, which `run` numbers."""
    return pd.concat(
        [
            run.steps.assign(run=n, policy=policy_of(run), syn_steps=run.options.syn_steps)
            for n, run in enumerate(runs)
        ],
        ignore_index=True,
    )
