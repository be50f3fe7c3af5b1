"""What pages of studies have in common: tables of accuracies, and how the runs were made."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.report.markdown import markdown
from scripts.results.evaluations import measured
from scripts.results.runs import Run
from scripts.studies.trials import Trial
from utils.core.files import write_text
from utils.measure.protocol import mean_and_std
from utils.measure.sets import KERNEL

Runs = Sequence[tuple[Trial, Run]]
IMAGES_ALONE = "raw"  # the regime of images with their classes, trained on by the protocol
MADE_WITH = ("device", "python", "torch", "git_commit")


def scores(runs: Runs) -> pd.DataFrame:
    """What was measured of the raw sets and of real images: line, place, regime, network, is_own,
    epochs, seed, accuracy (of the mean network, in percent). A kernel counts as the own network.

    Real images are lines of their own, in the regime of images and classes alone.
    """
    rows = [
        {
            "line": trial.line if each["set"] else each["trained_on"],
            "place": trial.place,
            "regime": each["set"] or IMAGES_ALONE,
            "network": each["network"],
            "is_own": each["network"] == run.model or each["set"].endswith(KERNEL),
            "epochs": each["epochs"],
            "seed": each["seed"],
            "accuracy": each["mean"],
        }
        for trial, run in runs
        for each in measured(run)
        if not each["set"].startswith("ema")
    ]
    columns = ["line", "place", "regime", "network", "is_own", "epochs", "seed", "accuracy"]
    return pd.DataFrame(rows, columns=columns)


def table(found: pd.DataFrame, columns: str) -> str:
    """Accuracies, mean and population standard deviation over seeds: a row for each line."""
    cells = found.pivot_table(
        index="line", columns=columns, values="accuracy", aggfunc=_score, sort=False
    )
    cells = cells[list(dict.fromkeys(found[columns]))].fillna("")
    return markdown(["", *cells.columns], ([line, *row] for line, *row in cells.itertuples()))


def _score(values: pd.Series) -> str:
    return mean_and_std(values.mean(), values.std(ddof=0), len(values)).strip()


def seconds_a_step(run: Run) -> float:
    """The median, without the first steps where there are more."""
    seconds = run.steps["seconds"]
    return statistics.median(seconds.iloc[5:] if len(seconds) > 5 else seconds)


def raised_megabytes(run: Run) -> float | None:
    """By how much outer steps raised the peak memory of their process, if that was measured."""
    measured = run.logged("memory")
    return measured[-1]["raised_bytes"] / 1e6 if measured else None


def write_page(path: Path, text: str, runs: Runs, problems: Sequence[str], command: str) -> None:
    """Write `text` with the command that made it, what is missing, and how the runs were made."""
    missing = "".join(f"- {problem}\n" for problem in problems)
    parts = [
        text,
        f"## How it was made\n\n```bash\n{command}\n```\n\n{_origins(runs)}",
        f"## Left out\n\n{missing}" if missing else "",
    ]
    write_text("\n".join(filter(None, parts)), path)


def _origins(runs: Runs) -> str:
    """Hardware, versions and commits of all runs."""
    calls = pd.DataFrame(call for _, run in runs for call in run.environments)
    said = {name: calls[name].dropna().unique() for name in MADE_WITH if name in calls}
    return "".join(f"- {name}: {', '.join(map(str, values))}\n" for name, values in said.items())
