"""What one call for a folder has chosen and done so far, plan.json: so that the next goes on."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.folder.choose import REPORT_SECONDS, Plan
from utils.core.errors import UserError
from utils.core.files import write_text

FILE = "plan.json"
LOOKING, EXPERTS, DISTILLING, MEASURING, REPORT = PARTS = (
    "looking and choosing",
    "experts",
    "distilling",
    "measuring",
    "report",
)


@dataclass
class Job:
    """A folder's run in `out`.

    `flags` find the pictures, `data` tells them apart, `choices` say in words what was found and
    chosen. `planned_from` is how many seconds were left when the plan was made. `experts` is their
    number, once it is settled. `goal` is the number of outer steps that is worked towards, and
    `is_final` says whether that is all of them. `used` has the seconds that each part has taken in
    all calls.
    """

    out: Path
    minutes: float
    flags: list[str]
    data: dict[str, Any]
    choices: list[str]
    compile: str
    plan: Plan
    planned_from: float = 0.0
    experts: int = 0
    goal: int = 0
    is_final: bool = False
    used: dict[str, float] = field(default_factory=dict)

    @property
    def predicted(self) -> dict[str, float]:
        """Seconds by part."""
        plan = self.plan
        return {
            LOOKING: self.minutes * 60 - self.planned_from,
            EXPERTS: plan.expert_seconds,
            DISTILLING: plan.distil_seconds,
            MEASURING: plan.measure_seconds,
            REPORT: REPORT_SECONDS,
        }

    @property
    def told(self) -> dict[str, Any]:
        """What the page says beside the run: choices, and minutes predicted and used by part."""
        predicted = self.predicted
        rows = [(part, predicted[part] / 60, self.used.get(part, 0) / 60) for part in PARTS]
        total = ("in all", sum(row[1] for row in rows), sum(row[2] for row in rows))
        return {"choices": self.choices, "minutes": [*rows, total]}

    @classmethod
    def of_run(cls, run: Path) -> "Job | None":
        """The one that made the run in this directory, if one did."""
        run = run.resolve()
        with suppress(UserError, IndexError):
            job = cls.load(run.parents[3])
            return job if job and job.run.resolve() == run else None
        return None

    @property
    def run(self) -> Path:
        return self.out / "folder" / self.plan.model / f"ipc{self.plan.ipc}" / "run"

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block, however it ends."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.used[name] = self.used.get(name, 0.0) + time.monotonic() - began
            self.save()

    def save(self) -> None:
        values = asdict(self)
        del values["out"]
        write_text(json.dumps(values, indent=1) + "\n", self.out / FILE)

    @classmethod
    def load(cls, out: Path) -> "Job | None":
        """Read what is in `out`; None where nothing was begun there."""
        path = out / FILE
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**values | {"out": out, "plan": Plan(**values["plan"])})
        except (OSError, ValueError, TypeError, LookupError):
            raise UserError(
                f"{path} cannot be read: move it away to begin anew, or give another --out"
            ) from None
