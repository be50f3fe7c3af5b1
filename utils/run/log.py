"""The log of a run, metrics.jsonl: write it, read it back."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.core import ranks
from utils.core.errors import UserError
from utils.core.files import write_text
from utils.run.wandb_log import WandbLog

METRICS = "metrics.jsonl"


def read_records(metrics: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, of which a killed run may have cut off the last.

    Whatever else is no record is left out as well. UserError where the file cannot be read.
    """
    if not metrics.exists():
        return []
    try:
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {metrics}: {error.strerror}") from error
    return [record for record in map(_parse, lines) if record is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and record.keys() >= {"kind", "iteration"}
    return record if is_record and isinstance(record["iteration"], int) else None


class MetricsLog:
    """metrics.jsonl, one JSON object a line; the same goes to Weights & Biases where wanted."""

    def __init__(self, folder: Path, *, wandb_mode: str, config: Mapping[str, Any]) -> None:
        self._path = folder / METRICS
        self._wandb = None
        if ranks.is_main():
            self._wandb = WandbLog.start(
                name=folder.name, mode=wandb_mode, config=config, folder=folder
            )

    def keep_up_to(self, iteration: int, *, evaluated: int, rewinds: int) -> None:
        """Drop what was logged behind the checkpoint that a run goes on from: that of a state after
        `iteration` steps, last evaluated at `evaluated`, after so many `rewinds`.
        """
        if not ranks.is_main() or not self._path.exists():
            return
        kept = []
        for record in read_records(self._path):
            if record["kind"] == "rewind":
                rewinds -= 1
                keep = rewinds >= 0
            elif record["kind"] == "eval":
                keep = record["iteration"] <= evaluated
            else:
                keep = record["iteration"] < iteration
            kept += [record] if keep else []
        write_text("".join(f"{json.dumps(record)}\n" for record in kept), self._path)

    def sync(self) -> None:
        """Let what was logged outlast a power failure, as the checkpoint does that follows."""
        if self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())

    def log(self, **record: Any) -> None:
        """Add one line; of several processes the main one does."""
        if not ranks.is_main():
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        if self._wandb is not None:
            self._wandb.log(record)

    def finish(self, status: int) -> None:
        """Let Weights & Biases know how the run has ended; waits for it some seconds at most."""
        if self._wandb is not None:
            self._wandb.finish(status)

    @staticmethod
    def say(text: str) -> None:
        """Print a line without tearing the progress bar."""
        if ranks.is_main():
            tqdm.write(text)
