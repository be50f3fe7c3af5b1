"""A script at work as a process that can be killed, filled up or asked to end.

Most calls are forked from a server that has imported the scripts once: what a fault can break
begins after the imports, which take seconds. A `fresh` call is an interpreter of its own. Every
call computes with one thread, so that results are the same bit for bit.
"""

import itertools
import multiprocessing
import os
import re
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
# What the server imports that calls are forked from; the last two are for digits.
PRELOAD = ["buffer", "distill_att", "eval", "scripts.faults.calls"]
PRELOAD += ["sklearn.datasets", "sklearn.model_selection", "torch._dynamo", "torchvision.utils"]
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

        def look(event: str, arguments: tuple[Any, ...]) -> None:
            match self.what, event:
                case "open", "open" if set(arguments[1] or "") & set("wax+"):
                    path = Path(arguments[0])
                case "rename", "os.rename":
                    path = Path(arguments[1])
                case _:
                    return
            if path.resolve().is_relative_to(here) and next(counted) == self.number:
                self._strike(path)

        sys.addaudithook(look)

    def _strike(self, path: Path) -> None:
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "full":
            size = path.stat().st_size if path.exists() else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + ROOM, resource.RLIM_INFINITY))
        else:
            os.kill(os.getpid(), signal.SIGSTOP)


class Call:
    """`python <script> <argv>` in `folder`, begun at once, in a process group of its own.

    `memory` are the bytes that it may take beyond its code.
    """

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
        self.script = script
        os.environ |= ONE_THREAD | {"PYTHONPATH": str(ROOT)}
        multiprocessing.set_forkserver_preload(PRELOAD)
        context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
        # Pipes, not files, whose size a fault may limit.
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        order = (script, tuple(argv), folder, fault, memory, [writer for _, writer in pipes])
        self._process = context.Process(target=_become, args=order)
        with _looking:
            self._process.start()
        for _, writer in pipes:
            writer.close()
        self._outputs = [_Collector(reader) for reader, _ in pipes]

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for its end and return the status, that of a signal negative; None if it goes on."""
        has_ended = connection.wait([self._process.sentinel], seconds)
        with _looking:
            if has_ended:
                self._process.join()
            return self._process.exitcode

    def wait_for(self, has_come: Callable[[], bool], seconds: float) -> bool:
        """Wait until something comes true or the call or the time ends; whether it came true."""
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
        self._process.kill()  # which may not be the leader of its group yet
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
        """Describe how a call has ended, and the last that it said."""
        said = self.messages
        return f"status {self.wait(0)} with {len(said)} lines: {' / '.join(said[-3:])}"


class _Collector(threading.Thread):
    """Reads a pipe to its end."""

    def __init__(self, pipe: connection.Connection) -> None:
        super().__init__(daemon=True)
        self.text = b""
        self._pipe = pipe
        self.start()

    def run(self) -> None:
        with self._pipe:
            while part := os.read(self._pipe.fileno(), 65536):
                self.text += part

    def whole(self) -> str:
        self.join(5)
        return self.text.decode("utf-8", "replace")


def _become(
    script: str,
    argv: tuple[str, ...],
    folder: Path,
    fault: AtWrite | None,
    memory: int | None,
    outputs: Sequence[connection.Connection],
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
    runpy.run_path(sys.argv[0], run_name="__main__")
