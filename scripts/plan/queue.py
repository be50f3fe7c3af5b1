"""Work on the cells of a plan, several at a time, each on a share of the devices.

In the folder of logs a cell has

    <cell>.log      what all calls have run, and what it printed
    <cell>.status   how the last one went: done in ..., failed: exit ..., not run: ..., interrupted
    <cell>.done     what was run when it was done, so that it is not run again (`finished.py`)

and a hidden lock file: a cell that another call works on is waited for. On a signal the running
commands get it too; they save and end, then the queue ends.
"""

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from scripts.plan.cells import Cell
from scripts.plan.devices import Devices, usable_cores
from scripts.plan.finished import inputs_of, is_finished, record_finished
from scripts.plan.tables import Outcome, say_outcomes
from utils.core.errors import UserError
from utils.core.files import check_writable, write_text
from utils.core.locks import locked
from utils.core.stopping import SIGNALS, Interrupted

POLL_SECONDS = 0.2
HANG_UP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # not on Windows
LISTENED_TO = (*SIGNALS, *HANG_UP)
# A process group of its own for a command.
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0}
    if hasattr(os, "killpg")
    else {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
)
CANNOT_START = 127  # as a shell says it


def run_plan(experts: Sequence[Cell], rows: Sequence[Cell], devices: Devices, logs: Path) -> int:
    """Work on all cells and say how they went; the exit status, 0 where all are done."""
    queue, stages = Queue(devices, logs), sorted({cell.stage for cell in experts})
    for stage in stages:  # with several GPUs experts have them all
        queue.work([cell for cell in experts if cell.stage == stage])
    queue.work(rows)
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
def handled_by(handler: Callable[[int, Any], object]) -> Iterator[None]:
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


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to all of a command; on Windows Ctrl-Break is the one that a group gets."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, number)
    else:
        process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted(number)


class Queue:
    """Cells at work, each a coroutine. `outcomes` has, by name, those that have had their turn."""

    def __init__(self, devices: Devices, logs: Path) -> None:
        check_writable(logs)
        self.outcomes: dict[str, Outcome] = {}
        self._devices, self._logs = devices, logs
        self._free = Counter(dict.fromkeys(devices.names, devices.slots))
        self._running: list[subprocess.Popen[bytes]] = []
        self._signal: int | None = None  # the first one; nothing begins after it

    def work(self, cells: Sequence[Cell]) -> None:
        """Work on all `cells`, the longest first, so that none of them is left alone at the end.

        Raises Interrupted after a signal, once what was running has ended.
        """
        asyncio.run(self._work(sorted(cells, key=lambda cell: -cell.estimate.hours)))
        if self._signal:
            raise Interrupted(self._signal)

    async def _work(self, cells: Sequence[Cell]) -> None:
        loop, turn = asyncio.get_running_loop(), asyncio.Lock()
        with handled_by(lambda number, frame: loop.call_soon_threadsafe(self._pass_on, number)):
            tasks = [asyncio.create_task(self._attend(cell, turn)) for cell in cells]
            try:
                await asyncio.gather(*tasks)
            except BaseException:  # a full disk, say: let running commands save and end first
                self._pass_on(signal.SIGTERM)
                await asyncio.gather(*tasks, return_exceptions=True)
                raise

    def _pass_on(self, number: int) -> None:
        self._signal = self._signal or number
        for process in self._running:
            if process.poll() is None:
                # The scripts know the signals of SIGNALS; one about the terminal asks for the same.
                _signal_group(process, number if number in SIGNALS else signal.SIGTERM)

    async def _attend(self, cell: Cell, turn: asyncio.Lock) -> None:
        """Run the cell unless it is done; while another call is at it, wait without slots."""
        log = self._file(cell, ".log")
        lock = log.with_name(f".{log.name}.lock")
        refused = False
        while not (self._signal or self._is_settled(cell)):
            async with self._slots(cell, turn) as share:
                with ExitStack() as held:
                    try:
                        held.enter_context(locked(lock, refusal="waiting: another call is at it"))
                    except UserError as refusal:
                        if not refused:
                            _say(cell, str(refusal))
                        refused = True
                    else:
                        return await self._run(cell, share)
            await asyncio.sleep(POLL_SECONDS)

    @asynccontextmanager
    async def _slots(self, cell: Cell, turn: asyncio.Lock) -> AsyncIterator[dict[str, int]]:
        """Hold slots of devices during the block; of none after a signal."""
        share: dict[str, int] = {}
        async with turn:  # nobody overtakes a large cell, or it might never have its turn
            while not (self._signal or (share := self._free_share(cell))):
                await asyncio.sleep(POLL_SECONDS)
            self._free.subtract(share)
        try:
            yield share
        finally:
            self._free.update(share)

    def _free_share(self, cell: Cell) -> dict[str, int]:
        """The slots for a cell, of the device that has the most free ones, or of all where one
        alone does not have them; empty where they are not free.
        """
        slots = self._devices.slots_for(cell)
        if slots > self._devices.slots:
            return dict(self._free) if self._free.total() == slots else {}
        device, free = self._free.most_common(1)[0]
        return {device: slots} if free >= slots else {}

    async def _run(self, cell: Cell, share: Mapping[str, int]) -> None:
        """Run the commands, unless there was a signal or another call has finished them by now."""
        if self._signal or self._is_settled(cell):
            return
        inputs, log = inputs_of(cell), self._file(cell, ".log")
        device = next(iter(share)) if len(share) == 1 else "all GPUs"
        _say(cell, f"started on device {device}, log {log}")
        with open(log, "a", encoding="utf-8") as file:
            status = await self._status_of(self._devices.command_lines(cell), file, share)
        self._settle(cell, status)
        if self.outcomes[cell.name].is_done:
            record_finished(cell, self._file(cell, ".done"), inputs=inputs)

    async def _status_of(self, lines: Sequence[str], log: IO[str], share: Iterable[str]) -> str:
        """Run the command lines one after another, as long as they end well; how that went."""
        log.write(f"\n{datetime.now():%c} on {socket.gethostname()}\n{' && '.join(lines)}\n")
        log.flush()
        began = time.monotonic()
        for line in lines:
            if self._signal:
                return "interrupted"
            if code := await self._exit_code(line, log, share):
                return "interrupted" if self._signal else f"failed: exit {code}"
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        return f"done in {minutes // 60}:{minutes % 60:02}:{seconds:02}"

    async def _exit_code(self, line: str, log: IO[str], share: Iterable[str]) -> int:
        """Run a command on the devices of `share`, with its part of the cores; its exit status as a
        shell says it. A process group of its own gets a terminal's signals once, by way of here.
        """
        threads = max(1, usable_cores() // self._devices.all_slots)
        visible = ",".join(share).removeprefix("cpu")
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        try:
            process = subprocess.Popen(
                shlex.split(line),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | {"CUDA_VISIBLE_DEVICES": visible},
                **OWN_GROUP,
            )
        except OSError as error:
            print(f"{error.filename}: {error.strerror}", file=log, flush=True)
            return CANNOT_START
        self._running.append(process)
        while (code := process.poll()) is None:
            await asyncio.sleep(POLL_SECONDS)
        self._running.remove(process)
        return code if code >= 0 else 128 - code

    def _is_settled(self, cell: Cell) -> bool:
        """Whether nothing is to be run: what the cell needs is missing, or it is done by now."""
        needed = self.outcomes.get(cell.needs or "")
        if cell.needs and not (needed and needed.is_done):
            self._settle(cell, f"not run: {cell.needs} failed")
        elif is_finished(cell, self._file(cell, ".done")):
            self._note(cell, "done before")
        return cell.name in self.outcomes

    def _settle(self, cell: Cell, status: str) -> None:
        """Write down, note and say how a cell went."""
        write_text(f"{status}\n", self._file(cell, ".status"))
        self._note(cell, status)

    def _note(self, cell: Cell, status: str) -> None:
        line = " && ".join(self._devices.command_lines(cell))
        self.outcomes[cell.name] = Outcome(cell, status, line, self._file(cell, ".log"))
        _say(cell, status)

    def _file(self, cell: Cell, ending: str) -> Path:
        return self._logs / f"{cell.name}{ending}"


def _say(cell: Cell, text: str) -> None:
    print(f"{datetime.now():%T} {cell.name}: {text}", flush=True)
