"""A script at work as a process that can be killed, filled up or asked to end.

Most calls are forked from a server that has imported the scripts once: what a fault can break
begins after the imports, which take seconds. A `fresh` call is an interpreter of its own. Every
call computes with one thread, so that results are the same bit for bit.
"""

import builtins
import importlib
import io
import itertools
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from utils.core.script import run_script

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# A progress bar: "expert 1: 40%|####    | 2/5 [00:01<00:02, 1.5epoch/s]".
PROGRESS = re.compile(r"\|\s*\d+/\d+ \[[^\]]*\]")
ROOM = 40  # bytes of the file that no longer fits: less than the smallest has

# Starting a process looks for others that have ended; who looks second finds no status any more.
_looking = threading.Lock()


@dataclass(frozen=True)
class AtWrite:
    """A fault at the `number`-th file opened for writing or renamed, counted from 1.

    `what` is "open" or "rename"; `fault` is "kill", "full" (nothing fits any more) or "stop" (it
    stands still).
    """

    what: str
    number: int
    fault: str

    def install(self) -> None:
        """From now on watch this process's writes under the current folder."""
        here, counted = Path.cwd().resolve(), itertools.count(1)

        def come(what: str, path: Any) -> None:
            is_ours = not isinstance(path, int) and Path(path).resolve().is_relative_to(here)
            if is_ours and what == self.what and next(counted) == self.number:
                self._strike(Path(path))

        really_open, really_rename = builtins.open, os.replace

        def watched_open(file: Any, mode: str = "r", *rest: Any, **keywords: Any) -> Any:
            if set(mode) & set("wax+"):
                come("open", file)
            return really_open(file, mode, *rest, **keywords)

        def watched_rename(source: Any, target: Any, **keywords: Any) -> None:
            come("rename", target)
            really_rename(source, target, **keywords)

        builtins.open = io.open = watched_open  # type: ignore[assignment]
        os.replace = watched_rename  # type: ignore[assignment]

    def _strike(self, path: Path) -> None:
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "full":
            size = path.stat().st_size if path.exists() else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + ROOM, resource.RLIM_INFINITY))
        else:
            os.kill(os.getpid(), signal.SIGSTOP)


class Call:
    """`python <script> <argv>` in `folder`, begun at once, in a process group of its own."""

    def __init__(
        self,
        script: str,
        argv: Sequence[str],
        folder: Path,
        *,
        fault: AtWrite | None = None,
        memory: int | None = None,
        fresh: bool = False,
    ) -> None:
        """`fault` and `memory`, bytes that it may take beyond its code, are for forked calls."""
        self.script = script
        readers, writers = zip(*(os.pipe() for _ in range(2)), strict=True)
        if fresh:
            self._process: Any = subprocess.Popen(
                [sys.executable, str(ROOT / script), *argv],
                cwd=folder,
                env=os.environ | ONE_THREAD,
                stdout=writers[0],
                stderr=writers[1],
                start_new_session=True,
            )
        else:
            context = _server()
            order = (script, tuple(argv), folder, fault, memory)
            outputs = [Connection(os.dup(writer), readable=False) for writer in writers]
            self._process = context.Process(target=_become, args=(*order, outputs))
            with _looking:
                self._process.start()
            for output in outputs:
                output.close()
        for writer in writers:
            os.close(writer)
        # Pipes, not files, whose size a fault may limit.
        self._outputs = [_Collector(reader) for reader in readers]

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status, that of a signal negative; None if it is still at work by then."""
        if not isinstance(self._process, subprocess.Popen):
            multiprocessing.connection.wait([self._process.sentinel], seconds)
            with _looking:
                return self._process.exitcode
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode

    def wait_for(self, has_come: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true while the call was at work, within so many seconds."""
        end = time.monotonic() + seconds
        while not (came := has_come()) and time.monotonic() < end and self.wait(0) is None:
            time.sleep(0.0005)
        return came

    def send(self, number: int) -> None:
        """Send a signal to all of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> int | None:
        """End it at once; the exit status, which says whether it had ended by itself before."""
        self.send(signal.SIGKILL)
        with suppress(ProcessLookupError):  # not the leader of its group yet
            if self.wait(0.05) is None:
                os.kill(self._process.pid, signal.SIGKILL)
        return self.wait()

    def has_printed(self) -> bool:
        return bool(self._outputs[0].text)

    def stands_still(self) -> bool:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED
        return False

    @property
    def stderr(self) -> str:
        """All of it, of a call that has ended."""
        return self._outputs[1].whole()

    @property
    def messages(self) -> list[str]:
        """The lines on stderr of a call that has ended, without the progress bars."""
        lines = re.split(r"[\r\n]+", self.stderr)
        return [line for line in lines if line.strip() and not PROGRESS.search(line)]

    def summary(self) -> str:
        """How a call has ended, and the last that it said."""
        said = self.messages
        return f"status {self.wait(0)} with {len(said)} lines: {' / '.join(said[-3:])}"


class _Collector(threading.Thread):
    """Reads a pipe to its end."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(daemon=True)
        self.text = b""
        self._descriptor = descriptor
        self.start()

    def run(self) -> None:
        while part := os.read(self._descriptor, 65536):
            self.text += part
        os.close(self._descriptor)

    def whole(self) -> str:
        self.join(5)
        return self.text.decode("utf-8", "replace")


def _server() -> Any:
    """Where calls are forked from; it starts with the first of them."""
    os.environ |= ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    context = multiprocessing.get_context("forkserver")
    scripts = ["buffer", "distill_att", "eval", "scripts.faults.calls"]
    for_digits = ["sklearn.datasets", "sklearn.model_selection"]
    context.set_forkserver_preload([*scripts, *for_digits])
    return context


def _become(
    script: str,
    argv: tuple[str, ...],
    folder: Path,
    fault: AtWrite | None,
    memory: int | None,
    outputs: Sequence[Connection],
) -> None:
    """Be the script, from now on to the end of this process."""
    os.setsid()
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", closefd=False),
        os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False),
    )
    os.chdir(folder)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a kill leaves
    sys.argv = [str(ROOT / script), *argv]
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if fault is not None:
        fault.install()
    sys.exit(run_script(importlib.import_module(Path(script).stem).main))
