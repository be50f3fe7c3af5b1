"""Choose how a row is run, and how much of it fits, from what was measured before."""

import json
from collections.abc import Mapping
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


@dataclass(frozen=True)
class Mode:
    """A way to run the scripts, and the benchmark's variants that run so."""

    compiled: bool
    cuda_graphs: bool
    unrolled: str
    trained: str

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the three scripts; where capturing fails after all they go on without."""
        compiled = "on" if self.compiled else "off"
        return "--compile", compiled, "--cuda_graphs", "auto" if self.cuda_graphs else "off"


# The fastest first.
MODES = {
    "graphs+compiled": Mode(True, True, unrolled="long", trained="one"),
    "graphs": Mode(False, True, unrolled="short", trained="short"),
    "compiled": Mode(True, False, unrolled="uncaptured", trained="one"),
    "plain": Mode(False, False, unrolled="twin", trained="twin"),
}


@dataclass(frozen=True)
class Choice:
    """How to run, and the seconds of an outer step and of an expert's epoch. `notes` say where
    each comes from.
    """

    flags: tuple[str, ...]
    step_seconds: float
    epoch_seconds: float
    notes: tuple[str, ...]


def choose(results: Path) -> Choice:
    """Choose from the JSON files in `results`; what is missing there is guessed."""
    right = [name for name in MODES if read_json(results / f"gate_{name}.json").get("right")]
    mode = MODES[right[0]] if right else None
    like = mode or MODES["graphs+compiled"]
    unrolled = (read_json(results / f"{name}.json") for name in ("unroll_ipc1", "unroll_variants"))
    step = next(filter(None, (_seconds(record, like.unrolled) for record in unrolled)), None)
    trained = read_json(results / "experts.json")
    epoch = _seconds(trained, like.trained)
    if epoch is not None:
        settings = trained["settings"]
        epoch *= BATCHES_AN_EPOCH / (int(settings["networks"]) * int(settings["steps"]))
    notes = (
        f"mode {right[0]}: right by the gate" if right else "mode auto: no gate was passed",
        f"{step or STEP_SECONDS:.3g} s a step, {'measured' if step else 'guessed'}",
        f"{epoch or EPOCH_SECONDS:.3g} s an epoch, {'measured' if epoch else 'guessed'}",
    )
    flags = mode.flags if mode else ()
    return Choice(flags, step or STEP_SECONDS, epoch or EPOCH_SECONDS, notes)


def read_json(path: Path) -> dict[str, Any]:
    """Read a record; {} where there is none or it is cut off."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _seconds(record: Mapping[str, Any], variant: str) -> float | None:
    """The median seconds of a benchmark's `variant`."""
    return record.get("results", {}).get(variant, {}).get("median_seconds")


def experts_within(seconds: float, epoch_seconds: float, *, epochs: int, most: int) -> int:
    """How many experts of so many epochs to train; whole files, from one on."""
    count = int(SPARE * (seconds - START_SECONDS) / (epochs * epoch_seconds))
    if count > EXPERTS_A_FILE:
        count -= count % EXPERTS_A_FILE
    return min(most, max(LEAST_EXPERTS, count))


def steps_within(seconds: float, step_seconds: float, *, most: int) -> int:
    """How many outer steps to take."""
    return min(most, max(1, int(SPARE * (seconds - START_SECONDS) / step_seconds)))
