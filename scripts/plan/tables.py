"""Tables of a plan: what its cells will cost, how they went, and what the rows have reached."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.plan.cells import Cell
from scripts.plan.devices import Devices
from scripts.plan.estimate import ASSUMPTIONS, Estimate
from utils.core.errors import UserError
from utils.measure.protocol import Accuracies
from utils.measure.record import read_evaluations

Measured = dict[tuple[str, str], dict[str, Accuracies]]  # (row, trained on), then by network


def show(cells: Sequence[Cell], devices: Devices, *more: str, commands: bool) -> None:
    """Print what the cells cost and, with `commands`, theirs and lines about `more` before."""
    if commands:
        lines = [f"{cell.name}: {' && '.join(devices.command_lines(cell))}" for cell in cells]
        print(*lines, *more, sep="\n", end="\n\n")
    print(cost_table(cells), devices, sep="\n", flush=True)


def cost_table(cells: Sequence[Cell]) -> str:
    """An aligned line for each cell, and their sums."""
    lines = [(cell.name, cell.text, cell.estimate) for cell in cells]
    total = Estimate.of_all([cell.estimate for cell in cells])
    lines.append((f"{len(cells)} in all", "", total))
    wide = max(len(name) for name, _, _ in lines)
    wider = max(len(text) for _, text, _ in lines)
    shown = [f"{'cell':{wide}}  {'':{wider}}  {'GPU hours':>9} {'GPU GB':>7} {'disk GB':>8}"]
    shown += [
        f"{name:{wide}}  {text:{wider}}  {e.hours:9,.1f} {e.memory:7,.1f} {e.disk:8,.1f}"
        for name, text, e in lines
    ]
    return "\n".join([*shown, ASSUMPTIONS])


@dataclass(frozen=True)
class Outcome:
    """How a cell went. `status` begins with done, failed or not run; `command` is what was run."""

    cell: Cell
    status: str
    command: str
    log: Path

    @property
    def is_done(self) -> bool:
        return self.status.startswith("done")

    def reason(self) -> str:
        """The line in which a script said why it ended, else the last one of the last attempt."""
        attempt = self.log.read_text(errors="replace").rpartition(self.command)[2]
        lines = [line.strip() for line in attempt.splitlines() if line.strip()]
        said = [line for line in lines if re.match(r"\w+\.py: (error|stopped)", line)]
        return (said or lines or ["it said nothing"])[-1]

    def measured(self) -> Measured:
        """What eval.py has recorded of a row that is done; of the same twice the later counts.
        UserError names a record that is damaged.
        """
        found: Measured = {}
        for folder in self.cell.outputs if self.is_done else ():
            for entry in read_evaluations(folder / "eval.json"):
                row = found.setdefault((self.cell.name, entry["trained_on"]), {})
                row[entry["model"]] = Accuracies(tuple(entry["accs"]))
        return found


def say_outcomes(outcomes: Sequence[Outcome]) -> int:
    """Print the accuracies of the rows, then what is not done and why; the exit status, 1 where
    a cell is not done or its evaluations cannot be read.
    """
    measured: Measured = {}
    problems = []
    for outcome in outcomes:
        try:
            measured |= outcome.measured()
        except UserError as error:
            problems.append(f"{outcome.cell.name}: {error}")
    print(accuracy_table(measured), end="")
    not_done = [outcome for outcome in outcomes if not outcome.is_done]
    print(f"\n{len(outcomes) - len(not_done)} of {len(outcomes)} cells are done")
    for outcome in not_done:
        print(f"{outcome.cell.name}: {outcome.status}")
        if not outcome.status.startswith("not run"):
            print(f"    log:     {outcome.log}: {outcome.reason()}")
            print(f"    command: {outcome.command}")
    print(*problems, sep="\n", end="\n" if problems else "", flush=True)
    return 1 if not_done or problems else 0


def accuracy_table(measured: Measured) -> str:
    """For each row a line on each set that was trained on: test accuracies, a column for each
    network. Empty where nothing was measured.
    """
    models = list(dict.fromkeys(model for row in measured.values() for model in row))
    lines = [["test accuracy", "trained on", *models]] if measured else []
    for (name, trained_on), row in measured.items():
        lines.append([name, trained_on, *(str(row.get(model, "-")) for model in models)])
    return "".join(
        f"{line[0]:28} {line[1]:14}{''.join(f'{value:>24}' for value in line[2:])}\n"
        for line in lines
    )
