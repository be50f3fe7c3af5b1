"""Run commands as steps of a session, each within its time, and pack what they leave behind."""

import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.05
CANNOT_START = 127  # as a shell says it
LEAST_SECONDS = 2.0  # a step with less is not begun
LINES_SHOWN = 15  # of each log
MAX_BYTES = 12 * 2**20  # of a file that is packed


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take, and those from SIGTERM to SIGKILL after them."""

    name: str
    command: Sequence[object]  # as str makes text of each
    seconds: float
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

    def run(self, *steps: Step, environment: Mapping[str, str] | None = None) -> list[Outcome]:
        """Run `steps` side by side to their ends, the last of them that of the session.

        When this call itself is interrupted, the steps are asked to end, then it goes on so.
        """
        variables = {**self._environment, **(environment or {})}
        running: list[_Running] = []
        try:
            for step in steps:
                limit = max(0.0, min(step.seconds, self.left() - step.grace))
                print(f"== {step.name}: at most {limit:.0f} s", flush=True)
                running.append(_Running(step, limit, self.results, variables))
            _wait_for(running)
        except BaseException:
            for each in running:
                each.ask_to_end()
            _wait_for(running)
            raise
        finally:
            outcomes = [each.outcome for each in running if each.outcome is not None]
            self.outcomes += outcomes
            for each in running:
                print(f"-- {each.outcome}", *each.last_lines(), sep="\n", flush=True)
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


class _Running:
    """A step at work, the first process of a group of its own; one that cannot be begun has its
    `outcome` at once.
    """

    def __init__(
        self, step: Step, limit: float, results: Path, environment: Mapping[str, str]
    ) -> None:
        self.outcome: Outcome | None = None
        self._step = step
        self._limit = limit
        self._log = results / f"{step.name}.log"
        self._asked_at: float | None = None
        self._began = time.monotonic()
        if limit < LEAST_SECONDS:
            self._end(None)
            return
        try:
            with open(self._log, "wb") as output:
                self._process = subprocess.Popen(
                    list(map(str, step.command)),
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._log.write_text(f"{error}\n")
            self._end(CANNOT_START)

    def is_at_work(self) -> bool:
        """Whether it has not ended; out of time it is asked to, then made to."""
        if self.outcome is not None:
            return False
        now = time.monotonic()
        if (status := self._process.poll()) is not None:
            self._send(signal.SIGKILL)  # to what it may have left at work
            self._end(status)
            return False
        if now - self._began > self._limit:
            self.ask_to_end()
        if self._asked_at is not None and now - self._asked_at > self._step.grace:
            self._send(signal.SIGKILL)
        return True

    def ask_to_end(self) -> None:
        if self.outcome is None and self._asked_at is None:
            self._asked_at = time.monotonic()
            self._send(signal.SIGTERM)

    def last_lines(self) -> list[str]:
        if self.outcome is None or self.outcome.status is None:
            return []
        lines = re.split(r"[\r\n]+", self._log.read_text("utf-8", errors="replace"))
        return [f"   {line}" for line in lines if line.strip()][-LINES_SHOWN:]

    def _end(self, status: int | None) -> None:
        seconds, was_cut_off = time.monotonic() - self._began, self._asked_at is not None
        self.outcome = Outcome(self._step.name, seconds, self._limit, status, was_cut_off)

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _wait_for(running: Sequence[_Running]) -> None:
    while sum(each.is_at_work() for each in running):
        time.sleep(POLL_SECONDS)
