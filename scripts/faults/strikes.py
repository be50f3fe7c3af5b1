"""What strikes a job: kills, a full disk, signals, a second process beside it.

After each strike the files are looked at, the job is continued without the fault, and compared with
the undisturbed one. Each function here yields, after each strike, what is not as it should be.
"""

import random
import re
import shlex
import signal
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

from scripts.faults.calls import AtWrite, Call
from scripts.faults.contents import Contents, broken, lost, read_folder
from scripts.faults.jobs import TEMPORARY, Job, copied

Strikes = Iterator[list[str]]  # what was wrong after each
ERROR = 2  # exit status of an error that a user can mend
# Of the kills: those of a fresh interpreter, those before the first line of output, those as soon
# as there is a temporary file.
FRESH, EARLY, AT_A_FILE = 0.1, 0.1, 0.3
START_SECONDS = 3.0  # of an interpreter, until torch is imported
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def kills(job: Job, number: int, seed: int) -> Strikes:
    """Kill the job at `number` random moments, continuing each time; a finished one begins anew."""
    rng = random.Random(f"{seed} {job.script}")
    while number > 0:
        with copied(job.start) as folder:
            wrong = list(islice(_kills_until_done(job, folder, rng), number))
            if wrong:
                wrong[-1] += job.finish(folder)
        yield from wrong
        number -= len(wrong)


def _kills_until_done(job: Job, folder: Path, rng: random.Random) -> Strikes:
    lasting = read_folder(job.reference).keys()
    had: Contents = {}
    while _kill_once(job, folder, rng):
        has = read_folder(folder)
        yield broken(has) or lost(had, has, lasting)
        had = has


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
            call.wait_for(lambda: any(folder.rglob(TEMPORARY)), 60)
    return call.kill() == -signal.SIGKILL


def at_writes(job: Job, what: str, fault: str, *, step: int = 1) -> Strikes:
    """Strike with `fault` ("kill" or "full") at every `step`-th file opened or renamed (`what`)."""
    for number in count(1, step):
        with copied(job.start) as folder:
            call = job.call(folder, fault=AtWrite(what, number, fault))
            status = call.wait()
            wrong = broken(read_folder(folder))
            if status == 0:  # it writes fewer, unless it did not notice
                wrong += job.compare(folder)
            else:
                if fault == "full":
                    wrong += _not_refused(call, "cannot write ")
                elif status != -signal.SIGKILL:
                    wrong += [call.summary()]
                wrong += job.finish(folder)
        if status != 0 or wrong:
            yield [f"{fault} at {what} {number}: {line}" for line in wrong]
        if status == 0:
            return


def _not_refused(call: Call, reason: str) -> list[str]:
    """Unless a call has ended in one line that begins with `reason`: how it did end."""
    messages, start = call.messages, f"{call.script}: error: {reason}"
    if call.wait() == ERROR and len(messages) == 1 and messages[0].startswith(start):
        return []
    return [call.summary()]


def signals(job: Job, number: int, seed: int, *, fresh: int = 2) -> Strikes:
    """Send SIGINT and SIGTERM in turn, at `number` random moments; then do as the last line says.

    The first `fresh` of them go to a fresh interpreter.
    """
    rng, sent = random.Random(f"{seed} {job.script}"), 0
    while sent < number:
        kind = (signal.SIGTERM, signal.SIGINT)[sent % 2]
        with copied(job.start) as folder:
            call = job.call(folder, fresh=sent < fresh)
            call.wait_for(call.has_printed, 60)
            call.wait(rng.random() * job.duration)
            call.send(kind)
            status = call.wait(60)
            # Python does not listen any more while it winds up.
            if status == 0 or (status == -kind and not job.compare(folder)):
                continue
            sent += 1
            wrong = broken(read_folder(folder)) + _continue_as_told(job, folder, call, STATUS[kind])
        yield [f"{kind.name} {sent}: {line}" for line in wrong]


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
    return job.compare(folder)


def second_call(job: Job, *, at: int = 3) -> Strikes:
    """Call a job that stands still in the middle of a write: refused, and nothing is touched."""
    wrong = []
    with copied(job.start) as folder:
        first = job.call(folder, fault=AtWrite("rename", at, "stop"))
        if not first.wait_for(first.stands_still, 60):
            wrong.append(f"the first has not come to its write: {first.wait(0)}")
        second = job.call(folder)
        if second.wait(60) is None:
            second.kill()
        wrong += _not_refused(second, "")
        if first.kill() != -signal.SIGKILL:
            wrong.append("the first ended before the second was refused")
        wrong += broken(read_folder(folder)) + job.finish(folder)
    yield wrong


def side_by_side(job: Job) -> Strikes:
    """Call a job twice at the same time: both end, and together leave what one of them does."""
    with copied(job.start) as folder:
        calls = [job.call(folder) for _ in range(2)]
        failed = [f"one of them failed: {call.summary()}" for call in calls if call.wait() != 0]
        wrong = failed + job.compare(folder)
    yield wrong
