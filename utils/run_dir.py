"""A run directory: where a distillation's files lie, and its log.

results/<dataset>[/<subset>]/<model>/ipc<k>/<run_name>/
    config.yaml  metrics.jsonl  distilled_<tag>.pt  images_<tag>.png  checkpoint.pt
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError
from utils.files import torch_load, torch_save, write_text
from utils.locks import locked

CHECKPOINT_KEYS = {"state", "config", "best", "evaluated", "measured_by", "num_experts", "how"}


class RunDir:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.jsonl"

    @classmethod
    def locate(
        cls,
        save_path: str,
        *,
        dataset: str,
        subset: str | None,
        model: str,
        ipc: int,
        run_name: str,
    ) -> "RunDir":
        """The directory of a run; it need not exist yet."""
        if not run_name or run_name in (".", "..") or Path(run_name).name != run_name:
            raise UserError(f"--run_name {run_name!r} must be the name of one folder, without '/'")
        return cls(Path(save_path, dataset, subset or "", model, f"ipc{ipc}", run_name))

    def unused(self) -> "RunDir":
        """This one where it is not there yet, else the next with a number behind its name."""
        name, number, run = self.path.name, 1, self
        while run.path.exists():
            number += 1
            run = RunDir(self.path.with_name(f"{name}_{number}"))
        return run

    @contextmanager
    def alone(self, checkpoint: Any) -> Iterator[None]:
        """Nobody else works here during the block. UserError where somebody does, or has changed
        the checkpoint since it was read as `checkpoint`.
        """
        if not distributed.is_main():
            yield
            return
        name = f"another --run_name than {self.path.name}"
        refusal = f"another process is at work in {self.path}: wait until it ends, or choose {name}"
        with locked(self.path / ".lock", refusal=refusal):
            if self._progress(self.load_checkpoint()) != self._progress(checkpoint):
                raise UserError(f"another process has just worked in {self.path}: call again")
            yield

    @staticmethod
    def _progress(checkpoint: Any) -> Any:
        return checkpoint and (checkpoint["state"]["iteration"], checkpoint["evaluated"])

    def distilled(self, tag: str) -> Path:
        return self.path / f"distilled_{tag}.pt"

    def picture(self, tag: str) -> Path:
        return self.path / f"images_{tag}.png"

    def save_config(self, config: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Write config.yaml; `environment` joins those of the earlier calls in it.

        `--config` reads the file again, without the environments.
        """
        if not distributed.is_main():
            return
        path = self.path / "config.yaml"
        earlier: list[Any] = []
        if path.exists():
            with suppress(OSError, yaml.YAMLError, TypeError, KeyError):
                earlier = list(yaml.safe_load(path.read_text(encoding="utf-8"))["environment"])
        content = {**config, "environment": [*earlier, dict(environment)]}
        write_text(yaml.safe_dump(content, sort_keys=False), path)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        torch_save(dict(state), self.checkpoint)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint of an earlier call, or None. UserError for one that cannot be read."""
        if not self.checkpoint.exists():
            return None
        advice = "choose another --run_name; the distilled sets beside it stay as they are"
        try:
            state = torch_load(self.checkpoint)
        except UserError as error:
            raise UserError(f"{error}: {advice}") from None
        if not isinstance(state, dict) or not state.keys() >= CHECKPOINT_KEYS:
            raise UserError(
                f"{self.checkpoint} is no checkpoint of this version of distill_att.py: {advice}"
            )
        return state

    def has_steps(self) -> bool:
        """Whether outer steps have been logged here."""
        return any(record["kind"] == "step" for record in read_records(self.metrics))


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

    def __init__(self, run: RunDir, *, wandb_mode: str, config: Mapping[str, Any]) -> None:
        self._path = run.metrics
        self._wandb = _start_wandb(run, wandb_mode, config)

    def keep_up_to(self, iteration: int, *, evaluated: int, rewinds: int) -> None:
        """Drop what was logged behind the checkpoint that a run goes on from: that of a state after
        `iteration` steps, last evaluated at `evaluated`, after so many `rewinds`.
        """
        if not distributed.is_main() or not self._path.exists():
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
        if not distributed.is_main():
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        if self._wandb is not None:
            self._wandb.log(record)

    @staticmethod
    def say(text: str) -> None:
        """Print a line without tearing the progress bar."""
        if distributed.is_main():
            tqdm.write(text)


def _start_wandb(run: RunDir, mode: str, config: Mapping[str, Any]) -> Any:
    """A Weights & Biases run, or None where it is not wanted or cannot be had."""
    if mode == "disabled" or not distributed.is_main():
        return None
    import wandb  # slow to import, needed only here

    try:
        return wandb.init(
            project="att",
            name=run.path.name,
            mode=mode,  # type: ignore[arg-type]
            config=dict(config),
            dir=str(run.path),
        )
    except Exception as error:  # no account or no network must not cost the run
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        tqdm.write(f"going on without wandb: {reason}")
        return None
