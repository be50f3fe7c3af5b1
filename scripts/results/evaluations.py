"""What was measured on a run's images: which of its evaluations count, and their mean and spread.

eval.json comes before what distill_att.py has measured itself. Accuracies are fractions in the
files and in Measured, percentages in a Score.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from networks import canonical_name
from scripts.results.runs import Record, Run
from utils.core.errors import UserError
from utils.measure.protocol import Accuracies
from utils.options import DistillOptions

DISTILLED = {"raw": "distilled raw", "ema": "distilled ema"}


@dataclass(frozen=True)
class Measured:
    """Networks of one architecture, trained on one set; `chosen_by` says how the iteration of a
    distilled one was chosen: test, val, last, or the iteration that was asked for.
    """

    trained_on: str
    model: str
    accuracies: Accuracies
    epochs: int
    seed: int
    chosen_by: str


@dataclass(frozen=True)
class Score:
    """Mean and population standard deviation over `n` networks, or over the means of `n` seeds."""

    mean: float
    std: float
    n: int
    of: str

    @classmethod
    def over(cls, measured: Sequence[Measured]) -> "Score":
        if len(measured) == 1:
            one = measured[0].accuracies
            return cls(100 * one.mean, 100 * one.std, len(one.accs), "networks")
        means = [100 * each.accuracies.mean for each in measured]
        return cls(statistics.fmean(means), statistics.pstdev(means), len(means), "seeds")

    @property
    def count(self) -> str:
        return f"{self.n} {self.of if self.n > 1 else self.of.removesuffix('s')}"

    def __str__(self) -> str:
        spread = f" ± {self.std:.2f}" if self.n > 1 else ""  # one alone has none
        return f"{self.mean:.2f}{spread}"


@dataclass(frozen=True)
class EvaluatedRun(Run):
    """`measured` holds the evaluation of each (trained on, network) that counts: of the chosen
    iteration before the last before others; then the longest training, the most networks, the
    latest. The environments of eval.py are among the `calls`.
    """

    measured: Mapping[tuple[str, str], Measured]


def with_evaluations(run: Run) -> EvaluatedRun:
    """UserError names an eval.json that is damaged."""
    entries = read_evaluations(run.path / "eval.json")
    calls = [e["environment"] for e in entries if isinstance(e.get("environment"), dict)]
    return EvaluatedRun(
        **{**vars(run), "calls": [*run.calls, *calls]},
        measured={**_logged(run), **_evaluated(entries, run.options)},
    )


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The entries of an eval.json, none where there is no file. UserError for a damaged one."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(map(_is_evaluation, entries)):
        raise UserError(f"{path}: cannot be read as a list of evaluations")
    return entries


def _is_evaluation(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), str) for name in ("trained_on", "model"))
        and isinstance(entry.get("epochs"), int)
        and _are_accuracies(entry.get("accs"))
    )


def _are_accuracies(accs: Any) -> bool:
    return isinstance(accs, list) and bool(accs) and all(isinstance(a, int | float) for a in accs)


def _evaluated(
    entries: Sequence[Record], options: DistillOptions
) -> dict[tuple[str, str], Measured]:
    """Of what eval.py has measured, the entries that count: those that are augmented as the
    distillation is, unless it is not on record.
    """
    own_dsa = options.dsa_strategy if options.dsa else None
    ranked = []
    for number, entry in enumerate(entries):
        if entry.get("dsa", own_dsa) != own_dsa:
            continue
        tag = _tag(entry) if entry["trained_on"] in DISTILLED.values() else ""
        measured = Measured(
            trained_on=entry["trained_on"],
            model=canonical_name(entry["model"]),
            accuracies=Accuracies(tuple(entry["accs"])),
            epochs=entry["epochs"],
            seed=entry.get("seed", 0),
            chosen_by={"best": options.select, "last": "last", "": ""}.get(tag, f"iteration {tag}"),
        )
        rank = (tag == "best", tag == "last", measured.epochs, len(entry["accs"]), number)
        ranked.append((rank, measured))
    ordered = sorted(ranked, key=lambda each: each[0])
    return {(measured.trained_on, measured.model): measured for _, measured in ordered}


def _tag(entry: Record) -> str:
    """best, last or an iteration, from the file's name distilled_[ema_]<tag>.pt."""
    name = Path(str(entry.get("distilled", "?"))).stem
    return name.removeprefix("distilled_").removeprefix("ema_")


def _logged(run: Run) -> dict[tuple[str, str], Measured]:
    """Of the evaluations of distill_att.py those of the chosen iterations, in each set."""
    options = run.options
    evals = [
        record
        for record in run.logged("eval")
        if isinstance(record.get("model"), str) and _are_accuracies(record.get("accs"))
    ]
    if options.Iteration > 0 and not any(record["iteration"] > 0 for record in evals):
        return {}  # of the images before any step
    own = canonical_name(options.evaluation_models[0])
    found = {}
    for set, trained_on in DISTILLED.items():
        of_set = [r for r in evals if r.get("set") == set]
        chosen = _chosen([r for r in of_set if canonical_name(r["model"]) == own], options.select)
        for record in of_set:
            if record["iteration"] == chosen:
                model = canonical_name(record["model"])
                found[trained_on, model] = Measured(
                    trained_on=trained_on,
                    model=model,
                    accuracies=Accuracies(tuple(record["accs"])),
                    epochs=options.epoch_eval_train,
                    seed=options.seed,
                    chosen_by=options.select,
                )
    return found


def _chosen(evals: Sequence[Record], select: str) -> int | None:
    """The iteration whose set distill_att.py keeps as the best, the first of several."""
    if select == "last":
        return max((r["iteration"] for r in evals), default=None)
    name = "val_accs" if select == "val" else "accs"
    measured = [r for r in evals if _are_accuracies(r.get(name))]
    best = max(measured, key=lambda r: Accuracies(tuple(r[name])).mean, default=None)
    return best["iteration"] if best else None
