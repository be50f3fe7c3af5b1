"""The report's CSV: a line for each published figure, each set in a table, and each run."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from scripts.report.runs import RunLine, once
from scripts.report.tables import Line, Published
from scripts.results.evaluations import DISTILLED, Score

COLUMNS = (
    *("table", "dataset", "subset", "ipc", "network", "method", "status", "set"),
    *("paper_mean", "paper_std", "mean", "std", "difference", "n", "of", "chosen_by", "epochs"),
    *("seeds", "settings", "differences", "gpu_hours", "expert_gpu_hours", "runs"),
)


def as_csv(lines: Sequence[Line], listed: Iterable[RunLine], published: Iterable[Published]) -> str:
    beside = {(line.place, line.method) for line in lines}
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerows(_table_records(line))
    for figure in published:
        if (figure.place, figure.method) not in beside:
            record = asdict(figure.place) | {"method": figure.method, "status": "published"}
            writer.writerow(record | _paper_record(figure))
    for run_line in listed:
        writer.writerows(_run_records(run_line))
    return text.getvalue()


def _table_records(line: Line) -> Iterator[dict[str, Any]]:
    """One for each set that was measured, or for what was not run."""
    record = asdict(line.place) | {"method": line.method, **_paper_record(line.published)}
    if line.planned:
        record["gpu_hours"] = f"{line.planned.hours:.2f}"
        record["expert_gpu_hours"] = f"{line.planned.expert_hours:.2f}"
    if line.group is None:
        yield record | {"status": "not run"}
        return
    for name in DISTILLED:
        if score := line.score(name):
            yield {
                **record,
                "status": "differs" if line.differences else "run",
                "set": name,
                **_score_record(score),
                "difference": _rounded(line.difference(name)),
                "chosen_by": line.chosen_by(name),
                "epochs": once(each.epochs for each in line.measured(name)),
                "seeds": " ".join(str(run.options.seed) for run in line.group.runs),
                "differences": ", ".join(line.differences),
                "runs": " ".join(str(run.path) for run in line.group.runs),
            }


def _run_records(line: RunLine) -> Iterator[dict[str, Any]]:
    """One for each network."""
    for network, score in line.scores.items():
        yield {
            "table": "all runs",
            "dataset": line.dataset,
            "ipc": line.ipc,
            "network": network,
            "method": line.method,
            "status": "run",
            "set": line.set,
            **_score_record(score),
            "chosen_by": line.chosen_by,
            "epochs": line.epochs,
            "seeds": " ".join(map(str, line.seeds)),
            "settings": ", ".join(f"{k} {v}" for k, v in line.columns.items() if v != ""),
            "runs": " ".join(map(str, line.paths)),
        }


def _paper_record(published: Published | None) -> dict[str, Any]:
    return {"paper_mean": published.mean, "paper_std": published.std} if published else {}


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _score_record(score: Score) -> dict[str, Any]:
    return {
        "mean": _rounded(score.mean),
        "std": _rounded(score.std),
        "n": score.n,
        "of": score.of,
    }
