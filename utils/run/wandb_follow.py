"""Send the log of a run to Weights & Biases, while it grows or afterwards.

    python -m utils.run.wandb_follow results/CIFAR10/ConvNetD3/ipc1/my_run [--mode offline]

metrics.jsonl is read line by line and each line becomes a record of a new wandb run, whose
configuration is config.yaml. `--wandb online` of distill_att.py starts this file as a process
beside the run. So what wandb does (prompts, exit hooks that wait for the network, a service that
outlives it and keeps its output open) never reaches the run, and what hangs can be killed. Nothing
of this repository is imported here, for that process does not need torch.

Each call of a run is a wandb run with the whole log so far, so the latest one is complete. They
cannot be one: of several offline runs with the same id, `wandb sync` keeps the last.
"""

import argparse
import json
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import yaml
from tqdm import tqdm

# A server may take its time to answer at the start, when nobody waits for it.
INIT_SECONDS = 60
# A call of wandb that takes longer hangs, and ends the process beside a run.
CALL_SECONDS = 120
# At the end wandb sends what is left for so long, and the run waits a little longer.
SEND_SECONDS = 5
WAIT_SECONDS = 8
# How long the process sleeps before it looks for new lines.
POLL_SECONDS = 1.0

LATE = "wandb could not send everything in time"
SETTINGS = {
    "init_timeout": INIT_SECONDS,
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


class WandbFollower:
    """The process beside one call of a run. Nothing here raises, and only `finish` waits, at most
    about WAIT_SECONDS. What fails, at any time, is one line, and the log can be sent later.
    """

    @classmethod
    def start(cls, folder: Path, mode: str) -> "WandbFollower | None":
        """Follow the log in `folder`; None where `mode` is disabled or no process can start. The
        process needs what Windows does not have; there the log can be sent afterwards.
        """
        if mode == "disabled":
            return None
        if not hasattr(signal, "alarm"):
            tqdm.write(_unsent(folder, "no wandb beside a run on Windows"))
            return None
        try:
            return cls(folder, mode)
        except OSError as error:
            tqdm.write(_unsent(folder, f"going on without wandb: {error}"))
            return None

    def __init__(self, folder: Path, mode: str) -> None:
        self._folder = folder
        self._is_over = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(folder.absolute()), f"--mode={mode}", "--beside"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run
            env={"WANDB_ERROR_REPORTING": "false", **os.environ},
        )

    def look(self) -> None:
        """Print, once, how the process has ended where it has."""
        if self._is_over or self._process.poll() is None:
            return
        assert self._process.stdout is not None
        said = self._process.stdout.read().decode().strip()
        self._end(said or _unsent(self._folder, "going on without wandb: its process has ended"))

    def finish(self, status: int = 0) -> None:
        """End the wandb run, as one that failed where `status` is not 0, and print what is left to
        do. A call that ends without this leaves a wandb run that failed.
        """
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:  # the process may have ended
            pipe.write(f"{status}\n".encode())
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(WAIT_SECONDS)
        self.look()
        if not self._is_over:
            _kill_tree(self._process.pid)
            with suppress(subprocess.TimeoutExpired):  # not even killed, as with a disk that hangs
                self._process.wait(1)
            self._end(_unsent(self._folder, LATE))

    def _end(self, said: str) -> None:
        self._is_over = True
        tqdm.write(said)


def _unsent(folder: Path, reason: str) -> str:
    command = f"python -m utils.run.wandb_follow {shlex.quote(str(folder))}"
    return f"{reason}; to upload: {command}"


def _kill_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with suppress(psutil.Error):
                each.kill()


class GrowingLog:
    """A log that another process adds lines to, or replaces as a whole, as a rewind does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._seen: set[int] = set()

    def new_lines(self) -> Iterator[bytes]:
        """Each different line that was not there before; one without its end is left for later."""
        if self._path.exists() and not self._is_open():
            self._file = open(self._path, "rb")  # noqa: SIM115 (closed with its last reference)
        while self._file is not None and (line := self._file.readline()):
            if not line.endswith(b"\n"):
                self._file.seek(-len(line), os.SEEK_CUR)
                return
            if hash(line) not in self._seen:
                self._seen.add(hash(line))
                yield line

    def _is_open(self) -> bool:
        """Whether the open file is the one that is at the path by now."""
        return self._file is not None and os.path.samestat(
            os.fstat(self._file.fileno()), self._path.stat()
        )


def send(
    folder: Path,
    mode: Any,
    *,
    ended: Callable[[], int | None] = lambda: 0,
    limit: int = 0,
    **settings: Any,
) -> str:
    """Make a wandb run of the run in `folder`, with every line of its log until that has `ended`:
    until the exit status is known, which may be waited for.

    A call of wandb that takes more than `limit` seconds ends the process (0: no limit). Returns
    what to say: where the wandb run is.
    """
    _end_after(limit)
    import wandb

    run = wandb.init(
        project="att",
        name=folder.name,
        group="/".join(folder.parts[-4:])[-128:],
        mode=mode,
        config=yaml.safe_load((folder / "config.yaml").read_text("utf-8")),
        dir=str(folder),  # where that cannot be written, the system's folder for temporary files
        settings={**SETTINGS, **settings},
    )
    run.define_metric("*", step_metric="iteration")
    log = GrowingLog(folder / "metrics.jsonl")
    status: int | None = None
    while status is None:
        status = ended()  # first: what was written before the end is read
        for line in log.new_lines():
            _end_after(limit)
            with suppress(ValueError, RecursionError):  # a line that a killed call has cut off
                if isinstance(record := json.loads(line), dict):
                    run.log(record)
    run.finish(exit_code=status)
    if mode == "offline":
        files = shlex.quote(os.path.dirname(run.dir))
        return f"wandb logged offline; to upload: wandb sync {files}"
    return f"sent to wandb: {run.url}"


def _end_after(seconds: int) -> None:
    """End this process unless this is called again in time; 0: never."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def send_beside_a_run(folder: Path, mode: str) -> None:
    """Send the log of the run that has started this process, until its exit status comes on stdin;
    print one line. Does not return.

    The end of stdin, or of that process, without a status is a failure.
    """
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)  # whoever ends the run, ends stdin
    # What wandb prints, and the service that it starts, must not get hold of the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    starter = os.getppid()

    def ended() -> int | None:
        signal.alarm(0)
        ready, _, _ = select.select([0], [], [], POLL_SECONDS)
        signal.alarm(CALL_SECONDS)
        if ready:
            return int(os.read(0, 16) or 1)
        return None if os.getppid() == starter else 1

    limits = {"finish_timeout": SEND_SECONDS, "finish_timeout_raises": True}
    try:
        said = send(folder, mode, ended=ended, limit=CALL_SECONDS, **limits)
    except TimeoutError:
        said = _unsent(folder, LATE)
    except BaseException as error:
        said = _unsent(folder, f"going on without wandb: {_one_line(error)}")
    with suppress(OSError):  # the run may be gone
        print(said, file=answers, flush=True)
    os._exit(0)  # wandb's exit hooks wait for its service


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="wandb_follow.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--mode", choices=("online", "offline"), default="online")
    parser.add_argument("--beside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    folder = args.run_directory.absolute()
    if args.beside:
        send_beside_a_run(folder, args.mode)
    for name in ("metrics.jsonl", "config.yaml"):
        if not (folder / name).is_file():
            parser.error(f"{folder} is no run directory: it has no {name}")
    try:
        print(send(folder, args.mode))
    except Exception as error:
        parser.error(_one_line(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
