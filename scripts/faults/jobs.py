"""Small jobs of the three scripts on digits.

A job works in a folder that begins as a copy of what the job before it left: experts, then a
distillation from them, then evaluations of its set. Paths are relative to it, so that all that the
files hold must be the same wherever the job ran.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.faults.calls import AtWrite, Call
from scripts.faults.contents import differences, read_folder

TEMPORARY = ".*.tmp"  # a file that waits to be renamed
# Jobs of seconds, for strikes at any moment; and the shortest that write every kind of file, for a
# strike at every single write.
LONGER = {"model": "ConvNetD1", "other": "MLP", "experts": 5, "steps": 12, "eval_it": 3}
LONGER |= {"epochs": 10, "networks": 6}
TINY = {"model": "MLP", "other": "ConvNetD1", "experts": 3, "steps": 2, "eval_it": 2}
TINY |= {"epochs": 1, "networks": 2}
# The scripts in the order in which they build on each other.
FLAGS = {
    "buffer.py": "--dataset digits --model {model} --num_experts {experts} --train_epochs 2 "
    "--save_interval 2",
    "distill_att.py": "--dataset digits --model {model} --run_name run --Iteration {steps} "
    "--eval_it {eval_it} --checkpoint_it 1 --num_eval 2 --epoch_eval_train {epochs} --syn_steps 3 "
    "--expert_epochs 1 --max_start_epoch 1 --compile off --unroll adjoint",
    "eval.py": "--distilled results/digits/{model}/ipc1/run/distilled_best.pt "
    "--model {model} {other} --random --num_eval {networks} --epoch_eval_train {epochs}",
}


@dataclass(frozen=True)
class Job:
    """A command line, the folder that it begins with, and how it ended undisturbed.

    `before_output` are the seconds until it printed something, `duration` those from then on.
    """

    script: str
    argv: tuple[str, ...]
    start: Path
    reference: Path
    before_output: float = 0.0
    duration: float = 0.0

    def call(self, folder: Path, *, fault: AtWrite | None = None, fresh: bool = False) -> Call:
        return Call(self.script, self.argv, folder, fault=fault, fresh=fresh)

    def finish(self, folder: Path) -> list[str]:
        """Call the job to its end; what is then wrong, the cause of failure or a difference."""
        call = self.call(folder)
        if call.wait() != 0:
            return [f"continuing failed: {call.summary()}"]
        return self.compare(folder)

    def compare(self, folder: Path) -> list[str]:
        """List how the files differ from those of the undisturbed job; left-overs count."""
        return list(differences(read_folder(folder), read_folder(self.reference)))


@contextmanager
def copied(original: Path) -> Iterator[Path]:
    """Make a copy of a folder, alone in one beside it, that is gone after the block."""
    with tempfile.TemporaryDirectory(dir=original.parent, ignore_cleanup_errors=True) as parent:
        yield Path(shutil.copytree(original, Path(parent) / "job", symlinks=True))


def make_jobs(scratch: Path, size: dict[str, Any]) -> list[Job]:
    """Run the three jobs once, undisturbed."""
    start = scratch / "nothing"
    start.mkdir(parents=True)
    Call("buffer.py", ["--help"], scratch).wait()  # the server starts, not to be timed
    jobs = []
    for script, flags in FLAGS.items():
        argv, reference = flags.format(**size).split(), scratch / f"reference_{Path(script).stem}"
        jobs.append(_run_once(Job(script, tuple(argv), start, reference)))
        start = reference
    return jobs


def _run_once(job: Job) -> Job:
    """Make the reference of a job, and time it."""
    shutil.copytree(job.start, job.reference)
    began = time.monotonic()
    call = job.call(job.reference)
    call.wait_for(call.has_printed, 120)
    printed = time.monotonic()
    if call.wait() != 0:
        raise RuntimeError(f"{job.script} failed undisturbed: {call.summary()}")
    return replace(job, before_output=printed - began, duration=time.monotonic() - printed)
