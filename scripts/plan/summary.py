"""How the cells of run_all.sh went, and the accuracies of the rows that have been evaluated.

    python -m scripts.plan.summary QUEUE      the folder that scripts/plan wrote

Exit status 1 where a cell is not done.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """A cell after its time in the queue. `status` begins with done, failed or not run."""

    name: str
    status: str
    run_dir: Path
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


def main(argv: Sequence[str]) -> int:
    outcomes = read_outcomes(Path(argv[0]))
    print(accuracy_table(outcomes), end="")
    not_done = [outcome for outcome in outcomes if not outcome.is_done]
    print(f"\n{len(outcomes) - len(not_done)} of {len(outcomes)} cells are done")
    for outcome in not_done:
        print(f"{outcome.name}: {outcome.status}")
        if not outcome.status.startswith("not run"):
            print(f"    log:     {outcome.log}: {outcome.reason()}")
            print(f"    command: {outcome.command}")
    return 1 if not_done else 0


def read_outcomes(queue: Path) -> list[Outcome]:
    logs = Path((queue / "logs").read_text().strip())
    outcomes = []
    for line in [*_lines(queue / "experts.tsv"), *_lines(queue / "rows.tsv")]:
        name, _, _, run_dir, command = line.split("\t")
        status = queue / "status" / name
        text = status.read_text().strip() if status.exists() else "not run: its process was ended"
        outcomes.append(Outcome(name, text, Path(run_dir), command, logs / f"{name}.log"))
    return outcomes


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def accuracy_table(outcomes: Sequence[Outcome]) -> str:
    """For each done row a line on distilled and one on random real images, as last recorded; mean
    and standard deviation in percent, a column for each network. Empty where there is none.
    """
    measured = {
        (outcome.name, trained_on): accuracies
        for outcome in outcomes
        if outcome.is_done
        for trained_on, accuracies in recorded_accuracies(outcome.run_dir / "eval.json").items()
    }
    models = list(dict.fromkeys(model for row in measured.values() for model in row))
    lines = [["test accuracy, %", "trained on", *models]] if measured else []
    for (name, trained_on), row in measured.items():
        lines.append([name, trained_on, *(row.get(model, "-") for model in models)])
    return "".join(
        f"{line[0]:28} {line[1]:14}{''.join(f'{value:>16}' for value in line[2:])}\n"
        for line in lines
    )


def recorded_accuracies(record: Path) -> dict[str, dict[str, str]]:
    """What eval.json holds, by what was trained on, then by network; a later entry counts."""
    found: dict[str, dict[str, str]] = {}
    for entry in json.loads(record.read_text()) if record.exists() else []:
        text = f"{100 * entry['acc_mean']:.2f} ± {100 * entry['acc_std']:.2f}"
        found.setdefault(entry["trained_on"], {})[entry["model"]] = text
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
