"""A run directory: where a distillation's files lie, and its log.

results/<dataset>[/<subset>]/<model>/ipc<k>/<run_name>/
    config.yaml  metrics.jsonl  distilled_<tag>.pt  images_<tag>.png  checkpoint.pt
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from networks import folder_name
from utils.core import ranks
from utils.core.errors import UserError
from utils.core.files import torch_load, torch_save, write_text
from utils.core.locks import locked
from utils.data.identity import KEY, DataIdentity
from utils.run.log import METRICS, iterate_records

CHECKPOINT = {
    "state": dict,
    "config": dict,
    "best": dict,
    "evaluated": int,
    "measured_by": dict,
    "num_experts": int,
    "how": dict,
}


class RunDir:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / METRICS

    @classmethod
    def of(cls, options: Any, run_name: str) -> "RunDir":
        """Name the directory of a run with these options of distill_att.py; it need not exist."""
        if not run_name or run_name in (".", "..") or Path(run_name).name != run_name:
            raise UserError(f"--run_name {run_name!r} must be the name of one folder, without '/'")
        model = folder_name(options.model)
        parts = (options.dataset, options.subset or "", model, f"ipc{options.ipc}")
        return cls(Path(options.save_path, *parts, run_name))

    def unused(self) -> "RunDir":
        """This directory if it does not exist yet, else the next with a number after its name."""
        name, number, run = self.path.name, 1, self
        while run.path.exists():
            number += 1
            run = RunDir(self.path.with_name(f"{name}_{number}"))
        return run

    @contextmanager
    def exclusive(self, checkpoint: Any) -> Iterator[None]:
        """Hold the run's lock during the block. UserError where another process has it, or has
        changed the checkpoint since it was read as `checkpoint`.
        """
        if not ranks.is_main():
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

    def save_config(
        self,
        config: Mapping[str, Any],
        *,
        experts: Mapping[str, Any],
        images: DataIdentity,
        environment: Mapping[str, str],
    ) -> None:
        """Write config.yaml: options, experts, what tells the images apart, and the `environment`
        of this call after those of the earlier calls. `--config` reads the options in it.
        """
        if not ranks.is_main():
            return
        path = self.path / "config.yaml"
        earlier: list[Any] = []
        if path.exists():
            with suppress(OSError, ValueError, yaml.YAMLError, TypeError, KeyError, RecursionError):
                earlier = list(yaml.safe_load(path.read_text(encoding="utf-8"))["environment"])
        content = {
            **config,
            "experts": dict(experts),
            KEY: images.to_dict(),
            "environment": [*earlier, dict(environment)],
        }
        write_text(yaml.safe_dump(content, sort_keys=False), path)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        torch_save(dict(state), self.checkpoint)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Read the checkpoint of an earlier call, or None. UserError where it cannot be read."""
        if not self.checkpoint.exists():
            return None
        advice = "choose another --run_name; the distilled sets beside it stay as they are"
        try:
            state = torch_load(self.checkpoint)
        except UserError as error:
            raise UserError(f"{error}: {advice}") from None
        if not _is_checkpoint(state):
            raise UserError(
                f"{self.checkpoint} is no checkpoint of this version of distill_att.py: {advice}"
            )
        return state

    def agreed_checkpoint(self) -> dict[str, Any] | None:
        """Read the checkpoint in the main process, for all processes."""
        return ranks.from_main(self.load_checkpoint() if ranks.is_main() else None)

    def has_steps(self) -> bool:
        """Whether outer steps have been logged here."""
        return any(record["kind"] == "step" for _, record in iterate_records(self.metrics))


def _is_checkpoint(content: Any) -> bool:
    """Whether it is one of this version; its `state` is checked when it is loaded."""
    return (
        isinstance(content, dict)
        and all(isinstance(content.get(name), kind) for name, kind in CHECKPOINT.items())
        and all(_is_plain(content[name]) for name in CHECKPOINT if name != "state")
        and isinstance(content["state"].get("iteration"), int)
    )


def _is_plain(value: Any) -> bool:
    """Whether it is made of what YAML knows, so that it can be compared."""
    if isinstance(value, dict | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | int | float | None)
