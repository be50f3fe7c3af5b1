"""Small jobs of the three scripts on digits, and what to compare in the files that they write.

A job works in a folder that begins as a copy of what the job before it left: experts, then a
distillation from them, then evaluations of its set. Paths are relative to it, so that all that the
files hold must be the same wherever the job ran.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scripts.faults.calls import Call
from scripts.faults.damage import read_content

BUFFERS, RUN = "buffers/digits", "results/digits/{model}/ipc1/run"
# What says when or with what a file was made.
CIRCUMSTANCES = {"environment", "seconds"}
TEMPORARY = ".*.tmp"  # a file that waits to be renamed
DATA_FLAGS = "--dataset digits --model {model}"
EXPERT_FLAGS = f"{DATA_FLAGS} --num_experts {{experts}} --train_epochs 2 --save_interval 2"
RUN_FLAGS = (
    f"{DATA_FLAGS} --run_name run --Iteration {{steps}} --eval_it {{eval_it}} --checkpoint_it 1 "
    "--num_eval 2 --epoch_eval_train {epochs} --syn_steps 3 --expert_epochs 1 --max_start_epoch 1 "
    "--compile off --unroll adjoint"
)
EVAL_FLAGS = (
    f"--distilled {RUN}/distilled_best.pt --model {{model}} {{other}} --random "
    "--num_eval {networks} --epoch_eval_train {epochs}"
)
# Jobs of seconds, for strikes at any moment; and the shortest that write every kind of file, for a
# strike at every single write.
LONGER = {"model": "ConvNetD1", "other": "MLP", "experts": 5, "steps": 12, "eval_it": 3}
LONGER |= {"epochs": 10, "networks": 6}
TINY = {"model": "MLP", "other": "ConvNetD1", "experts": 3, "steps": 2, "eval_it": 2}
TINY |= {"epochs": 1, "networks": 2}


@dataclass(frozen=True)
class Job:
    """A command line, the folder that it begins with (None: empty), and how it ended undisturbed.

    `output` is the folder, within the job's, that it writes to; `before_output` are the seconds
    until it printed something, `duration` those from then on.
    """

    script: str
    argv: tuple[str, ...]
    output: str
    start: Path | None
    reference: Path
    before_output: float = 0.0
    duration: float = 0.0

    def begin(self, folder: Path) -> Path:
        """A new folder for the job."""
        if self.start is None:
            folder.mkdir(parents=True)
        else:
            shutil.copytree(self.start, folder)
        (folder / self.output).mkdir(parents=True, exist_ok=True)
        return folder

    def call(self, folder: Path, *more: str, **keywords: Any) -> Call:
        return Call(self.script, [*self.argv, *more], folder, **keywords)

    def finish(self, folder: Path) -> list[str]:
        """Call the job to its end; what is then wrong, the cause of failure or a difference."""
        call = self.call(folder)
        if call.wait() != 0:
            return [f"continuing failed: {call.summary()}"]
        return differences(folder, self.reference)


def make_jobs(scratch: Path, size: dict[str, Any]) -> list[Job]:
    """The three jobs, each run once undisturbed."""
    scratch.mkdir(parents=True, exist_ok=True)
    Call("buffer.py", ["--help"], scratch).wait()  # the server starts, not to be timed
    made: list[Job] = []
    for script, flags, output in (
        ("buffer.py", EXPERT_FLAGS, f"{BUFFERS}/{{model}}"),
        ("distill_att.py", RUN_FLAGS, RUN),
        ("eval.py", EVAL_FLAGS, RUN),
    ):
        start = made[-1].reference if made else None
        argv = tuple(flags.format(**size).split())
        reference = scratch / f"reference_{Path(script).stem}"
        made.append(_run_once(Job(script, argv, output.format(**size), start, reference)))
    return made


def _run_once(job: Job) -> Job:
    began = time.monotonic()
    call = job.call(job.begin(job.reference))
    call.wait_for(call.has_printed, 120)
    printed = time.monotonic()
    if call.wait() != 0:
        raise RuntimeError(f"{job.script} failed undisturbed: {call.summary()}")
    return replace(job, before_output=printed - began, duration=time.monotonic() - printed)


def files(folder: Path) -> Iterator[Path]:
    """All files in `folder` but locks, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            yield path


def content(path: Path) -> Any:
    """What a file holds, without its circumstances; an exception if it is not whole."""
    if path.suffix == ".png":
        Image.open(path).load()
    found = read_content(path)
    return found if path.suffix == ".pt" else _without_circumstances(found)


def _without_circumstances(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if key not in CIRCUMSTANCES}
        return {key: _without_circumstances(part) for key, part in kept.items()}
    if isinstance(value, list):
        return [_without_circumstances(part) for part in value]
    return value


def broken_files(folder: Path) -> list[str]:
    """Which files are there but not whole, temporary ones apart."""
    found = []
    for path in files(folder):
        if path.name.startswith("."):
            continue
        try:
            content(path)
        except Exception as error:  # whatever a reader says of half a file
            found.append(f"{path.relative_to(folder)} is not whole: {error!r:.200}")
    return found


def sizes(folder: Path, reference: Path) -> dict[str, int]:
    """How much each file holds that is there at the end too: experts, evaluations, or one thing."""
    found = {}
    for path in files(folder):
        name = str(path.relative_to(folder))
        if (reference / name).exists():
            held = content(path) if path.suffix in (".pt", ".json") else None
            found[name] = len(held) if isinstance(held, list) else 1
    return found


def lost(before: dict[str, int], now: dict[str, int]) -> list[str]:
    """What there is less of than before, by `sizes`."""
    return [
        f"{name} holds {now.get(name, 0)} instead of {size}"
        for name, size in before.items()
        if now.get(name, 0) < size
    ]


def differences(folder: Path, reference: Path) -> list[str]:
    """In which files two folders differ, apart from circumstances; left-overs count."""
    ours = {str(path.relative_to(folder)) for path in files(folder)}
    theirs = {str(path.relative_to(reference)) for path in files(reference)}
    found = [f"{name} is there too" for name in sorted(ours - theirs)]
    found += [f"{name} is missing" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        try:
            where = _difference(content(folder / name), content(reference / name))
        except Exception as error:  # whatever a reader says of half a file
            where = f" is not whole: {error!r:.200}"
        found += [f"{name}{where}"] if where else []
    return found


def _difference(one: Any, other: Any) -> str:
    """The place of the first difference, "" for none."""
    if type(one) is not type(other):
        return f": {type(one).__name__} instead of {type(other).__name__}"
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return "" if same else ": another tensor"
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f": other keys {sorted(map(str, one.keys() ^ other.keys()))}"
        parts = [(f"[{key!r}]", one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return f": {len(one)} entries instead of {len(other)}"
        parts = [(f"[{n}]", *pair) for n, pair in enumerate(zip(one, other, strict=True))]
    else:
        return "" if one == other else f": {one!r:.80} instead of {other!r:.80}"
    return next((place + where for place, a, b in parts if (where := _difference(a, b))), "")
