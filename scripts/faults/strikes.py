"""What strikes a job: kills, a full disk, signals, a second process beside it.

After each strike the files are looked at, the job is continued without the fault, and compared with
the undisturbed one. What is not as it should be is told.
"""

import random
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from scripts.faults.calls import AtWrite, Call
from scripts.faults.jobs import TEMPORARY, Job, broken_files, differences, lost, sizes

ERROR = 2  # exit status of an error that a user can mend
# Of the kills: those of a fresh interpreter, those before the first line of output, those as soon
# as there is a temporary file.
FRESH, EARLY, AT_A_FILE = 0.1, 0.1, 0.3
START_SECONDS = 3.0  # of an interpreter, until torch is imported
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


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
    while tally.injected < number:
        with _working_folder(job, scratch, f"kills_{seed}") as folder:
            had: dict[str, int] = {}
            while tally.injected < number and _kill_once(job, folder, rng):
                tally.injected += 1
                has = sizes(folder, job.reference)
                wrong = broken_files(folder) or lost(had, has)
                tally.wrong += [f"after kill {tally.injected}: {line}" for line in wrong]
                had = has
            wrong = job.finish(folder)
            tally.wrong += [f"finished after {tally.injected} kills: {line}" for line in wrong]
    return tally


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
    tally, number = Tally(), 1
    while True:
        with _working_folder(job, scratch, f"{what}_{fault}_{number}") as folder:
            call = job.call(folder, fault=AtWrite(what, number, fault))
            status = call.wait()
            wrong = broken_files(folder)
            if status == 0:  # the job has fewer
                wrong += differences(folder, job.reference)
            else:
                tally.injected += 1
                if fault == "full":
                    wrong += _not_refused(call, "cannot write ")
                elif status != -signal.SIGKILL:
                    wrong += [call.summary()]
                wrong += job.finish(folder)
        tally.wrong += [f"{fault} at {what} {number}: {line}" for line in wrong]
        if status == 0:
            return tally
        number += step


def _not_refused(call: Call, reason: str) -> list[str]:
    """Unless a call has ended in one line that begins with `reason`: how it did end."""
    messages, start = call.messages, f"{call.script}: error: {reason}"
    if call.wait() == ERROR and len(messages) == 1 and messages[0].startswith(start):
        return []
    return [call.summary()]


def signals(job: Job, number: int, seed: int, scratch: Path, *, fresh: int = 2) -> Tally:
    """Send SIGINT and SIGTERM in turn, at `number` random moments; then do as the last line says.

    The first `fresh` of them go to a fresh interpreter.
    """
    rng, tally = random.Random(f"{seed} {job.script}"), Tally()
    while tally.injected < number:
        kind = (signal.SIGTERM, signal.SIGINT)[tally.injected % 2]
        with _working_folder(job, scratch, "signals") as folder:
            call = job.call(folder, fresh=tally.injected < fresh)
            call.wait_for(call.has_printed, 60)
            call.wait(rng.random() * job.duration)
            call.send(kind)
            status = call.wait(60)
            # Python does not listen any more while it winds up.
            if status == 0 or (status == -kind and not differences(folder, job.reference)):
                continue
            tally.injected += 1
            wrong = broken_files(folder) + _continue_as_told(job, folder, call, STATUS[kind])
        tally.wrong += [f"{kind.name} {tally.injected}: {line}" for line in wrong]
    return tally


def _continue_as_told(job: Job, folder: Path, call: Call, expected: int) -> list[str]:
    status, messages = call.wait(0), call.messages
    said = re.compile(rf"{re.escape(job.script)}: interrupted; to continue: python (.*)")
    match = said.fullmatch(messages[0]) if len(messages) == 1 else None
    if status != expected or match is None:
        call.kill()
        return [call.summary()]
    script, *argv = shlex.split(match[1])
    again = Call(Path(script).name, argv, folder)
    if again.wait() != 0:
        return [f"what it said failed: {again.summary()}"]
    return differences(folder, job.reference)


def second_call(job: Job, scratch: Path, *, at: int = 3) -> Tally:
    """Call a job that stands still in the middle of a write: refused, and nothing is touched."""
    tally = Tally(injected=1)
    with _working_folder(job, scratch, "second") as folder:
        first = job.call(folder, fault=AtWrite("rename", at, "stop"))
        if not first.wait_for(first.stands_still, 60):
            tally.wrong.append(f"the first has not come to its write: {first.wait(0)}")
        second = job.call(folder)
        if second.wait(60) is None:
            second.kill()
        tally.wrong += _not_refused(second, "")
        if first.kill() != -signal.SIGKILL:
            tally.wrong.append("the first ended before the second was refused")
        tally.wrong += broken_files(folder) + job.finish(folder)
    return tally


def side_by_side(job: Job, scratch: Path) -> Tally:
    """Call a job twice at the same time: both end, and together leave what one of them does."""
    tally = Tally(injected=1)
    with _working_folder(job, scratch, "side_by_side") as folder:
        for call in [job.call(folder) for _ in range(2)]:
            if call.wait() != 0:
                tally.wrong.append(f"one of them failed: {call.summary()}")
        tally.wrong += differences(folder, job.reference)
    return tally
