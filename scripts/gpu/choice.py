"""Choose how a row is run, and how much of it fits, from what was measured before."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCHES_AN_EPOCH = 196  # of 256, CIFAR's 50,000 images
# Where nothing was measured: guesses for one H100.
STEP_SECONDS = 0.1
EPOCH_SECONDS = 0.5
# From the start of a script to its first epoch or step: imports, whitening, compiling.
START_SECONDS = 30.0
LEAST_EXPERTS = 4
EXPERTS_A_FILE = 10
SPARE = 0.95  # of the time is planned for
# How far a mode may be from the plain full graph: loss and gradients in float64, the loss alone at
# the precision that the benchmarks run in.
EXACT, ROUNDED = 1e-8, 1e-2
# The benchmarks of the outer step, in the order in which they count.
UNROLLED = ("unroll_ipc1", "unroll_variants")


@dataclass(frozen=True)
class Mode:
    """A way to run the scripts, and the benchmark's variants that run so."""

    flags: str  # of the three scripts; where capturing fails after all they go on without
    unrolled: str
    trained: str


# The fastest first.
MODES = {
    "graphs+compiled": Mode("--compile on --cuda_graphs auto", unrolled="long", trained="one"),
    "graphs": Mode("--compile off --cuda_graphs auto", unrolled="short", trained="short"),
    "compiled": Mode("--compile on --cuda_graphs off", unrolled="uncaptured", trained="one"),
    "plain": Mode("--compile off --cuda_graphs off", unrolled="eager", trained="twin"),
}


@dataclass(frozen=True)
class Choice:
    """How to run, and the seconds of an outer step and of an expert's epoch. `notes` say where
    each comes from.
    """

    flags: list[str]
    step_seconds: float
    epoch_seconds: float
    notes: tuple[str, ...]


def choose(results: Path) -> Choice:
    """Choose from the JSON files in `results`; what is missing there is guessed."""
    right = [name for name in MODES if is_right(results, name)]
    name = right[0] if right else "auto"
    mode = MODES.get(name, MODES["graphs+compiled"])
    step = _measured(results, UNROLLED, mode.unrolled).get("median_seconds")
    epoch = _measured(results, ["experts"], mode.trained).get("median_seconds")
    if epoch is not None:
        settings = _read(results, "experts")["settings"]
        epoch *= BATCHES_AN_EPOCH / (int(settings["networks"]) * int(settings["steps"]))
    notes = (
        f"mode {name}; right by the gate: {', '.join(right) or 'none'}",
        f"{step or STEP_SECONDS:.3g} s a step, {'measured' if step else 'guessed'}",
        f"{epoch or EPOCH_SECONDS:.3g} s an epoch, {'measured' if epoch else 'guessed'}",
    )
    flags = mode.flags.split() if right else []
    return Choice(flags, step or STEP_SECONDS, epoch or EPOCH_SECONDS, notes)


def is_right(results: Path, name: str) -> bool:
    """Whether a mode has passed its gate, and was not wrong where it was timed; NaN is wrong."""
    variant = MODES[name].unrolled
    gate = _measured(results, [f"gate_{name}"], variant)
    is_exact = all(error <= EXACT for what, error in gate.items() if what.endswith("_error"))
    timed = _measured(results, UNROLLED, variant)
    return gate.get("baseline") == "twin" and is_exact and timed.get("loss_error", 0) <= ROUNDED


def _measured(results: Path, benches: Sequence[str], variant: str) -> dict[str, Any]:
    """What the first of `benches` that has run the `variant` says of it; {} where none has."""
    rows = (_read(results, bench).get("results", {}).get(variant) for bench in benches)
    return next(filter(None, rows), {})


def _read(results: Path, bench: str) -> dict[str, Any]:
    """A benchmark's record; {} where there is none or it is cut off."""
    try:
        record = json.loads(results.joinpath(f"{bench}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def experts_within(seconds: float, epoch_seconds: float, *, epochs: int, most: int) -> int:
    """How many experts of so many epochs to train; whole files, from one on."""
    count = int(SPARE * (seconds - START_SECONDS) / (epochs * epoch_seconds))
    if count > EXPERTS_A_FILE:
        count -= count % EXPERTS_A_FILE
    return min(most, max(LEAST_EXPERTS, count))
