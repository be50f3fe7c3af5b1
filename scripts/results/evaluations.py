"""What was measured on the images of runs, and which evaluation counts.

eval.json comes before what distill_att.py has measured itself. Accuracies are fractions in the
files and percentages here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from networks import canonical_name
from scripts.results.runs import Record, Run
from utils.measure.protocol import Accuracies
from utils.measure.sets import ADAM, KERNEL, SOFT, SQUARED, STEPS

# By what eval.json calls them. Soft labels store more numbers an image, and learned or noted steps,
# kernels and networks that regress are no common protocol: columns of their own.
SETS = {
    f"distilled {name}{way}": name + way
    for way in ("", SOFT, STEPS, ADAM, KERNEL, SQUARED)
    for name in ("raw", "ema")
}
COLUMNS = ("trained_on", "set", "network", "mean", "std", "n", "epochs", "seed", "chosen_by")


def measured(run: Run) -> list[dict[str, Any]]:
    """A row of COLUMNS for each set and network of a run.

    It holds the evaluation that counts: of the chosen iteration before the last before others; then
    the longest training, the most networks, the latest. `set` is empty for real images. `mean` and
    `std` are over `n` networks. `seed` is that of the run or, of real images, of the evaluation.
    `chosen_by` says how the iteration of a distilled set was chosen: test, val, last, or the
    iteration that was asked for.
    """
    rows = (*_logged(run), *_evaluated(run))  # later ones count before earlier ones
    return list({(row["trained_on"], row["network"]): row for row in rows}.values())


def _row(trained_on: str, record: Record, epochs: int, seed: int, chosen_by: str) -> dict[str, Any]:
    accuracies = Accuracies(tuple(record["accs"]))
    return {
        "trained_on": trained_on,
        "set": SETS.get(trained_on, ""),
        "network": canonical_name(record["model"]),
        "mean": 100 * accuracies.mean,
        "std": 100 * accuracies.std,
        "n": len(accuracies.accs),
        "epochs": epochs,
        "seed": seed,
        "chosen_by": chosen_by,
    }


def _evaluated(run: Run) -> Iterator[dict[str, Any]]:
    """Of what eval.py has measured on the distillation's test images, the entries that are
    augmented as the distillation is, or do not say.
    """
    options = run.options
    own_dsa = options.dsa_strategy if options.dsa else None
    alike = [
        entry
        for entry in run.evaluations
        if entry.get("dsa", own_dsa) == own_dsa and not entry.get("other_test")
    ]

    def rank(entry: Record) -> tuple[Any, ...]:
        tag = _tag(entry)
        return tag == "best", tag == "last", entry["epochs"], len(entry["accs"])

    for entry in sorted(alike, key=rank):
        tag = _tag(entry)
        chosen_by = {"best": options.select, "last": "last", "": ""}.get(tag, f"iteration {tag}")
        seed = options.seed if tag else entry.get("seed", 0)
        yield _row(entry["trained_on"], entry, entry["epochs"], seed, chosen_by)


def _tag(entry: Record) -> str:
    """best, last or an iteration, from the file's name distilled_[ema_]<tag>.pt; empty for real
    images.
    """
    if entry["trained_on"] not in SETS:
        return ""
    name = Path(str(entry.get("distilled", "?"))).stem
    return name.removeprefix("distilled_").removeprefix("ema_")


def _logged(run: Run) -> Iterator[dict[str, Any]]:
    """Of the evaluations of distill_att.py those of the chosen iterations, in each set; none where
    the images were only measured before any step.
    """
    options = run.options
    evals = logged_evaluations(run)
    if options.Iteration > 0 and not any(record["iteration"] > 0 for record in evals):
        return
    own = canonical_name(options.evaluation_models[0])
    for trained_on, name in SETS.items():
        of_set = [record for record in evals if _set_of(record) == name]
        by_own = [record for record in of_set if canonical_name(record["model"]) == own]
        chosen = _chosen(by_own, options.select)
        for record in of_set:
            if record["iteration"] == chosen:
                epochs = options.epoch_eval_train
                yield _row(trained_on, record, epochs, options.seed, options.select)


def _set_of(record: Record) -> str:
    """What a logged evaluation trained on, as in SETS."""
    name = str(record.get("set"))
    return f"{name}{SOFT}" if record.get("labels") == "soft" else name


def logged_evaluations(run: Run) -> list[Record]:
    """The evaluations in metrics.jsonl that name their network and hold accuracies."""
    return [
        record
        for record in run.logged("eval")
        if isinstance(record.get("model"), str) and _are_accuracies(record.get("accs"))
    ]


def _are_accuracies(accs: Any) -> bool:
    return isinstance(accs, list) and bool(accs) and all(isinstance(a, int | float) for a in accs)


def _chosen(evals: Sequence[Record], select: str) -> int | None:
    """The iteration whose set distill_att.py keeps as the best, the first of several."""
    if select == "last":
        return max((record["iteration"] for record in evals), default=None)
    name = "val_accs" if select == "val" else "accs"
    able = [record for record in evals if _are_accuracies(record.get(name))]
    best = max(able, key=lambda record: Accuracies(tuple(record[name])).mean, default=None)
    return best["iteration"] if best else None
