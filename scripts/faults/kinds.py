"""The faults that befall a job: kills, a full disk, signals, a second process beside it.

Each of them strikes, looks at what is on disk, lets the job go on without the fault, and compares
with the undisturbed run. What is not as it should be is counted and told.
"""

import itertools
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from scripts.faults.calls import AtWrite, Call
from scripts.faults.jobs import Job, amounts, damaged, differences, files, lost

ERROR = 2  # exit status of an error that a user can mend
# Of the kills: those of a fresh interpreter, those before the first line of output, those at the
# sight of a temporary file.
FRESH, EARLY, AT_A_FILE = 0.1, 0.1, 0.3
START_SECONDS = 3.0  # of an interpreter, until torch is imported
FULL_AT = (0.1, 0.3, 0.5, 0.7, 0.9)
TEMPORARY = ".*.tmp"  # a file that waits to be renamed


@dataclass
class Tally:
    """How often a fault struck, and what was wrong afterwards."""

    injected: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.injected += other.injected
        self.wrong += other.wrong


@contextmanager
def _working_folder(job: Job, scratch: Path, name: str) -> Iterator[Path]:
    """A folder in which the job begins, gone afterwards with the logs beside it."""
    parent = scratch / f"{Path(job.script).stem}_{name}"
    try:
        yield job.begin(parent / "job")
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def kills(job: Job, number: int, seed: int, scratch: Path) -> Tally:
    """Kill the job at `number` random moments, continuing each time; a finished one begins anew."""
    rng, tally = random.Random(f"{seed} {job.script}"), Tally()
    for turn in itertools.count():
        with _working_folder(job, scratch, f"kills_{seed}_{turn}") as folder:
            had: dict[str, int] = {}
            while tally.injected < number and _kill_once(job, folder, rng):
                tally.injected += 1
                now = amounts(folder, job.reference)
                wrong = damaged(folder) or lost(had, now)
                tally.wrong += [f"after kill {tally.injected}: {line}" for line in wrong]
                had = now
            wrong = job.finish(folder)
            tally.wrong += [f"finished after {tally.injected} kills: {line}" for line in wrong]
        if tally.injected >= number:
            return tally
    raise AssertionError


def _kill_once(job: Job, folder: Path, rng: random.Random) -> bool:
    """Call the job and kill it at a random moment; False if it was done before."""
    fresh, early, at_a_file = (rng.random() < share for share in (FRESH, EARLY, AT_A_FILE))
    moment = rng.random()
    call = job.call(folder, fresh=fresh)
    if early:
        call.wait(moment * (START_SECONDS if fresh else job.before_output))
    else:
        call.wait_for(call.has_printed, 60)
        call.wait(moment * job.duration)
        if at_a_file:
            call.wait_for(lambda: any((folder / job.output).glob(TEMPORARY)), 60)
    return call.kill() == -signal.SIGKILL


def at_writes(job: Job, what: str, fault: str, scratch: Path, *, step: int = 1) -> Tally:
    """Strike with `fault` ("kill" or "full") at every `step`-th file opened or renamed (`what`)."""
    tally = Tally()
    for number in itertools.count(1, step):
        with _working_folder(job, scratch, f"{what}_{fault}_{number}") as folder:
            call = job.call(folder, fault=AtWrite(what, number, fault))
            status = call.wait()
            wrong = damaged(folder)
            if status == 0:  # the job has fewer
                wrong += differences(folder, job.reference)
            elif fault == "full":
                wrong += refusal(job, call, "cannot write ")
            elif status != -signal.SIGKILL:
                wrong.append(f"status {status}: {' / '.join(call.messages[-3:])}")
            if status != 0:
                tally.injected += 1
                wrong += job.finish(folder)
        tally.wrong += [f"{fault} at {what} {number}: {line}" for line in wrong]
        if status == 0:
            return tally
    raise AssertionError


def refusal(job: Job, call: Call, reason: str) -> list[str]:
    """What is wrong with how a call has ended that had to say one line, beginning with `reason`."""
    status = call.wait()
    messages = [line for line in call.messages if "going on by --force" not in line]
    start = f"{job.script}: error: {reason}"
    if status == ERROR and len(messages) == 1 and messages[0].startswith(start):
        return []
    return [f"status {status} with {len(messages)} lines: {' / '.join(messages[-3:])}"]


def small_disk(job: Job, scratch: Path, *, full_at: Sequence[float] = FULL_AT) -> Tally:
    """Let the job run into the end of a small file system, then make that larger.

    `full_at` are parts of what the job writes. PermissionError where this process may not mount a
    file system.
    """
    tally = Tally()
    there = sum(path.stat().st_size for path in files(job.start)) if job.start else 0
    whole = sum(path.stat().st_size for path in files(job.reference))
    for share in full_at:
        parent = scratch / f"{Path(job.script).stem}_disk_{share}"
        parent.mkdir()
        with _file_system(parent / "disk", 4 * whole) as disk:
            folder = job.begin(disk / "job")
            # Half of a file system may be filled up by copies and left-overs of what it holds.
            _resize(disk, _used(disk) + int(share * (whole - there)))
            call = job.call(folder, "--force")  # else it is refused before it begins
            status = call.wait()
            if status != 0:
                tally.injected += 1
                wrong = damaged(folder) + refusal(job, call, "cannot write ")
                _resize(disk, 4 * whole)
                wrong += job.finish(folder)
                tally.wrong += [f"room for {share:.0%}: {line}" for line in wrong]
        shutil.rmtree(parent)
    return tally


def _used(disk: Path) -> int:
    usage = shutil.disk_usage(disk)
    return usage.total - usage.free


@contextmanager
def _file_system(where: Path, size: int) -> Iterator[Path]:
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        raise PermissionError("a file system may not be mounted here")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def _resize(where: Path, size: int) -> None:
    size = -(-size // resource.getpagesize()) * resource.getpagesize()
    subprocess.run(["mount", "-o", f"remount,size={size}", str(where)], check=True)


def signals(job: Job, number: int, seed: int, scratch: Path, *, fresh: int = 2) -> Tally:
    """Send SIGINT and SIGTERM in turn, at `number` random moments; then do as the last line says.

    The first `fresh` of them go to a fresh interpreter.
    """
    rng, tally = random.Random(f"{seed} {job.script}"), Tally()
    kinds = ((signal.SIGTERM, 143), (signal.SIGINT, 130))
    for turn in itertools.count():
        if tally.injected == number:
            return tally
        kind, expected = kinds[tally.injected % 2]
        with _working_folder(job, scratch, f"signals_{turn}") as folder:
            call = job.call(folder, fresh=tally.injected < fresh)
            call.wait_for(call.has_printed, 60)
            call.wait(rng.random() * job.duration)
            call.send(kind)
            status = call.wait(60)
            # Python does not listen any more while it winds up.
            if status == 0 or (status == -kind and not differences(folder, job.reference)):
                continue
            tally.injected += 1
            wrong = damaged(folder) + _continue_as_told(job, folder, call, expected)
        tally.wrong += [f"{kind.name} {turn + 1}: {line}" for line in wrong]
    raise AssertionError


def _continue_as_told(job: Job, folder: Path, call: Call, expected: int) -> list[str]:
    status, messages = call.wait(0), call.messages
    said = re.compile(rf"{re.escape(job.script)}: interrupted; to continue: python (.*)")
    match = said.fullmatch(messages[0]) if len(messages) == 1 else None
    if status != expected or match is None:
        call.kill()
        return [f"status {status} with {len(messages)} lines: {' / '.join(messages[-3:])}"]
    script, *argv = shlex.split(match[1])
    again = Call(Path(script).name, argv, folder)
    if again.wait() != 0:
        return [f"what it said failed: {' / '.join(again.messages[-3:])}"]
    return differences(folder, job.reference)


def second_signals(job: Job, scratch: Path, *, at: tuple[int, ...] = (3, 5)) -> Tally:
    """A second signal to a job that hangs in a write ends it at once."""
    tally = Tally()
    for number in at:
        with _working_folder(job, scratch, f"second_{number}") as folder:
            call = job.call(folder, fault=AtWrite("rename", number, "slow"))
            if not call.wait_for(partial(_hangs, folder / job.output), 60):
                continue
            call.send(signal.SIGTERM)
            if call.wait(1.6) is None:
                tally.injected += 1
                call.send(signal.SIGTERM)
            status = call.wait(2)
            wrong = [] if status == 143 else [f"status {status} after a second signal"]
            call.kill()
            wrong += damaged(folder) + job.finish(folder)
        tally.wrong += [f"at write {number}: {line}" for line in wrong]
    return tally


def _hangs(output: Path) -> bool:
    """Whether a file has been waiting for a second to be renamed."""
    try:
        return any(time.time() - path.stat().st_mtime > 1 for path in output.glob(TEMPORARY))
    except FileNotFoundError:
        return False


def second_refused(job: Job, scratch: Path, *, at: int = 3) -> Tally:
    """Call a job while it is at work (it hangs in a write): refused, and nothing is touched."""
    tally = Tally(injected=1)
    with _working_folder(job, scratch, "two") as folder:
        first = job.call(folder, fault=AtWrite("rename", at, "slow"))
        if not first.wait_for(partial(_hangs, folder / job.output), 60):
            tally.wrong.append(f"the first has not come to its write: {first.wait(0)}")
        second = job.call(folder)
        if second.wait(60) is None:
            second.kill()
        tally.wrong += refusal(job, second, "")
        if first.kill() != -signal.SIGKILL:
            tally.wrong.append("the first ended before the second was refused")
        tally.wrong += damaged(folder) + job.finish(folder)
    return tally


def two_at_work(job: Job, scratch: Path) -> Tally:
    """Call a job twice at the same time: both end, and together leave what one of them does."""
    return _side_by_side(job, scratch, [(), ()])


def two_ranges(job: Job, scratch: Path) -> Tally:
    """Train two ranges of experts at the same time: both end, with all experts."""
    return _side_by_side(job, scratch, [("--first_expert", "2"), ("--num_experts", "2")])


def _side_by_side(job: Job, scratch: Path, flags: Sequence[Sequence[str]]) -> Tally:
    tally = Tally(injected=1)
    with _working_folder(job, scratch, "side_by_side") as folder:
        for call in [job.call(folder, *more) for more in flags]:
            if call.wait() != 0:
                tally.wrong.append(f"one of them failed: {' / '.join(call.messages[-3:])}")
        tally.wrong += differences(folder, job.reference)
    return tally
