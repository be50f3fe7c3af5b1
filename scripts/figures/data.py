"""What the paper's figures show, as frames, from runs that have ended.

Each function takes all runs of one data set, chooses those that compare, and raises Missing where
they are not there. N_S is syn_steps, the most steps of a student; N_opt the one of them that is
nearest to the expert's target, so N_opt <= N_S; n the one that the policy picks and matches.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from networks import canonical_name
from scripts.results.evaluations import logged_evaluations
from scripts.results.runs import Run, comparable

RATES = ["lr_img", "lr_lr"]
ONE_AT_A_TIME = "repeats that vary lr_img or lr_lr, one at a time"
EVALUATION = ("num_eval", "epoch_eval_train")  # have to agree where accuracies are compared


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
        curves,
        ("length", "seed"),
        size=lambda group: (group["policy"].nunique(), group["syn_steps"].max()),
        wanted="runs with --log_distances",
    )
    first_seeds = chosen.sort_values(["policy", "seed"]).drop_duplicates("policy")
    common = set.intersection(*(set(curves[run]) for run in first_seeds["run"]))
    if len(common) < 2:
        raise Missing("two iterations with distances that all policies have")
    return pd.DataFrame(
        {"iteration": iteration, "policy": each.policy, **curves[each.run][iteration]}
        for iteration in (min(common), max(common))
        for each in first_seeds.itertuples()
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
    chosen = _largest(
        [run for run in runs if run.matches_trajectories and _count(run) >= interval],
        ("length", "seed", "syn_steps"),
        size=lambda group: group.loc[group["policy"] == "fixed", "syn_steps"].nunique(),
        wanted=f"runs with --length fixed of {interval} steps or more",
    )
    steps = _steps(chosen)
    steps["interval"] = steps["iteration"] // interval
    steps["off"] = (steps["length"] - steps["n_opt"]).abs()
    steps["case"] = steps["off"] > gamma
    by = ["policy", "syn_steps", "interval"]
    of_run = steps.groupby([*by, "run"]).agg(cases=("case", "sum"), steps=("iteration", "nunique"))
    cases = of_run.loc[of_run["steps"] == interval, "cases"].groupby(level=by).mean()
    mean = steps.groupby(by)["off"].mean().reindex(cases.index)
    return pd.DataFrame({"cases": cases, "mean": mean}).reset_index()


def chosen_lengths(runs: Iterable[Run]) -> pd.DataFrame:
    """Fig. 4, left: the lengths that att chose, a row for each N_S and run, a column for each
    iteration; NaN behind a run's end. Of several trajectories the mean.
    """
    chosen = _largest(
        [run for run in runs if policy_of(run) == "att" and _count(run)],
        ("seed", "syn_steps"),
        size=lambda group: group["syn_steps"].nunique(),
        wanted="runs with --length att",
    )
    return _steps(chosen).pivot_table("length", ["syn_steps", "run"], "iteration")


def successes(runs: Iterable[Run]) -> pd.DataFrame:
    """Fig. 4, right: how many of the repeats at each multiplier of a rate ended in order.

    One rate at a time is a multiple of that of the common setting. A repeat failed if its run
    stopped for divergence: a loss or images that are not finite, or a syn_lr at or below zero.
    """
    repeats = _largest(
        runs,
        ("length", "seed", *RATES),
        size=lambda group: len(group[RATES].drop_duplicates()) - 1,
        wanted="repeats with lr_img or lr_lr multiplied",
    )
    base = base_rates(repeats[RATES])
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


def base_rates(settings: pd.DataFrame) -> dict[str, float]:
    """The setting from which all others differ in one rate only; of several the smallest."""
    for base in sorted(itertools.product(*(settings[rate].unique() for rate in RATES))):
        if ((settings[RATES] != list(base)).sum(axis="columns") <= 1).all():
            return dict(zip(RATES, base, strict=True))
    raise Missing(ONE_AT_A_TIME)


def accuracies(runs: Iterable[Run]) -> pd.DataFrame:
    """By policy, set and iteration: mean and std in percent over seeds, of the network that was
    distilled with, and the seconds of all outer steps until then. At the iterations that all
    seeds have.

    Of several N_S that with most runs. A run that diverged is left out.
    """
    chosen = _largest(
        [run for run in runs if run.diverged is None and evaluations(run, "raw")],
        ("length", "seed"),
        size=lambda group: (group["policy"].nunique(), len(group)),
        wanted="runs that were evaluated",
    )
    measured = pd.DataFrame(
        {"policy": each.policy, "set": name, "iteration": at, "seconds": seconds, "accuracy": acc}
        for each in chosen.sort_values("policy", kind="stable").itertuples()
        for name in ("raw", "ema")
        for at, seconds, acc in _over_time(each.run, name)
    )
    found = measured.groupby(["policy", "set", "iteration"], sort=False).agg(
        seconds=("seconds", "mean"),
        mean=("accuracy", "mean"),
        std=("accuracy", lambda accs: accs.std(ddof=0)),
        seeds=("accuracy", "size"),
    )
    found = found.reset_index()
    return found[found["seeds"] == found["policy"].map(chosen["policy"].value_counts())]


def _over_time(run: Run, name: str) -> Iterable[tuple[int, float, float]]:
    """Iteration, seconds of outer steps until then, and accuracy in percent."""
    seconds = run.steps.drop_duplicates("iteration")["seconds"].cumsum()
    until = dict(enumerate([0.0, *seconds]))
    for iteration, accuracy in sorted(evaluations(run, name).items()):
        yield iteration, until.get(iteration, math.nan), 100 * accuracy


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
    runs: Iterable[Run],
    varied: Sequence[str],
    *,
    size: Callable[[pd.DataFrame], Any],
    wanted: str,
) -> pd.DataFrame:
    """A row for each run of the group that differs in `varied` alone and is first by `size`, then
    by outer steps. Raise Missing with what is `wanted` where no group has a size.
    """
    groups = map(_table, comparable(runs, *varied, also=EVALUATION))
    able = [group for group in groups if size(group)]
    if not able:
        raise Missing(wanted)
    return max(able, key=lambda group: (size(group), group["count"].sum()))


def _table(runs: Iterable[Run]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run": run,
            "policy": policy_of(run),
            **{name: getattr(run.options, name) for name in ("syn_steps", "seed", *RATES)},
            "count": _count(run),
            "success": run.diverged is None,
        }
        for run in runs
    )


def _count(run: Run) -> int:
    """Of outer steps."""
    return len(run.logged("step"))


def _steps(chosen: pd.DataFrame) -> pd.DataFrame:
    """The outer steps of all runs, which `run` numbers."""
    frames = [
        each.run.steps.assign(run=each.Index, policy=each.policy, syn_steps=each.syn_steps)
        for each in chosen.itertuples()
    ]
    return pd.concat(frames, ignore_index=True)
