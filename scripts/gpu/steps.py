"""Run commands as steps of a session, each within its time, and pack what they write."""

import math
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from scripts.plan.queue import CANNOT_START

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.05
LEAST_SECONDS = 2.0  # a step with less is not begun
LINES_SHOWN = 15  # of each log
MAX_BYTES = 12 * 2**20  # of a file that is packed


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take, and those from SIGTERM to SIGKILL after them."""

    name: str
    command: Sequence[object]  # as str makes text of each
    seconds: float = math.inf
    grace: float = 3.0


@dataclass(frozen=True)
class Outcome:
    """How a step went; `status` is None where no time was left for it."""

    name: str
    seconds: float
    limit: float
    status: int | None
    was_cut_off: bool = False

    def __str__(self) -> str:
        said = "no time left" if self.status is None else f"exit {self.status}"
        said = f"cut off, {said}" if self.was_cut_off else said
        return f"{self.name:24} {self.seconds:8.1f} {self.limit:8.1f}  {said}"


class Session:
    """Steps that end before `end`, on the clock of time.monotonic().

    They write below `results`: <name>.log, and what their commands say. After every step
    `out`/session.tgz holds all of it, but what is too large, and `out`/summary.txt the table.
    """

    def __init__(
        self, out: Path, results: Path, *, end: float, environment: Mapping[str, str]
    ) -> None:
        self.results = results
        self.outcomes: list[Outcome] = []
        self._out = out
        self._end = end
        self._environment = {**os.environ, **environment}
        for folder in (out, results):
            folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds to the end."""
        return self._end - time.monotonic()

    def run(
        self,
        *steps: Step,
        environment: Mapping[str, str] | None = None,
        at_once: int | None = None,
        keep: float = 0.0,
    ) -> list[Outcome]:
        """Run `steps`, all or `at_once` side by side, to their ends, each from its own beginning
        on, and none beyond that of the session but for `keep` seconds.

        When this call itself is interrupted, the steps are asked to end, then it goes on so.
        """
        variables = {**self._environment, **(environment or {})}
        interrupted = Event()
        # Kept by the threads: an interrupt while one is started leaves nothing to wait for.
        at_work: set[str] = set()
        found: dict[str, Outcome] = {}

        def work(step: Step) -> None:
            at_work.add(step.name)
            try:
                if not interrupted.is_set():
                    limit = max(0.0, min(step.seconds, self.left() - keep - step.grace))
                    print(f"== {step.name}: at most {limit:.0f} s", flush=True)
                    log = self.results / f"{step.name}.log"
                    found[step.name] = _run(step, limit, log, variables, interrupted)
            finally:
                at_work.discard(step.name)

        with ThreadPoolExecutor(at_once or max(1, len(steps))) as pool:
            try:
                for each in [pool.submit(work, step) for step in steps]:
                    each.result()
            finally:
                interrupted.set()
                while at_work:
                    time.sleep(POLL_SECONDS)
                outcomes = [found[step.name] for step in steps if step.name in found]
                for outcome in outcomes:
                    print(f"-- {outcome}", *self._last_lines(outcome), sep="\n", flush=True)
                self.outcomes += outcomes
                self.pack()
        return outcomes

    def pack(self) -> None:
        """Write session.tgz and summary.txt anew."""
        files = sorted(path for path in self.results.rglob("*") if path.is_file())
        packed = [path for path in files if path.stat().st_size <= MAX_BYTES]
        temporary = self._out / ".session.tgz"
        with tarfile.open(temporary, "w:gz", compresslevel=6) as archive:
            for path in packed:
                archive.add(path, path.relative_to(self.results))
        temporary.replace(self._out / "session.tgz")
        left_out = [f"too large to pack: {path}" for path in files if path not in packed]
        self._out.joinpath("summary.txt").write_text("\n".join([self.table(), *left_out, ""]))

    def table(self) -> str:
        head = f"{'step':24} {'seconds':>8} {'limit':>8}  status"
        return "\n".join([head, *map(str, self.outcomes)])

    def _last_lines(self, outcome: Outcome) -> list[str]:
        if outcome.status is None:
            return []
        log = self.results.joinpath(f"{outcome.name}.log").read_text("utf-8", errors="replace")
        lines = [line for line in re.split(r"[\r\n]+", log) if line.strip()]
        return [f"   {line}" for line in lines[-LINES_SHOWN:]]


def _run(
    step: Step, limit: float, log: Path, environment: Mapping[str, str], interrupted: Event
) -> Outcome:
    """Run a step as the first process of a group of its own. After `limit` seconds, or once
    `interrupted`, it is asked to end, then made to.
    """
    if limit < LEAST_SECONDS:
        return Outcome(step.name, 0.0, limit, None)
    began = time.monotonic()
    try:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                list(map(str, step.command)),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        log.write_text(f"{error}\n")
        return Outcome(step.name, 0.0, limit, CANNOT_START)
    while process.poll() is None and time.monotonic() < began + limit and not interrupted.is_set():
        time.sleep(POLL_SECONDS)
    was_cut_off = process.poll() is None
    with suppress(ProcessLookupError):
        if was_cut_off:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(step.grace)
        os.killpg(process.pid, signal.SIGKILL)  # also what it may have left at work
    return Outcome(step.name, time.monotonic() - began, limit, process.wait(), was_cut_off)
