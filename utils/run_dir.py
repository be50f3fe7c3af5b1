"""A run directory: where a distillation's files lie, and its log.

results/<dataset>[/<subset>]/<model>/ipc<k>/<run_name>/
    config.yaml  metrics.jsonl  distilled_<tag>.pt  images_<tag>.png  checkpoint.pt
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from utils.errors import UserError
from utils.files import torch_save, write_text


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

    def distilled(self, tag: str) -> Path:
        return self.path / f"distilled_{tag}.pt"

    def picture(self, tag: str) -> Path:
        return self.path / f"images_{tag}.png"

    def save_config(self, config: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Write config.yaml, which `--config` reads again; it skips the `environment` in it."""
        text = yaml.safe_dump({**config, "environment": dict(environment)}, sort_keys=False)
        write_text(text, self.path / "config.yaml")

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        torch_save(dict(state), self.checkpoint)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint of an earlier call, or None. UserError for one that cannot be read."""
        if not self.checkpoint.exists():
            return None
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail anywhere in torch's reader
            raise UserError(
                f"{self.checkpoint} cannot be read ({type(error).__name__}): choose another "
                "--run_name; the distilled sets beside it stay as they are"
            ) from None


class MetricsLog:
    """metrics.jsonl, one JSON object a line; the same goes to Weights & Biases where wanted."""

    def __init__(self, run: RunDir, *, wandb_mode: str, config: Mapping[str, Any]) -> None:
        self._path = run.metrics
        self._wandb = None
        if wandb_mode != "disabled":
            import wandb  # slow to import, needed only here

            self._wandb = wandb.init(
                project="att",
                name=run.path.name,
                mode=wandb_mode,  # type: ignore[arg-type]
                config=dict(config),
                dir=str(run.path),
            )

    def keep_up_to(self, iteration: int) -> None:
        """Drop what an interrupted call logged behind the checkpoint it continues from."""
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_before(line, iteration)]
            write_text("".join(f"{line}\n" for line in kept), self._path)

    def log(self, **record: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._wandb is not None:
            self._wandb.log(record)

    @staticmethod
    def say(text: str) -> None:
        """Print a line without tearing the progress bar."""
        tqdm.write(text)


def _is_before(line: str, iteration: int) -> bool:
    """Whether a line was logged before outer step `iteration`; evaluations precede the step."""
    try:
        record = json.loads(line)
    except ValueError:  # the last line of a killed run may be cut off
        return False
    return record["iteration"] < iteration + (record["kind"] == "eval")
