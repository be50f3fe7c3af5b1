"""Measure sets: a row for each line, network and augmentation; and what follows from the rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import eval as evaluation
from scripts.scoreboard.scores import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)
from utils.core.errors import UserError
from utils.data.distilled import SyntheticSet
from utils.measure.record import Entry
from utils.measure.selection import SELECTIONS

COLUMNS = "set line network augmented accuracy std n epochs chosen_by seconds".split()
SCORES = "set network HLR IOR LRS ARS".split()
RANDOM, FULL = SELECTIONS["random"].trained_on, "full"
# The real images of every set; those that experts choose are added where there are some.
REAL = "--random --equal_bytes --full".split()
CHOSEN_BY_EXPERTS = "--herding --k_center".split()


def measure(path: Path, flags: Sequence[str], *, experts: bool) -> list[Entry]:
    """Train networks on a set and on real images, with augmentation and, on the set and as many
    random images, without. What eval.json has already is not measured again.

    UserError where the set cannot be evaluated.
    """
    chosen = CHOSEN_BY_EXPERTS if experts else []
    calls = ([*REAL, *chosen, "--dsa"], ["--random", "--no_dsa"])
    return [
        entry
        for more in calls
        for entry in evaluation.run(evaluation.parse(["--distilled", str(path), *more, *flags]))
    ]


def rows_of(name: str, entries: Sequence[Entry], *, chosen_by: str) -> pd.DataFrame:
    """The evaluations of a set as rows of COLUMNS; accuracies in percent."""
    rows: list[dict[str, Any]] = [
        {
            "set": name,
            "line": entry["trained_on"],
            "network": entry["model"],
            "augmented": entry["dsa"] is not None,
            "accuracy": 100 * entry["acc_mean"],
            "std": 100 * entry["acc_std"],
            "n": len(entry["accs"]),
            "epochs": entry["epochs"],
            "chosen_by": chosen_by if entry["trained_on"].startswith("distilled") else "",
            "seconds": entry.get("seconds"),
        }
        for entry in entries
    ]
    return pd.DataFrame(rows, columns=COLUMNS).drop_duplicates(
        ["set", "line", "network", "augmented"]
    )


def scores_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The scores of each set by each network, as SCORES: of images with their classes alone, since
    random images have no labels by a teacher to compare soft ones with. Where a part was not
    measured it is missing.
    """
    found = []
    for (name, network), own in rows.groupby(["set", "network"], sort=False):
        accuracies = own.set_index(["line", "augmented"])["accuracy"] / 100

        def of(line: str, *, augmented: bool = True, known: pd.Series = accuracies) -> float:
            return known.get((line, augmented), float("nan"))

        lines = [line for line in own["line"] if line in ("distilled raw", "distilled ema")]
        if not lines:
            continue
        hlr = hard_label_recovery(of(FULL), of(lines[0]))
        ior, plain = (
            improvement_over_random(of(lines[0], augmented=each), of(RANDOM, augmented=each))
            for each in (True, False)
        )
        lrs = label_robust_score(ior=ior, hlr=hlr)
        ars = augmentation_robust_score(ior=ior, ior_unaugmented=plain)
        found.append((name, network, *(100 * each for each in (hlr, ior, lrs, ars))))
    return pd.DataFrame(found, columns=SCORES)


def measure_all(
    sets: Sequence[Path], flags: Sequence[str], *, experts: bool
) -> tuple[pd.DataFrame, list[str]]:
    """The rows of all sets, and a line for each that cannot be evaluated."""
    frames, problems = [pd.DataFrame(columns=COLUMNS)], []
    for path in sets:
        try:
            entries = measure(path, flags, experts=experts)
        except UserError as error:
            problems.append(f"{path}: {' '.join(str(error).split())}")
            print(problems[-1], flush=True)
            continue
        frames.append(rows_of(str(path), entries, chosen_by=how_chosen(path)))
    return pd.concat([frame for frame in frames if len(frame)] or frames), problems


def how_chosen(path: Path) -> str:
    """How the iteration of a set was chosen, by its name and its settings: test, val, last, or the
    iteration itself.
    """
    prefix, _, tag = path.stem.partition("_")
    if prefix != "distilled":
        return "not said"
    tag = tag.removeprefix("ema_")
    return SyntheticSet.load(path).config.get("select", "test") if tag == "best" else tag
