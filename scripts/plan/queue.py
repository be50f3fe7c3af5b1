"""Work on the cells of a plan, several at a time, each on a share of the devices.

In the folder of logs a cell has

    <cell>.log      what all calls have run, and what it printed
    <cell>.status   how the last one went: done in ..., failed: exit ..., not run: ..., interrupted
    <cell>.done     what was run when it was done, so that it is not run again (`finished.py`)

and a hidden lock file: a cell that another call works on is waited for. On a signal the running
commands get it too; they save and end, then the queue ends.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from scripts.plan.cells import Cell
from scripts.plan.devices import Devices
from scripts.plan.finished import Stamps, inputs_of, is_finished, record_finished
from scripts.plan.tables import Outcome, say_outcomes
from utils.core.errors import UserError
from utils.core.files import check_writable, write_text
from utils.core.locks import locked
from utils.core.stopping import SIGNALS, Interrupted

POLL_SECONDS = 0.2
LISTENED_TO = (*SIGNALS, signal.SIGHUP)
CANNOT_START = 127  # as a shell says it


def run_plan(experts: Sequence[Cell], rows: Sequence[Cell], devices: Devices, logs: Path) -> int:
    """Work on all cells and say how they went; the exit status, 0 where all are done."""
    queue = Queue(devices, logs)
    for cells in (experts, rows):  # with several GPUs experts have them all
        queue.work(cells)
    return say_outcomes([queue.outcomes[cell.name] for cell in (*experts, *rows)])


def run_command(main: Callable[[Sequence[str]], int], *, script: str) -> int:
    """Call `main` with the command line of `script`. A UserError becomes one line and status 2, a
    signal the advice to call again and status 130 or 143.
    """
    try:
        with handled_by(_interrupt):
            return main(sys.argv[1:])
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print("interrupted: the same command goes on from here", flush=True)
        return 130 if interrupted.args == (signal.SIGINT,) else 143


@contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let `handler` have the signals during the block, but those that the caller lets be ignored:
    nohup does that.
    """
    before = {number: signal.getsignal(number) for number in LISTENED_TO}
    for number, usual in before.items():
        if usual != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted(number)


class Attempt:
    """A cell at work: its commands one after another, each in a process group of its own, so that
    a signal from a terminal reaches it once, by way of the queue.

    `share` says how many slots of which devices it holds; `held` is left when it is over.
    """

    def __init__(
        self,
        cell: Cell,
        command_lines: Sequence[str],
        share: Mapping[str, int],
        *,
        log: IO[str],
        environment: Mapping[str, str],
        held: ExitStack,
    ) -> None:
        self.cell, self.share, self.inputs = cell, share, inputs_of(cell)
        self._left, self._log, self._environment = list(command_lines), log, environment
        self._held = held
        self._began = time.monotonic()
        self._start_next()

    def pass_on(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            # The scripts know the signals of SIGNALS; one about the terminal asks for the same.
            os.killpg(self._process.pid, number if number in SIGNALS else signal.SIGTERM)

    def status(self, *, stopped: bool) -> str | None:
        """None while it goes on, else how it has ended; begins the next command where that is due.
        With `stopped` none is begun, and to be over but not done is to be interrupted.
        """
        code = CANNOT_START if self._process is None else self._process.poll()
        if code is None:
            return None
        if code == 0 and self._left and not stopped:
            self._start_next()
            return None
        if code == 0 and not self._left:
            minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
            return f"done in {minutes // 60}:{minutes % 60:02}:{seconds:02}"
        # A process that a signal has ended is reported as by a shell.
        return "interrupted" if stopped else f"failed: exit {code if code >= 0 else 128 - code}"

    def close(self) -> None:
        """Wait for the command that is running; let others have the cell."""
        if self._process is not None:
            self._process.wait()
        self._held.close()

    def _start_next(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                shlex.split(self._left.pop(0)),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                process_group=0,
            )
        except OSError as error:
            self._log.write(f"{error.filename}: {error.strerror}\n")
            self._log.flush()


class Queue:
    """`outcomes` has, by name, each cell that has had its turn."""

    def __init__(self, devices: Devices, logs: Path) -> None:
        check_writable(logs)
        self.outcomes: dict[str, Outcome] = {}
        self._devices, self._logs = devices, logs
        self._free = dict.fromkeys(devices.names, devices.slots)
        self._attempts: list[Attempt] = []
        self._waited_for: set[str] = set()
        self._signals: list[int] = []  # that have not been passed on
        self._first_signal: int | None = None

    def work(self, cells: Sequence[Cell]) -> None:
        """Work on all `cells`, the longest first, so that none of them is left alone at the end.

        Raises Interrupted after a signal, once what was running has ended.
        """
        waiting = sorted(cells, key=lambda cell: -cell.estimate.hours)
        waiting = [cell for cell in waiting if not self._is_settled(cell)]
        with handled_by(lambda number, frame: self._signals.append(number)), self._nobody_left():
            while self._attempts or (waiting and not self._first_signal):
                self._pass_on_signals()
                self._end_what_is_over()
                if not self._first_signal:
                    waiting = self._begin_what_fits(waiting)
                time.sleep(POLL_SECONDS if self._attempts or waiting else 0)
        if self._first_signal:
            raise Interrupted(self._first_signal)

    def _pass_on_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            self._first_signal = self._first_signal or number
            for attempt in self._attempts:
                attempt.pass_on(number)

    @contextmanager
    def _nobody_left(self) -> Iterator[None]:
        """Let running commands save and end before an error, a full disk say, ends the queue."""
        try:
            yield
        finally:
            for attempt in self._attempts:
                attempt.pass_on(signal.SIGTERM)
            for attempt in self._attempts:
                attempt.close()

    def _is_settled(self, cell: Cell) -> bool:
        """Whether nothing is to be run: what the cell needs is missing, or it is done by now."""
        needed = self.outcomes.get(cell.needs or "")
        if cell.needs and not (needed and needed.is_done):
            self._settle(cell, f"not run: {cell.needs} failed")
        elif is_finished(cell, self._file(cell, ".done")):
            self._settle(cell, "done before", keep=False)
        return cell.name in self.outcomes

    def _begin_what_fits(self, waiting: Sequence[Cell]) -> list[Cell]:
        """Begin cells in their order; the others are given back."""
        left: list[Cell] = []
        for position, cell in enumerate(waiting):
            share = self._free_share(self._devices.slots_for(cell))
            if not share:  # nobody overtakes it, or a large cell might never have its turn
                return [*left, *waiting[position:]]
            if not self._begin(cell, share):
                left.append(cell)
        return left

    def _free_share(self, slots: int) -> dict[str, int]:
        """So many slots of the device that has the most free ones, or of all where one alone does
        not have them; empty where they are not free.
        """
        if slots > self._devices.slots:
            return dict(self._free) if sum(self._free.values()) == slots else {}
        device = max(self._free, key=lambda name: self._free[name])
        return {device: slots} if self._free[device] >= slots else {}

    def _begin(self, cell: Cell, share: Mapping[str, int]) -> bool:
        """Begin the cell where no other call works on it; whether this one need not wait for it."""
        log = self._file(cell, ".log")
        with ExitStack() as held:
            try:
                lock = log.with_name(f".{log.name}.lock")
                held.enter_context(locked(lock, refusal="waiting: another call is at it"))
            except UserError as refusal:
                if cell.name not in self._waited_for:
                    self._waited_for.add(cell.name)
                    _say(cell, str(refusal))
                return False
            if self._is_settled(cell):  # by the call that was waited for
                return True
            device = next(iter(share)) if len(share) == 1 else "all GPUs"
            _say(cell, f"started on device {device}, log {log}")
            file = held.enter_context(open(log, "a", encoding="utf-8"))
            lines = self._devices.command_lines(cell)
            file.write(f"\n{datetime.now():%c} on {socket.gethostname()}\n{' && '.join(lines)}\n")
            file.flush()
            for name, slots in share.items():
                self._free[name] -= slots
            self._attempts.append(
                Attempt(
                    cell,
                    lines,
                    share,
                    log=file,
                    environment=self._environment(share),
                    held=held.pop_all(),
                )
            )
        return True

    def _environment(self, share: Mapping[str, int]) -> dict[str, str]:
        """That of this process; the cell sees its devices alone, and has its part of the cores."""
        threads = max(1, len(os.sched_getaffinity(0)) // self._devices.all_slots)
        return {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "CUDA_VISIBLE_DEVICES": ",".join(share).removeprefix("cpu"),
        }

    def _end_what_is_over(self) -> None:
        for attempt in list(self._attempts):
            status = attempt.status(stopped=self._first_signal is not None)
            if status is None:
                continue
            self._attempts.remove(attempt)
            for name, slots in attempt.share.items():
                self._free[name] += slots
            self._settle(attempt.cell, status, inputs=attempt.inputs)
            attempt.close()

    def _settle(
        self, cell: Cell, status: str, *, inputs: Stamps | None = None, keep: bool = True
    ) -> None:
        """Note and say how a cell went; `keep` writes it down, with `inputs` that it is done."""
        line = " && ".join(self._devices.command_lines(cell))
        outcome = Outcome(cell, status, line, self._file(cell, ".log"))
        self.outcomes[cell.name] = outcome
        if keep:
            write_text(f"{status}\n", self._file(cell, ".status"))
        if inputs is not None and outcome.is_done:
            record_finished(cell, self._file(cell, ".done"), inputs=inputs)
        _say(cell, status)

    def _file(self, cell: Cell, ending: str) -> Path:
        return self._logs / f"{cell.name}{ending}"


def _say(cell: Cell, text: str) -> None:
    print(f"{datetime.now():%T} {cell.name}: {text}", flush=True)
