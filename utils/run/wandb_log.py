"""Weights & Biases beside a run, which it can neither stop nor slow down.

All of wandb lives in a process of its own: this file, run as a script. The run writes records into
a pipe from a thread and hears what became of them from another. So what wandb does to its process
(prompts, exit hooks that wait for the network, a service that outlives it and keeps its output
open) never reaches the run, and what hangs can be killed. Nothing of this repository is imported
here, for the other process does not need torch.
"""

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

# A server may take its time to answer at the start, when nobody waits for it.
INIT_SECONDS = 60
# A call of wandb that takes longer hangs, and ends the process.
CALL_SECONDS = 120
# At the end wandb sends what is left for so long, and the run waits a little longer.
SEND_SECONDS = 5
WAIT_SECONDS = 8
# Records that may wait for wandb.
BACKLOG = 10_000

SETTINGS = {
    "init_timeout": INIT_SECONDS,
    "finish_timeout": SEND_SECONDS,
    "finish_timeout_raises": True,
    "silent": True,
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}


class WandbLog:
    """The log of one call. Nothing here raises or waits, but for `finish`, about WAIT_SECONDS at
    most. Whatever fails, at any time, is one line; records from then on are dropped.
    """

    @classmethod
    def start(
        cls, *, name: str, mode: str, config: Mapping[str, Any], folder: Path
    ) -> "WandbLog | None":
        """A log to a new wandb run `name` with its files in `folder`/wandb (in the system's folder
        for temporary files where that cannot be written).

        None where `mode` is disabled, not online or offline, or no process can be started.
        """
        if mode == "disabled":
            return None
        folder = folder.absolute()
        init = {
            "project": "att",
            "name": name,
            # Of a run that is continued, each call is a wandb run of this group. They cannot be one
            # run: of several offline ones with the same id, `wandb sync` keeps the last.
            "group": "/".join(folder.parts[-4:])[-128:],
            "mode": mode,
            "config": dict(config),
            "dir": str(folder),
            "settings": SETTINGS,
        }
        try:
            return cls(init)
        except OSError as error:
            tqdm.write(f"going on without wandb: {error}")
            return None

    def __init__(self, init: Mapping[str, Any]) -> None:
        self._is_offline = init["mode"] == "offline"
        self._is_over = False
        self._is_cut_off = False
        self._is_behind = False
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lines.put(json.dumps(init, default=str))
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # Python cannot exit while a thread holds the lock of a buffer
            start_new_session=True,  # Ctrl-C is for the run
            env={"WANDB_ERROR_REPORTING": "false", **os.environ},
        )
        threading.Thread(target=self._write, daemon=True).start()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand over a record of plain values; its `iteration` is the x axis of the others."""
        if self._is_over:
            return
        if self._lines.qsize() < BACKLOG:
            self._lines.put(json.dumps({"log": record}, default=str))
        elif not self._is_behind:
            self._is_behind = True
            tqdm.write(f"wandb is {BACKLOG} records behind, and misses some")

    def finish(self, status: int = 0) -> None:
        """End the wandb run, as one that failed where `status` is not 0, and say what is left to
        do. A call that ends without this leaves a wandb run that failed.
        """
        self._lines.put(json.dumps({"finish": status}))
        self._lines.put(None)
        self._reader.join(WAIT_SECONDS)
        if self._reader.is_alive():
            self._is_cut_off = True
            _kill_tree(self._process.pid)
            self._reader.join(1)
        with suppress(subprocess.TimeoutExpired):  # not even killed, as with a disk that hangs
            self._process.wait(1)

    def _write(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:  # the reader is told why it broke
            for line in iter(self._lines.get, None):
                left = memoryview(f"{line}\n".encode())
                while left:
                    left = left[os.write(pipe.fileno(), left) :]

    def _read(self) -> None:
        """Wait for the end of the process and print what is to be said about it."""
        assert self._process.stdout is not None
        told = {"failure": "its process has ended"}
        for line in self._process.stdout:
            told |= json.loads(line)
        self._is_over = True
        files, failure = told.get("files"), told["failure"]
        if self._is_cut_off:
            failure = "unsent" if files else "it had not started when the run ended"
        to_upload = f"to upload: wandb sync {shlex.quote(str(files))}"
        if failure == "unsent":
            tqdm.write(f"wandb could not send everything in time; {to_upload}")
        elif failure:
            tqdm.write(f"going on without wandb: {failure}")
        elif self._is_offline:
            tqdm.write(f"wandb logged offline; {to_upload}")


def _kill_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.Error):
                each.kill()


def serve() -> None:
    """Do with wandb what the lines on stdin ask for and answer on stdout: `files`, the folder of
    the wandb run once it has started, and at the end `failure`, a reason, "unsent" or "".

    Does not return.
    """
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)  # whoever ends the run, ends stdin
    # What wandb prints, and the service that it starts, must not get hold of the two pipes.
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    for number in (0, 1):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    failure = ""
    try:
        signal.alarm(CALL_SECONDS)
        import wandb

        run = wandb.init(**json.loads(asked.readline()))
        run.define_metric("*", step_metric="iteration")
        print(json.dumps({"files": os.path.dirname(run.dir)}), file=answers)
        while "finish" not in (request := _next(asked)):
            run.log(request["log"])
        try:
            run.finish(exit_code=request["finish"])
        except TimeoutError:
            failure = "unsent"
    except BaseException as error:
        failure = (str(error).strip() or type(error).__name__).splitlines()[0]
    with suppress(OSError):  # the run may be gone
        print(json.dumps({"failure": failure}), file=answers)
    os._exit(0)  # wandb's exit hooks wait for its service


def _next(asked: Any) -> dict[str, Any]:
    """The next request; the end of the run without one is a failure."""
    signal.alarm(0)
    line = asked.readline()
    signal.alarm(CALL_SECONDS)
    return json.loads(line) if line.endswith("\n") else {"finish": 1}


if __name__ == "__main__":
    serve()
