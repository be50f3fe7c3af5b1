"""The log of a run, metrics.jsonl: write it, read it back."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.core import ranks
from utils.core.errors import UserError
from utils.core.files import atomic_write
from utils.run.wandb_follow import WandbFollower

METRICS = "metrics.jsonl"
Record = dict[str, Any]


def read_records(metrics: Path) -> list[Record]:
    """The records of a metrics.jsonl, whose last one a killed run may have cut off.

    Lines that are no records are left out. UserError where the file cannot be read.
    """
    return [record for _, record in iterate_records(metrics)]


def iterate_records(metrics: Path) -> Iterator[tuple[str, Record]]:
    """Like `read_records`, one at a time: each line without its end, and its record."""
    if not metrics.exists():
        return
    try:
        with open(metrics, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if (record := _parse(line)) is not None:
                    yield line.rstrip("\n"), record
    except OSError as error:
        raise UserError(f"cannot read {metrics}: {error.strerror}") from error


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and record.keys() >= {"kind", "iteration"}
    return record if is_record and isinstance(record["iteration"], int) else None


class MetricsLog:
    """metrics.jsonl, one JSON object a line; Weights & Biases follows it where wanted."""

    def __init__(self, folder: Path, *, wandb_mode: str) -> None:
        self._path = folder / METRICS
        self._wandb_mode = wandb_mode if ranks.is_main() else "disabled"
        self._wandb: WandbFollower | None = None

    def keep_up_to(self, iteration: int, *, evaluated: int, rewinds: int) -> None:
        """Drop what was logged after the checkpoint that this call continues from: that of a state
        after `iteration` steps and `rewinds` rewinds, last evaluated at `evaluated`. Weights &
        Biases follows what is left.
        """
        if ranks.is_main() and self._path.exists():
            with atomic_write(self._path, "w") as file:
                for line, record in iterate_records(self._path):
                    if record["kind"] == "rewind":
                        rewinds -= 1
                        keep = rewinds >= 0
                    elif record["kind"] == "eval":
                        keep = record["iteration"] <= evaluated
                    else:
                        keep = record["iteration"] < iteration
                    if keep:
                        file.write(f"{line}\n")
        if self._wandb is None:
            self._wandb = WandbFollower.start(self._path.parent, self._wandb_mode)

    def sync(self) -> None:
        """Let what was logged outlast a power failure, as the checkpoint does that follows."""
        if self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())

    def log(self, **record: Any) -> None:
        """Add one line, in the main process."""
        if not ranks.is_main():
            return
        try:
            with open(self._path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        if self._wandb is not None:
            self._wandb.look()

    def finish(self, status: int) -> None:
        """Tell Weights & Biases how the run has ended; wait for it some seconds at most."""
        if self._wandb is not None:
            self._wandb.finish(status)

    @staticmethod
    def say(text: str) -> None:
        """Print a line without tearing the progress bar."""
        if ranks.is_main():
            tqdm.write(text)
